#!/usr/bin/env python3
"""Several ranks over MPI: the same losses as one process in every ZeRO stage, memory that falls with the stage, and
checkpoints that resume on any number of ranks.

    make && python -m unittest tests.ranks.test_ranks
"""

import json
import re
import shutil
import subprocess
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.lib.labelled_task import LENGTH, make_task, sequences, write_task
from tests.lib.ranks import AS_ROOT, MPIRUN, mpirun_each
from tests.lib.runs import BINARY, ENVIRONMENT, TIMEOUT, Case, lines_of, losses, step_dir, val_losses, \
    without_timings

MPI = {**ENVIRONMENT, **AS_ROOT}
COMMON = ["train.seq_len=16", "model.max_position_embeddings=32", "train.micro_batch=1", "train.batch_tokens=128",
          "train.steps=8", "system.threads=1", "run.eval_every=4", "run.eval_batches=5", "run.save_every=4"]
# Another value of every model option: with biases and untied embeddings every unit has parameters of its own.
OTHER = ["model.tie_word_embeddings=false", "model.bias=true", "model.norm=layernorm", "model.activation=swiglu",
         "model.position_embedding=learned", "model.num_hidden_layers=5", "model.layer_pattern=iha_global mha_global"]
# IHA layers with groups of query heads, in which alpha_k and alpha_v are smaller than alpha_q.
GROUPED = ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.qk_norm=rmsnorm", "model.qkv_bias=true",
           "model.layer_pattern=iha_global iha_local mha_global", "model.num_hidden_layers=4", "model.num_pseudo_heads=3",
           "model.init_alpha=noise"]


