#!/usr/bin/env bash
# Run fuzz targets (see tests/fuzz/fuzz.mk, which builds them).
#
#   tests/fuzz/run.sh short BUILD_DIR TARGET            seeds, past failures, then a fixed number of new inputs:
#                                                       the same ones in every run
#   tests/fuzz/run.sh long BUILD_DIR SECONDS [TARGET]   as many as fit into the time; failures are kept in
#                                                       tests/fuzz/corpus/TARGET, and from then on replayed
#
# What has been found so far stays in BUILD_DIR/work/TARGET, where the next long run starts from.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.." || exit
mode=$1 build=$2

# Inputs of a short run: about three seconds each.
declare -A runs=([chat]=20000 [checkpoint]=25000 [config]=20000 [labels]=6000 [metrics]=60000 [model_json]=80000 [safetensors]=100000 [shards]=30000
    [tokenizer]=15000 [trainer_json]=80000)

# In memory where that is possible: some targets write files.
tmp=$(mktemp -d /dev/shm/fuzz.XXXXXX 2>/dev/null || mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export TMPDIR=$tmp
export UBSAN_OPTIONS=print_stacktrace=1
export ASAN_OPTIONS=quarantine_size_mb=16 # or what was freed counts against the limit of memory

# Addresses that change from run to run would be tried as values, and change what the next inputs are.
fixed=()
! setarch -R true 2>/dev/null || fixed=(setarch -R)

set_options() { # of a target; what is beyond them hangs or is absurd for inputs of a few kilobytes
    options=(-rss_limit_mb=512 -malloc_limit_mb=256 -max_len=16384)
    [ ! -f "tests/fuzz/$1.dict" ] || options+=("-dict=tests/fuzz/$1.dict")
}

short() {
    local target=$1 binary=$build/fuzz_$1 files
    set_options "$target"
    files=(tests/fuzz/seeds/"$target"/* tests/fuzz/corpus/"$target"/*)
    "$binary" "${options[@]}" -timeout=30 "-artifact_prefix=$tmp/" "${files[@]}" || return 1
    mkdir "$tmp/new"
    "${fixed[@]}" "$binary" "${options[@]}" -timeout=30 -seed=1 "-runs=${runs[$target]}" "-artifact_prefix=$build/failed-$target-" \
        "$tmp/new" tests/fuzz/seeds/"$target" $(ls -d tests/fuzz/corpus/"$target" 2>/dev/null)
}

# A failure's name: what the log says it is, in letters, and a few digits of the input's hash.
name_failure() {
    local log=$1 file=$2 what
    what=$(grep -aoE 'CHECK failed: .*|runtime error: .*|SUMMARY: .*' "$log" | head -1 |
        sed -E 's/^CHECK failed: [^ ]+ //; s/^runtime error: //; s/^SUMMARY: [A-Za-z]+: //; s/[^A-Za-z0-9]+/-/g' | cut -c1-60)
    echo "${what:-failure}-$(sha1sum <"$file" | cut -c1-8)"
}

long() {
    local seconds=$1 target=$2 binary=$build/fuzz_$2 log=$build/$2.log kept=tests/fuzz/corpus/$2 file name last
    set_options "$target"
    mkdir -p "$build/work/$target" "$tmp/$target" "$kept"
    "$binary" "${options[@]}" -timeout=5 -fork=2 "-max_total_time=$seconds" "-artifact_prefix=$tmp/$target/" \
        "$build/work/$target" tests/fuzz/seeds/"$target" "$kept" >"$log" 2>&1
    local status=$?
    last=$(grep -aE '^#[0-9]+: cov:' "$log" | tail -1)
    printf '  %-5s %-14s %11s inputs  coverage %5s  %s\n' "$([ $status = 0 ] && echo ok || echo FAIL)" "$target" \
        "$(sed -E 's/^#([0-9]+):.*/\1/' <<<"$last")" "$(sed -E 's/.* cov: ([0-9]+).*/\1/' <<<"$last")" \
        "$(sed -E 's/.*(corp: [0-9]+).*/\1/' <<<"$last")"
    for file in "$tmp/$target"/*; do
        name=$(name_failure "$log" "$file")
        mv "$file" "$kept/$name" && echo "        kept as $kept/$name"
    done
    rmdir "$kept" 2>/dev/null
    return $status
}

if [ "$mode" = short ]; then
    short "$3"
    exit
fi
failed=0
targets=("${@:4}")
[ ${#targets[@]} -gt 0 ] || targets=(tests/fuzz/fuzz_*.c)
for target in "${targets[@]}"; do
    target=${target##*/fuzz_}
    long "$3" "${target%.c}" || failed=$((failed + 1))
done
[ $failed = 0 ] || echo "fuzz: $failed targets failed; the logs are in $build" >&2
[ $failed = 0 ]
