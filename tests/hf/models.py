"""What tests of Transformers share: golden cases as checkpoint directories, and loading them."""

import json
import shutil
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.lib.runs import ROOT

torch.set_num_threads(1)  # models are tiny
transformers.utils.logging.disable_progress_bar()

GOLDEN = ROOT / "tests" / "golden"
CODE = ROOT / "model" / "checkpoint" / "hf"
NAMES = sorted(path.stem for path in GOLDEN.glob("model_*.json"))
KEYS = {"architectures": ["IhaForCausalLM"], "dtype": "float32",
        "auto_map": {"AutoConfig": "configuration_iha.IhaConfig",
                     "AutoModelForCausalLM": "modeling_iha.IhaForCausalLM"}}


def config_of(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden(name):
    """The tensors of a golden case: tests/reference/make_golden.py."""
    return load_file(GOLDEN / f"{name}.safetensors")


def write_checkpoint(folder, config, params):
    """A directory as train_iha writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | KEYS))
    save_file(params, folder / "model.safetensors", metadata={"format": "pt"})
    for path in CODE.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def write_golden(folder, name, positions=None):
    """A golden case as a checkpoint; `positions`: with so many learned positions, if it has such."""
    config = config_of(name)
    params = {key[6:]: value for key, value in golden(name).items() if key.startswith("param.")}
    if positions and "pos_embed.weight" in params:
        config["max_position_embeddings"] = positions
        draw = np.random.default_rng(1)
        params["pos_embed.weight"] = draw.normal(0, 0.5, (positions, config["hidden_size"])).astype("f")
    return write_checkpoint(folder, config, params)


def load(path, **options):
    """The model; fails where a tensor is missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True,
                                                                    **options)
    left = {what: names for what, names in info.items() if names}
    if left:
        raise AssertionError(f"{path}: {left}")
    return model.eval()


def relative(x, y):
    """The norm of x - y, by that of y."""
    return (torch.linalg.vector_norm((x - y).double()) / torch.linalg.vector_norm(y.double())).item()


class Folder(unittest.TestCase):
    """A temporary folder."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls.temporary.name)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def new(self):
        return Path(tempfile.mkdtemp(dir=self.tmp)) / "model"
