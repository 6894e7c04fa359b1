#!/usr/bin/env bash
# Install requirements-hf.txt into .venv-hf, for make test-hf: about 700 MB to download, 2.2 GB on the disk.
set -euo pipefail
cd "$(dirname "$0")/../.."

if cat requirements-hf.txt tests/hf/stub_cuda.py | cmp -s - .venv-hf/installed; then
    exit 0
fi
echo "test-hf: installing PyTorch and Transformers in .venv-hf"
[ -x .venv-hf/bin/python ] || python3 -m venv .venv-hf
.venv-hf/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-hf.txt
.venv-hf/bin/python tests/hf/stub_cuda.py "$(.venv-hf/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
.venv-hf/bin/python -c 'import torch, transformers; print(f"test-hf: torch {torch.__version__}, transformers {transformers.__version__}")'
cat requirements-hf.txt tests/hf/stub_cuda.py >.venv-hf/installed
