#!/usr/bin/env python3
"""The synthetic tasks against brute force: labels, balance, splits, and a run that reads them.

    make && python -m unittest tests.cli.test_tasks
"""

import itertools
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from tests.lib.runs import Case, lines_of

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "data" / "tasks.py"
PADDING = -2


def composition(matrix, order):
    """Whether a path of `order` steps leads from i to j, by trying all of them."""
    m = len(matrix)
    inner = list(itertools.product(range(m), repeat=order - 1))
    return [[int(any(all(matrix[a][b] for a, b in itertools.pairwise((i, *path, j))) for path in inner))
             for j in range(m)] for i in range(m)]


def cpm3(x, modulus, factor):
    return [sum((xi + factor * xj + xl) % modulus == 0 for xj in x for xl in x) for xi in x]


class TasksCase(Case):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls.temporary.name)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def tasks(self, *arguments, expect=0):
        run = subprocess.run([sys.executable, TASKS, *arguments], capture_output=True, text=True)
        self.assertEqual(run.returncode, expect, run.stderr)
        return run

    def make(self, name, *arguments, train=300, val=40, test=40):
        """{split: [(tokens, labels) without padding, ...]} of a new folder `name`."""
        folder = self.tmp / name
        self.tasks(*arguments, "--out", folder, "--train", str(train), "--val", str(val), "--test", str(test))
        description = json.loads((folder / "dataset.json").read_text())
        splits = {}
        for split, count in (("train", train), ("val", val), ("test", test)):
            tokens = np.fromfile(folder / f"{split}_000000.bin", "<u2")[512:]
            labels = np.fromfile(folder / f"{split}_000000.labels", "<i4")[256:]
            self.assertEqual(len(tokens), len(labels))
            self.assertEqual(labels[-1], -1)
            rows = zip(tokens[:-1].reshape(count, -1), labels[:-1].reshape(count, -1))
            splits[split] = [(row[targets != PADDING].tolist(), targets[targets != PADDING].tolist())
                             for row, targets in rows]
            self.assertTrue((tokens[:-1][labels[:-1] == PADDING] == description["separator"]).all())
            self.assertLess(max(tokens.max(), labels.max()), description["vocab_size"])
        examples = [tuple(tokens) for rows in splits.values() for tokens, _ in rows]
        self.assertEqual(len(set(examples)), len(examples), "an example stands twice")
        return splits


