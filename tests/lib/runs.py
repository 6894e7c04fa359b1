"""What tests that run train_iha share: the binary and its environment, a folder with shards and a tiny configuration,
and readers of what a run leaves.

The binary is ./train_iha, or the one that TRAIN_IHA names.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.lib.tiny import tiny_config, write_shard

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = str(Path(os.environ.get("TRAIN_IHA", ROOT / "train_iha")).resolve())
CHECK = ROOT / "tests" / "reference" / "export_check.py"
TIMEOUT = 180  # seconds, where others use the machine too; runs here take less than one
# Threads that spin while they wait take the cores from other programs.
ENVIRONMENT = {**os.environ, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "100")}

END_OF_DOCUMENT = 256  # the byte tokenizer's
T = 32  # sequence length
CPU = ["system.device=cpu", "system.precision=fp32", "system.threads=2"]


def tiny(data):
    return tiny_config(data, seq_len=T, batch_tokens=128, steps=20, system="precision = fp32\nthreads = 2",
                       run="dir = runs/default")


def sentences(count, seed):
    """Text with a simple grammar, which a model can learn."""
    draw = random.Random(seed)
    names, verbs, things = ("anna", "boris", "clara", "david"), ("sees", "takes", "likes"), ("apples", "books", "cats")
    return [f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}. " for _ in range(count)]


def documents(count, seed):
    """Token ids: every fourth sentence ends a document."""
    ids = []
    for i, sentence in enumerate(sentences(count, seed)):
        ids += sentence.encode()
        if i % 4 == 3:
            ids.append(END_OF_DOCUMENT)
    return ids


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_timings(records):
    return [{key: x for key, x in r.items() if key not in ("tokens_per_second", "mfu")} for r in records]


def losses(run_dir):
    return np.array([r["loss"] for r in lines_of(run_dir / "metrics.jsonl") if "loss" in r])


def val_losses(run_dir):
    return {r["step"]: r["val_loss"] for r in lines_of(run_dir / "metrics.jsonl") if "val_loss" in r}


def steps_in(run_dir):
    return sorted(int(p.name[5:]) for p in run_dir.glob("step_????????"))


def step_dir(run_dir, step):
    return run_dir / f"step_{step:08d}"


def tree(folder):
    """{path: bytes, or the target of a link} of everything in a folder; directories are None."""
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
            for p in Path(folder).rglob("*")}


def start(*args, **options):
    return subprocess.Popen([BINARY, *map(str, args)], env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


class Case(unittest.TestCase):
    """A temporary folder with shards of uint16 and uint32 and the tiny configuration."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls.temporary.name)
        cls.data, cls.wide = cls.tmp / "data", cls.tmp / "wide"
        for folder, wide in ((cls.data, False), (cls.wide, True)):
            folder.mkdir()
            for i in range(2):
                write_shard(folder / f"train_{i}.bin", documents(160, i), wide)
            write_shard(folder / "val_0.bin", documents(40, 9), wide)
        cls.val = cls.data / "val_0.bin"
        cls.config = cls.tmp / "tiny.ini"
        cls.config.write_text(tiny(cls.data))

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def run_cli(self, *args, code=0, cwd=None):
        done = subprocess.run([BINARY, *map(str, args)], env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=TIMEOUT, cwd=cwd or self.tmp)
        self.assertEqual(done.returncode, code, f"{args}\n{done.stdout!r}\n{done.stderr.decode()}")
        return done

    def new_dir(self, name=None):
        return Path(tempfile.mkdtemp(dir=self.tmp)) / (name or "run")

    def train(self, *overrides, run_dir=None, config=None, code=0):
        run_dir = run_dir or self.new_dir()
        self.last = self.run_cli("train", config or self.config, f"run.dir={run_dir}", *overrides, code=code)
        return run_dir

    def evaluate(self, checkpoint, *overrides):
        """(val_loss, tokens, the loss's digits) of the last line on stdout."""
        out = self.run_cli("eval", checkpoint, *CPU, *overrides).stdout.decode()
        match = re.fullmatch(r"val_loss (\d+\.\d{7}) (\d+)", out.splitlines()[-1])
        self.assertTrue(match, out)
        return float(match[1]), int(match[2]), match[1]

    def refused(self, *args, names=(), warnings=False, cwd=None):
        """Exit code 2 and one line on stderr, which contains `names`. Returns the line."""
        done = self.run_cli(*args, code=2, cwd=cwd)
        lines = done.stderr.decode().splitlines()
        if warnings:
            lines = [line for line in lines if not line.startswith("warning: ")]
        self.assertEqual(len(lines), 1, lines)
        self.assertTrue(lines[0].startswith("train_iha: "), lines)
        self.assertEqual(done.stdout, b"")
        for name in names:
            self.assertIn(str(name), lines[0])
        return lines[0]

    def check_export(self, checkpoint, shard=None, rtol=1e-5, **kind):
        """The checkpoint as other programs read it: names, shapes, types, and the loss that NumPy computes."""
        shard = shard or self.val
        loss, tokens, _ = self.evaluate(checkpoint, f"data.val={shard}")
        done = subprocess.run([sys.executable, CHECK, checkpoint, "--numpy-loss", shard, str(T), str(tokens // T)],
                              capture_output=True, text=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr)
        word, expected, count = done.stdout.splitlines()[-1].split()
        self.assertEqual((word, int(count)), ("val_loss", tokens))
        self.assertTrue(math.isclose(loss, float(expected), rel_tol=rtol), (loss, expected))
        config = json.loads((checkpoint / "config.json").read_text())
        self.assertEqual({key: config[key] for key in kind}, kind)
        return load_file(checkpoint / "model.safetensors")

    def stop_between_steps(self, step, *overrides):
        """A run that has done `step` steps, their metrics and checkpoints, and is blocked before the next one.
        Returns (process, run directory); free(process, directory) unblocks it."""
        run_dir = self.new_dir()
        run_dir.mkdir()
        os.mkfifo(run_dir / "samples.txt")
        process = start("train", self.config, f"run.dir={run_dir}", f"run.sample_every={step}", *overrides)
        self.addCleanup(self.end, process)
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + TIMEOUT
        while not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
            self.assertIsNone(process.poll(), "the run ended early")
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.005)
        return process, run_dir

    @staticmethod
    def end(process):
        process.kill()
        process.communicate()

    @staticmethod
    def free(process, run_dir):
        with open(run_dir / "samples.txt", "rb") as pipe:
            (run_dir / "samples.txt").unlink()
            pipe.read()
        out, err = process.communicate(timeout=TIMEOUT)
        return process.returncode, err.decode()
