#!/usr/bin/env bash
# Whole runs on a GPU, one property each; exit code 0 where it holds.
#
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER data                   write the tokens that all others train on; first
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER moving                 from the GPU to the CPU and back
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER ranks PRECISION STAGE  two ranks on one GPU have the losses of one rank
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER deterministic RANKS    two runs and a resumed run have the same bits
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER graph                  the same bits with CUDA graphs and without
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER killed                 one of two ranks: the other ends, the checkpoint is good
#   tests/gpu/check_gpu_runs.sh BINARY FOLDER profile                --profile prints its table and writes its file
#
# Two ranks are started by mpirun if it is installed, otherwise over TCP with torchrun's variables; LAUNCH=mpirun or
# LAUNCH=tcp selects one.
# FOLDER keeps the runs, each in a folder of its own. BINARY may be build/release/emulator/train_iha, on emulated GPUs.
set -uo pipefail
cd "$(dirname "$0")/../.."
binary=$1 work=$2
PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3) # only its standard library is used
LAUNCH=${LAUNCH:-$(command -v mpirun >/dev/null && echo mpirun || echo tcp)}
END_SECONDS=60 # for a rank to notice that another was killed

fail() {
    echo "FAIL: $*"
    exit 1
}

# ---- running ----

# Two ranks over TCP; RANK_PIDS are theirs.
start_tcp() {
    local port=$((20000 + RANDOM % 12000)) rank
    RANK_PIDS=()
    for rank in 0 1; do
        RANK=$rank WORLD_SIZE=2 LOCAL_RANK=$rank LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            "$binary" "$@" &
        RANK_PIDS+=($!)
    done
}

# ranks, arguments of the program
on_ranks() {
    local ranks=$1 pid status=0
    shift
    if [ "$ranks" = 1 ]; then
        "$binary" "$@"
    elif [ "$LAUNCH" = mpirun ]; then
        OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun --oversubscribe -np "$ranks" "$binary" "$@"
    else
        start_tcp "$@"
        for pid in "${RANK_PIDS[@]}"; do
            wait "$pid" || status=$?
        done
        return "$status"
    fi
}

# ranks, name of the run, keys
train() {
    local ranks=$1 name=$2
    shift 2
    on_ranks "$ranks" train "$work/run.ini" run.dir="$work/$name" "$@" || fail "the run $name ended with code $?"
}

# ---- results of a run ----

losses() { # of a run, a line a step
    sed -n 's/.*"step": *\([0-9]*\),.*"loss": *\([^,}]*\).*"grad_norm": *\([^,}]*\).*/\1 \2 \3/p' "$work/$1/metrics.jsonl"
}

last_loss() {
    losses "$1" | tail -1 | cut -d' ' -f2
}

# Check that a is positive, and that its relative distance from b is at most `most`.
near() {
    awk -v a="$1" -v b="$2" -v most="$3" 'BEGIN { exit !(a > 0 && (a - b) ^ 2 <= (most * b) ^ 2) }' ||
        fail "$1 is not within $3 of $2"
}

# Check that two runs have so many steps, the same losses and the same weights, to the bit.
same() {
    local a=$work/$1 b=$work/$2 steps=$3
    [ "$(losses "$1" | wc -l)" = "$steps" ] || fail "$1 has not $steps steps in metrics.jsonl"
    [ "$(losses "$1")" = "$(losses "$2")" ] ||
        fail "losses of $1 and $2 differ: $(diff <(losses "$1") <(losses "$2") | head -4 | tr '\n' ' ')"
    cmp "$a"/step_000000"$steps"/model.safetensors "$b"/step_000000"$steps"/model.safetensors ||
        fail "weights of $1 and $2 differ"
    echo "the same bits after $steps steps: loss $(last_loss "$1")"
}

# A checkpoint's or a run's loss on a device.
val_loss() {
    "$binary" eval "$work/$1" data.val="$work/train.bin" run.eval_batches=8 system.device="$2" system.precision=fp32 |
        sed -n 's/^val_loss \([^ ]*\) .*/\1/p'
}

# ---- checks ----

