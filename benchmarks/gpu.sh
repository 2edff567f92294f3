#!/usr/bin/env bash
# Benchmark hqlt on a GPU, with or without network, in less than nine minutes; see docs/gpu.md.
#
#     bash benchmarks/gpu.sh [FOLDER]       results are written to FOLDER, by default $OUT, else results/gpu/CARD
#     REHEARSE=1 bash benchmarks/gpu.sh     the same without a GPU: tiny, interpreted, nothing is measured
#
# Each stage is a separate process. If one fails or exceeds its time limit, this is noted in FOLDER/log.txt, and the next
# one runs. WHEELS: folder of wheels of missing packages, by default ./wheels. PYTHON: the interpreter to use.
set -u
cd "$(dirname "$0")/.." || exit 1
WHEELS=${WHEELS:-wheels}
SECONDS=0
SCRATCH=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$SCRATCH"' EXIT

# Use the first python that has torch with CUDA or, for a rehearsal, one that has torch.
look='import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)'
GPU= python=
for candidate in ${PYTHON:-python3 python}; do
    command -v "$candidate" >/dev/null || continue
    PYTHONWARNINGS=ignore "$candidate" -c "$look" 2>/dev/null
    case $? in
        0) GPU=1 python=$candidate && break ;;
        3) python=${python:-$candidate} ;;
    esac
done
[ -z "$python" ] && { echo "gpu.sh: expected a python that has torch, found none; set PYTHON=..."; exit 1; }

card='import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))'
FOLDER=${1:-${OUT:-results/gpu/$([ -n "$GPU" ] && "$python" -c "$card" || echo no-gpu)}}
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
LOG=$FOLDER/log.txt
exec > >(tee "$LOG") 2>&1
note() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

# stage NAME SECONDS COMMAND...: run the command with a time limit, and log how it ended.
stage() {
    local name=$1 limit=$2 code
    shift 2
    note "$name: begins, $limit s at most"
    timeout --kill-after=10 "$((limit * PATIENCE))" "$@"
    code=$?
    case $code in
        0) note "$name: done" ;;
        124 | 137) note "$name: FAILED: took longer than $limit s" ;;
        *) note "$name: FAILED: status $code" ;;
    esac
    return $code
}
# measure NAME SECONDS STAGE: run a stage of hqlt.bench.gpu_stages.
measure() { stage "$1" "$2" "$python" -m hqlt.bench.gpu_stages "$3" "$FOLDER" $OPTIONS; }

OPTIONS= PATIENCE=1
if [ -n "${REHEARSE:-}" ]; then
    OPTIONS=--rehearse PATIENCE=20 # nothing is timed, and the interpreter is slow
    export TRITON_INTERPRET=1 PYTHONWARNINGS=ignore
    note "REHEARSAL: no GPU, nothing is measured"
fi
note "$("$python" --version), $python"

# Missing packages come from the wheels, which are unpacked; nothing is installed.
mkdir "$SCRATCH/site"
for wheel in "$WHEELS"/*.whl; do
    [ -e "$wheel" ] || { note "no wheels in $WHEELS: without jsonargparse there is no demo, without fla-core no peer"; break; }
    case $wheel in *nvidia_cuda_nvcc*) unpack="*/bin/ptxas" ;; *) unpack= ;; esac
    "$python" - "$wheel" "$SCRATCH/site" "$unpack" <<'PYTHON' || note "not unpacked: $wheel"
import fnmatch, sys, zipfile
wheel, site, only = sys.argv[1:]
archive = zipfile.ZipFile(wheel)
archive.extractall(site, [name for name in archive.namelist() if fnmatch.fnmatch(name, only or "*")])
PYTHON
done
for packed in "$WHEELS"/ptxas*.xz; do [ -e "$packed" ] && xz -dc "$packed" >"$SCRATCH/ptxas"; done
PTXAS=$(find "$SCRATCH" -name ptxas -type f | head -1)
[ -n "$PTXAS" ] && chmod +x "$PTXAS"
export PYTHONPATH=$PWD/src:$SCRATCH/site TRITON_CACHE_DIR=$SCRATCH/triton PYTHONUNBUFFERED=1

measure "1 card" 60 card
[ -z "$GPU${REHEARSE:-}" ] && { note "no GPU: the end"; exit 2; }
nvidia-smi 2>/dev/null

# Build the native library as setup.py does, in the background while results are checked.
if ! ls src/hqlt/native/_memories*.so >/dev/null 2>&1; then
    stage "native library" 200 g++ -O2 -g0 -std=c++17 -fvisibility=hidden -fPIC -shared -pthread \
        src/hqlt/native/memories.cpp -o "$SCRATCH/_memories.so" && mv "$SCRATCH/_memories.so" src/hqlt/native/ &
    builder=$!
fi

# Also in the background: compile fla's kernels, about 90 variants, one after the other.
timeout 300 "$python" -m hqlt.bench.gpu_stages warm_peer "$FOLDER" $OPTIONS >"$SCRATCH/peer" 2>&1 &
peer=$!
measure "2 right, triton's ptxas" 120 right
if [ -n "$PTXAS" ]; then
    export TRITON_PTXAS_PATH=$PTXAS
    measure "2 right, another ptxas" 100 right
    unset TRITON_PTXAS_PATH
else
    note "2 right, another ptxas: skipped: none in $WHEELS"
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$sanitizer" ] || [ -n "${REHEARSE:-}" ]; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "2 memcheck" 100 ${sanitizer:+"$sanitizer" --tool memcheck --error-exitcode 9} \
        "$python" -m hqlt.bench.gpu_stages memcheck "$FOLDER" $OPTIONS
else
    note "2 memcheck: skipped: no compute-sanitizer"
fi

[ -n "${builder:-}" ] && wait "$builder"
measure "6 demo" 70 demo

note "waiting for the peer's kernels"
wait "$peer" && note "the peer's kernels: done" || note "the peer's kernels: FAILED: $(tail -n 1 "$SCRATCH/peer")"
# rest NAME SECONDS STAGE: run a stage in the remainder of the nine minutes, if that is enough.
rest() {
    local limit=$2
    [ -z "${REHEARSE:-}" ] && limit=$((515 - SECONDS < limit ? 515 - SECONDS : limit))
    if [ "$limit" -ge 15 ]; then measure "$1" "$limit" "$3"; else note "$1: skipped: no time is left"; fi
}
rest "3 race" 120 race
rest "4 sweep" 90 sweep
rest "5 train" 60 train
note "all results are in $FOLDER"
