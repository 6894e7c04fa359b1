"""What tests of Transformers share: golden cases as checkpoint directories, and loading them."""

import copy
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


def in_float64(model, run):
    """run(model) with its weights in float64."""
    with torch.no_grad():
        return run(copy.deepcopy(model).double())


def distance(x, y):
    """The norm of x - y."""
    return torch.linalg.vector_norm(x.double() - y.double()).item()


def loss_error(logits, exact):
    """By how much a mean loss of these logits may be off: each is by the logits' error in the mean; and it is printed with
    seven decimals."""
    return 3 * distance(logits, exact) / exact.numel()**0.5 + 5e-8


class RoundedToBf16(torch.overrides.TorchFunctionMode):
    """The plain computation in bf16: what these functions return is rounded. Angles of RoPE are not."""

    ROUNDED = (torch.nn.functional.linear, torch.nn.functional.embedding, torch.nn.functional.layer_norm, torch.einsum,
               torch.nn.functional.scaled_dot_product_attention, torch.Tensor.__add__, torch.Tensor.add, torch.Tensor.__matmul__,
               torch.Tensor.matmul, torch.cat)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_value = isinstance(out, torch.Tensor) and out.is_floating_point() and function in self.ROUNDED
        return out.bfloat16().to(out.dtype) if is_value else out


class Folder(unittest.TestCase):
    """A temporary folder."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls.temporary.name)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def check_error(self, found, plain, exact, what=None):
        """found is at most three times as far from float64 as the plain computation in the same precision."""
        allowed = 3 * max(distance(plain, exact), 2**-24 * torch.linalg.vector_norm(exact.double()).item())
        self.assertLessEqual(distance(found, exact), allowed, what)

    def new(self):
        return Path(tempfile.mkdtemp(dir=self.tmp)) / "model"
