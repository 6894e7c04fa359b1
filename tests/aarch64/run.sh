#!/usr/bin/env bash
# Build for aarch64 with a cross compiler, and run the unit tests and a training run under qemu-aarch64. On Debian.
#
#   tests/aarch64/run.sh [TEST ...]    TEST: test_attention, ..., or train_iha; default: all of tests/unit and train_iha
#   ROOT_DIR=DIR                       aarch64 libraries, unpacked from Debian's packages; default: build/distro/aarch64.
#                                      It is kept, and used again. Nothing is installed on this machine.
#   AARCH64_ARCH=armv9-a               the processor that is built for (armv8.2-a)
#   JOBS=N                             tests at once (2)
#   TEST_SAMPLE=N                      of the cases of tests with many, every Nth (40): qemu computes every operation on
#                                      floating-point numbers by itself, hundreds of times slower than a processor
#
# Closes with a line of counts. 3: not started.
set -uo pipefail
cd "$(dirname "$0")/../.."

refuse() {
    echo "test-aarch64: $1" >&2
    exit 3
}

packages=(libc6-dev libgomp1 libdnnl-dev libcjson-dev libinih-dev libpcre2-dev libutf8proc-dev libcmocka-dev)
compiler=aarch64-linux-gnu-gcc
for tool in $compiler:gcc-aarch64-linux-gnu qemu-aarch64:qemu-user apt-get:apt dpkg-deb:dpkg; do
    command -v "${tool%%:*}" >/dev/null || refuse "${tool%%:*} is not installed: apt-get install ${tool#*:}"
done
root=${ROOT_DIR:-build/distro/aarch64}
mkdir -p "$root" || exit 3
root=$(realpath "$root")
exec 9>"$root.lock"
flock -n 9 || refuse "$root is in use by another run"

# ---- libraries: apt with an own state of its own, in which nothing is installed ----

if ! cmp -s "$root/unpacked" <<<"${packages[*]}"; then
    echo "test-aarch64: unpacking Debian's arm64 packages in $root"
    state=$root/apt
    mkdir -p "$state/lists/partial" "$state/archives/partial"
    : >"$state/status"
    cat >"$state/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$state";
Dir::State::lists "$state/lists";
Dir::State::status "$state/status";
Dir::Cache "$state";
Dir::Cache::archives "$state/archives";
END
    export APT_CONFIG=$state/apt.conf
    { apt-get update -qq && apt-get install -y -qq --download-only --no-install-recommends "${packages[@]}"; } \
        >"$root.log" 2>&1 9>&- || { tail -n 5 "$root.log" >&2; refuse "apt has no arm64 packages for this release: see $root.log"; }
    unset APT_CONFIG
    for package in "$state"/archives/*.deb; do
        dpkg-deb -x "$package" "$root" || refuse "cannot unpack $package"
    done
    # Links to absolute paths, of libraries for the linker among them, mean paths in the folder.
    find "$root" -type l -lname '/*' -print0 | while IFS= read -rd '' link; do
        ln -sfn "$root$(readlink "$link")" "$link"
    done
    rm -rf "$state"
    echo "${packages[*]}" >"$root/unpacked"
fi

# ---- build ----

build=build/aarch64
names=("$@")
[ ${#names[@]} -gt 0 ] || names=($(cd tests/unit && ls test_*.c) train_iha)
programs=()
for name in "${names[@]}"; do
    name=${name%.c}
    [ "$name" = train_iha ] && programs+=("$build/train_iha") || programs+=("$build/tests/unit/$name")
done
# What was given to a make above this script was meant for this machine.
MAKEFLAGS= make --no-print-directory -j2 BUILD=$build BINARY=$build/train_iha CC="$compiler --sysroot=$root" \
    LD=aarch64-linux-gnu-ld OBJCOPY=aarch64-linux-gnu-objcopy ARCH="${AARCH64_ARCH:-armv8.2-a}" CUDA=0 MPI_CFLAGS= MPI_LIBS= \
    SANITIZE=0 WERROR="${WERROR:-0}" "${programs[@]}" || exit 1

# ---- run ----

export TEST_SAMPLE=${TEST_SAMPLE:-40}
# Threads that spin while they wait would take the cores from those that compute.
export QEMU_LD_PREFIX=$root GOMP_SPINCOUNT=0 CMOCKA_MESSAGE_OUTPUT=TAP build
work=$(mktemp -d)
export work
trap 'rm -rf "$work"' EXIT

# A training run that resumes has the bits of one that was never stopped. Prints what a C test prints.
run_program() {
    local train=(qemu-aarch64 "$build/train_iha" train configs/quickstart.ini data.train="$work/shard.bin" data.val=none
        model.hidden_size=32 model.head_dim=8 model.intermediate_size=64 train.seq_len=32 train.micro_batch=2
        train.warmup_steps=0 system.threads=2 run.eval_every=0 run.sample_every=0 run.save_every=6)
    echo 1..1
    python3 - "$work/shard.bin" <<'END' || return 1
import struct, sys
text = b"The same words again, and then the same words again. " * 200
with open(sys.argv[1], "wb") as f:
    f.write(struct.pack("<256i", 20240520, 1, len(text), *[0] * 253) + struct.pack(f"<{len(text)}H", *text))
END
    "${train[@]}" train.steps=12 run.dir="$work/whole" && "${train[@]}" train.steps=12 run.dir="$work/parts" &&
        rm -r "$work"/parts/step_00000012 && "${train[@]}" train.steps=12 run.dir="$work/parts" &&
        cmp "$work"/{whole,parts}/step_00000012/model.safetensors && echo "ok 1 - resumed"
}

run_test() { # NAME; prints a line, and after a failure what the test printed; leaves "passed failed" in a file
    local name=$1 start=$EPOCHREALTIME output status planned good
    if [ "$name" = train_iha ]; then
        output=$(run_program 2>&1)
    else
        output=$(qemu-aarch64 "$build/tests/unit/$name" 2>&1)
    fi
    status=$?
    planned=$(awk '/^1\.\.[0-9]+$/ { sub(/.*\.\./, ""); n += $0 } END { print n + 0 }' <<<"$output")
    good=$(grep -cE '^ok [0-9]+ - |^(not )?ok [0-9]+ # SKIP' <<<"$output")
    if [ $status = 0 ] && [ "$planned" -gt 0 ] && [ "$good" = "$planned" ]; then
        printf '  ok    %-30s %3d tests  %5.1f s\n' "$name" "$planned" "$(bc <<<"$EPOCHREALTIME - $start")"
    else
        [ "$planned" -gt "$good" ] || planned=$((good + 1))
        printf '  FAIL  %-30s %3d of %d failed, exit code %d\n%s\n' "$name" $((planned - good)) "$planned" $status "$output"
    fi
    echo "$good $((planned - good))" >"$work/$name.counts"
}
export -f run_test run_program
printf '%s\n' "${names[@]%.c}" | xargs -P "${JOBS:-2}" -L 1 bash -c 'run_test "$@"' bash
read -r passed failed < <(cat "$work"/*.counts | awk '{ p += $1; f += $2 } END { print p + 0, f + 0 }')
[ "$(ls "$work" | grep -c 'counts$')" = ${#names[@]} ] || failed=$((failed + 1))
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