data() {
    cat >"$work/run.ini" <<END
[model]
vocab_size = 257
hidden_size = 64
num_hidden_layers = 5
num_attention_heads = 4
[train]
seq_len = 64
micro_batch = 2
batch_tokens = 256
steps = 20
lr = 3e-3
schedule = constant
[data]
train = $work/train.bin
val = $work/train.bin
[system]
device = cuda
[run]
dir = $work/run
END
    "$PYTHON" - "$work/train.bin" <<'END'
import struct
import sys
tokens = [i * 5 % 97 for i in range(97)] * 300
header = [20240520, 1, len(tokens)] + [0] * 253
open(sys.argv[1], "wb").write(struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens))
END
}

# One run that changes devices after a third and two thirds, in fp32, compared with one that stays on the CPU.
moving() {
    local fp32=system.precision=fp32 gpu cpu
    train 1 moving $fp32 train.steps=20
    train 1 moving $fp32 train.steps=40 system.device=cpu
    train 1 moving $fp32 train.steps=60
    train 1 staying $fp32 train.steps=60 system.device=cpu
    gpu=$(val_loss moving cuda)
    cpu=$(val_loss moving cpu)
    echo "evaluated on the GPU: $gpu, on the CPU: $cpu"
    echo "last loss of the run that moved: $(last_loss moving), of the one that stayed: $(last_loss staying)"
    near "$gpu" "$cpu" 1e-4
    near "$(last_loss moving)" "$(last_loss staying)" 0.05
}

# precision, zero_stage. Rounding grows from step to step, in bf16 by steps of 0.4 % a weight.
ranks() {
    local precision=system.precision=$1 name=$1_$2
    train 1 "one_$1" "$precision" # trained once for all stages: a finished run says so
    train 2 "two_$name" "$precision" system.zero_stage="$2" train.micro_batch=1
    echo "last loss of one rank: $(last_loss "one_$1"), of two over $LAUNCH: $(last_loss "two_$name")"
    near "$(last_loss "two_$name")" "$(last_loss "one_$1")" "$([ "$1" = fp32 ] && echo 1e-4 || echo 1e-2)"
}

# ranks
deterministic() {
    local keys=(system.deterministic=true train.micro_batch=1)
    train "$1" "first_$1" "${keys[@]}"
    train "$1" "second_$1" "${keys[@]}"
    same "first_$1" "second_$1" 20
    train "$1" "resumed_$1" "${keys[@]}" train.steps=9
    train "$1" "resumed_$1" "${keys[@]}"
    same "first_$1" "resumed_$1" 20
}

graph() {
    train 1 graph system.deterministic=true system.graph=auto
    train 1 plain system.deterministic=true system.graph=off
    same graph plain 20
}

killed() {
    local i status
    start_tcp train "$work/run.ini" run.dir="$work/killed" train.micro_batch=1 train.steps=1000000 run.save_every=5
    trap 'kill -9 "${RANK_PIDS[@]}" 2>/dev/null' EXIT
    for ((i = 0; i < 10 * END_SECONDS; i++)); do
        [ -d "$work/killed/step_00000010" ] && break
        kill -0 "${RANK_PIDS[@]}" || fail "a rank ended by itself"
        sleep 0.1
    done
    kill -9 "${RANK_PIDS[1]}"
    for ((i = 0; i < 10 * END_SECONDS; i++)); do
        kill -0 "${RANK_PIDS[0]}" 2>/dev/null || break
        sleep 0.1
    done
    [ "$i" -lt $((10 * END_SECONDS)) ] || fail "rank 0 goes on $END_SECONDS s after rank 1 was killed"
    wait "${RANK_PIDS[0]}"
    status=$?
    echo "rank 0 ended $((i / 10)) s after rank 1, with code $status"
    [ "$status" = 1 ] || fail "its code is not 1"
    near "$(val_loss killed cuda)" "$(val_loss killed cpu)" 1e-3
}

profile() {
    train 1 profile --profile 3 train.steps=10 2>"$work/table" || fail "$(cat "$work/table")"
    cat "$work/table"
    grep -q 'operation by operation' "$work/table" && grep -q 'attention_backward' "$work/table" ||
        fail "no table of operations"
    "$PYTHON" -c 'import json, sys; json.load(open(sys.argv[1]))' "$work/profile/profile.json" ||
        fail "profile.json is not JSON"
}

"${@:3}"
