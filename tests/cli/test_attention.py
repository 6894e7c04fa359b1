#!/usr/bin/env python3
"""`train_iha attention` against the reference's softmax, and the picture made of it.

    make && python -m unittest tests.cli.test_attention
"""

import json
import os
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from tests.lib.runs import BINARY, CPU, ROOT, Case, step_dir

sys.path.insert(0, str(ROOT / "tests" / "reference"))
import iha_reference  # noqa: E402

PROMPT = "boris sees cats."
# Every kind of layer; the windows are shorter than the prompt.
LAYERS = ("mha_global", "iha_local", "iha_global", "mha_local")
KINDS = {"flat": ["model.num_pseudo_heads=3", "model.iha_window=9"],
         "token, no positions": ["model.iha_mask=token", "model.position_embedding=none", "model.num_pseudo_heads=2",
                                 "model.iha_window=6"],
         "not causal": ["model.causal=false", "model.iha_rope=token", "model.layer_pattern=mha_global iha_global"]}


def reference(config, params, tokens):
    """The attention weights [H,S,S] of every layer, in double."""
    layers = []

    def record(xp, q, k, v, see):
        scores = np.einsum("bshd,bzhd->bhsz", q, k) / np.sqrt(q.shape[-1])
        layers.append(iha_reference.softmax(np, np.where(see, scores, -np.inf))[0])
        return np.einsum("bhsz,bzhd->bshd", layers[-1][None], v)

    with mock.patch.object(iha_reference, "attend", record):
        iha_reference.logits(np, config, {name: x.astype(np.float64) for name, x in params.items()}, tokens[None])
    return layers


class Attention(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.runs = {}
        for kind, overrides in KINDS.items():
            run_dir = cls.tmp / f"run{len(cls.runs)}"
            subprocess.run([BINARY, "train", cls.config, f"run.dir={run_dir}", "model.num_hidden_layers=4",
                            "model.layer_pattern=" + " ".join(LAYERS), "model.local_window=4", "train.steps=4",
                            "model.init_alpha=noise", *overrides], check=True, capture_output=True)
            cls.runs[kind] = step_dir(run_dir, 4)

    def weights(self, checkpoint, layer, *more):
        out = self.tmp / "out.safetensors"
        self.run_cli("attention", checkpoint, "--prompt", PROMPT, "--layer", layer, "--out", out, *CPU, *more)
        return load_file(out)

    def test_weights_are_the_references(self):
        tokens = np.frombuffer(PROMPT.encode(), np.uint8).astype(int)
        for kind, checkpoint in self.runs.items():
            config = json.loads((checkpoint / "config.json").read_text())
            expected = reference(config, load_file(checkpoint / "model.safetensors"), tokens)
            for layer, want in enumerate(expected):
                got = self.weights(checkpoint, layer)["weights"]
                H, P, _, T, _ = got.shape
                self.assertEqual(T, len(tokens))
                got = got.transpose(0, 3, 1, 4, 2).reshape(H, T * P, T * P)  # [H, t, p, u, q]
                self.assertEqual(got.shape, want.shape, (kind, layer))
                np.testing.assert_allclose(got, want, atol=2e-6, err_msg=f"{kind}, layer {layer}")
                self.assertTrue((got[want == 0] == 0).all(), "a key that is not visible has a weight")

    def test_tokens_and_their_text(self):
        out = self.weights(self.runs["flat"], 0)
        self.assertEqual(bytes(out["tokens"].astype(np.uint8)).decode(), PROMPT)
        self.assertEqual(out["text"].tobytes().decode(), PROMPT)
        np.testing.assert_array_equal(out["text_ends"], np.arange(1, len(PROMPT) + 1))

    def test_what_is_refused(self):
        checkpoint, out = self.runs["flat"], self.tmp / "none.safetensors"
        for arguments, words in ((["--prompt", "a", "--layer", "4"], ["--layer 4", "the last is 3"]),
                                 (["--prompt", ""], ["empty"]), ([], ["--prompt TEXT"]),
                                 (["--prompt", "x" * 33], ["33 tokens", "max_position_embeddings = 32"])):
            self.refused("attention", checkpoint, "--out", out, *arguments, names=words)
        done = self.run_cli("attention", checkpoint, "--prompt", "a", "--out", self.tmp / "no/where", code=1)
        self.assertIn("no/where", done.stderr.decode())
        self.assertFalse(out.exists())

    def test_a_picture(self):
        out = self.tmp / "heads.png"
        run = [sys.executable, ROOT / "scripts" / "plot_attention.py", self.runs["flat"]]
        environment = {**os.environ, "TRAIN_IHA": BINARY}
        done = subprocess.run([*run, "--prompt", PROMPT, "--out", out], capture_output=True, text=True, env=environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("layer 1, iha_local, layer 0, mha_global; 16 tokens", done.stdout)
        self.assertEqual(out.read_bytes()[:4], b"\x89PNG")
        done = subprocess.run([*run, "--prompt", PROMPT, "--layer", "7"], capture_output=True, text=True, env=environment)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1), done.stderr)


if __name__ == "__main__":
    unittest.main()
