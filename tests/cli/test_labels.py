#!/usr/bin/env python3
"""Training and evaluating with labels: what counts, what is recorded, and how epochs and patience end a run.

    make && python -m unittest tests.cli.test_labels
"""

import json
import math
import re
import shutil
import tempfile
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.lib.labelled_task import LENGTH, answers, make_task, sequences, write_task
from tests.lib.runs import Case, lines_of, losses, step_dir, steps_in, tree, without_timings
from tests.lib.tiny import write_shard

BATCH = 24  # sequences of a step
ALL_STEPS = 180  # nine epochs of 480 sequences


def steps_of(run_dir):
    return [r for r in lines_of(run_dir / "metrics.jsonl") if "loss" in r]


def evaluations_of(run_dir):
    return [r for r in lines_of(run_dir / "metrics.jsonl") if "val_loss" in r]


class LabelsCase(Case):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls.temporary.name)
        cls.config = make_task(cls.tmp)

    def shard(self, name, tokens, labels=None):
        write_task(self.tmp / name, tokens, labels)
        return name

    def figures(self, checkpoint, *overrides):
        """{name: (value, count)} of the lines on stdout of eval."""
        lines = self.run_cli("eval", checkpoint, *overrides).stdout.decode().splitlines()
        found = [re.fullmatch(r"(val_\w+) (\d+\.\d{7}) (\d+)", line) for line in lines]
        self.assertTrue(all(found), lines)
        return {m[1]: (float(m[2]), int(m[3])) for m in found}


class Learning(LabelsCase):
    def test_a_task_is_learned(self):
        run_dir = self.train()
        err = self.last.stderr.decode()
        steps, evaluations = steps_of(run_dir), evaluations_of(run_dir)
        self.assertIn(f"{ALL_STEPS} steps (train.epochs = 9)", err)
        # The best is saved at once, and three evaluations without a better one end the run.
        best = next(r["step"] for r in evaluations if r["val_exact"] == 1)
        self.assertLess(best + 15, ALL_STEPS)
        self.assertEqual(len(steps), best + 15)
        self.assertEqual(steps_in(run_dir), [best, best + 15])
        self.assertEqual((run_dir / "best").resolve().name, f"step_{best:08d}")
        self.assertIn(f"train.patience = 3: validation exact has not improved since step {best} (1)\n", err)
        self.assertIn(f"done: {best + 15} steps", err)
        # What is recorded.
        self.assertEqual(list(steps[0]), ["step", "loss", "lr", "grad_norm", "tokens", "target_tokens",
                                          "tokens_per_second", "mfu", "skipped"])
        self.assertEqual(list(evaluations[0]), ["step", "val_loss", "val_accuracy", "val_exact"])
        self.assertEqual(sum(r["target_tokens"] for r in steps[:20]), (answers(sequences(480, 1)) >= 0).sum())
        self.assertEqual(steps[1]["tokens"], 2 * BATCH * LENGTH)
        self.assertLess(evaluations[0]["val_exact"], evaluations[0]["val_accuracy"])
        # eval finds the same.
        labels = answers(sequences(50, 2)) >= 0
        found = self.figures(run_dir / "best", "data.val=val.bin", "system.device=cpu")
        last = next(r for r in evaluations if r["step"] == best)
        for name, count in (("val_accuracy", labels.sum()), ("val_exact", labels.any(axis=1).sum()),
                            ("val_loss", labels.sum())):
            self.assertEqual(found[name][1], count)
            self.assertAlmostEqual(found[name][0], last[name], delta=6e-8)
        self.assertEqual(list(found)[-1], "val_loss")
        # Started again, it is finished.
        before = {k: x for k, x in tree(run_dir).items() if k != "lock"}
        self.train(run_dir=run_dir)
        self.assertIn("already finished: it is at step", self.last.stdout.decode())
        self.assertIn("train.patience = 3 evaluations", self.last.stdout.decode())
        self.assertEqual({k: x for k, x in tree(run_dir).items() if k != "lock"}, before)
        # With more patience it goes on.
        self.train("train.patience=4", run_dir=run_dir)
        self.assertEqual(len(steps_of(run_dir)), best + 20)

    def test_micro_batches(self):
        runs = [self.train(f"train.micro_batch={b}", "train.epochs=2", "train.patience=0") for b in (24, 1, 3, 8)]
        for other in runs[1:]:
            np.testing.assert_allclose(losses(other), losses(runs[0]), rtol=1e-4)
            np.testing.assert_allclose(losses(other)[0], losses(runs[0])[0], rtol=1e-6)
            for key in ("target_tokens", "grad_norm"):
                np.testing.assert_allclose([r[key] for r in steps_of(other)], [r[key] for r in steps_of(runs[0])],
                                           rtol=1e-3)
            for a, b in zip(evaluations_of(other), evaluations_of(runs[0])):
                self.assertEqual((a["val_accuracy"], a["val_exact"]), (b["val_accuracy"], b["val_exact"]))

    def test_recorded_loss_is_a_plain_mean(self):
        """A step over all of a shard, without a change to the weights, has the loss that eval finds."""
        for micro_batch in (480, 5):
            run_dir = self.train("train.steps=1", "train.epochs=none", "train.lr=0", "data.val=none", "run.eval_every=0",
                                 f"train.batch_tokens={480 * LENGTH}", f"train.micro_batch={micro_batch}",
                                 "train.patience=0", "train.best_by=loss")
            loss, count = self.figures(run_dir, "data.val=train.bin", "system.device=cpu")["val_loss"]
            step, = steps_of(run_dir)
            self.assertEqual(count, step["target_tokens"])
            self.assertTrue(math.isclose(loss, step["loss"], rel_tol=1e-6), (loss, step))

    def test_eval_averages_over_labels(self):
        run_dir = self.train("train.epochs=0.5", "train.patience=0")
        tokens = sequences(40, 3)
        write_shard(self.tmp / "next.bin", np.append(tokens, 0))
        following = np.append(tokens, 0)[1:].reshape(tokens.shape)
        counts = np.random.default_rng(4).integers(0, 2, tokens.shape) == 1
        parts = []
        for name, labels in (("all", following), ("some", np.where(counts, following, -1)),
                             ("rest", np.where(counts, -2, following))):
            parts.append(self.figures(run_dir, f"data.val={self.shard(name + '.bin', tokens, labels)}"))
        plain = self.figures(run_dir, "data.val=next.bin")
        self.assertEqual(list(plain), ["val_loss"])
        self.assertEqual(plain["val_loss"], parts[0]["val_loss"])
        self.assertEqual([p["val_loss"][1] for p in parts], [tokens.size, counts.sum(), (~counts).sum()])
        for key in ("val_loss", "val_accuracy"):
            whole, some, rest = (p[key] for p in parts)
            self.assertAlmostEqual(whole[0], (some[0] * some[1] + rest[0] * rest[1]) / whole[1], places=6)


