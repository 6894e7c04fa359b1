#!/usr/bin/env bash
# Run tests and close with the counts. Without GROUPS all of them: every test program, every Python test file and a
# short run of every fuzz target.
#
#   tests/run.sh BUILD_DIR BINARY [GROUP ...]        GROUP: unit, cuda, ranks, cli, faults, fuzz
#   PYTHON=no                                        the test programs in C alone
set -uo pipefail
cd "$(dirname "$0")/.."
build=$1
export TRAIN_IHA=$2
export EMULATOR_TRAIN_IHA=$build/emulator/train_iha
export CUDA_VISIBLE_DEVICES= # the CPU is what these test; make check-gpu tests the GPU beside it
groups=("${@:3}")
[ ${#groups[@]} -gt 0 ] || groups=(unit cuda ranks cli faults fuzz)
passed=0 failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# name, tests run, tests failed, seconds
report() {
    if [ "$3" = 0 ]; then
        printf '  ok    %-30s %3d tests  %5.1f s\n' "$1" "$2" "$4"
    else
        printf '  FAIL  %-30s %3d of %d failed\n' "$1" "$3" "$2"
        cat "$log"
    fi
    passed=$((passed + $2 - $3))
    failed=$((failed + $3))
}

# GROUP/test_NAME
run_c() {
    local start=$EPOCHREALTIME status count bad
    "$build/tests/$1" >"$log" 2>&1
    status=$?
    count=$(sed -n 's/^\[==========\] \([0-9]*\) test(s) run.*/\1/p' "$log" | paste -sd+ | bc)
    bad=$(grep -c '^\[  FAILED  \] [a-z_]*$' "$log")
    [ "$status" = 0 ] && bad=0
    [ "$status" != 0 ] && [ "$bad" = 0 ] && bad=1 # a crash reports nothing
    [ "${count:-0}" -ge "$bad" ] || count=$bad
    report "$1" "${count:-0}" "$bad" "$(bc <<<"$EPOCHREALTIME - $start")"
}

run_python() {
    local start=$EPOCHREALTIME status count bad
    local -x TRAIN_IHA=$TRAIN_IHA
    [[ $1 = faults/test_faults || $1 = faults/test_ranks_anomalies ]] && TRAIN_IHA=$build/quick/train_iha
    .venv/bin/python -m unittest "tests.${1/\//.}" >"$log" 2>&1
    status=$?
    count=$(sed -n 's/^Ran \([0-9]*\) tests\? in.*/\1/p' "$log")
    bad=$(grep -cE '^(FAIL|ERROR): ' "$log")
    [ "$status" = 0 ] && bad=0
    [ "$status" != 0 ] && [ "$bad" = 0 ] && bad=1
    [ "${count:-0}" -ge "$bad" ] || count=$bad
    report "$1" "${count:-0}" "$bad" "$(bc <<<"$EPOCHREALTIME - $start")"
}

# A target is one test: it passes when none of its inputs fails.
run_fuzz() {
    local start=$EPOCHREALTIME status
    tests/fuzz/run.sh short build/fuzz "${1#fuzz/fuzz_}" >"$log" 2>&1
    status=$?
    report "$1" 1 "$((status != 0))" "$(bc <<<"$EPOCHREALTIME - $start")"
}

for group in "${groups[@]}"; do
    for source in tests/"$group"/{test,fuzz}_*.{c,py}; do
        [ -e "$source" ] || continue
        test=${source#tests/}
        test=${test%.*}
        case $source in
        tests/fuzz/*) run_fuzz "$test" ;;
        *.py) [ "${PYTHON:-}" = no ] || run_python "$test" ;;
        *)
            if [ "$group" = cuda ] && [ ! -x "$build/tests/$test" ]; then
                printf '  skip  %-30s needs CUDA headers, or cuDNN\n' "$test"
                continue
            fi
            run_c "$test"
            ;;
        esac
    done
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
