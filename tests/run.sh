#!/usr/bin/env bash
# Run tests and print the counts last. Without GROUP all groups: every test program, every Python test file and a short
# run of every fuzz target.
#
#   tests/run.sh BUILD_DIR BINARY [GROUP ...]        GROUP: unit, cuda, ranks, cli, faults, fuzz
#   PYTHON=no                                        without the Python tests that start the program
#   JOBS=2                                           so many C tests of a group at a time
set -uo pipefail
cd "$(dirname "$0")/.."
build=$1
export TRAIN_IHA=$2
export EMULATOR_TRAIN_IHA=$build/emulator/train_iha
export CUDA_VISIBLE_DEVICES= # the CPU is what these test; make check-gpu tests the GPU beside it
export CMOCKA_MESSAGE_OUTPUT=TAP # the format that does not differ between versions of cmocka
groups=("${@:3}")
[ ${#groups[@]} -gt 0 ] || groups=(unit cuda ranks cli faults fuzz)
passed=0 failed=0 skipped=0
logs=$(mktemp -d)
log=$logs/log
trap 'rm -rf "$logs"' EXIT

# GROUP/NAME, the exit status of what wrote the log, its seconds, tests planned, passed, skipped. The other planned ones
# have failed, whether they say so or a crash came first; so has a file that fails otherwise, or plans no test.
report() {
    local bad=$(($4 - $5 - $6)) remark=
    if [ "$bad" = 0 ] && { [ "$2" != 0 ] || [ "$4" = 0 ]; }; then bad=1; fi
    [ "$6" = 0 ] || remark=", $6 skipped"
    if [ "$bad" = 0 ]; then
        printf '  ok    %-30s %3d tests  %5.1f s%s\n' "$1" "$5" "$3" "$remark"
    else
        printf '  FAIL  %-30s %3d of %d failed, exit code %d\n' "$1" "$bad" "$4" "$2"
        cat "$log"
    fi
    passed=$((passed + $5))
    failed=$((failed + bad))
    skipped=$((skipped + $6))
}

seconds_since() { bc <<<"$EPOCHREALTIME - $1"; }

# The C tests of a group run JOBS at a time and are reported in their order. Programs that share cores must not spin at
# their barriers.
started=()
start_c() {
    local out=$logs/${1//\//_}
    [ "${JOBS:-1}" = 1 ] || local -x OMP_WAIT_POLICY=passive
    while [ "$(jobs -pr | wc -l)" -ge "${JOBS:-1}" ]; do wait -n; done
    report_c
    started+=("$1")
    (
        start=$EPOCHREALTIME
        "$build/tests/$1" >"$out" 2>&1
        echo "$? $(seconds_since "$start")" >"$out.new"
        mv "$out.new" "$out.end"
    ) &
}

# Report those that have ended, up to the first that has not.
report_c() {
    local test status seconds
    while [ ${#started[@]} -gt 0 ] && [ -e "$logs/${started[0]//\//_}.end" ]; do
        test=${started[0]}
        started=("${started[@]:1}")
        log=$logs/${test//\//_}
        read -r status seconds <"$log.end"
        report_plan "$test" "$status" "$seconds"
        log=$logs/log
    done
}

# A program's plan is a line "1..N"; older versions of cmocka call a skipped test "not ok".
report_plan() {
    report "$1" "$2" "$3" $(awk '
        /^[ \t]*1\.\.[0-9]+$/ { sub(/.*\.\./, ""); planned += $0 }
        /^ok [0-9]+ - / { passed++ }
        /^(not )?ok [0-9]+ # SKIP/ { skipped++ }
        END { print planned + 0, passed + 0, skipped + 0 }' "$log")
}

# unittest closes with "Ran 3 tests in ..." and "OK (skipped=1)" or "FAILED (failures=1, errors=1)"; an error before
# the first test of a class is not among those that ran, and one test may fail in several of its subtests.
run_python() {
    local start=$EPOCHREALTIME status
    local -x TRAIN_IHA=$TRAIN_IHA
    [[ $1 = faults/test_faults || $1 = faults/test_ranks_anomalies ]] && TRAIN_IHA=$build/quick/train_iha
    .venv/bin/python -m unittest "tests.${1/\//.}" >"$log" 2>&1
    status=$?
    report "$1" "$status" "$(seconds_since "$start")" $(awk '
        function number(key) { return match($0, key "=[0-9]+") ? substr($0, RSTART + length(key) + 1) + 0 : 0 }
        /^Ran [0-9]+ tests? in / { planned = $2 }
        /^(OK|FAILED)( \(.*\))?$/ {
            bad = number("failures") + number("errors") + number("unexpected successes")
            skipped = number("skipped")
        }
        END {
            planned = planned < bad + skipped ? bad + skipped : planned
            print planned + 0, planned - bad - skipped, skipped + 0
        }' "$log")
}

# A target is one test: it passes when none of its inputs fails.
run_fuzz() {
    local start=$EPOCHREALTIME status
    tests/fuzz/run.sh short build/fuzz "${1#fuzz/fuzz_}" >"$log" 2>&1
    status=$?
    report "$1" "$status" "$(seconds_since "$start")" 1 "$((status == 0))" 0
}

for group in "${groups[@]}"; do
    [ -d "tests/$group" ] || { echo "tests/run.sh: there is no group '$group'" >&2; exit 2; }
    for source in tests/"$group"/{test,fuzz}_*.{c,py}; do
        [ -e "$source" ] || continue
        test=${source#tests/}
        test=${test%.*}
        case $source in
        tests/fuzz/*) run_fuzz "$test" ;;
        tests/unit/*.py) run_python "$test" ;;
        *.py) [ "${PYTHON:-}" = no ] || run_python "$test" ;;
        *)
            if [ "$group" = cuda ] && [ ! -x "$build/tests/$test" ]; then
                printf '  skip  %-30s needs CUDA headers, or cuDNN\n' "$test"
                continue
            fi
            start_c "$test"
            [ "${JOBS:-1}" != 1 ] || { wait; report_c; }
            ;;
        esac
    done
    wait
    report_c
done
echo "$passed passed, $failed failed$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
