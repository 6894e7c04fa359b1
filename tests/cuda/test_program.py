#!/usr/bin/env python3
"""The whole program on GPUs of the emulator in tests/cuda/emulator/, whose queues run on threads of their own.

    make build/release/emulator/train_iha && python -m unittest tests.cuda.test_program

The binary is emulator/train_iha in the build folder, or what EMULATOR_TRAIN_IHA names. Losses are compared with those of
system.device = cpu.
"""

import json
import os
import random
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from tests.lib.emulator import EMULATOR_BINARY
from tests.lib.tiny import tiny_config, write_shard

TIMEOUT = 120  # seconds; 20 steps here take three


@unittest.skipUnless(EMULATOR_BINARY.exists(), "no CUDA headers")
class OneGpu(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = Path(tempfile.mkdtemp(prefix="iha-emulator-"))
        rng = random.Random(3)
        (cls.dir / "data").mkdir()
        for name in ["train_0", "val_0"]:
            tokens = [rng.choice(b"in the beginning was the word ") for _ in range(4000)]
            write_shard(cls.dir / "data" / f"{name}.bin", tokens)
        config = tiny_config(cls.dir / "data", seq_len=32, batch_tokens=128, steps=20,
                             system="precision = fp32\nthreads = 2", run="dir = unnamed")
        (cls.dir / "tiny.ini").write_text(config)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.dir)

    def run_program(self, *arguments, code=0, **environment):
        done = subprocess.run(
            [EMULATOR_BINARY, *map(str, arguments)],
            cwd=self.dir,
            env={**os.environ, "GOMP_SPINCOUNT": "100", "EMULATOR_DELAY_US": "100", **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def train(self, run, *overrides, **environment):
        """The metrics of a run: its lines of steps, without what depends on time."""
        self.run_program("train", "tiny.ini", f"run.dir={run}", *overrides, **environment)
        lines = map(json.loads, (self.dir / run / "metrics.jsonl").read_text().splitlines())
        return [(m["step"], m["loss"], m["grad_norm"]) for m in lines if "loss" in m]

    def near(self, got, want, relative):
        self.assertEqual([step for step, _, _ in got], list(range(1, 21)))
        for (step, loss, norm), (_, want_loss, want_norm) in zip(got, want, strict=True):
            self.assertAlmostEqual(loss, want_loss, delta=relative * want_loss, msg=f"step {step}")
            self.assertAlmostEqual(norm, want_norm, delta=10 * relative * want_norm, msg=f"norm of step {step}")

    def test_wrong_products_end_the_run(self):
        """Before the first step, in one line, whether training, evaluating or generating."""
        cuda = "system.device=cuda"
        self.train("right", "train.steps=1", cuda)
        for fault, number in (("wrong", ""), ("unwritten", "is nan instead of")):
            for command in (("train", "tiny.ini", f"run.dir={fault}"), ("eval", "right", "data.val=data/val_0.bin"),
                            ("generate", "right", "--tokens", "3")):
                error = self.run_program(*command, cuda, code=1, EMULATOR_PRODUCTS=fault).stderr
                line = error.splitlines()[-1]
                self.assertIn("cuBLASLt computes wrong matrix products on this GPU", line)
                self.assertIn(number, line)
            self.assertNotIn("step", " ".join(p.name for p in (self.dir / fault).glob("step_*")))

    def test_losses_are_the_cpus(self):
        cpu = self.train("cpu")
        fp32 = self.train("fp32", "system.device=cuda", "system.precision=fp32")
        bf16 = self.train("bf16", "system.device=cuda", "system.precision=bf16", EMULATOR_SEED="3")
        self.assertGreater(cpu[0][1] - cpu[-1][1], 1)  # it learns
        self.near(fp32, cpu, 1e-4)
        self.near(bf16, cpu, 1e-2)  # bf16 keeps 8 bits
        self.assertNotEqual(bf16, fp32)

    def test_muon(self):
        """The CPU's losses; and a resumed run is the one that was not ended."""
        muon = ["train.optimizer=muon", "train.muon_lr=0.02", "run.save_every=7"]
        cpu = self.train("muon_cpu", *muon)
        bf16 = [*muon, "system.device=cuda", "system.precision=bf16"]
        whole = self.train("muon_bf16", *bf16)
        self.near(whole, cpu, 2e-2)
        shutil.rmtree(self.dir / "muon_bf16" / "step_00000020")
        shutil.rmtree(self.dir / "muon_bf16" / "step_00000014")
        (self.dir / "muon_bf16").rename(self.dir / "muon_resumed")
        self.assertEqual(self.train("muon_resumed", *bf16), whole)

    def test_plans_are_kept(self):
        """A run that is resumed takes the algorithms of its plan file; a damaged file is replaced."""
        plans = self.dir / "plans" / "plans-00000.txt"
        cuda = ["system.device=cuda", "system.precision=bf16", "run.save_every=2"]
        self.train("plans", *cuda, "train.steps=2")
        first = plans.read_text()
        self.assertIn("\nmatmul ", first)
        plans.write_text(first + "?")
        done = self.run_program("train", "tiny.ini", "run.dir=plans", *cuda, "train.steps=4")
        self.assertIn("plans-00000.txt is ignored: it is damaged", done.stderr)
        self.assertEqual([line.split(" = ")[0] for line in plans.read_text().splitlines()[:-1]],
                         [line.split(" = ")[0] for line in first.splitlines()[:-1]])
        before = plans.stat()
        done = self.run_program("train", "tiny.ini", "run.dir=plans", *cuda, "train.steps=6")
        self.assertNotIn("plans-00000", done.stderr)
        self.assertEqual(plans.stat().st_mtime_ns, before.st_mtime_ns)

    def test_order_does_not_matter(self):
        """What runs when, on the GPU, changes nothing: not a bit."""
        cuda = ["system.device=cuda", "system.precision=bf16", "train.steps=5"]
        curves = {}
        for gelu in ("apart", "fused"):
            curves[gelu] = self.train(f"{gelu}_4", *cuda, EMULATOR_SEED="4", IHA_GELU=gelu)
            self.assertEqual(curves[gelu], self.train(f"{gelu}_7", *cuda, EMULATOR_SEED="7", IHA_GELU=gelu), gelu)
        for (step, loss, _), (_, other, _) in zip(curves["apart"], curves["fused"], strict=True):
            self.assertNotEqual(loss, other)  # rounded otherwise
            self.assertAlmostEqual(loss, other, delta=2e-3 * loss, msg=f"step {step}")

    def test_saves_and_resumes(self):
        cuda = ["system.device=cuda", "system.precision=bf16", "run.save_every=7"]
        whole = self.train("whole", *cuda)
        # What a run that was ended in step 8 leaves.
        for left in (self.dir / "whole").glob("step_*"):
            if int(left.name[5:]) > 7:
                shutil.rmtree(left)
        (self.dir / "whole").rename(self.dir / "resumed")
        self.assertEqual(self.train("resumed", *cuda), whole)
        self.assertTrue((self.dir / "resumed" / "step_00000020").is_dir())

    def test_no_gpu(self):
        done = self.run_program("train", "tiny.ini", "run.dir=none", "system.device=cuda", code=2, EMULATOR_GPUS="0")
        self.assertIn("no GPU", done.stderr)

    def test_unusable_gpus(self):
        """A driver that is too old: an error, or a warning that the CPU is taken; a machine without GPUs is no news."""
        old = {"EMULATOR_GPUS": "0", "EMULATOR_DRIVER": "12020"}
        why = "the NVIDIA driver is too old: it supports CUDA up to 12.2, and this program was built with CUDA 13.0"
        done = self.run_program("train", "tiny.ini", "run.dir=old", "system.device=cuda", code=2, **old)
        self.assertIn(f"system.device = cuda: {why}", done.stderr)
        for device, environment, warns in (("auto", old, True), ("cpu", old, False), ("auto", {"EMULATOR_GPUS": "0"}, False),
                                           ("auto", {"EMULATOR_GPUS": "0", "EMULATOR_DRIVER": "0"}, False)):
            done = self.run_program("info", "tiny.ini", f"system.device={device}", **environment) if device == "auto" else \
                self.run_program("train", "tiny.ini", "run.dir=cpu_only", "train.steps=1", "system.device=cpu", **environment)
            self.assertEqual(f"warning: system.device = auto takes the CPU: {why}" in done.stderr, warns)
            self.assertEqual("warning" in done.stderr, warns, done.stderr)


if __name__ == "__main__":
    unittest.main()