class Counting(LabelsCase):
    def test_a_step_without_targets(self):
        tokens = sequences(3 * BATCH, 5)
        labels = answers(tokens)
        labels[2 * BATCH:] = -1
        shard = self.shard("ends.bin", tokens, labels)
        run_dir = self.train(f"data.train={shard}", "data.shuffle=false", "train.epochs=1", "train.patience=0",
                             "train.max_skips=0", "run.save_every=1", "run.keep=0")
        self.assertIn("  NO TARGETS\n", self.last.stderr.decode())
        step = steps_of(run_dir)[2]
        self.assertEqual([step[k] for k in ("loss", "grad_norm", "target_tokens", "skipped")], [None, 0, 0, False])
        self.assertLess(step["lr"], steps_of(run_dir)[1]["lr"])
        for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
            self.assertEqual(*((step_dir(run_dir, s) / name).read_bytes() for s in (2, 3)))
        trainer = json.loads((step_dir(run_dir, 3) / "trainer.json").read_text())
        self.assertEqual((trainer["updates"], trainer["skips_run"], trainer["step"]), (2, 0, 3))

    def test_validation_data_in_which_nothing_counts(self):
        tokens = sequences(40, 6)
        labels = np.full(tokens.shape, -1)
        nothing = self.shard("nothing.bin", tokens, labels)
        labels[20, 3] = 1
        late = self.shard("late.bin", tokens, labels)
        run_dir = self.train("train.epochs=0.1", "train.patience=0", f"data.val={late}")
        self.assertEqual(self.figures(run_dir, f"data.val={late}")["val_exact"][1], 1)
        for data in ([f"data.val={nothing}"], [f"data.val={late}", "run.eval_batches=5"]):
            self.refused("train", self.config, "run.dir=refused", *data, names=["data.val", "no label counts"])
            self.refused("eval", run_dir, *data, "train.micro_batch=4", names=["data.val", "no label counts"])
        self.assertFalse((self.tmp / "refused").exists())

    def test_best_by_needs_labels(self):
        write_shard(self.tmp / "plain.bin", np.append(sequences(40, 6), 0))
        line = self.refused("train", self.config, "run.dir=refused", "data.val=plain.bin", names=["train.best_by = exact"])
        self.assertIn("plain.bin", line)


