"""Training in bf16 on the CPU: which precision a run gets and keeps, that a resumed run has the same bits, and what other
commands make of its checkpoints."""

import json
import os
import re
import shutil
import subprocess
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.lib.runs import BINARY, ENVIRONMENT, TIMEOUT, Case, lines_of, losses, step_dir, steps_in, tree, without_timings

BF16 = "system.precision=bf16"
AUTO = "system.precision=auto"
OLD = {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # as on a processor without bf16


def recorded(checkpoint):
    return json.loads((checkpoint / "trainer.json").read_text())["config"]["system.precision"]


class Bf16(Case):
    def train_on(self, environment, *overrides, run_dir=None):
        run_dir = run_dir or self.new_dir()
        done = subprocess.run([BINARY, "train", self.config, f"run.dir={run_dir}", *overrides], text=True,
                              env=ENVIRONMENT | environment, capture_output=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr)
        return run_dir, done.stderr

    def test_learns_as_in_fp32(self):
        fp32, bf16 = self.train(), self.train(BF16)
        self.assertIn(", bf16 by ", self.last.stderr.decode())
        a, b = losses(fp32), losses(bf16)
        self.assertTrue((a != b).any())
        np.testing.assert_allclose(b, a, rtol=0.02)
        weights = load_file(step_dir(bf16, 20) / "model.safetensors")
        self.assertEqual({x.dtype for x in weights.values()}, {np.dtype("float32")})
        bits = np.concatenate([x.view(np.uint32).ravel() for x in weights.values()])
        self.assertTrue((bits & 0xffff).any())  # master weights, not what bf16 holds

    def test_muon_learns_as_in_fp32(self):
        muon = "train.optimizer=muon"
        np.testing.assert_allclose(losses(self.train(muon, BF16)), losses(self.train(muon)), rtol=0.02)

    def test_resumed_run_has_the_same_bits(self):
        for recompute, optimizer in (("none", "muon"), ("full", "adamw")):
            over = [BF16, f"system.recompute={recompute}", "train.batch_tokens=256", "model.bias=true",
                    "model.norm=layernorm", f"train.optimizer={optimizer}"]
            whole = self.train(*over)
            parts = self.train(*over, "run.save_every=7", "run.keep=0")
            for step in (14, 7):
                for late in (s for s in steps_in(parts) if s > step):
                    shutil.rmtree(step_dir(parts, late))
                self.train(*over, "run.keep=0", run_dir=parts)
                self.assertIn(f"resuming from {step_dir(parts, step)}", self.last.stderr.decode())
            self.assertEqual(*(without_timings(lines_of(r / "metrics.jsonl")) for r in (whole, parts)))
            files = [tree(step_dir(r, 20)) for r in (whole, parts)]
            for name in files[0]:
                if name != "trainer.json":
                    self.assertEqual(files[0][name], files[1][name], name)

    def test_auto_is_recorded_and_kept(self):
        run_dir, text = self.train_on({}, AUTO, "train.steps=4", "train.schedule=constant")
        fast = recorded(step_dir(run_dir, 4)) == "bf16"
        self.assertEqual(", bf16 by " in text, fast)
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" not in flags:
            self.assertFalse(fast)
        elif not set(os.environ) & {"DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"}:
            self.assertTrue(fast)
        _, text = self.train_on(OLD, AUTO, "train.steps=8", "train.schedule=constant", run_dir=run_dir)
        self.assertEqual(recorded(step_dir(run_dir, 8)), "bf16" if fast else "fp32")
        self.assertEqual("neither avx512_bf16 nor amx_bf16" in text, fast)

    def test_processor_without_bf16(self):
        run_dir, text = self.train_on(OLD, AUTO, "train.steps=1")
        self.assertEqual(recorded(step_dir(run_dir, 1)), "fp32")
        self.assertNotIn("bf16", text)
        run_dir, text = self.train_on(OLD, BF16)
        self.assertIn("warning: system.precision = bf16, but this processor has neither avx512_bf16 nor amx_bf16", text)
        self.assertIn(", bf16 by conversion", text)
        np.testing.assert_allclose(losses(run_dir), losses(self.train(BF16)), rtol=5e-3)

    def test_evaluates_in_fp32(self):
        run_dir = self.train(BF16)
        over = ["system.device=cpu", "system.threads=2"]
        auto, fp32, bf16 = (self.run_cli("eval", run_dir, *over, *more).stdout.decode().split()[-2]
                            for more in ([], ["system.precision=fp32"], [BF16]))
        self.assertEqual(auto, fp32)
        self.assertNotEqual(bf16, fp32)
        np.testing.assert_allclose(float(bf16), float(fp32), rtol=0.01)

    def test_generates(self):
        run_dir = self.train(BF16)
        text = self.run_cli("generate", run_dir, "--prompt", "anna", "--tokens", "40", BF16, "system.device=cpu").stdout
        self.assertTrue(text.startswith(b"anna"), text)

    def test_info(self):
        parameters = {}
        for precision in ("fp32", "bf16"):
            text = self.run_cli("info", self.config, f"system.precision={precision}", "model.vocab_size=70000").stdout.decode()
            self.assertIn(f"Memory for training in {precision}", text)
            parameters[precision] = float(re.search(r"parameters +([\d.]+) MB", text)[1])
        self.assertAlmostEqual(parameters["fp32"] / parameters["bf16"], 2, delta=0.05)


if __name__ == "__main__":
    unittest.main()
