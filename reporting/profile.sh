#!/usr/bin/env bash
# Trace a training script with Nsight Systems, and print the phases of its steps:
#
#     bash reporting/profile.sh OUTPUT SCRIPT [ARGUMENTS...]
#
# for example: bash reporting/profile.sh runs/profile/baseline resnext/resnext.py --output_dir runs/profile
# Without --max_steps among the arguments the run ends after STEPS steps (30), by itself: nsys stops nothing.
# Without nsys, PyTorch's own profiler traces some of them into OUTPUT.json.gz.
# Writes OUTPUT.nsys-rep, for the nsys-ui viewer, and OUTPUT.sqlite. PYTHON names the interpreter (python3).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

if [ $# -lt 2 ]; then
    echo "profile.sh: usage: bash reporting/profile.sh OUTPUT SCRIPT [ARGUMENTS...]" >&2
    exit 2
fi
if ! command -v nsys >/dev/null; then
    # PyTorch's own profiler shows the same phases, and on CUDA the memory, without another program.
    echo "profile.sh: nsys is not installed (https://developer.nvidia.com/nsight-systems, or on Debian: apt install" \
        "nsight-systems, in non-free); using PyTorch's profiler: $1.json.gz, for https://ui.perfetto.dev" >&2
    set -- "$@" --trace "$1.json.gz"
    shift
    [[ " $* " == *" --max_steps"* ]] || set -- "$@" --max_steps "${STEPS:-30}"
    exec "$python" "$@"
fi

# quietly WHAT COMMAND...: run the command without its output; when it fails, the last line of that is the reason.
quietly() {
    local said
    said=$("${@:2}" 2>&1 </dev/null) || {
        said=$(grep -v '^[[:space:]]*$' <<<"$said" | tail -n 1 || true)
        echo "profile.sh: $1 failed: ${said:-no reason given}" >&2
        exit 2
    }
}

output=$1
shift
mkdir -p "$(dirname "$output")"
[[ " $* " == *" --max_steps"* ]] || set -- "$@" --max_steps "${STEPS:-30}"

if nvidia-smi -L >/dev/null 2>&1; then
    what=(-t cuda,nvtx --cuda-memory-usage true)
else
    what=(-t nvtx --sample=none --cpuctxsw=none)  # All that there is to see without a GPU.
fi
rm -f "$output".{qdstrm,nsys-rep,sqlite}
nsys profile "${what[@]}" -o "$output" "$python" "$@"

if [ ! -f "$output.nsys-rep" ]; then
    # Debian's nsys looks for its importer in the wrong place, and leaves the raw trace.
    importer=$(find /usr/lib/nsight-systems /opt/nvidia -name QdstrmImporter -type f 2>/dev/null | head -n 1 || true)
    if [ -z "$importer" ] || [ ! -f "$output.qdstrm" ]; then
        echo "profile.sh: nsys wrote no report $output.nsys-rep, and there is no QdstrmImporter to make one" >&2
        exit 2
    fi
    quietly "making a report of $output.qdstrm" "$importer" -i "$output.qdstrm"
    rm "$output.qdstrm"
fi
quietly "nsys export of $output.nsys-rep" \
    nsys export --type sqlite --force-overwrite true -o "$output.sqlite" "$output.nsys-rep"
"$python" "$here/../report.py" --nsys "$output.sqlite"

if [ "${what[1]}" = cuda,nvtx ]; then
    # nsys's own projection of the ranges onto the GPU; 2022 calls it by another name than later versions.
    projection=$(nsys stats --help-reports 2>&1 | grep -oE 'nvtx_gpu_proj_sum|nvtxgpuproj' | head -n 1 || true)
    nsys stats --report "$projection" --format csv "$output.sqlite" >"$output.gpu_projection.csv" || true
fi
