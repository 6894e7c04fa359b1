#!/usr/bin/env python3
"""train.optimizer = muon: a step against NumPy in double, resuming, the memory that info plans, and refusals.

    make && python -m unittest tests.cli.test_muon
"""

import json
import re
import time
import unittest

import numpy as np
from safetensors.numpy import load_file

from tests.lib.runs import TIMEOUT, Case, lines_of, start, step_dir, tree, without_timings

MUON = ["train.optimizer=muon", "train.muon_lr=0.03", "train.muon_momentum_warmup=4"]
EVERY = ["train.steps=6", "train.schedule=constant", "run.save_every=1", "run.keep=0"]
# Matrices of every shape: gate matrices, biases, and heads that are wider together than the residual stream.
OTHER = ["model.activation=swiglu", "model.bias=true", "model.norm=layernorm", "model.head_dim=12"]


def is_hidden(name):
    return re.fullmatch(r"layers\.\d+\.(attn\.(qkv|out)|mlp\.(up|gate|down))\.weight", name) is not None


def parts(name, x, rows=None):
    """The matrices of a weight: q, k, v (and k', v') of qkv, of as many rows as given, or of equal ones."""
    if not name.endswith("qkv.weight"):
        return [x]
    return np.split(x, np.cumsum(rows)[:-1] if rows else 3)


