#!/usr/bin/env bash
# Everything that must hold on a GPU, with a summary table last; the full results are in build/check-gpu.txt.
#
#   tests/check_gpu.sh PROGRAM_DIR BINARY CUDA_HOME
#
# The tests of the operations; the same under compute-sanitizer where it is installed; whole models beside the CPU's;
# a run that moves from the GPU to the CPU and back. Sanitizers stop when BUDGET seconds have gone by.
set -uo pipefail
cd "$(dirname "$0")/.."
programs=$1 binary=$2 cuda_home=$3
results=build/check-gpu.txt
BUDGET=${BUDGET:-420}
summary=() failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p build
: >"$results"

if [ "$("$programs/check_gpu" --devices 2>/dev/null || echo 0)" = 0 ]; then
    echo "check-gpu: no GPU, or no driver for it, was found; nvidia-smi should list one" >&2
    exit 2
fi

# name, result, remark
note() {
    local line
    line=$(printf '%-48s %-8s %s' "$1" "$2" "$3")
    summary+=("$line")
    echo "$line"
    [ "$2" != FAIL ] || failed=$((failed + 1))
}

# name, seconds it may take, command...: its output goes to the results.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n==== %s: %s\n' "$name" "$*" >>"$results"
    timeout -k 5 "$limit" "$@" >"$work/out" 2>&1
    status=$?
    cat "$work/out" >>"$results"
    if [ "$status" = 0 ]; then
        note "$name" ok "$((SECONDS - start)) s"
    elif [ "$status" = 124 ]; then
        note "$name" FAIL "not done after $limit s"
    else
        note "$name" FAIL "exit code $status; $(grep -m1 -E 'FAIL|ERROR|error|Error' "$work/out" | cut -c1-90)"
    fi
    return "$status"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$results"
"$programs/check_gpu" --devices >/dev/null

# ---- operations ----
for test in "$programs"/test_*; do
    step "$(basename "$test")" 120 "$test"
    case $test in
    *attention*) IHA_ATTENTION=own step "$(basename "$test"), IHA_ATTENTION=own" 120 "$test" ;;
    esac
done

# ---- whole models ----
step "whole models, gradients, training" 180 "$programs/check_gpu"
grep -E '^(ok|FAIL|     ) ' "$work/out"

# ---- from the GPU to the CPU and back ----
# One run of 60 steps that changes devices after 20 and 40, in fp32, beside one that stays on the CPU.
cat >"$work/run.ini" <<END
[model]
vocab_size = 257
hidden_size = 64
num_hidden_layers = 5
num_attention_heads = 4
[train]
seq_len = 64
micro_batch = 4
steps = 60
lr = 3e-3
[data]
train = $work/train.bin
val = $work/train.bin
[system]
precision = fp32
[run]
dir = $work/moving
END
.venv/bin/python - "$work/train.bin" <<'END'
import sys
import numpy as np
header = np.zeros(256, "<i4")
tokens = np.tile(np.arange(97) * 5 % 97, 300).astype("<u2")
header[:3] = 20240520, 1, len(tokens)
open(sys.argv[1], "wb").write(header.tobytes() + tokens.tobytes())
END
last_loss() { # of a run's metrics
    sed -n 's/.*"loss": *\([0-9.e+-]*\).*/\1/p' "$1/metrics.jsonl" | tail -1
}
moving() {
    "$binary" train "$work/run.ini" train.steps=20 train.schedule=constant system.device=cuda &&
        "$binary" train "$work/run.ini" train.steps=40 train.schedule=constant system.device=cpu &&
        "$binary" train "$work/run.ini" train.steps=60 train.schedule=constant system.device=cuda &&
        "$binary" train "$work/run.ini" train.schedule=constant system.device=cpu run.dir="$work/staying" || return 1
    local gpu cpu
    gpu=$("$binary" eval "$work/moving" data.val="$work/train.bin" system.device=cuda system.precision=fp32 | tail -1)
    cpu=$("$binary" eval "$work/moving" data.val="$work/train.bin" system.device=cpu system.precision=fp32 | tail -1)
    echo "evaluated on the GPU: $gpu"
    echo "evaluated on the CPU: $cpu"
    echo "last loss of the run that moved: $(last_loss "$work/moving"), of the one that stayed: $(last_loss "$work/staying")"
    awk -v a="${gpu#val_loss }" -v b="${cpu#val_loss }" 'BEGIN { exit !(a > 0 && (a - b)^2 <= (1e-4 * b)^2) }' &&
        awk -v a="$(last_loss "$work/moving")" -v b="$(last_loss "$work/staying")" \
            'BEGIN { exit !(a > 0 && (a - b)^2 <= (0.02 * b + 1e-3)^2) }'
}
export -f moving last_loss
export binary work
step "saved on the GPU, resumed on the CPU, and back" 120 bash -c moving
grep -E 'evaluated|last loss' "$work/out"

# ---- sanitizers ----
sanitizer=$(command -v compute-sanitizer || ls "$cuda_home/bin/compute-sanitizer" 2>/dev/null)
for tool in memcheck racecheck; do
    for test in "$programs"/test_*; do
        name="$tool $(basename "$test")"
        if [ -z "$sanitizer" ]; then
            note "$name" skipped "compute-sanitizer is not installed"
        elif [ "$SECONDS" -ge "$BUDGET" ]; then
            note "$name" skipped "out of time; BUDGET=seconds gives more"
        else
            # cuDNN's kernels are not ours to judge
            IHA_ATTENTION=own step "$name" $((BUDGET + 40 - SECONDS)) "$sanitizer" --tool "$tool" --error-exitcode 9 "$test"
        fi
    done
done

printf '\n==== summary\n' | tee -a "$results"
printf '%s\n' "${summary[@]}" | tee -a "$results"
echo "$((${#summary[@]} - failed)) of ${#summary[@]} without failure in $SECONDS s; all results in $results" | tee -a "$results"
[ "$failed" = 0 ]
