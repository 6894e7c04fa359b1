#!/usr/bin/env bash
# Everything that must hold on a GPU, with a summary table last; the full results are in build/check-gpu.txt.
#
#   tests/gpu/check_gpu.sh PROGRAM_DIR BINARY [CUDA_HOME]
#
# The tests of the operations and of NCCL with one rank; whole models compared with the CPU; whole runs
# (tests/gpu/check_gpu_runs.sh); the tests under compute-sanitizer, where it is installed, until BUDGET seconds have gone by.
set -uo pipefail
cd "$(dirname "$0")/../.."
programs=$1 binary=$2 cuda_home=${3:-/usr/local/cuda}
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
step "whole models, gradients, training" 240 "$programs/check_gpu"
grep -E '^(ok|FAIL|     ) ' "$work/out"

# ---- whole runs ----
# seconds each may take, arguments of tests/gpu/check_gpu_runs.sh
run() {
    local limit=$1
    shift
    step "run: $*" "$limit" tests/gpu/check_gpu_runs.sh "$binary" "$work" "$@"
    grep -E '^(FAIL|evaluated|last loss|the same bits|rank 0 ended)' "$work/out" | sed 's/^/      /'
}
run 30 data
run 120 moving
for precision in fp32 bf16; do
    for stage in 1 2; do
        run 60 ranks $precision $stage
    done
done
run 60 deterministic 1
run 60 deterministic 2
run 60 graph
run 150 killed
run 60 profile

# ---- sanitizers ----
sanitizer=$(command -v compute-sanitizer || ls "$cuda_home/bin/compute-sanitizer" 2>/dev/null)
for tool in memcheck racecheck; do
    for test in "$programs"/test_*; do
        name="$tool $(basename "$test")"
        case $test in
        *nccl*) continue ;; # the kernels of NCCL, and of cuDNN below, are not checked
        esac
        if [ -z "$sanitizer" ]; then
            note "$name" skipped "compute-sanitizer is not installed"
        elif [ "$SECONDS" -ge "$BUDGET" ]; then
            note "$name" skipped "out of time; BUDGET=seconds gives more"
        else
            IHA_ATTENTION=own step "$name" $((BUDGET + 40 - SECONDS)) "$sanitizer" --tool "$tool" --error-exitcode 9 "$test"
        fi
    done
done

printf '\n==== summary\n' | tee -a "$results"
printf '%s\n' "${summary[@]}" | tee -a "$results"
echo "$((${#summary[@]} - failed)) of ${#summary[@]} without failure in $SECONDS s; all results in $results" | tee -a "$results"
[ "$failed" = 0 ]
