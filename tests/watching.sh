#!/usr/bin/env bash
# Install Chromium, and TensorBoard and W&B in .venv-watching; then run the tests that make test skips without them.
#
#   TRAIN_IHA=./train_iha BUILD=build/release tests/watching.sh        as make test-watching does
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v chromium >/dev/null; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    echo "test-watching: installing chromium${sudo:+ (with sudo)}"
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
if ! cat requirements.txt requirements-watching.txt | cmp -s - .venv-watching/installed; then
    echo "test-watching: installing TensorBoard and W&B in .venv-watching"
    [ -x .venv-watching/bin/python ] || python3 -m venv .venv-watching
    .venv-watching/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-watching.txt
    cat requirements.txt requirements-watching.txt >.venv-watching/installed
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
.venv-watching/bin/python -m unittest -v tests.cli.test_watch tests.cli.test_report 2>&1 | tee "$log"
if tail -n 1 "$log" | grep -q skipped; then
    echo "test-watching: some tests were skipped" >&2
    exit 1
fi
