#!/bin/sh
# The CPU kernels as older and newer CPUs run them: compiles ggml_fasa/cpu for each instruction set, puts the result in
# front of a built libggml-cpu, and runs upstream's harness on it where this CPU, or the emulator, can.
#
#   tests/cross/variants.sh BUILD LLAMA_CPP     BUILD: a CMake build with FASA_BUILD_TESTS; LLAMA_CPP: the tree it is of
#
# Exit status 1 if a variant does not compile or does not pass. For ARM, with a cross compiler and qemu-user:
#
#   cmake -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DFASA_BUILD_TESTS=ON \
#       -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
#       -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8-a
#   cmake --build build/arm --target test-backend-ops
#   CXX=aarch64-linux-gnu-g++ QEMU="qemu-aarch64 -L /usr/aarch64-linux-gnu" tests/cross/variants.sh build/arm LLAMA_CPP
set -eu

[ $# -eq 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 1; }
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(cd "$1" && pwd)
ggml=$(cd "$2/ggml" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
CXX=${CXX:-g++}

case $("$CXX" -dumpmachine) in
    aarch64*) archs="armv8-a armv8.2-a+dotprod+fp16" ;;
    *)        archs="x86-64 haswell skylake-avx512 icelake-server alderlake" ;;
esac

flags() { # of /proc/cpuinfo that a variant cannot run without
    case $1 in
        haswell)        echo avx2 fma f16c ;;
        skylake-avx512) echo avx512f avx512bw ;;
        icelake-server) echo avx512_vnni avx512_vbmi2 ;;
        alderlake)      echo avx_vnni ;;
    esac
}

run() { # the harness with the variant $1 in front
    if [ -n "${QEMU:-}" ]; then
        $QEMU -E LD_PRELOAD="$1" "$build/bin/test-backend-ops" -b CPU -o FASA_ATTN
    else
        LD_PRELOAD="$1" "$build/bin/test-backend-ops" -b CPU -o FASA_ATTN
    fi
}

status=0
for arch in $archs; do
    "$CXX" -O3 -DNDEBUG -std=gnu++17 -fPIC -shared -fopenmp -w -march="$arch" "$root"/ggml_fasa/cpu/*.cpp \
        -o "$work/$arch.so" -I"$root/ggml_fasa/include" -I"$root/ggml_fasa/cpu" \
        -I"$ggml/include" -I"$ggml/src" -I"$ggml/src/ggml-cpu"

    runs=yes
    if [ -z "${QEMU:-}" ]; then
        for flag in $(flags "$arch"); do
            grep -qw "$flag" /proc/cpuinfo || runs=no
        done
    fi
    if [ $runs = no ]; then
        echo "$arch: compiles, cannot run here"
    elif run "$work/$arch.so" > "$work/log" 2>&1; then
        echo "$arch: $(grep -a 'tests passed' "$work/log")"
    else
        echo "$arch: FAILED"; grep -a -e FAIL -e signal -e rror "$work/log" | head; status=1
    fi
done
exit $status
