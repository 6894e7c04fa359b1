#!/usr/bin/env python3
"""run.log_norms_every: norms of gradients and weights by part of the model, against the checkpoints, on one rank and several.

    make && python -m unittest tests.cli.test_norms
"""

import math
import shutil
import subprocess
import unittest

import numpy as np
from safetensors.numpy import load_file

from tests.lib.ranks import AS_ROOT, MPIRUN
from tests.lib.runs import BINARY, ENVIRONMENT, TIMEOUT, Case, lines_of, losses, step_dir

RUN = ["train.steps=6", "train.micro_batch=1", "train.batch_tokens=192", "run.save_every=1", "run.keep=0",
       "run.log_norms_every=2", "model.tie_word_embeddings=false", "system.threads=1"]


def part_of(name):
    if "norm" in name:
        return "norms"
    if not name.startswith("layers."):
        return "lm_head" if "lm_head" in name else "embeddings"
    return "mix" if "alpha" in name or "collapse" in name else "mlp" if ".mlp." in name else "attention"


def norms(tensors):
    sums = {}
    for name, x in tensors.items():
        sums[part_of(name)] = sums.get(part_of(name), 0) + float((x.astype(float)**2).sum())
    return {part: math.sqrt(x) for part, x in sums.items()}


class Norms(Case):
    def lines(self, run):
        return {m["step"]: m for m in lines_of(run / "metrics.jsonl") if "loss" in m}

    def test_they_are_those_of_gradients_and_weights(self):
        run, without = self.train(*RUN), self.train(*RUN, "run.log_norms_every=0")
        np.testing.assert_array_equal(losses(run), losses(without))
        lines = self.lines(run)
        self.assertEqual([step for step, m in lines.items() if "grad_norms" in m], [2, 4, 6])
        for step in (2, 4, 6):  # the weights that the gradient is of: before the update
            expected = norms(load_file(step_dir(run, step - 1) / "model.safetensors"))
            found = lines[step]["weight_norms"]
            self.assertEqual(set(found), {"embeddings", "attention", "mix", "mlp", "norms", "lm_head"})
            for part, x in expected.items():
                self.assertTrue(math.isclose(found[part], x, rel_tol=1e-5), (step, part))
            whole = math.sqrt(sum(x * x for x in lines[step]["grad_norms"].values()))
            self.assertTrue(math.isclose(whole, lines[step]["grad_norm"], rel_tol=1e-5), step)

    def test_gradients_by_part(self):
        """From Muon's momentum, which begins as the first gradient."""
        run = self.train(*RUN, "train.optimizer=muon", "run.log_norms_every=1", "train.grad_clip=0")
        weights = load_file(step_dir(run, 1) / "model.safetensors")
        file = load_file(step_dir(run, 1) / "optimizer-00000-of-00001.safetensors")
        by_size = {}  # sizes tell the parts apart: qkv, out; up, down
        used = 0
        for begin, end in file["ranges"]:
            by_size.setdefault(end - begin, []).append(file["exp_avg"][used:used + end - begin])
            used += end - begin
        hidden = {name: x.size for name, x in weights.items() if ".attn.qkv." in name or ".attn.out." in name}
        squares = sum(float((x.astype(float)**2).sum()) for n in set(hidden.values()) for x in by_size[n])
        self.assertTrue(math.isclose(math.sqrt(squares), self.lines(run)[1]["grad_norms"]["attention"], rel_tol=1e-5))

    @unittest.skipUnless(shutil.which("mpirun"), "mpirun is not installed: run make deps")
    def test_several_ranks_write_the_same(self):
        one = self.lines(self.train(*RUN, "train.optimizer=muon"))
        for stage in (0, 2):
            run = self.new_dir()
            p = subprocess.run([*MPIRUN, "-np", "2", BINARY, "train", str(self.config), f"run.dir={run}", *RUN,
                                "train.optimizer=muon", f"system.zero_stage={stage}"], env={**ENVIRONMENT, **AS_ROOT},
                               capture_output=True, timeout=TIMEOUT, cwd=self.tmp, stdin=subprocess.DEVNULL)
            self.assertEqual(p.returncode, 0, p.stderr)
            many = self.lines(run)
            for step in (2, 4, 6):
                for kind in ("grad_norms", "weight_norms"):
                    self.assertEqual(many[step][kind].keys(), one[step][kind].keys())
                    np.testing.assert_allclose(list(many[step][kind].values()), list(one[step][kind].values()), rtol=1e-4)


if __name__ == "__main__":
    unittest.main()
