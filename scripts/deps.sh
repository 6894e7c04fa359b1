#!/usr/bin/env bash
# Install what is missing: packages of the distribution (Debian, Ubuntu), and a Python environment in .venv for
# data preparation, plots and reference tests. Asks for sudo only when something is missing and you are not root.
#
#   scripts/deps.sh            all of it
#   scripts/deps.sh --no-corpus  without the texts the quickstart reads
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(gcc g++ make bc libc6-dev libdnnl-dev libcjson-dev libinih-dev libpcre2-dev libutf8proc-dev libcmocka-dev
    libopenmpi-dev openmpi-bin iproute2 python3 python3-venv)
[ "${1:-}" = --no-corpus ] || packages+=(bible-kjv bible-kjv-text)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
# clang with its sanitizers and libFuzzer, for the fuzz targets. Found by compiling, not by a package's name, which
# contains the compiler's version.
can_fuzz() {
    local probe status
    probe=$(mktemp)
    echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return d && n ? 0 : 0; }' |
        clang -fsanitize=fuzzer,address,undefined -x c - -o "$probe" 2>/dev/null
    status=$?
    rm -f "$probe"
    return $status
}
can_fuzz || missing+=(clang)

if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        echo "deps: no apt-get here; install these by hand: ${missing[*]}" >&2
        exit 2
    fi
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    echo "deps: installing ${missing[*]}${sudo:+ (with sudo)}"
    $sudo apt-get update -qq
    # The runtime libraries of the distribution's clang; on Ubuntu 22.04 they are part of clang.
    if [[ " ${missing[*]} " == *" clang "* ]] && apt-cache show libclang-rt-dev >/dev/null 2>&1; then
        missing+=(libclang-rt-dev)
    fi
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

requirements=(requirements.txt)
if command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    requirements+=(requirements-cuda.txt)
fi
if ! cat "${requirements[@]}" | cmp -s - .venv/installed-requirements.txt; then
    echo "deps: Python environment in .venv ($(cat "${requirements[@]}" | grep -vc '^#') packages)"
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check "${requirements[@]/#/-r}"
    cat "${requirements[@]}" >.venv/installed-requirements.txt
fi
# The emulator of a GPU needs headers of the CUDA runtime, from the toolkit or these.
if ! command -v nvcc >/dev/null && [ ! -e "${CUDA_HOME:-/usr/local/cuda}/include/cuda_bf16.h" ] &&
    ! cmp -s tests/cuda/requirements.txt .venv/installed-emulator-requirements.txt; then
    echo "deps: headers of the CUDA runtime, in .venv"
    .venv/bin/pip install --quiet --disable-pip-version-check -r tests/cuda/requirements.txt
    cp tests/cuda/requirements.txt .venv/installed-emulator-requirements.txt
fi
echo "deps: everything is installed"
