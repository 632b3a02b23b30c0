#!/bin/sh
# The CPU kernels as older and newer x86 CPUs run them: compiles ggml_fasa/cpu for each instruction set, puts the result in
# front of a built libggml-cpu, and runs upstream's harness on it where this CPU can.
#
#   tests/cross/variants.sh BUILD LLAMA_CPP     BUILD: a CMake build with FASA_BUILD_TESTS; LLAMA_CPP: the tree it is of
#
# Exit status 1 if a variant does not compile or does not pass. For ARM, cross-build with FASA_BUILD_TESTS and
# -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8-a (or armv8.2-a+dotprod), and run bin/test-backend-ops by qemu-aarch64.
set -eu

[ $# -eq 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 1; }
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(cd "$1" && pwd)
ggml=$(cd "$2/ggml" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

flags() { # of /proc/cpuinfo that a variant cannot run without
    case $1 in
        x86-64)         echo ;;
        haswell)        echo avx2 fma f16c ;;
        skylake-avx512) echo avx512f avx512bw ;;
        icelake-server) echo avx512_vnni avx512_vbmi2 ;;
        alderlake)      echo avx_vnni ;;
    esac
}

status=0
for arch in x86-64 haswell skylake-avx512 icelake-server alderlake; do
    "${CXX:-g++}" -O3 -DNDEBUG -std=gnu++17 -fPIC -shared -fopenmp -w -march=$arch "$root"/ggml_fasa/cpu/*.cpp \
        -o "$work/$arch.so" -I"$root/ggml_fasa/include" -I"$root/ggml_fasa/cpu" \
        -I"$ggml/include" -I"$ggml/src" -I"$ggml/src/ggml-cpu"

    runs=yes
    for flag in $(flags $arch); do
        grep -qw "$flag" /proc/cpuinfo || runs=no
    done
    if [ $runs = no ]; then
        echo "$arch: compiles, cannot run here"
    elif LD_PRELOAD="$work/$arch.so" "$build/bin/test-backend-ops" -b CPU -o FASA_ATTN > "$work/log" 2>&1; then
        echo "$arch: $(grep -a 'tests passed' "$work/log")"
    else
        echo "$arch: FAILED"; grep -a FAIL "$work/log" | head; status=1
    fi
done
exit $status
