#!/usr/bin/env bash
# The list of experiments. Every line that trains is a command that can be pasted into a shell.
#
#   bash run.sh           make .venv, install, train ResNeXt with each technique on handwritten digits, print the table
#   bash run.sh test      the same set-up, then every test
#   bash run.sh resnext   the study on CIFAR-10 (EPOCHS=200 by default; a GPU is wanted)
#   bash run.sh table     the table of the records that are there
set -euo pipefail
cd "$(dirname "$0")"

# OpenMP threads that spin for each other are slow on a busy machine; passive ones cost nothing on an idle one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

setup() {
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "run.sh: $python is older than 3.11; name a newer one, as in PYTHON=python3.12 bash run.sh" >&2
        exit 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # A stamp with the requirements in it: installed once, and again when they change.
    if ! cmp -s requirements.txt .venv/installed; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

# Train unless the record of the run is there; AGAIN=1 trains all the same.
run() {
    local record=$1
    shift
    if [ -z "${AGAIN:-}" ] && [ -f "$record" ]; then
        echo "# $record is there (AGAIN=1 runs it again)"
    else
        echo "\$ python3 $*"
        python3 "$@"
    fi
}

digits() {
    local out=runs/digits name common
    common="--dataset digits --model resnext29_2x4d --batch_size 32 --lr 0.0005 --output_dir $out --num_epoch"
    name=32_resnext29_2x4d_digits
    run $out/resnext_2_worker_$name.json resnext/resnext.py $common ${EPOCHS:-12}
    run $out/resnext_2_worker_${name}_fp16.json resnext/resnext.py $common ${EPOCHS:-12} --half_precision
    # The rest change times and memory, and no result (tests/test_resnext_scripts.py): a few epochs are enough.
    common="$common ${FEW_EPOCHS:-3}"
    run $out/resnext_0_worker_$name.json resnext/resnext.py $common --num_worker 0
    run $out/resnext_1_worker_$name.json resnext/resnext.py $common --num_worker 1
    run $out/resnext_device_$name.json resnext/resnext.py $common --loader device
    for policy in segments block; do
        run $out/resnext_2_worker_${name}_checkpoint_$policy.json resnext/resnext_checkpoint.py $common --policy $policy
    done
    run $out/resnext_2_worker_${name}_checkpoint.json resnext/resnext_checkpoint.py $common
    run $out/resnext_2_worker_${name}_checkpoint_budget0.4.json resnext/resnext_checkpoint.py $common --memory_budget 0.4
    python3 resnext/summary.py $out
}

resnext() {
    local out=runs/cifar10 common="--num_epoch ${EPOCHS:-200} --output_dir runs/cifar10"
    for workers in 2 0 1 4 8; do
        run $out/resnext_${workers}_worker_128.json resnext/resnext.py $common --num_worker $workers
    done
    run $out/resnext_device_128.json resnext/resnext.py $common --loader device
    run $out/resnext_2_worker_128_fp16.json resnext/resnext.py $common --half_precision
    for batch in 128 512 896; do
        run $out/resnext_2_worker_$batch.json resnext/resnext.py $common --batch_size $batch
        run $out/resnext_2_worker_${batch}_checkpoint.json resnext/resnext_checkpoint.py $common --batch_size $batch
        run $out/resnext_2_worker_${batch}_checkpoint_block.json resnext/resnext_checkpoint.py $common --batch_size $batch --policy block
        run $out/resnext_2_worker_${batch}_checkpoint_nested.json resnext/resnext_checkpoint.py $common --batch_size $batch --policy nested
    done
    python3 resnext/summary.py $out
}

case "${1:-}" in
    "") setup; digits ;;
    test) setup; python3 -m pytest -n 2 "${@:2}" ;;
    resnext) setup; resnext ;;
    table) [ -d "${2:-runs/digits}" ] || { echo "run.sh: there is no folder ${2:-runs/digits}" >&2; exit 2; }
        setup; python3 resnext/summary.py "${2:-runs/digits}" ;;
    *) echo "run.sh: unknown job '$1'; jobs are: (none) test resnext table" >&2; exit 2 ;;
esac
