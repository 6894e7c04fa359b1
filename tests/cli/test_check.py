#!/usr/bin/env python3
"""Data that is checked: `train_iha check`, and what train and eval say of labels that are wrong."""

import json
import os
import subprocess
import unittest

from tests.lib.runs import BINARY, ENVIRONMENT, T, TIMEOUT, Case, documents
from tests.lib.tiny import write_labels, write_shard

GOOD = documents(40, 1)


class Labelled(Case):
    def folder(self, *names, labels=GOOD):
        folder = self.new_dir("data")
        folder.mkdir()
        for name in names:
            write_shard(folder / f"{name}.bin", GOOD)
            if labels is not None:
                write_labels(folder / f"{name}.labels", labels)
        return folder


class Check(Labelled):
    def check(self, folder, code=0, vocab=257):
        done = self.run_cli("check", f"{folder}/*.bin", "--vocab", vocab, code=code)
        return done.stdout.decode().splitlines(), done.stderr.decode().splitlines()

    def test_good_data(self):
        out, err = self.check(self.folder("a", "b", labels=None))
        self.assertEqual(out, [f"2 of 2 shards are good: {2 * len(GOOD)} tokens, all ids below 257"])
        self.assertEqual(err, [])

    def test_labels_are_counted(self):
        labels = [-1] * len(GOOD)
        labels[3:13], labels[20:27] = [5] * 10, [-2] * 7
        out, err = self.check(self.folder("a", "b", labels=labels))
        share = 100 * 10 / len(GOOD)
        self.assertEqual(out[1], f"labels: 20 count ({share:.1f}%), 14 are padding, {2 * (len(GOOD) - 17)} do not count")
        self.assertEqual(err, [])

    def test_every_bad_file_is_reported(self):
        folder = self.folder("a", "b", "c", "d", "e", "f", "g")
        write_shard(folder / "a.bin", GOOD[:-1] + [300])
        write_labels(folder / "b.labels", GOOD[:-1])
        write_labels(folder / "c.labels", [-3] + GOOD[1:])
        write_shard(folder / "d.bin", GOOD, magic=3)
        write_labels(folder / "d.labels", GOOD, version=2)
        (folder / "e.labels").unlink()
        write_shard(folder / "f.bin", [])
        write_labels(folder / "f.labels", [])
        out, err = self.check(folder, code=2)
        self.assertEqual(out[0], f"2 of 7 shards are good: {2 * len(GOOD)} tokens, all ids below 257")  # e and g
        for words in (f"a.bin: token {len(GOOD) - 1} is id 300", f"b.labels: {len(GOOD) - 1} labels for the {len(GOOD)}",
                      "c.labels: label 0 is -3", "d.bin: not a token shard", "d.labels: labels version 2",
                      "e.bin has no labels, and", "f.bin: 0 tokens hold no sequence",
                      "check: 7 problems in the data of"):
            self.assertEqual(sum(words in line for line in err), 1, (words, err))
        self.assertEqual(len(err), 8)
        self.assertTrue(all(line.startswith("train_iha: ") for line in err))

    def test_ids_of_every_piece(self):
        """A file is checked in pieces by several threads; the first bad id is the one reported."""
        folder = self.folder()
        tokens = [0] * (13 << 20)
        write_shard(folder / "a.bin", tokens)
        with open(folder / "a.bin", "r+b") as f:
            for position in (13 << 20) - 1, 9 << 20, 5 << 20:
                f.seek(1024 + 2 * position)
                f.write(b"\x01\x01")
                f.flush()
                _, err = self.check(folder, code=2)
                self.assertIn(f"token {position} is id 257 but", err[0])
                self.assertEqual(len(err), 2)

    def test_vocabulary_of_the_data_set(self):
        folder = self.folder("a", labels=None)
        (folder / "dataset.json").write_text(json.dumps({"separator": 256, "vocab_size": 300}))
        _, err = self.check(folder, code=2)
        self.assertIn("dataset.json: these shards have a vocabulary of 300", err[0])
        self.check(folder, vocab=300)

    def test_progress_on_a_terminal(self):
        folder = self.folder()
        write_shard(folder / "a.bin", [0, 0])
        with open(folder / "a.bin", "r+b") as f:
            f.seek(8)
            f.write((2 << 29).to_bytes(4, "little"))
            f.truncate(1024 + (2 << 30))  # a hole
        master, slave = os.openpty()
        done = subprocess.Popen([BINARY, "check", f"{folder}/*.bin", "--vocab", "257"], env=ENVIRONMENT, stderr=slave,
                                stdout=subprocess.PIPE, text=True)
        os.close(slave)
        shown = os.read(master, 4096).decode()
        self.assertRegex(shown, r"\r\x1b\[Kchecked \d\.\d of 2\.1 GB +\d+%  \d+\.\d\d GB/s  \d+:\d\d left")
        done.kill()
        done.communicate(timeout=TIMEOUT)
        os.close(master)

    def test_not_found(self):
        self.refused("check", "nowhere/*.bin", "--vocab", "257", names=["no file matches 'nowhere/*.bin'"])
        self.refused("check", "a.bin", names=["--vocab N is missing"])


class BadLabels(Labelled):
    """One line and exit code 2, before the first step."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir = cls.train(cls(), "train.steps=1")

    def test_refused(self):
        cases = {"length": (dict(labels=GOOD[:-1]), "a.labels: ", "make the labels again"),
                 "id": (dict(labels=GOOD[:-1] + [257]), "a.labels: label", "is 257 but vocab_size is 257"),
                 "below": (dict(labels=[-3] + GOOD[1:]), "a.labels: label 0 is -3", "-2 (padding)"),
                 "magic": (dict(labels=GOOD, magic=20240520), "a.labels: not a file of labels", "20261129"),
                 "version": (dict(labels=GOOD, version=7), "a.labels: labels version 7", "1 is expected"),
                 "truncated": (dict(labels=GOOD[:-1], count=len(GOOD)), "a.labels: truncated", "prepare it again")}
        for name, (how, *words) in cases.items():
            folder = self.folder("a", "b")
            write_labels(folder / "a.labels", **how)
            self.expect_refused(name, folder, words)
        folder = self.folder("a", "b")
        (folder / "b.labels").unlink()
        self.expect_refused("one without", folder, ["b.bin has no labels, and", "a.bin has some"])

    def expect_refused(self, name, folder, words):
        with self.subTest(name):
            for key in ("train", "val"):
                run_dir = self.new_dir()
                self.refused("train", self.config, f"run.dir={run_dir}", f"data.{key}={folder}/*.bin", names=words)
                self.assertFalse(run_dir.exists())
            self.refused("eval", self.run_dir, f"data.val={folder}/*.bin", names=words)

    def test_trains_with_good_labels(self):
        labels = [-1] * (len(GOOD) - 1) + [-1]
        labels[:T] = GOOD[1:T + 1]
        folder = self.folder("a", labels=labels)
        self.train(f"data.train={folder}/*.bin", "train.steps=2")


if __name__ == "__main__":
    unittest.main()