class Ending(LabelsCase):
    def test_epochs(self):
        for epochs, steps in (("1", 20), ("0.26", 6), ("1e-3", 1)):
            run_dir = self.train(f"train.epochs={epochs}", "train.patience=0")
            self.assertEqual(len(steps_of(run_dir)), steps)
            self.train(f"train.epochs={epochs}", "train.patience=0", run_dir=run_dir)
            self.assertIn(f"train.epochs = {epochs.replace('1e-3', '0.001')} are {steps} steps",
                          self.last.stdout.decode())
            self.assertIn(f"Steps: {steps} of {BATCH * LENGTH} tokens, for train.epochs = ", self.run_cli(
                "info", self.config, f"train.epochs={epochs}").stdout.decode())
        self.train("train.epochs=none", "train.steps=3", "train.patience=0", run_dir=run_dir)  # steps may change
        self.assertEqual(len(steps_of(run_dir)), 3)
        self.refused("train", self.config, "run.dir=refused", "train.steps=3", names=["train.epochs", "train.steps"])
        self.refused("train", self.config, "run.dir=refused", "train.warmup_steps=181",
                     names=["train.warmup_steps = 181", "180 steps of train.epochs = 9"])
        self.assertIn("data.train cannot be opened", self.run_cli("info", self.config, "data.train=none.bin").stdout.decode())

    def assert_same_end(self, run_dir, whole):
        self.assertEqual(steps_in(run_dir), steps_in(whole))
        self.assertEqual(without_timings(lines_of(run_dir / "metrics.jsonl")),
                         without_timings(lines_of(whole / "metrics.jsonl")))
        a, b = tree(run_dir), tree(whole)
        self.assertEqual(a["best"], b["best"])
        for name in a:
            if name.endswith(".safetensors"):
                self.assertEqual(a[name], b[name], name)
            elif name.endswith("trainer.json"):
                x, y = ({k: v for k, v in json.loads(t).items() if k not in ("seconds", "config")} for t in (a[name], b[name]))
                self.assertEqual(x, y)

    def test_patience_over_resumes(self):
        """Resumed from any of its checkpoints, a run ends at the same step, with the same files."""
        options = ["run.save_every=7", "run.keep=3", "run.eval_every=4", "train.best_by=loss", "train.grad_clip=0",
                   "train.lr=0.2", "train.schedule=constant", "train.patience=4"]
        whole = self.train(*options)
        last = len(steps_of(whole))
        self.assertLess(last, ALL_STEPS)
        best = int((whole / "best").resolve().name[5:])
        self.assertGreater(best, 8)
        everything = self.train(*options, "run.keep=0")
        self.assertEqual(steps_in(everything)[-1], last)
        for step in steps_in(everything)[:-1]:
            run_dir = self.new_dir()
            shutil.copytree(everything, run_dir, symlinks=True)
            for later in steps_in(everything):
                if later > step:
                    shutil.rmtree(step_dir(run_dir, later))
            self.train(*options, run_dir=run_dir)
            self.assertIn(f"resuming from {step_dir(run_dir, step)}\n", self.last.stderr.decode())
            self.assert_same_end(run_dir, whole)

    def test_weights_of_the_best(self):
        """best is what a run that ends at that step has."""
        run_dir = self.train("train.schedule=constant")
        best = int((run_dir / "best").resolve().name[5:])
        other = self.train("train.schedule=constant", "train.epochs=none", f"train.steps={best}")
        a, b = (load_file(folder / "model.safetensors") for folder in (run_dir / "best", step_dir(other, best)))
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


if __name__ == "__main__":
    unittest.main()
