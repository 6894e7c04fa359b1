"""scripts/watch.py: what TensorBoard and W&B get is what metrics.jsonl says, past restarts too.

    make && python -m unittest tests.cli.test_watch

The parts that need tensorboard or wandb are skipped without them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WATCH = ROOT / "scripts/watch.py"


def line(step, **more):
    return json.dumps({"step": step, "loss": 3 + 1 / step, "lr": 0.001, "grad_norm": 1.5, "tokens": step * 128,
                       "tokens_per_second": 99.5, "mfu": None, "skipped": False, **more}) + "\n"


class Watch(unittest.TestCase):
    def setUp(self):
        self.tmp = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.tmp, ignore_errors=True)
        self.run_dir = self.tmp / "one"
        self.run_dir.mkdir()
        self.metrics = self.run_dir / "metrics.jsonl"

    def watch(self, *args, code=0, **environment):
        done = subprocess.run([sys.executable, WATCH, *map(str, args)], capture_output=True, text=True, timeout=120,
                              env={**os.environ, **environment}, cwd=self.tmp)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def scalars(self, folder):
        """{name: [(step, value)]} as TensorBoard itself reads them."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    @unittest.skipUnless(importlib.util.find_spec("tensorboard"), "needs tensorboard")
    def test_tensorboard(self):
        self.metrics.write_text("".join(line(step) for step in range(1, 6)) + '{"step": 5, "val_loss": 2.5}\n'
                                '{"step": 5, "task": "words", "accuracy": 0.25, "accuracy_norm": 0.5}\n{"step": 6, "lo')
        self.watch(self.run_dir, "--to", "tensorboard", "--out", self.tmp / "tb", "--once")
        got = self.scalars(self.tmp / "tb/one")
        self.assertEqual([step for step, _ in got["train/loss"]], [1, 2, 3, 4, 5])
        for step, value in got["train/loss"]:
            self.assertAlmostEqual(value, 3 + 1 / step, places=5)
        self.assertEqual((got["val/loss"], got["tasks/words/accuracy_norm"]), ([(5, 2.5)], [(5, 0.5)]))
        self.assertNotIn("speed/mfu", got)

    @unittest.skipUnless(importlib.util.find_spec("tensorboard"), "needs tensorboard")
    def test_a_restart(self):
        """A run goes back to step 3 and continues otherwise, while it is watched; the process it belongs to ends."""
        sleeper = subprocess.Popen(["sleep", "1000"])
        watcher = subprocess.Popen([sys.executable, WATCH, self.run_dir, "--to", "tensorboard", "--out", self.tmp / "tb", "--pid",
                                    str(sleeper.pid)], env={**os.environ, "WATCH_SECONDS": "0.05"})
        self.addCleanup(watcher.kill)
        self.addCleanup(sleeper.kill)
        self.metrics.write_text("".join(line(step) for step in range(1, 7)))
        self.wait(lambda: list(self.tmp.rglob("events*")) and "train/loss" in self.scalars(self.tmp / "tb/one"))
        other = self.run_dir / "metrics.jsonl.tmp"
        other.write_text("".join(line(step) for step in range(1, 4)) + line(4, loss=9.0))
        other.rename(self.metrics)
        self.wait(lambda: self.scalars(self.tmp / "tb/one")["train/loss"][-1] == (4, 9.0))
        sleeper.kill()
        sleeper.wait()
        self.assertEqual(watcher.wait(timeout=60), 0)
        self.assertEqual([step for step, _ in self.scalars(self.tmp / "tb/one")["train/loss"]], [1, 2, 3, 4])

    def wait(self, condition):
        end = time.monotonic() + 60
        while not condition():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)

    @unittest.skipUnless(importlib.util.find_spec("wandb"), "needs wandb")
    def test_wandb_offline(self):
        self.metrics.write_text(line(1) + line(2))
        self.watch(self.run_dir, "--to", "wandb", "--out", self.tmp / "wb", "--once", WANDB_MODE="offline", HOME=str(self.tmp))
        files = list((self.tmp / "wb").rglob("*.wandb"))
        self.assertEqual(len(files), 1)
        self.assertIn(b"train/loss", files[0].read_bytes())

    def test_bad_input(self):
        with tempfile.TemporaryDirectory() as empty:
            for args, says in (([self.run_dir], "--to"), ([self.run_dir, "--to", "excel"], "excel"), (["--to", "wandb"], "RUN")):
                done = self.watch(*args, code=2)
                self.assertEqual((done.stdout, len(done.stderr.splitlines())), ("", 1))
                self.assertIn(says, done.stderr)
            for target in ("tensorboard", "wandb"):
                if importlib.util.find_spec(target) is None:
                    done = self.watch(self.run_dir, "--to", target, code=2)
                    self.assertEqual(len(done.stderr.splitlines()), 1)
                    self.assertIn("not installed", done.stderr)
                    launch = subprocess.run([ROOT / "scripts/launch.sh", "--watch", target, "train", "configs/quickstart.ini"],
                                            cwd=ROOT, capture_output=True, text=True)
                    self.assertEqual((launch.returncode, len(launch.stderr.splitlines())), (2, 1), launch.stderr)
                    self.assertIn("not installed", launch.stderr)


if __name__ == "__main__":
    unittest.main()
