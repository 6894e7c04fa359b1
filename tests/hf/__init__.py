"""Tests of what Transformers does with checkpoints: make test-hf. What its packages read when they are imported is set here:
no network, no messages, and a temporary folder for the code that comes with models."""

import os
import tempfile

MODULES = tempfile.TemporaryDirectory()
os.environ.update(HF_MODULES_CACHE=MODULES.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                  HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="critical", TOKENIZERS_PARALLELISM="false")