@unittest.skipUnless(shutil.which("mpirun"), "mpirun is not installed: run make deps")
class Ranks(Case):
    def on(self, ranks, run_dir, *overrides, command="train", what=None, status=0):
        """Run on so many ranks. Returns the CompletedProcess."""
        launch = [*MPIRUN, "-np", str(ranks)] if ranks > 1 else []
        where = [f"run.dir={run_dir}"] if command == "train" else []
        p = subprocess.run([*launch, BINARY, command, str(what or self.config), *where, *overrides], env=MPI, text=True,
                           capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, cwd=self.tmp)
        self.assertEqual(p.returncode, status, p.stderr)
        return p

    def weights(self, run_dir, step):
        return load_file(step_dir(run_dir, step) / "model.safetensors")

    def assert_same_losses(self, one, many):
        """Equal but for the order of floating-point sums."""
        np.testing.assert_allclose(losses(many), losses(one), rtol=2e-6)
        a, b = val_losses(one), val_losses(many)
        self.assertEqual(a.keys(), b.keys())
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=2e-6)
        for step in (4, 8):
            one_weights, many_weights = self.weights(one, step), self.weights(many, step)
            self.assertEqual(one_weights.keys(), many_weights.keys())
            for name, x in one_weights.items():
                error = np.linalg.norm(many_weights[name] - x) / np.linalg.norm(x)
                self.assertLess(error, 1e-4, name)

    def test_losses_are_those_of_one_process(self):
        for label, model in (("plain", []), ("other", OTHER)):
            one = self.tmp / f"{label}_one"
            self.on(1, one, *COMMON, *model)
            self.assertLess(losses(one)[-1], losses(one)[0])
            for ranks, stage in ((2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2), (8, 1), (8, 2)):
                with self.subTest(model=label, ranks=ranks, stage=stage):
                    many = self.tmp / f"{label}_{ranks}_{stage}"
                    p = self.on(ranks, many, *COMMON, *model, f"system.zero_stage={stage}")
                    self.assertIn(f"{ranks} ranks over mpi, zero_stage {stage}", p.stderr)
                    self.assert_same_losses(one, many)
                    self.assertEqual(len(list(step_dir(many, 8).glob("optimizer-*"))), ranks)

    def test_labels(self):
        """The task of tests/lib/labelled_task.py, in which some passes have no target: the same curve and the same end on
        any number of ranks."""
        config = make_task(self.tmp)
        one = self.tmp / "labels_one"
        self.on(1, one, what=config)
        metrics = lines_of(one / "metrics.jsonl")
        self.assertEqual(metrics[-1]["val_exact"], 1)
        for ranks, stage, passes in ((2, 0, 1), (2, 1, 12), (3, 2, 8), (3, 1, 1)):
            with self.subTest(ranks=ranks, stage=stage):
                many = self.tmp / f"labels_{ranks}_{stage}"
                micro_batch = 24 // ranks // passes
                p = self.on(ranks, many, f"system.zero_stage={stage}", f"train.micro_batch={micro_batch}", what=config)
                self.assertEqual(p.stderr.count("train.patience = 3: validation exact has not improved"), 1)
                self.assertEqual((many / "best").readlink(), (one / "best").readlink())
                found = lines_of(many / "metrics.jsonl")
                self.assertEqual(len(found), len(metrics))
                for a, b in zip(metrics, found):
                    self.assertEqual([a.get(k) for k in ("step", "target_tokens", "val_accuracy", "val_exact")],
                                     [b.get(k) for k in ("step", "target_tokens", "val_accuracy", "val_exact")])
                np.testing.assert_allclose(losses(many), losses(one), rtol=1e-4)
                p = self.on(ranks, many, command="eval", what=many / "best")
                self.assertEqual([line.split()[0] for line in p.stdout.splitlines()],
                                 ["val_accuracy", "val_exact", "val_loss"])
        write_task(self.tmp / "nothing.bin", sequences(9, 3), np.full((9, LENGTH), -1))
        p = self.on(2, many, "data.val=nothing.bin", "run.dir=refused", what=config, status=2)
        self.assertEqual(p.stderr.count("no label counts"), 1, p.stderr)

    def test_stages_agree_bit_for_bit(self):
        """With one pass a step all stages add the same numbers in the same order."""
        for optimizer in ("adamw", "muon"):
            files = []
            for stage in (0, 1, 2):
                run = self.tmp / f"bits_{optimizer}_{stage}"
                self.on(3, run, *COMMON, *OTHER, "train.batch_tokens=48", f"system.zero_stage={stage}",
                        f"train.optimizer={optimizer}")
                files.append([(step_dir(run, 8) / name).read_bytes() for name in
                              ("model.safetensors", "optimizer-00001-of-00003.safetensors")])
            self.assertEqual(files[0], files[1])
            self.assertEqual(files[0], files[2])

    def test_muon_is_the_same_on_any_number_of_ranks(self):
        """One curve on 1, 2 and 3 ranks in every stage, and any number continues what another began."""
        muon = [*COMMON, *OTHER, "train.batch_tokens=96", "train.optimizer=muon", "train.muon_lr=0.02"]
        one = self.tmp / "muon_one"
        self.on(1, one, *muon)
        for ranks, stage in ((2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)):
            with self.subTest(ranks=ranks, stage=stage):
                many = self.tmp / f"muon_{ranks}_{stage}"
                self.on(ranks, many, *muon, f"system.zero_stage={stage}")
                self.assert_same_losses(one, many)
        for begun, ranks, stage in (("one", 3, 2), ("3_1", 2, 0), ("3_0", 1, 1)):
            with self.subTest(begun=begun, ranks=ranks, stage=stage):
                resumed = self.tmp / f"muon_resumed_{ranks}"
                shutil.copytree(self.tmp / f"muon_{begun}", resumed, symlinks=True)
                shutil.rmtree(step_dir(resumed, 8))
                self.assertIn("resuming from", self.on(ranks, resumed, *muon, f"system.zero_stage={stage}").stderr)
                self.assert_same_losses(one, resumed)

    def test_grouped_heads_are_the_same_on_any_number_of_ranks(self):
        """Also in a run that some ranks begin and another number continues."""
        grouped = [*COMMON, *GROUPED, "train.batch_tokens=96"]
        one = self.tmp / "grouped_one"
        self.on(1, one, *grouped)
        begun = self.weights(one, 4)
        for name, x in self.weights(one, 8).items():
            self.assertTrue(np.any(x != begun[name]), name)
        for name, shape in (("alpha_q", (3, 4, 4)), ("alpha_k", (3, 2, 2)), ("q_norm.weight", (4,)), ("qkv.bias", (32,))):
            self.assertEqual(begun[f"layers.0.attn.{name}"].shape, shape)
        for ranks, stage in ((2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)):
            with self.subTest(ranks=ranks, stage=stage):
                many = self.tmp / f"grouped_{ranks}_{stage}"
                self.on(ranks, many, *grouped, f"system.zero_stage={stage}")
                self.assert_same_losses(one, many)
        for begun, ranks, stage in (("2_1", 3, 2), ("3_2", 1, 0)):
            with self.subTest(begun=begun, ranks=ranks, stage=stage):
                resumed = self.tmp / f"grouped_resumed_{ranks}"
                shutil.copytree(self.tmp / f"grouped_{begun}", resumed, symlinks=True)
                shutil.rmtree(step_dir(resumed, 8))
                self.assertIn("resuming from", self.on(ranks, resumed, *grouped, f"system.zero_stage={stage}").stderr)
                self.assert_same_losses(one, resumed)

    def test_units_of_several_buckets(self):
        large = ["model.vocab_size=70000", "model.hidden_size=64", "train.steps=2", "train.batch_tokens=32",
                 "run.save_every=0", "run.eval_every=0", "data.tokenizer=none"]
        one = self.tmp / "large_one"
        self.on(1, one, *COMMON, *large)
        for stage in (1, 2):
            many = self.tmp / f"large_{stage}"
            self.on(2, many, *COMMON, *large, f"system.zero_stage={stage}")
            np.testing.assert_allclose(losses(many), losses(one), rtol=2e-6)
            a, b = self.weights(one, 2), self.weights(many, 2)
            for name in a:
                self.assertLess(np.linalg.norm(a[name] - b[name]), 1e-4 * np.linalg.norm(a[name]), name)

    def test_resuming_on_any_number_of_ranks(self):
        """4 steps on two ranks, then 4 on another number: the same losses as 8 steps on two."""
        whole = self.tmp / "whole"
        self.on(2, whole, *COMMON, *OTHER)
        for ranks, stage in ((1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (4, 0), (4, 2)):
            with self.subTest(ranks=ranks, stage=stage):
                run = self.tmp / f"resumed_{ranks}_{stage}"
                shutil.copytree(whole, run, symlinks=True)
                shutil.rmtree(step_dir(run, 8))
                batch = ["train.batch_tokens=128"] if ranks != 3 else []
                if ranks == 3:  # 128 tokens are not a multiple of 3 ranks of 16: refused, nothing lost
                    p = self.on(3, run, *COMMON, *OTHER, status=2)
                    self.assertIn("batch_tokens = 128 is not a multiple", p.stderr)
                    self.assertEqual(p.stderr.count("train_iha: "), 1, p.stderr)
                    continue
                p = self.on(ranks, run, *COMMON, *OTHER, *batch, f"system.zero_stage={stage}")
                self.assertIn("resuming from", p.stderr)
                self.assert_same_losses(whole, run)
                if (ranks, stage) in ((2, 0), (2, 1)):
                    self.assertEqual((step_dir(run, 8) / "model.safetensors").read_bytes(),
                                     (step_dir(whole, 8) / "model.safetensors").read_bytes())
                    self.assertEqual(without_timings(lines_of(run / "metrics.jsonl")),
                                     without_timings(lines_of(whole / "metrics.jsonl")))

    def test_stage_0_resumes_bit_for_bit(self):
        """Every rank updates all parameters, so every rank must load all moments."""
        for ranks in (2, 4):
            parts = self.tmp / f"replicas_parts_{ranks}"
            for steps in (3, 8):
                self.on(ranks, parts, *COMMON, "system.zero_stage=0", "train.schedule=constant", f"train.steps={steps}")
            self.on(ranks, self.tmp / f"replicas_constant_{ranks}", *COMMON, "system.zero_stage=0", "train.schedule=constant")
            for name in ["model.safetensors"] + [f"optimizer-{r:05d}-of-{ranks:05d}.safetensors" for r in range(ranks)]:
                self.assertEqual((step_dir(parts, 8) / name).read_bytes(),
                                 (step_dir(self.tmp / f"replicas_constant_{ranks}", 8) / name).read_bytes(), name)

    def test_packed_and_mixed_data_are_the_same_on_any_number_of_ranks(self):
        """Also in a run that two ranks begin and another number continues."""
        data = ["train.batch_tokens=96", "data.packing=fit", "data.segments=documents",
                f"data.train=0.6 {self.data}/train_*.bin, 0.4 {self.data}/val_*.bin"]
        one = self.tmp / "packed_1"
        self.on(1, one, *COMMON, *data)
        position = json.loads((step_dir(one, 8) / "trainer.json").read_text())["data_position"]
        for ranks in (2, 3):
            many, resumed = self.tmp / f"packed_{ranks}", self.tmp / f"packed_resumed_{ranks}"
            self.on(ranks, many, *COMMON, *data)
            shutil.copytree(one if ranks == 2 else self.tmp / "packed_2", resumed, symlinks=True)
            shutil.rmtree(step_dir(resumed, 8))
            self.assertIn("resuming from", self.on(ranks, resumed, *COMMON, *data).stderr)
            for run in (many, resumed):
                self.assert_same_losses(one, run)
                trainer = json.loads((step_dir(run, 8) / "trainer.json").read_text())
                self.assertEqual(trainer["data_position"], position)

    def test_ranks_with_different_settings_or_data_are_refused(self):
        """Before the first step."""
        other = self.tmp / "other.ini"
        other.write_text(Path(self.config).read_text().replace("lr = 1e-2", "lr = 1e-3"))
        data = self.tmp / "otherdata.ini"
        data.write_text(Path(self.config).read_text().replace("train_*.bin", "val_*.bin"))
        for config, message in ((other, "rank 1: its configuration differs from rank 0's"),
                                (data, "rank 1: ")):
            p = subprocess.run(mpirun_each(*([BINARY, "train", path, f"run.dir={self.tmp}/alike", *COMMON]
                                             for path in (self.config, config))),
                               env=MPI, text=True, capture_output=True, timeout=TIMEOUT, cwd=self.tmp)
            self.assertEqual(p.returncode, 2, p.stderr)
            self.assertIn(message, p.stderr)
        self.assertFalse((self.tmp / "alike" / "metrics.jsonl").exists())

    def test_ranks_with_different_shards_of_the_same_names_are_refused(self):
        here, there = self.tmp / "here", self.tmp / "there"
        for folder, name in ((here, "train_0.bin"), (there, "train_1.bin")):
            folder.mkdir()
            shutil.copy(self.data / name, folder / "shard.bin")
        command = [BINARY, "train", str(self.config), f"run.dir={self.tmp}/named", "data.train=shard.bin", *COMMON]
        p = subprocess.run(mpirun_each(*(["env", "-C", folder, *command] for folder in (here, there))), env=MPI, text=True,
                           capture_output=True, timeout=TIMEOUT, cwd=self.tmp)
        self.assertEqual(p.returncode, 2, p.stderr)
        self.assertIn("rank 1: its training or validation data differs from rank 0's", p.stderr)

    def test_missing_optimizer_file_of_a_rank(self):
        run = self.tmp / "missing"
        self.on(2, run, *COMMON)
        (step_dir(run, 8) / "optimizer-00001-of-00002.safetensors").unlink()
        p = self.on(1, run, *COMMON, "train.steps=10")
        self.assertIn("optimizer-00001-of-00002.safetensors", p.stderr)
        self.assertIn("resuming from " + str(step_dir(run, 4)), p.stderr)

    def test_eval_on_several_ranks(self):
        run = self.tmp / "evaluated"
        self.on(1, run, *COMMON)
        values = []
        for ranks in (1, 3):
            p = self.on(ranks, None, "run.eval_batches=7", command="eval", what=run)
            values.append(p.stdout.splitlines()[-1].split())
            self.assertEqual(p.stdout.count("val_loss"), 1)
        self.assertEqual(values[0][2], values[1][2])
        self.assertAlmostEqual(float(values[0][1]), float(values[1][1]), places=6)

    def test_memory_is_what_info_estimates(self):
        """Peak memory of each rank, with a model that is large against the libraries."""
        large = ["model.vocab_size=40000", "model.hidden_size=512", "model.num_hidden_layers=6",
                 "model.num_attention_heads=4", "model.intermediate_size=2048", "train.steps=2",
                 "train.batch_tokens=32", "run.save_every=0", "run.eval_every=0", "data.tokenizer=none"]
        p = subprocess.run([BINARY, "info", self.config, *COMMON, *large], capture_output=True, text=True, env=MPI,
                           cwd=self.tmp)
        row = re.search(r"^ +2 +([\d.]+) +([\d.]+) +([\d.]+)$", p.stdout, re.M)
        estimated = [float(x) for x in row.groups()]
        self.assertGreater(estimated[0], 1.25 * estimated[1])
        # mpirun starts a Python process, which runs the rank as its child and reports the child's peak memory.
        measure = ("import resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode; "
                   "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True); sys.exit(status)")

        def peaks(run, *overrides):
            p = subprocess.run([*MPIRUN, "-np", "2", "python3", "-c", measure, BINARY, "train", self.config,
                                f"run.dir={self.tmp / run}", *COMMON, *overrides],
                               capture_output=True, text=True, env=MPI, cwd=self.tmp, timeout=TIMEOUT)
            self.assertEqual(p.returncode, 0, p.stderr)
            return [int(peak) / 1e3 * 1.024 for peak in re.findall(r"peak (\d+)", p.stdout)]

        # Memory of the libraries, once they have been used: that of a tiny run.
        libraries = max(peaks("memory_tiny", "train.steps=2", "run.save_every=0", "run.eval_every=0"))
        for stage in (0, 1, 2):
            for peak in peaks(f"memory_{stage}", *large, f"system.zero_stage={stage}"):
                self.assertLess(peak, 1.1 * estimated[stage] + libraries + 40, f"stage {stage}")
                self.assertGreater(peak, 0.8 * estimated[stage] + libraries / 2, f"stage {stage}")


if __name__ == "__main__":
    unittest.main()
