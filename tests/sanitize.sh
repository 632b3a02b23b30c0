#!/bin/sh
# The op tests on libraries built with a sanitizer: upstream's harness, then ours, whose cases run 1, 2, 3 and 5 threads.
#
#   tests/sanitize.sh BUILD [pytest arguments]     BUILD: the build folder of preset asan, ubsan or tsan
#
# Exit status 1 if a test fails or a sanitizer reports. PYTHON names the interpreter that has the tests' packages.
set -eu

[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 1; }
bin=$(cd "$1/bin" && pwd)
shift
cd "$(dirname "$0")/.."

export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=report_thread_leaks=1
"$bin/test-backend-ops" test -o FASA_ATTN -b CPU

# Python is not built with a sanitizer, whose runtime must come first; what Python itself does not free is no finding.
preload=$(ldd "$bin/libggml-base.so" | sed -n 's/.*=> \(.*lib[at]san[^ ]*\) .*/\1/p')
export ASAN_OPTIONS=detect_leaks=0 OPENBLAS_NUM_THREADS=1 LLAMA_CPP_LIB_PATH="$bin"
export PYTHONPATH="$PWD/bindings:$PWD/calibrate_py${PYTHONPATH:+:$PYTHONPATH}"
LD_PRELOAD="$preload" "${PYTHON:-python3}" -m pytest tests/test_op.py tests/test_stages.py -q "$@"
