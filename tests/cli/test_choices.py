"""eval.tasks: choices made by data/prepare.py --choices, and their scores against a reference computed from logits.

    make && python -m unittest tests.cli.test_choices
"""

import json
import random
import re
import subprocess
import sys
import unittest

import numpy as np
from safetensors.numpy import load_file

from tests.lib.ranks import MPI_ENVIRONMENT, MPIRUN
from tests.lib.runs import BINARY, CPU, ROOT, TIMEOUT, Case, lines_of, step_dir

sys.path.insert(0, str(ROOT / "tests/reference"))
import iha_reference  # noqa: E402

PREPARE = ROOT / "data/prepare.py"
SEPARATOR = 256
T = 40


def prepare(*args, code=0):
    done = subprocess.run([sys.executable, PREPARE, "--tokenizer", "bytes", "--choices", *map(str, args)],
                          capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def items(count, seed):
    """Items with 2 to 5 endings, some of them without a context, some too long for the model."""
    draw = random.Random(seed)
    words = ("anna", "boris", "sees", "takes", "apples", "books", "cats. ", "é")
    text = lambda low, high: " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))
    for i in range(count):
        endings = [text(1, 4) for _ in range(draw.randint(2, 5))]
        label = draw.randrange(len(endings))
        yield {"context" if i % 2 else "ctx": text(0, 8), "endings": endings, "label": label if i % 3 else str(label)}


def table(text):
    """{task: (items, chance, accuracy, normalised)} in per cent."""
    rows = re.findall(r"^  (\S+) +(\d+) +([\d.]+)% +([\d.]+)% +([\d.]+)%(?:  \((\d+) contexts cut\))?$", text, re.M)
    return {name: (int(n), *map(float, numbers), int(cut or 0)) for name, n, *numbers, cut in rows}


class Choices(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir, cls.folder = cls.tmp / "trained", cls.tmp / "choices"
        cls.rows = list(items(61, 1))
        (cls.tmp / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cls.rows))
        (cls.tmp / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items(7, 2)))
        cls.printed = prepare("--out", cls.folder, cls.tmp / "small.jsonl", cls.tmp / "other.jsonl").stdout
        cls.tasks = f"eval.tasks={cls.folder}/*.choices"
        cls.done = subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", cls.tasks, "run.eval_every=10",
                                   f"train.seq_len={T}", "train.batch_tokens=160"], capture_output=True, text=True, cwd=cls.tmp)
        assert cls.done.returncode == 0, cls.done.stderr
        cls.checkpoint = step_dir(cls.run_dir, 20)

    def expected(self):
        """(share right by sum, share right by mean over characters, contexts cut), from the reference's logits."""
        weights = {name: x.astype(np.float64) for name, x in load_file(self.checkpoint / "model.safetensors").items()}
        config = json.loads((self.checkpoint / "config.json").read_text())
        plain, normalised, cut = [], [], 0
        for row in self.rows:
            context = row.get("context", row.get("ctx"))
            sums = []
            for ending in row["endings"]:
                tail = list((" " * bool(context and context[-1] != " ") + ending).encode())
                ids = [SEPARATOR, *context.encode(), *tail]
                cut += len(ids) - 1 > T
                ids = ids[-(T + 1):]
                logits = iha_reference.logits(np, config, weights, np.array([ids[:-1]]))[0]
                logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                sums.append(logs[np.arange(len(ids) - 1), ids[1:]][-len(tail):].sum())
            lengths = np.array([len(ending.strip()) for ending in row["endings"]])
            plain.append(int(np.argmax(sums)) == int(row["label"]))
            normalised.append(int(np.argmax(sums / lengths)) == int(row["label"]))
        return np.mean(plain), np.mean(normalised), cut

    def test_reference(self):
        accuracy, normalised, cut = self.expected()
        self.assertGreater(cut, 0)
        self.assertNotEqual(accuracy, normalised)
        line = next(r for r in lines_of(self.run_dir / "metrics.jsonl") if r["step"] == 20 and r.get("task") == "small")
        self.assertEqual((line["accuracy"], line["accuracy_norm"]), (np.float64(f"{accuracy:.9g}"), np.float64(f"{normalised:.9g}")))
        chance = np.mean([1 / len(row["endings"]) for row in self.rows])
        self.assertAlmostEqual(line["chance"], chance, places=8)
        # The same in a table, from batches that hold sequences as one matrix product takes them, and that do not.
        for batch in (1, 3, 16):
            out = self.run_cli("eval", self.checkpoint, *CPU, self.tasks, f"train.micro_batch={batch}").stdout.decode()
            got = table(out)
            self.assertEqual(got["small"], (61, *(round(100 * x, 1) for x in (chance, accuracy, normalised)), cut), out)
            self.assertEqual(list(got), ["other", "small"])
            self.assertNotIn("val_loss", out)

    def test_unaligned_rows(self):
        """T * C * 4 is no multiple of 256 here, so that the classifier runs over all rows for each sequence."""
        outs = {self.run_cli("eval", self.checkpoint, *CPU, self.tasks, "train.seq_len=38", f"train.micro_batch={batch}").stdout
                for batch in (1, 2, 8)}
        self.assertEqual(len(outs), 1)

    def test_in_training(self):
        records = lines_of(self.run_dir / "metrics.jsonl")
        self.assertEqual([(r["step"], r["task"], r["items"]) for r in records if "task" in r],
                         [(10, "other", 7), (10, "small", 61), (20, "other", 7), (20, "small", 61)])
        self.assertIn("step 10: choices\n", self.done.stderr)
        few = self.train(self.tasks, "eval.task_items=5", "run.eval_every=20", "data.val=none")
        self.assertEqual([r["items"] for r in lines_of(few / "metrics.jsonl") if "task" in r], [5, 5])
        # eval scores all items, whatever the run scored
        self.assertEqual(table(self.run_cli("eval", few, *CPU, self.tasks).stdout.decode())["small"][0], 61)
        self.train(self.tasks, "run.eval_every=0", "train.steps=1")
        self.assertIn("warning: eval.tasks has no effect", self.last.stderr.decode())

    def test_ranks(self):
        alone = self.run_cli("eval", self.checkpoint, *CPU, self.tasks).stdout
        for ranks in (2, 3):
            done = subprocess.run([*MPIRUN, "-n", str(ranks), BINARY, "eval", self.checkpoint, *CPU, self.tasks],
                                  env=MPI_ENVIRONMENT, capture_output=True, timeout=TIMEOUT, cwd=self.tmp)
            self.assertEqual((done.returncode, done.stdout), (0, alone), done.stderr)

    def test_with_loss(self):
        out = self.run_cli("eval", self.checkpoint, *CPU, self.tasks, f"data.val={self.val}").stdout.decode()
        self.assertEqual(len(table(out)), 2)
        self.assertRegex(out.splitlines()[-1], r"^val_loss \d+\.\d{7} \d+$")
        out = self.run_cli("eval", self.checkpoint, *CPU, f"data.val={self.val}").stdout.decode()
        self.assertEqual(table(out), {})  # what training evaluated is not evaluated again unasked

    def test_bits_per_byte(self):
        text = self.tmp / "text.txt"
        text.write_text("a sentence of some words. " * 400)
        data = self.tmp / "counted"
        subprocess.run([sys.executable, PREPARE, "--tokenizer", "bytes", "--out", data, text], check=True, capture_output=True)
        shard = json.loads((data / "dataset.json").read_text())["shards"]["val_000000.bin"]
        out = self.run_cli("eval", self.checkpoint, *CPU, f"data.val={data}/val_*.bin").stdout.decode()
        bits, loss = (float(re.search(rf"^{name} (\S+)", out, re.M)[1]) for name in ("bits_per_byte", "val_loss"))
        self.assertAlmostEqual(bits, loss / np.log(2) * shard["tokens"] / shard["bytes"], places=5)

    def test_bad_files(self):
        good = (self.folder / "small.choices").read_bytes()
        words = np.frombuffer(good, "<i4").copy()
        first = 256
        changes = {"label out of range": (first, 7), "negative label": (first, -1), "no endings": (first + 1, 0),
                   "magic": (0, 5), "items": (2, 62), "fewer items": (2, 60), "start": (3, 257)}
        bad = self.tmp / "bad.choices"
        for name, (at, value) in changes.items():
            with self.subTest(name):
                changed = words.copy()
                changed[at] = value
                bad.write_bytes(changed.tobytes())
                self.refused("eval", self.checkpoint, *CPU, f"eval.tasks={bad}", names=["bad.choices"])
        for content in (b"", good[:-4], good[:-3], good + bytes(4)):
            bad.write_bytes(content)
            self.refused("eval", self.checkpoint, *CPU, f"eval.tasks={bad}", names=["bad.choices"])
        self.refused("eval", self.checkpoint, *CPU, "eval.tasks=nowhere/*", names=["nowhere"])
        self.refused("eval", self.checkpoint, *CPU, self.tasks, "train.seq_len=4", names=["seq_len", "ending"])
        self.refused("train", self.config, f"run.dir={self.new_dir()}", self.tasks, "model.causal=false",
                     "model.layer_pattern=mha_global", names=["causal"])

    def test_bad_input(self):
        good = {"context": "a", "endings": ["b", "c"], "label": 0}
        for change, says in (({"label": 2}, "label 2 is out of range"), ({"label": -1}, "out of range"),
                             ({"label": "x"}, "label"), ({"endings": ["b", " "]}, "ending 1 is empty"),
                             ({"endings": ["b"]}, "1 endings"), ({"endings": "bc"}, "list of texts"), ({"context": 3}, "context")):
            with self.subTest(says):
                path = self.tmp / "bad.jsonl"
                path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
                done = prepare("--out", self.tmp / "never", path, code=2)
                self.assertEqual((done.stdout, len(done.stderr.splitlines())), ("", 1))
                self.assertIn("bad.jsonl:2", done.stderr)
                self.assertIn(says, done.stderr)
                self.assertFalse((self.tmp / "never").exists())
        self.assertIn("holds shards", prepare("--out", self.data, self.tmp / "small.jsonl", code=2).stderr)
        self.assertIn("already holds", prepare("--out", self.folder, self.tmp / "small.jsonl", code=2).stderr)


if __name__ == "__main__":
    unittest.main()
