#!/usr/bin/env bash
# Checks and measures FASA on a CUDA GPU and appends rows to docs/benchmarks/gpu.jsonl. Without --build everything but
# the sanitizer fits a call of 10 minutes on an H100.
#
#   ops        test-backend-ops: our op's cases on the GPU against the CPU
#   sanitizer  compute-sanitizer (memcheck, racecheck, initcheck) on small cases
#   decode     tokens/s against depth, FASA off and on, on random weights in the shape of Llama 3.1 8B
#   prefill    tokens/s of reading a prompt, the same
#   tokens     greedy tokens and logits: a budget of all that is cached against dense, a run against the same run again, and
#              where there are two GPUs, layers split between them against one
#   stages     the op alone against flash attention; in a build with -DFASA_CUDA_CLOCK=ON also what each stage takes
#
# usage: tools/bench_gpu.sh (--build DIR | --bin DIR) [--only PART,PART] [--model GGUF] [--cases REGEX] [--out JSONL]
#   --build  configure and build there for sm_90; CUDA_ARCHITECTURES=80 for another, FASA_LLAMA_CPP_DIR as for CMake
#   --bin    the programs, with their libraries beside them or where they were built
#   --model  calibrated model; written if there is none (default: /tmp/fasa-random-8b.gguf)
#   --cases  parameters of the cases for the sanitizer
#   PYTHON   (environment) Python with numpy, tqdm and gguf (default: python3)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
build='' bin='' only=ops,sanitizer,decode,prefill
model=/tmp/fasa-random-8b.gguf
cases='n_kv=(65|257|700|1000),|n_row=5,n_stream=2|softcap=3.*sinks=1|n_write=3,'
out=$root/docs/benchmarks/gpu.jsonl
backend=CUDA0

fail() {
    echo "error: $1" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    if [ "$1" = -h ] || [ "$1" = --help ]; then
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
        exit 0
    fi
    [ $# -ge 2 ] || fail "$1: expected a value"
    case $1 in
        --build) build=$2 ;;
        --bin)   bin=$2 ;;
        --only)  only=$2 ;;
        --model) model=$2 ;;
        --cases) cases=$2 ;;
        --out)   out=$2 ;;
        *)       fail "unknown option $1" ;;
    esac
    shift 2
done
for part in ${only//,/ }; do
    case $part in
        ops | sanitizer | decode | prefill | tokens | stages) ;;
        *) fail "--only: there is no part '$part'" ;;
    esac
done

if [ -n "$build" ]; then
    cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DFASA_BUILD_TESTS=ON \
        -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90}"
    cmake --build "$build" --parallel --target llama-bench test-backend-ops fasa-mapped fasa-stages
    bin=$build/bin
    # gguf, where it is not installed
    upstream=$(sed -n 's/^FASA_LLAMA_CPP_DIR:PATH=//p' "$build/CMakeCache.txt")
    gguf=${upstream:-$(echo "$build"/upstream-*/tree/vendor/llama.cpp)}/gguf-py
fi
[ -x "$bin/llama-bench" ] && [ -x "$bin/test-backend-ops" ] ||
    fail "llama-bench and test-backend-ops are not in '$bin': give --build or --bin"
export LD_LIBRARY_PATH=$bin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$root/tools:$root/calibrate_py${PYTHONPATH:+:$PYTHONPATH}${gguf:+:$gguf}

# report KIND KEY=VALUE...: a row that carries no speed
report() {
    "$python" - "$out" "$@" <<'EOF'
import sys
from machine import emit, gpu, row
out, kind, *settings = sys.argv[1:]
emit(row(kind, gpu=gpu(), **dict(s.split("=", 1) for s in settings)), out)
EOF
}

# run_cases PROGRAM...: test-backend-ops on our op; prints all but the cases that passed, and sets n_passed to "N/M"
run_cases() {
    local log status=0
    log=$(mktemp)
    "$@" test -b "$backend" -o FASA_ATTN >"$log" 2>&1 || status=$?
    n_passed=$(sed -n 's/^ *\([0-9]*\/[0-9]*\) tests passed$/\1/p' "$log" | head -n 1)
    grep -v 'OK.\{0,5\}$' "$log" | tail -n 60 || true
    rm -f "$log"
    [ "$status" = 0 ] && [ -n "$n_passed" ] && [ "${n_passed#*/}" != 0 ]
}

run_ops() {
    run_cases "$bin/test-backend-ops" || return 1
    report ops "passed=$n_passed"
}

