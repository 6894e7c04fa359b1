#!/usr/bin/env bash
# Run tests and print the counts last. Without GROUP all groups: every test program, every Python test file and a short
# run of every fuzz target.
#
#   tests/run.sh BUILD_DIR BINARY [GROUP ...]        GROUP: unit, cuda, ranks, cli, faults, fuzz; hf, not among "all"
#   PYTHON=no                                        without the Python tests that start the program
#   JOBS=N                                           so many files at once; default: 2, since many tests mostly wait
set -uo pipefail
cd "$(dirname "$0")/.."
export BUILD=$1
export TRAIN_IHA=$2
export EMULATOR_TRAIN_IHA=$BUILD/emulator/train_iha
export CUDA_VISIBLE_DEVICES= # the CPU is what these test; make check-gpu tests the GPU beside it
export CMOCKA_MESSAGE_OUTPUT=TAP # the format that does not differ between versions of cmocka
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-100} # threads that spin while they wait take the cores from the other file's tests
groups=("${@:3}")
[ ${#groups[@]} -gt 0 ] || groups=(unit cuda ranks cli faults fuzz)
passed=0 failed=0 skipped=0
WORK=$(mktemp -d)
export WORK
trap 'rm -rf "$WORK"' EXIT

# Takes NUMBER, GROUP/NAME, the exit status of what wrote NUMBER.log, its start, tests planned, passed, skipped. Leaves
# what to print in NUMBER.report and "passed failed skipped" in NUMBER.counts. Planned tests that neither passed nor were
# skipped have failed, whether they say so or a crash came first; so has a file that fails otherwise, or plans no test.
report() {
    local bad=$(($5 - $6 - $7)) remark=
    if [ "$bad" = 0 ] && { [ "$3" != 0 ] || [ "$5" = 0 ]; }; then bad=1; fi
    [ "$7" = 0 ] || remark=", $7 skipped"
    if [ "$bad" = 0 ]; then
        printf '  ok    %-30s %3d tests  %5.1f s%s\n' "$2" "$6" "$(bc <<<"$EPOCHREALTIME - $4")" "$remark"
    else
        printf '  FAIL  %-30s %3d of %d failed, exit code %d\n' "$2" "$bad" "$5" "$3"
        cat "$WORK/$1.log"
    fi >"$WORK/$1.report"
    echo "$6 $bad $7" >"$WORK/$1.counts"
}

# A program's plan is a line "1..N"; older versions of cmocka call a skipped test "not ok".
run_c() { # NUMBER GROUP/NAME, as the other two
    local start=$EPOCHREALTIME log=$WORK/$1.log status
    "$BUILD/tests/$2" >"$log" 2>&1
    status=$?
    report "$1" "$2" "$status" "$start" $(awk '
        /^[ \t]*1\.\.[0-9]+$/ { sub(/.*\.\./, ""); planned += $0 }
        /^ok [0-9]+ - / { passed++ }
        /^(not )?ok [0-9]+ # SKIP/ { skipped++ }
        END { print planned + 0, passed + 0, skipped + 0 }' "$log")
}

# unittest closes with "Ran 3 tests in ..." and "OK (skipped=1)" or "FAILED (failures=1, errors=1)"; an error before
# the first test of a class is not among those that ran, and one test may fail in several of its subtests.
run_python() {
    local start=$EPOCHREALTIME log=$WORK/$1.log status environment=.venv
    [[ $2 != hf/* ]] || environment=.venv-hf
    [[ $2 = faults/test_faults || $2 = faults/test_ranks_anomalies ]] && TRAIN_IHA=$BUILD/quick/train_iha
    $environment/bin/python -m unittest "tests.${2/\//.}" >"$log" 2>&1
    status=$?
    report "$1" "$2" "$status" "$start" $(awk '
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
    tests/fuzz/run.sh short build/fuzz "${2#fuzz/fuzz_}" >"$WORK/$1.log" 2>&1
    status=$?
    report "$1" "$2" "$status" "$start" 1 "$((status == 0))" 0
}

tests=() # "FUNCTION NUMBER GROUP/NAME"
for group in "${groups[@]}"; do
    [ -d "tests/$group" ] || { echo "tests/run.sh: there is no group '$group'" >&2; exit 2; }
    for source in tests/"$group"/{test,fuzz}_*.{c,py}; do
        [ -e "$source" ] || continue
        test=${source#tests/}
        test=${test%.*}
        case $source in
        tests/fuzz/*) kind=run_fuzz ;;
        tests/unit/*.py) kind=run_python ;;
        *.py) [ "${PYTHON:-}" != no ] || continue; kind=run_python ;;
        *)
            if [ "$group" = cuda ] && [ ! -x "$BUILD/tests/$test" ]; then
                printf '  skip  %-30s needs CUDA headers, or cuDNN\n' "$test"
                continue
            fi
            kind=run_c
            ;;
        esac
        tests+=("$kind ${#tests[@]} $test")
    done
done

# xargs and not `&`, which would leave SIGINT ignored in the tests. Reports are printed in the order of the tests.
export -f report run_c run_python run_fuzz
shopt -s lastpipe
shown=0
printf '%s\n' "${tests[@]}" | xargs -P "${JOBS:-2}" -L 1 bash -c '"$@"; echo' bash | while read -r _; do
    while [ -e "$WORK/$shown.counts" ]; do
        cat "$WORK/$shown.report"
        read -r p f s <"$WORK/$shown.counts"
        passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s)) shown=$((shown + 1))
    done
done
if [ "$shown" != ${#tests[@]} ]; then
    echo "tests/run.sh: ${tests[shown]##* } and what comes after it did not end"
    failed=$((failed + ${#tests[@]} - shown))
fi
echo "$passed passed, $failed failed$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