def orthogonalized(g):
    """Five Newton-Schulz iterations act on singular values alone."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def moments(checkpoint, weights):
    """Muon's momentum by name; AdamW's second moments by name."""
    file = load_file(checkpoint / "optimizer-00000-of-00001.safetensors")
    names, found = list(weights), [{}, {}]  # in the order of the file: sorted as in the header
    offsets, at = {}, 0
    for name in names:
        offsets[at] = name
        at += weights[name].size
    for which, ranges, values in ((0, "ranges", "exp_avg"), (1, "ranges_sq", "exp_avg_sq")):
        used = 0
        for begin, end in file[ranges]:
            name = offsets[begin]
            assert end - begin == weights[name].size
            found[which][name] = file[values][used:used + end - begin].reshape(weights[name].shape).astype(float)
            used += end - begin
    return found


def weights_in_order(checkpoint):
    """As the file lays them out: the order that ranges count in."""
    data = (checkpoint / "model.safetensors").read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    loaded = load_file(checkpoint / "model.safetensors")
    return {name: loaded[name].astype(float) for name in sorted(header, key=lambda n: header[n]["data_offsets"])}


class Muon(Case):
    def test_steps_follow_the_equations(self):
        self.check_steps(OTHER, None, 3)

    def test_matrices_of_other_layers(self):
        """Heads of 12 for 4 heads of q and 1 of k and v; simplicial layers have k and v twice."""
        heads = ["model.num_attention_heads=4", "model.head_dim=12"]
        self.check_steps([*OTHER, *heads, "model.num_key_value_heads=1"], (48, 12, 12), 3)
        self.check_steps([*OTHER, *heads, "model.layer_pattern=simplicial_global"], (48,) * 5, 5)

    def check_steps(self, overrides, rows, count):
        """The gradient is what momentum does not explain; from it NumPy computes the step."""
        run = self.train(*MUON, *EVERY, *overrides)
        checked = 0
        for step in range(1, 6):
            old, new = (weights_in_order(step_dir(run, s)) for s in (step, step + 1))
            m_old, m_new = moments(step_dir(run, step), old)[0], moments(step_dir(run, step + 1), new)[0]
            momentum = 0.85 + (0.95 - 0.85) * min(step / 4, 1)
            for name in filter(is_hidden, old):
                for w, w_new, m, m1 in zip(*(parts(name, x, rows) for x in
                                              (old[name], new[name], m_old[name], m_new[name]))):
                    gradient = m1 - momentum * m
                    update = 0.2 * max(w.shape)**0.5 * orthogonalized(gradient + momentum * m1) + 0.1 * w
                    error = np.linalg.norm(w_new - (w - 0.03 * update)) / np.linalg.norm(0.03 * update)
                    self.assertLess(error, 1e-3, name)
                    checked += 1
        self.assertEqual(checked, 5 * 2 * (count + 1 + 3))

    def test_only_hidden_matrices_are_muons(self):
        """Second moments exist for the others; a run of AdamW has the same momentless first step for them."""
        run, adamw = self.train(*MUON, *EVERY, *OTHER), self.train(*EVERY, *OTHER)
        muon = weights_in_order(step_dir(run, 1))
        second = moments(step_dir(run, 1), muon)[1]
        self.assertEqual(set(second), {name for name in muon if not is_hidden(name)})
        for name, x in weights_in_order(step_dir(adamw, 1)).items():
            self.assertEqual(np.array_equal(x, muon[name]), not is_hidden(name), name)

    def test_a_resumed_run_is_bit_identical(self):
        whole, parted = self.train(*MUON, *EVERY), self.new_dir()
        for steps in (3, 6):
            self.train(*MUON, *EVERY, f"train.steps={steps}", run_dir=parted)
        self.assertIn(b"resuming from", self.last.stderr)
        a, b = tree(step_dir(whole, 6)), tree(step_dir(parted, 6))
        for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
            self.assertEqual(a[name], b[name], name)
        self.assertEqual(without_timings(lines_of(whole / "metrics.jsonl")),
                         without_timings(lines_of(parted / "metrics.jsonl")))

    def test_a_killed_run_resumes_bit_identically(self):
        steps = ["train.steps=40", "train.schedule=constant", "run.save_every=3"]
        whole, killed = self.train(*MUON, *steps), self.new_dir()
        process = start("train", self.config, f"run.dir={killed}", *MUON, *steps)
        self.addCleanup(self.end, process)
        deadline = time.monotonic() + TIMEOUT
        while not (killed / "step_00000006").exists():
            self.assertLess(time.monotonic(), deadline)
        process.kill()
        process.wait()
        self.train(*MUON, *steps, run_dir=killed)
        self.assertEqual(tree(step_dir(whole, 40)).keys(), tree(step_dir(killed, 40)).keys())
        for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
            self.assertEqual((step_dir(whole, 40) / name).read_bytes(), (step_dir(killed, 40) / name).read_bytes(), name)

    def test_the_optimizer_of_a_run_does_not_change(self):
        run = self.train(*EVERY)
        self.refused("train", self.config, f"run.dir={run}", *EVERY, "train.steps=7", *MUON,
                     names=["train.optimizer was adamw and is now muon"])
        self.refused("train", self.config, f"run.dir={self.new_dir()}", *EVERY, *MUON, f"train.init_from={run}",
                     "train.init_optimizer=keep", names=["train.init_optimizer = keep", "train.optimizer = adamw"])
        self.train(*EVERY, *MUON, f"train.init_from={run}")
        self.train(*EVERY, *MUON, f"train.init_from={self.train(*EVERY, *MUON)}", "train.init_optimizer=keep")

    def test_refusals(self):
        for overrides, names in (
                (["train.muon_lr=0.1"], ["train.muon_lr", "optimizer = muon"]),
                (["train.muon_momentum=0.5"], ["train.muon_momentum", "optimizer = muon"]),
                (["train.muon_momentum_warmup=5"], ["train.muon_momentum_warmup"]),
                (["train.optimizer=muom"], ["muom", "did you mean 'muon'"]),
                (["train.optimizer=muon", "train.muon_momentum=1"], ["muon_momentum", "from 0 to 1 (excluded)"]),
                (["train.optimizer=muon", "train.lr=0", "train.min_lr=0", "train.muon_lr=0.1"], ["muon_lr", "lr"])):
            self.refused("train", self.config, f"run.dir={self.new_dir()}", *overrides, names=names)

    def test_memory_is_one_moment_less(self):
        """info plans what is allocated; the matrices of Muon have one moment instead of two."""
        large = ["model.vocab_size=512", "model.hidden_size=256", "model.intermediate_size=1024",
                 "model.layer_pattern=mha_global"]
        found = []
        for muon in ([], MUON):
            text = self.run_cli("info", self.config, *large, *muon).stdout.decode()
            found.append(float(re.search(r"optimizer +([\d.]+) MB", text)[1]))
        hidden = 2 * (4 * 256 * 256 + 2 * 256 * 1024) * 4 / 1e6
        self.assertAlmostEqual(found[0] - found[1], hidden, delta=0.11)


if __name__ == "__main__":
    unittest.main()
