#!/bin/sh
# Test the native library with AddressSanitizer and UndefinedBehaviorSanitizer: build it in a temporary folder, then run
# tests/ops/fuzz_native.py on it, with 300 examples or the number in the first argument. Stops at the first finding.
set -eu
cd "$(dirname "$0")/../.."
examples=${1:-300}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r src/hqlt "$folder/hqlt"
rm -f "$folder"/hqlt/native/_memories*
${CXX:-g++} -O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -std=c++17 -fPIC -shared \
    -pthread src/hqlt/native/memories.cpp -o "$folder/hqlt/native/_memories.so"
preload="$(${CXX:-g++} -print-file-name=libasan.so):$(${CXX:-g++} -print-file-name=libubsan.so)"
for isa in plain avx2 avx512; do
    export HQLT_NATIVE_ISA=$isa
    PYTHONPATH=$folder:. LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 "${PYTHON:-python3}" -c "
import sys
from hqlt import native
if native.why_not():
    sys.exit(print('skipped:', native.why_not()))
from tests.ops.fuzz_native import main
main($examples)
print('$isa: no findings')"
done