run_sanitizer() {
    local tool result=0
    for tool in memcheck racecheck initcheck; do
        echo "compute-sanitizer --tool $tool"
        # the test program copies whole tensors, also those that nothing has written yet: only kernels are of interest
        if run_cases compute-sanitizer --tool "$tool" --check-api-memory-access no --error-exitcode 1 \
            "$bin/test-backend-ops" -p "$cases"; then
            report sanitizer "tool=$tool" "passed=$n_passed"
        else
            result=1
        fi
    done
    return "$result"
}

measure() {
    [ -f "$model" ] || "$python" "$root/tools/random_gguf.py" "$model" || return 1
    "$python" "$root/tools/bench_decode.py" --model "$model" --llama-bench "$bin/llama-bench" --n-gpu-layers 99 \
        --budget 256 1024 --reps 3 --out "$out" "$@"
}

# greedy GPUS KEY=VALUE...: what fasa-mapped says of a run on these GPUs, on 8192 random tokens
greedy() {
    local gpus=$1
    shift
    CUDA_VISIBLE_DEVICES=$gpus "$bin/fasa-mapped" run "$model" ctx=8704 depth=8192 gen=64 "$@"
}

# same WHAT A B: a row, and whether the tokens of two runs are the same
same() {
    "$python" - "$out" "$@" <<'EOF'
import json, sys
from machine import emit, gpu, row
out, what, *runs = sys.argv[1:]
a, b = map(json.loads, runs)
n_same = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"])) if x != y), len(a["tokens"]))
result = f"{n_same} of {len(a['tokens'])} tokens, logits {'equal' if a['logits'] == b['logits'] else 'not equal'} bit by bit"
print(f"{what}: {result}")
emit(row("gpu_tokens", gpu=gpu(), check=what, result=result), out)
sys.exit(n_same < len(a["tokens"]))
EOF
}

run_tokens() {
    [ -f "$model" ] || "$python" "$root/tools/random_gguf.py" "$model" || return 1
    local result=0 dense sparse
    dense=$(greedy 0 mode=off) && sparse=$(greedy 0 mode=c budget=256) || return 1
    same 'budget of all that is cached, dense' "$(greedy 0 mode=c budget=16384)" "$dense" || result=1
    same 'budget 256, the same again' "$(greedy 0 mode=c budget=256)" "$sparse" || result=1
    if [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')" -gt 1 ]; then
        same 'two GPUs, one: dense' "$(greedy 0,1 mode=off)" "$dense" || result=1
        same 'two GPUs, one: budget 256' "$(greedy 0,1 mode=c budget=256)" "$sparse" || result=1
        same 'two GPUs, one: budget 256, FASA-M' "$(greedy 0,1 mode=m budget=256)" "$(greedy 0 mode=m budget=256)" || result=1
    fi
    return "$result"
}

# Lines of fasa-stages as rows: the clock's, of which a shape has many, come before the line of their shape.
run_stages() {
    "$bin/fasa-stages" | "$python" -c '
import json, re, statistics, sys
from machine import emit, gpu, row
clocks, copy, name = {}, None, gpu()
for line in sys.stdin:
    clock = re.match(r"fasa-clock n_kv (\d+) index_type (\d) budget (\d+) ns: tip (\d+) select (\d+) fac (\d+)", line)
    if clock:
        n_kv, index_type, budget, *ns = map(int, clock.groups())
        clocks.setdefault((n_kv, ("f16", "q8", "q4")[index_type], budget), []).append(ns)
        continue
    values = json.loads(line)
    copy = values.get("copy_gb_per_s", copy)
    if "n_kv" not in values:
        continue
    ns = clocks.get((values["n_kv"], values["index_type"], min(values["budget"], values["n_kv"])))
    if ns:
        values.update(zip(("tip_us", "select_us", "fac_us"), (round(statistics.median(x) / 1e3, 2) for x in zip(*ns))))
    emit(row("gpu_stages", gpu=name, copy_gb_per_s=copy, **values), sys.argv[1])
' "$out"
}

run_decode() {
    # large batches: most of the time goes into reading the contexts. Many tokens: the first ones come slowly, after seconds in which
    # the host has restored a context and the GPU had nothing to do. A process for each budget: in the third and fourth context of
    # one, decoding was up to 4 % slower than in the first
    local budget
    for budget in 1024 256; do
        measure --depth 0 32768 65536 131072 --prompt --n-gen 256 --rounds 1 --bench-args "-b 2048 -ub 2048" --budget "$budget" || return 1
    done
}

run_prefill() {
    measure --depth --prompt 512 4096 --rounds 3
}

failed=''
for part in ${only//,/ }; do
    echo "== $part"
    started=$SECONDS
    "run_$part" || failed="$failed $part"
    echo "== $part took $((SECONDS - started)) s"
done
[ -z "$failed" ] || fail "failed:$failed"
