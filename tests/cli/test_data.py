#!/usr/bin/env python3
"""What a run reads: segments, packing, mixtures, and data that is not there or changes while a thread reads it ahead.

    make && python -m unittest tests.cli.test_data
"""

import json
import shutil
import unittest

import numpy as np

from tests.lib.runs import CPU, END_OF_DOCUMENT, Case, lines_of, losses, sentences, step_dir, tree, val_losses, \
    without_timings
from tests.lib.tiny import write_shard

SEGMENTS = "data.segments=documents"
FIT = ["data.packing=fit", SEGMENTS]


def short_documents(count, seed):
    """Documents of one sentence, of 16 to 24 tokens and their end."""
    return [x for sentence in sentences(count, seed) for x in (*sentence.encode(), END_OF_DOCUMENT)]


class Data(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.short = cls.tmp / "short"
        cls.short.mkdir()
        for name, count, seed in (("a_0", 150, 1), ("a_1", 90, 2), ("b_0", 60, 3), ("val_0", 40, 4)):
            write_shard(cls.short / f"{name}.bin", short_documents(count, seed))
        cls.mixture = f"data.train=0.7 {cls.short}/a_*.bin, 0.3 {cls.short}/b_*.bin"
        cls.fit = [*FIT, f"data.train={cls.short}/a_*.bin", f"data.val={cls.short}/val_*.bin"]

    def assert_same_end(self, run_dir, other, step=20):
        a, b = (tree(step_dir(folder, step)) for folder in (run_dir, other))
        texts = [json.loads(t.pop("trainer.json")) for t in (a, b)]
        self.assertEqual(a, b)
        for t in texts:
            del t["seconds"]
            t["config"] = {key: x for key, x in t["config"].items() if not key.startswith("run.")}
        self.assertEqual(*texts)
        self.assertEqual(*(without_timings(lines_of(folder / "metrics.jsonl")) for folder in (run_dir, other)))
        return texts[0]


class Runs(Data):
    def test_segments_change_the_loss_and_are_recorded(self):
        evaluated = {}
        for settings in ([], [SEGMENTS], [SEGMENTS, "data.segment_positions=continue"],
                         [SEGMENTS, "data.separator_at=start"], [SEGMENTS, f"data.separator={ord('.')}"]):
            run_dir = self.train("run.eval_every=20", "model.position_embedding=learned", *settings)
            checkpoint = step_dir(run_dir, 20)
            loss = self.evaluate(checkpoint)[0]
            self.assertAlmostEqual(loss, val_losses(run_dir)[20], 5)
            config = json.loads((checkpoint / "trainer.json").read_text())["config"]
            self.assertEqual(config["data.separator"], "auto" if not settings else settings[-1].split("=")[1]
                             if "separator=" in settings[-1] else str(END_OF_DOCUMENT))
            evaluated[tuple(settings)] = loss
            # Settings of an evaluation can be given, too; the separator comes from the checkpoint's tokenizer.
            if not settings:
                other = self.evaluate(checkpoint, SEGMENTS)[0]
            elif settings == [SEGMENTS]:
                self.assertNotEqual(self.evaluate(checkpoint, "data.segments=none")[0], loss)
        self.assertEqual(len(set(evaluated.values())), 5)
        self.assertNotEqual(other, evaluated[()])

    def test_where_the_separator_comes_from(self):
        folder = self.tmp / "made"
        folder.mkdir()
        for name in ("train_0.bin", "val_0.bin"):
            shutil.copy(self.data / name, folder)
        globs = [f"data.train={folder}/train_0.bin", f"data.val={folder}/val_0.bin", "data.tokenizer=none"]
        for need in (SEGMENTS, "data.packing=fit"):
            self.refused("train", self.config, f"run.dir={self.new_dir()}", *globs, need,
                         names=["data.separator = auto", "dataset.json"])
        given = self.train(*globs, SEGMENTS, "data.separator=256")
        (folder / "dataset.json").write_text('{"separator": 256, "vocab_size": 257, "tokenizer_sha256": null}')
        found = self.train(*globs, SEGMENTS)
        self.assert_same_end(given, found)
        # Without segments nothing needs it, and it stays as it is.
        self.assertIn('"data.separator":\t"auto"', (step_dir(self.train(*globs), 20) / "trainer.json").read_text())
        (folder / "dataset.json").unlink()
        plain = self.train(*globs)
        self.refused("eval", plain, *CPU, *globs[1:2], SEGMENTS, names=["data.separator = auto"])
        self.assertEqual(self.evaluate(plain, SEGMENTS, "data.separator=256"),
                         self.evaluate(plain, SEGMENTS, "data.tokenizer=bytes"))

    def test_bad_settings(self):
        for setting, names in (("data.segments=document", ["did you mean 'documents'?"]),
                               ("data.packing=best", ["stream or fit"]),
                               ("data.separator=-1", ["from 0 to"]), ("data.separator=257", ["not below model.vocab_size = 257"]),
                               ("data.separator_at=begin", ["end or start"]),
                               ("data.segment_positions=go", ["restart or continue"]),
                               (f"data.train=0.5 {self.short}/a_*.bin, {self.short}/b_*.bin", ["data.train", "WEIGHT GLOB"]),
                               (f"data.train=0.5 {self.short}/a_*.bin, 0 {self.short}/b_*.bin", ["must be above 0"]),
                               (f"data.train=1 {self.short}/a_*.bin, 1 {self.short}/c_*.bin", ["no file matches", "c_*.bin"]),
                               (f"data.val=1 {self.short}/a_*.bin, 1 {self.short}/b_*.bin", ["data.val", "mixture"])):
            run_dir = self.new_dir()
            self.refused("train", self.config, f"run.dir={run_dir}", setting, names=names)
            self.assertFalse(run_dir.exists())
        for settings in (["data.packing=fit"], [self.mixture]):
            self.refused("train", self.config, f"run.dir={self.new_dir()}", *settings, "train.steps=none", "train.epochs=2",
                         names=["train.epochs"])

    def test_fit_packs_and_says_so(self):
        run_dir = self.train(*self.fit, "run.eval_every=10", "train.steps=80")
        err = self.last.stderr.decode()
        self.assertRegex(err, r"packing: \d+ documents in \d+ sequences, \d+\.\d\d % padding; 0 documents are longer than "
                              r"a sequence, and 0\.00 % of the tokens are cropped\n")
        self.assertRegex(err, r"step \d+: epoch 2 of .*a_\*\.bin begins\n")
        loss, tokens, _ = self.evaluate(step_dir(run_dir, 80))
        self.assertAlmostEqual(loss, val_losses(run_dir)[80], 5)
        shard = np.fromfile(self.short / "val_0.bin", "<u2")[512:]
        self.assertEqual(tokens, len(shard) - 1)  # padding does not count, nor does the last token
        self.assertLess(losses(run_dir)[-1], losses(run_dir)[0])

    def test_shards_may_be_shorter_than_a_sequence(self):
        write_shard(self.tmp / "few.bin", short_documents(3, 5))
        self.refused("train", self.config, f"run.dir={self.new_dir()}", f"data.train={self.tmp}/few.bin",
                     "train.seq_len=128", "train.batch_tokens=256", names=["hold no sequence"])
        self.train(*FIT, f"data.train={self.tmp}/few.bin", "data.val=none", "train.seq_len=128", "train.batch_tokens=256")
        self.assertIn("packing: 3 documents in 1 sequences", self.last.stderr.decode())

    def test_mixtures_print_shares_and_epochs(self):
        self.train(self.mixture, "train.steps=50")
        err = self.last.stderr.decode()
        self.assertRegex(err, rf"step \d+: epoch 2 of {self.short}/b_\*\.bin begins\n")
        self.assertRegex(err, rf"data: {self.short}/a_\*\.bin: 70\.00 % of the sequences, \d+\.\d\d epochs; "
                              rf"{self.short}/b_\*\.bin: 30\.00 % of the sequences, \d+\.\d\d epochs\n")


class Resuming(Data):
    def resume(self, *settings, step):
        """Killed after a step that was not saved, and continued: the same bytes as without."""
        settings = [*settings, "run.eval_every=6", "run.save_every=4"]
        whole = self.train(*settings)
        process, run_dir = self.stop_between_steps(step, *settings)
        self.end(process)
        (run_dir / "samples.txt").unlink()
        self.train(*settings, run_dir=run_dir)
        self.assertIn("resuming from", self.last.stderr.decode())
        return self.assert_same_end(whole, run_dir)

    def test_fit(self):
        for step in (7, 18):
            self.assertEqual(len(self.resume(*self.fit, step=step)["data_position"]), 4)

    def test_fit_in_file_order(self):
        self.resume(*self.fit, "data.shuffle=false", step=9)

    def test_mixture(self):
        self.assertEqual(len(self.resume(self.mixture, step=10)["data_position"]), 8)

    def test_mixture_of_packed_sources(self):
        self.resume(self.mixture, *FIT, step=13)

    def test_stream_records_no_position(self):
        self.assertNotIn("data_position", self.resume(SEGMENTS, step=11))

    def test_other_data_settings_are_refused(self):
        run_dir = self.train(*self.fit)
        for change, names in (("data.packing=stream", ["data.packing was fit and is now stream"]),
                              ("data.segments=none", ["data.segments was documents"]),
                              ("data.separator=46", ["data.separator was 256 and is now 46"]),
                              ("data.separator_at=start", ["data.separator_at was end"]),
                              ("data.segment_positions=continue", ["data.segment_positions"]),
                              (self.mixture, ["training data has changed"])):
            self.refused("train", self.config, f"run.dir={run_dir}", *self.fit, change, "train.steps=30", names=names)
        mixed = self.train(self.mixture)
        self.refused("train", self.config, f"run.dir={mixed}", self.mixture.replace("0.7", "0.8"), "train.steps=30",
                     names=["training data has changed"])

    def test_checkpoints_from_before_these_settings(self):
        run_dir = self.train()
        path = step_dir(run_dir, 20) / "trainer.json"
        recorded = json.loads(path.read_text())
        for key in ("packing", "segments", "separator", "separator_at", "segment_positions"):
            del recorded["config"][f"data.{key}"]
        path.write_text(json.dumps(recorded))
        for setting in (SEGMENTS, "data.packing=fit"):
            self.refused("train", self.config, f"run.dir={run_dir}", setting, "train.steps=24",
                         names=[setting.split("=")[0], "another run"])
        self.train("train.steps=24", run_dir=run_dir)
        self.evaluate(step_dir(run_dir, 20))

    def test_damaged_positions(self):
        run_dir = self.train(*self.fit)
        path = step_dir(run_dir, 20) / "trainer.json"
        recorded = json.loads(path.read_text())
        for position in ([], [1], [79, 0, 0, 0], [80, 0, 9, 0], [80, 0, 0, 0] * 2):
            path.write_text(json.dumps({**recorded, "data_position": position}))
            done = self.run_cli("train", self.config, f"run.dir={run_dir}", *self.fit, "train.steps=30", code=2)
            lines = done.stderr.decode().splitlines()
            self.assertRegex(lines[-1], "train_iha: .*position")
            self.assertEqual([line[:13] for line in lines[:-1]], ["resuming from"])
        path.write_text(json.dumps({**recorded, "data_position": [80, 0, 0.5, 0]}))
        self.refused("train", self.config, f"run.dir={run_dir}", *self.fit, "train.steps=30", names=["none of its"],
                     warnings=True)


class ReadingAhead(Data):
    def test_a_file_that_ends_while_a_run_reads_it(self):
        """The steps that were read are done and saved, and the error comes once."""
        for settings in ([], FIT):
            folder = self.new_dir("shards")
            shutil.copytree(self.data, folder)
            # Long enough that reading is not finished, nor all of it ahead, when the file changes.
            long = folder / "train_0.bin"
            write_shard(long, np.tile(np.fromfile(long, "<u2")[512:], 600))
            run = [f"data.train={long}", "data.val=none", "train.steps=100000", *settings]
            process, run_dir = self.stop_between_steps(3, *run, "run.sample_every=3")
            with open(long, "r+b") as f:
                f.truncate(3000)
            code, err = self.free(process, run_dir)
            errors = [line for line in err.splitlines() if line.startswith("train_iha: ")]
            self.assertEqual((code, len(errors)), (1, 1), err)
            self.assertIn("has changed", errors[0])
            step = len(lines_of(run_dir / "metrics.jsonl"))
            self.assertTrue(step_dir(run_dir, step).exists(), step)


if __name__ == "__main__":
    unittest.main()