class Labels(TasksCase):
    def test_compositions(self):
        for name, order, sizes in (("binary", 2, range(6, 11)), ("ternary", 3, range(5, 9))):
            splits = self.make(name, name)
            seen = set()
            for tokens, labels in splits["train"]:
                m = round(len(tokens) ** 0.5)
                seen.add(m)
                matrix = [tokens[i * m:(i + 1) * m] for i in range(m)]
                self.assertEqual(sum(composition(matrix, order), []), labels)
            self.assertEqual(seen, set(sizes))

    def test_balance_of_compositions(self):
        """Shares of ones as simulated independently: 61.1 % and 50.1 %, of the inputs 0.325 and 0.264."""
        for name, share, density in (("binary", 0.611, 0.325), ("ternary", 0.501, 0.264)):
            rows = self.make(name + "_balance", name, train=4000)["train"]
            tokens, labels = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
            self.assertAlmostEqual(labels.mean(), share, delta=0.012)
            self.assertAlmostEqual(tokens.mean(), density, delta=0.004)

    def test_cpm3(self):
        splits = self.make("cpm3", "cpm3", "--length", "6", "--modulus", "5", "--factor", "12")
        for tokens, labels in splits["train"]:
            self.assertEqual(cpm3(tokens, 5, 12), labels)

    def test_polynomial(self):
        """The same coefficients in all splits, found from one shifted one at a time."""
        splits = self.make("polynomial", "polynomial", "--length", "8", "--modulus", "5", "--order", "3")
        rows = sum(splits.values(), [])
        fits = [c for c in itertools.product(range(5), repeat=3)
                if all(labels[i] == sum(c[k] * tokens[i - k] for k in range(3)) % 5
                       for tokens, labels in rows[:20] for i in range(8))]
        self.assertEqual(len(fits), 1)
        self.assertNotIn(0, fits[0])
        for tokens, labels in rows:
            self.assertEqual(labels, [sum(c * tokens[i - k] for k, c in enumerate(fits[0])) % 5 for i in range(8)])

    def test_multikey_bytes(self):
        for haystack in ("filler", "needles"):
            splits = self.make(f"multikey_{haystack}", "multikey", "--haystack", haystack, "--length", "400", "--pairs",
                               "3", train=50)
            for tokens, labels in splits["train"]:
                self.assertEqual(tokens[-1], 256)
                text = bytes(tokens[:-1]).decode()
                prompt, answer = text[:-7], text[-7:]
                key = prompt.split("for ")[-1].removesuffix(" is: ")
                self.assertEqual(prompt.count(f"for {key} is: {answer}."), 1)
                needles = prompt.count("One of the special magic numbers for ")
                self.assertEqual(needles, 3 if haystack == "filler" else (400 - 97) // 59)
                # Every digit is predicted one position before it, and nothing else counts.
                self.assertEqual([label for label in labels if label >= 0], list(answer.encode()))
                self.assertEqual([i for i, label in enumerate(labels) if label >= 0],
                                 list(range(len(prompt) - 1, len(text) - 1)))

    def test_multikey_ids(self):
        for haystack in ("filler", "needles"):
            splits = self.make(f"ids_{haystack}", "multikey", "--form", "ids", "--haystack", haystack, "--length", "64",
                               "--value-tokens", "2", train=50)
            for tokens, labels in splits["train"]:
                *context, mark, key, first, second, _ = tokens
                self.assertEqual(mark, 0)
                at = context.index(key)
                self.assertEqual(context[at + 1:at + 3], [first, second])
                self.assertEqual(context.count(key), 1)
                self.assertEqual(labels[-5:], [-1, first, second, -1, -1])
                self.assertEqual(set(labels[:-5]), {-1})


class Files(TasksCase):
    def test_the_seed_decides(self):
        first, again, other = (self.make(name, "binary", "--seed", seed, train=20)
                               for name, seed in (("a", "3"), ("b", "3"), ("c", "4")))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def test_a_larger_training_set_keeps_the_others(self):
        small, large = (self.make(name, "ternary", train=n) for name, n in (("small", 20), ("large", 60)))
        self.assertEqual(small["val"], large["val"])
        self.assertEqual(small["test"], large["test"])

    def test_what_is_refused(self):
        self.make("taken", "binary", train=2, val=2, test=2)
        for arguments, message in (
                (["binary", "--out", self.tmp / "taken"], "already holds shards"),
                (["cpm3", "--factor", "3", "--out", self.tmp / "x"], "more than twice"),
                (["multikey", "--pairs", "50", "--out", self.tmp / "x"], "do not fit --length 512"),
                (["multikey", "--text", self.tmp / "none", "--out", self.tmp / "x"], "none: No such file"),
                (["polynomial", "--length", "2", "--modulus", "2", "--out", self.tmp / "x"], "different examples"),
                (["binary", "--train", "0", "--out", self.tmp / "x"], "--train")):
            error = self.tasks(*arguments, expect=2).stderr
            self.assertEqual(error.count("\n"), 1, error)
            self.assertIn(message, error)
        self.assertFalse((self.tmp / "x").exists())

    def test_a_run_reads_them(self):
        self.make("run", "binary", train=64, val=20)
        config = self.tmp / "task.ini"
        config.write_text("""\
[model]
vocab_size = 3
causal = false
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
layer_pattern = iha_global
position_embedding = learned
[train]
seq_len = 100
micro_batch = 8
epochs = 2
lr = 1e-2
[data]
train = run/train_*.bin
val = run/val_*.bin
segments = documents
[system]
device = cpu
precision = fp32
[run]
dir = trained
eval_every = 8
""")
        self.run_cli("train", config)
        steps = lines_of(self.tmp / "trained" / "metrics.jsonl")
        evaluation = [line for line in steps if "val_accuracy" in line]
        self.assertEqual(len(evaluation), 2)
        self.assertGreater(evaluation[-1]["val_accuracy"], 0.4)


if __name__ == "__main__":
    unittest.main()
