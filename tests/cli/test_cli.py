#!/usr/bin/env python3
"""train_iha as a user runs it: the commands, what they write, how they fail and how they resume.

    make && python -m unittest tests.cli.test_cli

The binary is ./train_iha, or what TRAIN_IHA names. Everything else is made here: shards, configurations, models of a
few thousand parameters. What is random is seeded, and where a test has to stop a run between two steps it does not
rely on timing: it puts a pipe where the run writes its samples, and the run stops there until the pipe is read.
"""

import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import unittest

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.lib.runs import BINARY, CPU, ENVIRONMENT, ROOT, T, TIMEOUT, Case, documents, lines_of, losses, \
    sentences, start, step_dir, steps_in, tiny, tree, val_losses, without_timings
from tests.lib.tiny import write_shard

# ---- training ------------------------------------------------------------------------------------------------------

COMMANDS = ("train", "eval", "generate", "attention", "info", "check")


class Families(Case):
    """The models of the configurations in configs/, made small, with the same structure."""

    def family(self, name, *overrides, wide=False, **kind):
        data = self.wide if wide else self.data
        run_dir = self.train("model.vocab_size=257", f"train.seq_len={T}", "train.micro_batch=4",
                             "train.batch_tokens=256", "train.steps=50", "train.lr=1e-2", "train.warmup_steps=5",
                             f"data.train={data}/train_*.bin", f"data.val={data}/val_*.bin", *CPU, *overrides,
                             "run.eval_every=20", "run.eval_batches=0", "run.sample_every=0",
                             config=ROOT / "configs" / name)
        loss, val = losses(run_dir), val_losses(run_dir)
        self.assertEqual(len(loss), 50)
        self.assertLess(abs(loss[0] - math.log(257)), 0.5)
        self.assertLess(loss[-5:].mean(), loss[0] - 2.5)
        self.assertEqual(list(val), [20, 40, 50])
        self.assertLess(val[50], val[20])
        tensors = self.check_export(step_dir(run_dir, 50), data / "val_0.bin", **kind)
        self.assertEqual({x.dtype for x in tensors.values()}, {np.dtype("float32")})
        self.assertNotIn("lm_head.weight", tensors)
        return tensors

    def test_gpt2(self):
        tensors = self.family("gpt2_124m.ini", "train.min_lr=1e-3", "model.hidden_size=24", "model.num_hidden_layers=3",
                              "model.num_attention_heads=3", layer_types=["mha_global"] * 3, norm="layernorm",
                              position_embedding="learned", activation="gelu_tanh", bias=True, intermediate_size=96,
                              max_position_embeddings=T, head_dim=8)
        self.assertEqual(tensors["pos_embed.weight"].shape, (T, 24))
        self.assertEqual(tensors["layers.2.attn.qkv.bias"].shape, (72,))
        self.assertEqual(tensors["layers.0.mlp_norm.bias"].shape, (24,))
        self.assertEqual(len(tensors), 2 + 12 * 3 + 2)

    def test_llama(self):
        tensors = self.family("llama_1b.ini", "model.hidden_size=32", "model.num_hidden_layers=2",
                              "model.num_attention_heads=4", "model.intermediate_size=64", wide=True,
                              layer_types=["mha_global"] * 2, norm="rmsnorm", position_embedding="rope",
                              activation="swiglu", bias=False, rope_theta=500000)
        self.assertEqual(tensors["layers.1.mlp.gate.weight"].shape, (64, 32))
        self.assertFalse([name for name in tensors if name.endswith(".bias")])

    def test_iha_of_the_paper(self):
        tensors = self.family("paper/2.4b_iha.ini", "train.min_lr=1e-3", "model.hidden_size=40", "model.head_dim=8",
                              "model.num_hidden_layers=6", "model.num_attention_heads=5", "model.intermediate_size=64",
                              wide=True, layer_types=["iha_local"] * 4 + ["mha_global", "iha_local"],
                              norm="rmsnorm", position_embedding="rope", iha_mask="flat", iha_rope="virtual",
                              iha_collapse="full", num_pseudo_heads=2, iha_window=8)
        self.assertEqual(tensors["layers.0.attn.alpha_q"].shape, (2, 5, 5))
        self.assertEqual(tensors["layers.5.attn.collapse"].shape, (5, 2, 5))
        self.assertNotIn("layers.4.attn.collapse", tensors)

    def test_bytes_small(self):
        tensors = self.family("bytes_small.ini", "model.hidden_size=32", "model.num_attention_heads=4",
                              "model.intermediate_size=48", "model.max_position_embeddings=64",
                              layer_types=["iha_local"] * 4 + ["mha_global"], max_position_embeddings=64)
        moved = tensors["layers.1.attn.alpha_q"] - np.stack([np.eye(4)] * 2)
        self.assertGreater(np.abs(moved).max(), 1e-3)  # the mixing is learned, too


class Options(Case):
    """The rest of the configuration's keys, a few together."""

    def variant(self, *overrides, shard=None, **kind):
        run_dir = self.train("train.steps=15", *overrides)
        loss = losses(run_dir)
        self.assertLess(loss[-1], loss[0] - 0.5)
        return self.check_export(step_dir(run_dir, 15), shard, **kind), run_dir

    def test_relu2_untied_without_positions(self):
        tensors, _ = self.variant("model.activation=relu2", "model.tie_word_embeddings=false",
                                  "model.position_embedding=none", activation="relu2", tie_word_embeddings=False)
        self.assertEqual(tensors["lm_head.weight"].shape, (257, 16))
        self.assertFalse(np.array_equal(tensors["lm_head.weight"], tensors["embed.weight"]))

    def test_token_mask_and_per_head_collapse(self):
        tensors, _ = self.variant("model.iha_mask=token", "model.iha_rope=token", "model.iha_collapse=per_head",
                                  "model.num_pseudo_heads=3", "model.init_alpha=noise", "model.init_collapse=mean",
                                  iha_mask="token", iha_rope="token", iha_collapse="per_head", num_pseudo_heads=3)
        self.assertEqual(tensors["layers.0.attn.collapse"].shape, (2, 3))

    def test_every_kind_of_layer(self):
        kinds = ["iha_global", "mha_local", "iha_local", "mha_global"]
        self.variant("model.num_hidden_layers=4", "model.layer_pattern=" + " ".join(kinds), "model.local_window=5",
                     "model.iha_window=7", layer_types=kinds, local_window=5, iha_window=7)

    def test_swiglu_with_layernorm_and_bias(self):
        tensors, _ = self.variant("model.activation=swiglu", "model.norm=layernorm", "model.bias=true",
                                  "model.position_embedding=learned", "model.max_position_embeddings=40")
        self.assertNotIn("layers.0.mlp.gate.bias", tensors)
        self.assertEqual(tensors["pos_embed.weight"].shape, (40, 16))

    def test_rmsnorm_has_no_bias(self):
        tensors, _ = self.variant("model.bias=true")
        self.assertIn("layers.0.attn.out.bias", tensors)
        self.assertNotIn("final_norm.bias", tensors)

    def test_not_causal(self):
        _, run_dir = self.variant("model.causal=false", "model.layer_pattern=iha_global mha_global", causal=False)
        self.refused("generate", run_dir, "--prompt", "anna", names=["causal"])

    def test_uint32_shards_hold_the_same_tokens(self):
        _, wide = self.variant(f"data.train={self.wide}/train_*.bin", f"data.val={self.wide}/val_*.bin",
                               shard=self.wide / "val_0.bin")
        narrow = self.train("train.steps=15")
        np.testing.assert_array_equal(losses(wide), losses(narrow))

    def test_recompute_changes_memory_only(self):
        # The same operations on the same numbers: not one bit may differ.
        runs = [self.train("model.num_hidden_layers=3", f"system.recompute={mode}")
                for mode in ("none", "light", "full")]
        for other in runs[1:]:
            self.assertEqual(without_timings(lines_of(runs[0] / "metrics.jsonl")),
                             without_timings(lines_of(other / "metrics.jsonl")))
            self.assertEqual(tree(step_dir(runs[0], 20))["model.safetensors"],
                             tree(step_dir(other, 20))["model.safetensors"])

    def test_gradient_accumulation(self):
        runs = [self.train("train.batch_tokens=256", f"train.micro_batch={b}") for b in (8, 1, 2, 4)]
        for other in runs[1:]:
            # Sums of fp32 in another order; steps amplify the difference.
            np.testing.assert_allclose(losses(other), losses(runs[0]), rtol=1e-5)
            a, b = (json.loads((step_dir(r, 20) / "trainer.json").read_text()) for r in (runs[0], other))
            self.assertEqual((a["sequences"], a["tokens"]), (b["sequences"], b["tokens"]))

    def test_accumulation_sees_the_same_sequences(self):
        # Every sequence repeats a byte of its own, so a step's loss at lr = 0 identifies the sequences in it.
        data = self.new_dir("data")
        data.mkdir()
        write_shard(data / "train.bin", np.repeat(np.arange(60), T).tolist() + [0])
        runs = [self.train(f"data.train={data}/*.bin", "data.val=none", "train.lr=0", "train.batch_tokens=128",
                           f"train.micro_batch={b}", "train.steps=16") for b in (4, 1)]
        one, four = losses(runs[1]), losses(runs[0])
        np.testing.assert_allclose(one, four, rtol=1e-6)
        self.assertGreater(np.diff(np.sort(four)).max(), 1e-4)  # steps can be distinguished
        self.assertAlmostEqual(four[:15].mean(), losses(self.train(
            f"data.train={data}/*.bin", "data.val=none", "train.lr=0", "train.micro_batch=60",
            "train.batch_tokens=1920", "train.steps=1"))[0], places=5)  # an epoch sees each sequence once

    def test_shuffle_and_seed(self):
        base = losses(self.train("train.steps=4"))
        self.assertFalse(np.array_equal(base, losses(self.train("train.steps=4", "data.shuffle=false"))))
        self.assertFalse(np.array_equal(base, losses(self.train("train.steps=4", "train.seed=2"))))
        np.testing.assert_array_equal(base, losses(self.train("train.steps=4")))

    def test_schedules(self):
        def expected(kind, step, steps=20, warmup=4, lr=1e-2, min_lr=2e-3):
            if step < warmup:
                return lr * (step + 1) / warmup
            done = (step - warmup) / (steps - warmup)
            if kind == "wsd":
                done = max(0, (step - 0.8 * steps) / (0.2 * steps))
            return {"cosine": min_lr + (lr - min_lr) * (1 + math.cos(math.pi * done)) / 2,
                    "constant": lr}.get(kind, lr - (lr - min_lr) * done)

        for kind in ("cosine", "linear", "constant", "wsd"):
            with self.subTest(kind):
                run_dir = self.train(f"train.schedule={kind}", "train.warmup_steps=4", "train.min_lr=2e-3")
                lrs = [r["lr"] for r in lines_of(run_dir / "metrics.jsonl") if "lr" in r]
                np.testing.assert_allclose(lrs, [expected(kind, i) for i in range(20)], rtol=1e-6)

    def test_clip_decay_and_rates_matter(self):
        base = losses(self.train())
        for override in ("train.grad_clip=0.1", "train.weight_decay=5", "train.mix_lr_scale=10", "train.beta1=0.5",
                         "train.beta2=0.5", "train.eps=1e-3"):
            self.assertFalse(np.array_equal(base, losses(self.train(override))), override)

    def test_iha_window_is_resolved_once(self):
        # auto depends on seq_len, and eval may use another.
        run_dir = self.train("train.steps=2")
        self.assertEqual(json.loads((step_dir(run_dir, 2) / "config.json").read_text())["iha_window"], 8)
        loss, tokens, _ = self.evaluate(run_dir, f"data.val={self.val}", "train.seq_len=16")
        self.assertTrue(math.isfinite(loss))
        self.assertGreater(tokens, 0)
        self.assertEqual(tokens % 16, 0)


# ---- metrics and evaluation ----------------------------------------------------------------------------------------

class Metrics(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir = cls.tmp / "evaluated"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", "run.eval_every=8"],
                       check=True, capture_output=True, timeout=TIMEOUT, env=ENVIRONMENT)

    def test_a_line_a_step_and_one_an_evaluation(self):
        records = lines_of(self.run_dir / "metrics.jsonl")
        steps = [r for r in records if "loss" in r]
        self.assertEqual([r["step"] for r in steps], list(range(1, 21)))
        for r in steps:
            self.assertEqual(list(r), ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu",
                                       "skipped"])
            self.assertEqual(r["tokens"], 128 * r["step"])
            self.assertIs(r["skipped"], False)
            self.assertGreater(r["tokens_per_second"], 0)
            self.assertGreater(r["grad_norm"], 0)
        self.assertEqual([list(r) for r in records if r not in steps], [["step", "val_loss"]] * 3)
        self.assertEqual([r["step"] for r in records], [*range(1, 9), 8, *range(9, 17), 16, *range(17, 21), 20])

    def test_log_every_thins_the_terminal_only(self):
        run_dir = self.train("run.log_every=0", "train.steps=5")
        self.assertEqual(len(losses(run_dir)), 5)
        self.assertNotIn(b"tok/s", self.last.stderr)
        self.train("train.steps=5")
        self.assertIn(b"tok/s", self.last.stderr)

    def test_eval_prints_what_training_found(self):
        for checkpoint in (self.run_dir, step_dir(self.run_dir, 20), self.run_dir / "best"):
            loss, tokens, digits = self.evaluate(checkpoint, f"data.val={self.val}")
            self.assertEqual(digits, f"{val_losses(self.run_dir)[20]:.7f}")
            self.assertEqual(tokens, (len(documents(40, 9)) - 1) // T * T)

    def test_eval_in_other_batches(self):
        expected, tokens, _ = self.evaluate(self.run_dir, f"data.val={self.val}", "train.micro_batch=1")
        for b in (3, 7, 64):
            loss, n, _ = self.evaluate(self.run_dir, f"data.val={self.val}", f"train.micro_batch={b}")
            self.assertEqual(n, tokens)
            self.assertTrue(math.isclose(loss, expected, rel_tol=1e-6), (b, loss, expected))

    def test_eval_batches_take_the_start(self):
        shard = self.tmp / "start.bin"
        write_shard(shard, documents(40, 9)[:6 * T + 1])
        whole, tokens, _ = self.evaluate(self.run_dir, f"data.val={shard}")
        part, n, _ = self.evaluate(self.run_dir, f"data.val={self.val}", "run.eval_batches=3", "train.micro_batch=2")
        self.assertEqual((n, tokens), (6 * T, 6 * T))
        self.assertTrue(math.isclose(part, whole, rel_tol=1e-6))

    def test_eval_over_several_files(self):
        loss, tokens, _ = self.evaluate(self.run_dir, f"data.val={self.data}/train_*.bin")
        parts = [self.evaluate(self.run_dir, f"data.val={self.data}/train_{i}.bin") for i in range(2)]
        self.assertEqual(tokens, sum(p[1] for p in parts))
        self.assertAlmostEqual(loss, sum(p[0] * p[1] for p in parts) / tokens, places=5)

    def test_evaluation_and_sampling_leave_training_alone(self):
        plain = self.train("data.val=none")
        busy = self.train("run.eval_every=3", "run.sample_every=5", "run.save_every=2")
        np.testing.assert_array_equal(losses(plain), losses(busy))
        self.assertEqual(val_losses(plain), {})
        self.assertEqual((busy / "samples.txt").read_bytes().count(b"---- step"), 4)


# ---- stopping and going on -----------------------------------------------------------------------------------------

class Resume(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.straight = cls.tmp / "straight"
        cls.often = ["run.save_every=3", "run.eval_every=5"]
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.straight}", *cls.often],
                       check=True, capture_output=True, timeout=TIMEOUT, env=ENVIRONMENT)

    def assert_same_end(self, run_dir, evaluated=True):
        a, b = tree(step_dir(self.straight, 20)), tree(step_dir(run_dir, 20))
        self.assertEqual(set(a), set(b))
        for name in set(a) - {"trainer.json"}:
            self.assertEqual(a[name], b[name], name)
        a, b = (json.loads(t["trainer.json"]) for t in (a, b))
        for t in (a, b):
            for timing in ("seconds",):
                t.pop(timing)
            t["config"] = {k: x for k, x in t["config"].items() if not k.startswith("run.")}
        self.assertEqual(a, b)
        self.assertEqual(without_timings(lines_of(self.straight / "metrics.jsonl")),
                         without_timings(lines_of(run_dir / "metrics.jsonl")))

    def copy(self, source=None):
        run_dir = self.new_dir()
        shutil.copytree(source or self.straight, run_dir, symlinks=True)
        return run_dir

    def damage(self, checkpoint, name="model.safetensors"):
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])

    def test_killed(self):
        process, run_dir = self.stop_between_steps(7, *self.often)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (run_dir / "samples.txt").unlink()
        there = steps_in(run_dir)  # that of step 6 appears when it has been written, at the end of a later step
        self.assertIn(there, ([3], [3, 6]))
        with open(run_dir / "metrics.jsonl", "a") as f:
            f.write('{"step": 8, "loss": 4.')  # an incomplete line
        (run_dir / "step_00000009.tmp").mkdir()  # an incomplete checkpoint
        self.train(*self.often, run_dir=run_dir)
        self.assertIn(f"resuming from {step_dir(run_dir, there[-1])}\n", self.last.stderr.decode())
        self.assert_same_end(run_dir)
        self.assertEqual([p for p in run_dir.rglob("*.tmp")], [])

    def test_killed_before_the_first_checkpoint(self):
        process, run_dir = self.stop_between_steps(2, *self.often)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (run_dir / "samples.txt").unlink()
        self.train(*self.often, run_dir=run_dir)
        self.assert_same_end(run_dir)

    def test_finished(self):
        run_dir = self.copy()
        before = tree(run_dir)
        self.train(*self.often, run_dir=run_dir)
        self.assertIn("finished", (self.last.stdout + self.last.stderr).decode())
        after = tree(run_dir)
        before.pop("lock"), after.pop("lock")  # holds a process id
        self.assertEqual(before, after)

    def test_signals_finish_the_step_and_save(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU):
            run_dir = self.new_dir()
            process = start("train", self.config, f"run.dir={run_dir}", "train.steps=100000", "train.min_lr=1e-2",
                            "train.schedule=constant")
            self.addCleanup(self.end, process)
            metrics = run_dir / "metrics.jsonl"
            while not (metrics.exists() and metrics.read_text().count("\n") > 3):
                self.assertIsNone(process.poll())
                time.sleep(0.005)
            process.send_signal(number)
            time.sleep(0.002)
            process.send_signal(number)  # as timeout(1) does
            _, err = process.communicate(timeout=TIMEOUT)
            self.assertEqual(process.returncode, 0, err)
            done = len(losses(run_dir))
            self.assertEqual(steps_in(run_dir), [done])
            self.assertIn(f"after step {done}", err.decode())
            resumed = self.train(f"train.steps={done + 2}", "train.schedule=constant", run_dir=run_dir)
            straight = self.train(f"train.steps={done + 2}", "train.schedule=constant")
            np.testing.assert_array_equal(losses(resumed), losses(straight))

    def test_signal_between_steps(self):
        # The usual moment for a signal in runs that evaluate or sample for long.
        process, run_dir = self.stop_between_steps(7, *self.often)
        process.send_signal(signal.SIGTERM)
        code, err = self.free(process, run_dir)
        self.assertEqual(code, 0, err)
        done = len(losses(run_dir))
        self.assertEqual(steps_in(run_dir)[-1], done)  # nothing that was trained is lost
        self.assertLess(done, 9)
        self.train(*self.often, run_dir=run_dir)
        self.assert_same_end(run_dir)

    def test_damaged_checkpoint(self):
        for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors", "trainer.json"):
            run_dir = self.copy()
            self.assertEqual(steps_in(run_dir), [18, 20])
            self.damage(step_dir(run_dir, 20), name)
            self.train(*self.often, run_dir=run_dir)
            err = self.last.stderr.decode()
            self.assertIn(f"warning: {step_dir(run_dir, 20)}", err)
            self.assertIn(f"resuming from {step_dir(run_dir, 18)}\n", err)
            self.assert_same_end(run_dir)

    def test_all_checkpoints_damaged(self):
        run_dir = self.copy()
        for step in (18, 20):
            self.damage(step_dir(run_dir, step))
        before = tree(run_dir)
        self.refused("train", self.config, f"run.dir={run_dir}", *self.often, names=[run_dir, "none"], warnings=True)
        after = tree(run_dir)
        before.pop("lock"), after.pop("lock")
        self.assertEqual(before, after)

    def test_damaged_checkpoint_does_not_count_as_kept(self):
        run_dir = self.train("train.steps=12", "run.save_every=4", "run.keep=0", "data.val=none")
        shutil.rmtree(step_dir(run_dir, 8))
        self.damage(step_dir(run_dir, 12))
        self.train("train.steps=12", "run.save_every=1", "run.keep=1", "data.val=none", run_dir=run_dir)
        self.assertEqual(steps_in(run_dir), [12])
        # The same, stopped while the damaged checkpoint is still the one with the highest number.
        run_dir = self.train("train.steps=12", "run.save_every=4", "run.keep=0", "data.val=none")
        self.damage(step_dir(run_dir, 12))
        self.train("train.steps=10", "run.keep=1", "data.val=none", run_dir=run_dir)
        self.assertIn(10, steps_in(run_dir))
        self.train("train.steps=11", "run.keep=1", "data.val=none", run_dir=run_dir)
        self.assertIn(f"resuming from {step_dir(run_dir, 10)}\n", self.last.stderr.decode())

    def test_what_may_change(self):
        run_dir = self.copy()
        self.train("train.steps=24", "train.lr=5e-3", "train.min_lr=1e-3", "train.warmup_steps=2",
                   "train.schedule=linear", "system.recompute=light", "run.keep=1", "run.eval_every=4",
                   run_dir=run_dir)
        self.assertEqual(len(losses(run_dir)), 24)
        self.assertEqual(steps_in(run_dir)[-1], 24)
        moved = self.new_dir("moved")
        shutil.copytree(self.data, moved)  # the same data in another place
        self.train("train.steps=25", f"data.train={moved}/train_*.bin", f"data.val={moved}/val_*.bin",
                   run_dir=run_dir)
        self.assertEqual(len(losses(run_dir)), 25)

    def test_what_may_not_change(self):
        run_dir = self.copy()
        before = tree(run_dir)
        changed = self.new_dir("changed")
        shutil.copytree(self.data, changed)
        write_shard(changed / "train_1.bin", documents(160, 5))
        for override, name in (("model.hidden_size=32", None), ("model.iha_mask=token", "iha_mask"),
                               ("model.norm_eps=1e-6", "norm_eps"), ("train.seed=7", "seed"),
                               ("train.seq_len=16", None), ("train.batch_tokens=256", "batch_tokens"),
                               ("data.shuffle=false", "shuffle"), ("train.beta2=0.9", "beta2"),
                               (f"data.train={changed}/train_*.bin", "data"),
                               (f"data.train={self.data}/train_0.bin", "data")):
            with self.subTest(override):
                line = self.refused("train", self.config, f"run.dir={run_dir}", "train.steps=30", override,
                                    names=[name] if name else [])
                self.assertIn(str(run_dir), line)
        after = tree(run_dir)
        before.pop("lock"), after.pop("lock")
        self.assertEqual(before, after)

    def test_in_use(self):
        process, run_dir = self.stop_between_steps(4)
        before = {k: x for k, x in tree(run_dir).items() if k != "samples.txt"}
        self.refused("train", self.config, f"run.dir={run_dir}", names=["in use", process.pid])
        self.assertEqual(before, {k: x for k, x in tree(run_dir).items() if k != "samples.txt"})
        code, err = self.free(process, run_dir)
        self.assertEqual(code, 0, err)
        self.assertEqual(len(losses(run_dir)), 20)

    def test_thread_count_may_change(self):
        run_dir = self.train("train.steps=10", "train.schedule=constant", "system.threads=1")
        self.train("train.schedule=constant", run_dir=run_dir)
        straight = self.train("train.schedule=constant")
        np.testing.assert_allclose(losses(run_dir), losses(straight), rtol=1e-5)


class Keep(Case):
    def test_newest(self):
        for keep, expected in ((1, [20]), (3, [16, 18, 20]), (0, list(range(2, 21, 2)))):
            run_dir = self.train("run.save_every=2", f"run.keep={keep}", "data.val=none")
            self.assertEqual(steps_in(run_dir), expected)
            self.assertFalse((run_dir / "best").is_symlink())

    def test_appears_while_training_goes_on(self):
        """A checkpoint is published while later steps run, not only at the next save: step 8's exists by step 14."""
        run_dir = self.new_dir()
        run_dir.mkdir()
        samples, half = run_dir / "samples.txt", run_dir / "step_00000008.tmp" / "trainer.json"
        os.mkfifo(samples)
        process = start("train", self.config, f"run.dir={run_dir}", "run.save_every=8", "run.sample_every=1",
                        "train.steps=15", "data.val=none")
        self.addCleanup(self.end, process)
        deadline = time.monotonic() + TIMEOUT
        for step in range(1, 15):
            while step == 9 and not (half.exists() or steps_in(run_dir)):  # the last file that is written
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.005)
            with open(samples, "rb") as pipe:  # once the run comes to the sample
                self.assertEqual(steps_in(run_dir), [8] if step == 14 else steps_in(run_dir))
                pipe.read()
        self.assertEqual(self.free(process, run_dir)[0], 0)
        self.assertEqual(steps_in(run_dir), [8, 15])

    def test_what_cannot_be_finished_is_removed(self):
        def small_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))

        run_dir = self.new_dir()
        process = start("train", self.config, f"run.dir={run_dir}", "run.save_every=2", preexec_fn=small_files)
        _, err = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 1)
        self.assertIn(b"File too large", err)
        self.assertEqual(list(run_dir.glob("step_*")), [])

    def test_last_step_is_always_saved(self):
        self.assertEqual(steps_in(self.train("run.save_every=0")), [20])
        self.assertEqual(steps_in(self.train("run.save_every=15")), [15, 20])

    def test_best_stays(self):
        # Ten good steps, then a learning rate that makes the model worse.
        saving = ["run.save_every=2", "run.eval_every=2", "train.schedule=constant", "train.grad_clip=0"]
        run_dir = self.train("train.steps=10", *saving)
        self.assertEqual(os.readlink(run_dir / "best"), "step_00000010")
        self.train("train.steps=20", "train.lr=0.5", "train.warmup_steps=0", *saving, run_dir=run_dir)
        val = val_losses(run_dir)
        best = min(val, key=val.get)
        self.assertLess(best, 18, "the test needs a run that gets worse")
        self.assertEqual(steps_in(run_dir), [best, 18, 20])
        self.assertEqual(os.readlink(run_dir / "best"), f"step_{best:08d}")
        self.assertEqual(self.evaluate(run_dir / "best", f"data.val={self.val}")[2], f"{val[best]:.7f}")

    def test_best_is_among_the_saved(self):
        run_dir = self.train("run.save_every=6", "run.eval_every=2", "run.keep=0", "train.schedule=constant",
                             "train.lr=0.1", "train.warmup_steps=0")
        saved = {step: x for step, x in val_losses(run_dir).items() if step in steps_in(run_dir)}
        self.assertEqual(sorted(saved), [6, 12, 18, 20])
        self.assertEqual(os.readlink(run_dir / "best"), f"step_{min(saved, key=saved.get):08d}")

    def test_a_loss_that_is_not_finite_is_not_the_best(self):
        saving = ["run.eval_every=2", "run.save_every=2", "run.keep=1", "train.max_skips=100"]
        run_dir = self.train("train.steps=4", *saving)
        model = step_dir(run_dir, 4) / "model.safetensors"
        tensors = load_file(model)
        tensors["final_norm.weight"][:] = np.nan
        save_file(tensors, model, {"format": "pt"})
        self.train("train.steps=8", *saving, run_dir=run_dir)
        self.assertEqual([r["val_loss"] for r in lines_of(run_dir / "metrics.jsonl") if "val_loss" in r][2:],
                         [None, None])
        self.assertTrue(all(r["skipped"] for r in lines_of(run_dir / "metrics.jsonl") if r["step"] > 4 and "loss" in r))
        self.assertEqual(os.readlink(run_dir / "best"), "step_00000004")
        self.assertEqual(steps_in(run_dir), [4, 8])


class InitFrom(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.source = cls.tmp / "source"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.source}"],
                       check=True, capture_output=True, timeout=TIMEOUT, env=ENVIRONMENT)

    def moments(self, run_dir, step):
        return load_file(step_dir(run_dir, step) / "optimizer-00000-of-00001.safetensors")

    def test_weights_and_moments(self):
        # At lr = 0 the weights do not change, and the moments show what they started from.
        start = ["train.steps=1", "train.lr=0", f"train.init_from={self.source}"]
        fresh, keep = self.train(*start), self.train(*start, "train.init_optimizer=keep")
        weights = [tree(step_dir(r, s))["model.safetensors"] for r, s in ((self.source, 20), (fresh, 1), (keep, 1))]
        self.assertTrue(weights[0] == weights[1] == weights[2])
        old, new, kept = self.moments(self.source, 20), self.moments(fresh, 1), self.moments(keep, 1)
        for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
            np.testing.assert_allclose(kept[name], np.float32(beta) * old[name] + new[name], rtol=1e-4, atol=1e-9)
        self.assertEqual([json.loads((step_dir(r, 1) / "trainer.json").read_text())["updates"] for r in (fresh, keep)],
                         [1, 21])

    def test_a_new_run(self):
        run_dir = self.train("train.steps=6", "train.lr=1e-3", f"train.init_from={step_dir(self.source, 20)}",
                             f"data.train={self.data}/train_1.bin", "train.seed=3")
        self.assertEqual([r["step"] for r in lines_of(run_dir / "metrics.jsonl") if "loss" in r], list(range(1, 7)))
        self.assertLess(losses(run_dir)[0], losses(self.source)[0] - 1)
        # On resume the run's own checkpoint is used.
        self.train("train.steps=8", "train.lr=1e-3", f"train.init_from={step_dir(self.source, 20)}",
                   f"data.train={self.data}/train_1.bin", "train.seed=3", run_dir=run_dir)
        self.assertIn(f"resuming from {step_dir(run_dir, 6)}", self.last.stderr.decode())

    def test_longer_sequences(self):
        run_dir = self.train("train.steps=2", "train.seq_len=64", f"train.init_from={self.source}")
        self.assertLess(losses(run_dir)[0], losses(self.source)[0] - 1)

    def test_mha_becomes_iha(self):
        """The same function where the rules say so, and the run says what changes it."""
        mha = self.train("model.layer_pattern=mha_global")
        before = self.evaluate(mha)[0]
        start = ["train.steps=1", "train.lr=0", f"train.init_from={mha}"]
        exact = self.train(*start, "model.layer_pattern=iha_global mha_global", "model.iha_rope=token")
        said = self.last.stderr.decode()
        self.assertIn(f"1 layer that was MHA in {step_dir(mha, 20)}: alpha and collapse are new\n", said)
        self.assertIn("function preserved, for sequences of up to 32 tokens\n", said)
        losses_said = re.search(r"loss of one batch: ([\d.]+) by the checkpoint's model, ([\d.]+) by this one\n", said)
        self.assertAlmostEqual(*map(float, losses_said.groups()), delta=1e-5)
        self.assertAlmostEqual(float(losses_said[1]), losses(exact)[0], delta=0.5)
        self.assertAlmostEqual(self.evaluate(exact)[0], before, delta=1e-5)
        self.train("train.steps=2", f"train.init_from={mha}", "train.lr=0", "model.layer_pattern=iha_global mha_global",
                   "model.iha_rope=token", run_dir=exact)  # goes on without comparing anything
        self.assertNotIn("function preserved", self.last.stderr.decode())

        changed = self.train(*start)  # the default pattern
        said = self.last.stderr.decode()
        self.assertIn("function changed: layer 0: model.iha_rope = virtual", said)
        self.assertIn("layer 0: a query sees 4 tokens and saw 32", said)
        losses_said = re.search(r"loss of one batch: ([\d.]+) by the checkpoint's model, ([\d.]+) by this one\n", said)
        self.assertNotAlmostEqual(*map(float, losses_said.groups()), delta=1e-4)
        self.assertNotAlmostEqual(self.evaluate(changed)[0], before, delta=1e-4)

        self.refused("train", self.config, f"run.dir={self.new_dir()}", *start, "train.init_optimizer=keep",
                     names=["train.init_optimizer", "become IHA"])
        self.refused("train", self.config, f"run.dir={self.new_dir()}", f"train.init_from={self.source}",
                     "model.layer_pattern=mha_global", names=["layer 0", "alpha and collapse would be lost"])

    def test_refused(self):
        for override, names in (("model.hidden_size=32", ["another model"]), ("model.bias=true", ["bias"]),
                                # The shapes of these are the same.
                                ("model.activation=relu2", ["model.activation"]), ("model.norm=layernorm", ["model.norm"]),
                                ("model.position_embedding=none", ["model.position_embedding"])):
            self.refused("train", self.config, f"run.dir={self.new_dir()}", f"train.init_from={self.source}", override,
                         names=names)
        missing = self.tmp / "nowhere"
        self.refused("train", self.config, f"run.dir={self.new_dir()}", f"train.init_from={missing}", names=[missing])


# ---- what is wrong -------------------------------------------------------------------------------------------------

class Refusals(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir = cls.tmp / "small"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", "train.steps=2", "data.tokenizer=none"],
                       check=True, capture_output=True, timeout=TIMEOUT, env=ENVIRONMENT)

    def refuse_train(self, *overrides, names=(), config=None):
        run_dir = self.new_dir()
        line = self.refused("train", config or self.config, f"run.dir={run_dir}", *overrides, names=names)
        self.assertFalse(run_dir.exists(), "a refused run left a directory")
        return line

    def test_help_and_version(self):
        for args in (["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)):
            done = self.run_cli(*args)
            self.assertIn(b"train_iha", done.stdout)
            self.assertEqual(done.stderr, b"")
        text = self.run_cli("--help").stdout.decode()
        for word in ("train CONFIG", "eval CHECKPOINT", "generate CHECKPOINT", "info CONFIG", "iha_window"):
            self.assertIn(word, text)
        self.assertIn("--top-k", self.run_cli("generate", "--help").stdout.decode())

    def test_commands(self):
        self.refused("trian", self.config, names=["trian", "did you mean train"])
        self.refused("generat", self.run_dir, names=["did you mean generate"])
        self.refused()
        self.refused("train", self.config, "--profil", "3", names=["--profil", "did you mean --profile"])
        self.refused("train", "--profil", "3", self.config, names=["did you mean --profile"])
        self.refused("train", self.config, "--profile", names=["--profile", "value"])
        self.refused("train", self.config, "--profile", "2", "--profile", "2", names=["--profile", "twice"])
        for options in (["--gpus", "2"], ["--gpus"], ["--gpus", self.config]):
            self.refused("info", *options, names=["info CONFIG|CHECKPOINT", "missing"])
        for command in COMMANDS:
            self.refused(command, names=[command, "missing"])

    def test_keys_and_values(self):
        for override, names in (
                ("model.hiden_size=16", ["hiden_size", "hidden_size"]), ("modle.hidden_size=16", ["modle", "model"]),
                ("model.norm=rmsnrom", ["rmsnrom", "'rmsnorm'"]), ("model.activation=relu", ["relu2"]),
                ("train.lr=fast", ["train.lr", "fast"]), ("train.steps=1.5", ["steps"]), ("hidden_size=16", ["model."]),
                ("model.num_attention_heads=3", ["hidden_size", "num_attention_heads"]),
                ("model.layer_pattern=iha_locl", ["iha_locl", "iha_local"]), ("train.batch_tokens=100", ["128"]),
                ("train.seq_len=64 ", ["seq_len"]), ("model.max_position_embeddings=8", ["seq_len"]),
                ("model.causal=false", ["causal"]), ("--steps=5", ["--steps"]), ("train.lr", ["train.lr"]),
                ("data.tokenizer=nowhere.json", ["nowhere.json"]), ("model.vocab_size=256", ["257"])):
            with self.subTest(override):
                self.refuse_train(override, names=names)

    def test_configuration_files(self):
        def ini(text, name="bad.ini"):
            path = self.tmp / name
            path.write_text(text)
            return path

        self.refuse_train(config=self.tmp / "no.ini", names=["no.ini"])
        self.refuse_train(config=self.tmp, names=[self.tmp])
        good = tiny(self.data)
        self.refuse_train(config=ini(good.replace("lr = 1e-2", "lrr = 1e-2")), names=["bad.ini:15", "lrr"])
        self.refuse_train(config=ini(good.replace("[train]", "[trian]")), names=["bad.ini:10", "train"])
        self.refuse_train(config=ini(good.replace("steps = 20\n", "")), names=["train.steps"])
        self.refuse_train(config=ini(good.replace("num_hidden_layers = 2", "num_hidden_layers two")),
                          names=["bad.ini:5"])

    def test_shards(self):
        folder = self.new_dir("bad")
        folder.mkdir()
        good = documents(40, 1)
        write_shard(folder / "magic.bin", good, magic=12345)
        write_shard(folder / "version.bin", good, version=2)
        write_shard(folder / "short.bin", good, count=len(good) + 1)
        write_shard(folder / "long.bin", good, count=len(good) - 1)
        write_shard(folder / "negative.bin", good, count=-1)
        write_shard(folder / "big.bin", good + [300])
        write_shard(folder / "big32.bin", good + [1 << 31], wide=True)
        write_shard(folder / "tiny.bin", good[:T])
        (folder / "header.bin").write_bytes(b"\0" * 1000)
        (folder / "empty.bin").touch()
        for name, words in (("magic.bin", ["12345", 20240520]), ("version.bin", ["version 2"]),
                            ("short.bin", ["truncated"]), ("long.bin", []), ("negative.bin", []),
                            ("big.bin", ["300", "257"]), ("big32.bin", [1 << 31]), ("tiny.bin", ["seq_len"]),
                            ("header.bin", []), ("empty.bin", []), ("missing_*.bin", ["missing_*.bin"])):
            for key in ("train", "val"):
                with self.subTest(name, key=key):
                    self.refuse_train(f"data.{key}={folder / name}", names=[folder / name, *words])
            with self.subTest(name, command="eval"):
                self.refused("eval", self.run_dir, f"data.val={folder / name}", names=[folder / name, *words])

    def test_run_directory(self):
        blocked = self.tmp / "file"
        blocked.write_text("mine")
        self.refused("train", self.config, f"run.dir={blocked}", names=[blocked])
        self.refused("train", self.config, f"run.dir={blocked}/below", names=[blocked])
        self.assertEqual(blocked.read_text(), "mine")

    def test_checkpoints(self):
        nowhere, empty = self.tmp / "nowhere", self.tmp / "empty"
        empty.mkdir()
        for command, more in (("eval", [f"data.val={self.val}"]), ("generate", ["--prompt", "1"])):
            self.refused(command, nowhere, *more, names=[nowhere])
            self.refused(command, empty, *more, names=[empty, "checkpoint"])
            self.refused(command, self.run_dir, *more, "model.hidden_size=8", names=["model"])
            self.refused(command, self.run_dir, *more, "train.sed=8", names=["seed"])
        self.refused("info", nowhere, names=[nowhere])
        self.refused("info", empty, names=[empty])
        self.assertEqual(list(empty.iterdir()), [])
        for name in ("config.json", "model.safetensors"):
            copy = self.new_dir()
            shutil.copytree(step_dir(self.run_dir, 2), copy)
            path = copy / name
            path.write_bytes(path.read_bytes()[:-20])
            self.refused("eval", copy, f"data.val={self.val}", names=[path])
            path.unlink()
            self.refused("eval", copy, f"data.val={self.val}", names=[copy])

    def test_eval_without_data(self):
        run_dir = self.train("train.steps=1", "data.val=none")
        self.refused("eval", run_dir, names=["data.val"])

    def test_generate_options(self):
        for args, names in (
                (["--prompt", "hello"], ["token ids", "hello"]), (["--prompt", "1 2 400"], ["400", "257"]),
                (["--tokens", "3", "--seed", "1", "--tokens", "3"], ["--tokens", "twice"]),
                (["--tokens", "3", "--prompt", "--tokens", "--seed", "x"], ["--seed x"]),
                (["--prompt", "-1"], ["-1"]), (["--promt", "1"], ["--promt", "--prompt"]),
                (["--topk", "1"], ["--top-k"]), (["--verbose"], ["--verbose"]), (["--prompt"], ["--prompt"]),
                (["--tokens", "many"], ["--tokens", "many"]), (["--tokens", "-3"], ["--tokens"]),
                (["--tokens", "1.5"], ["--tokens", "1.5"]), (["--top-k", "2.5"], ["--top-k"]),
                (["--temperature", "nan"], ["--temperature"]), (["--seed", "x"], ["--seed"])):
            with self.subTest(args):
                self.refused("generate", self.run_dir, *args, names=names)

    def test_options_before_the_checkpoint(self):
        after = self.run_cli("generate", self.run_dir, *CPU, "--prompt", "1 2", "--tokens", "3").stdout
        before = self.run_cli("generate", "--prompt", "1 2", "--tokens", "3", self.run_dir, *CPU).stdout
        self.assertEqual(before, after)

    def test_learned_positions_end(self):
        run_dir = self.train("train.steps=1", "model.position_embedding=learned", "data.tokenizer=none")
        self.run_cli("generate", run_dir, "--prompt", "1 2", "--tokens", T - 2)
        self.refused("generate", run_dir, "--prompt", "1 2", "--tokens", T - 1, names=[T])

    def test_diverged(self):
        run_dir = self.new_dir()
        self.train("train.steps=4", "train.max_skips=3", run_dir=run_dir)
        model = step_dir(run_dir, 4) / "model.safetensors"
        tensors = load_file(model)
        tensors["final_norm.weight"][:] = np.inf
        save_file(tensors, model, {"format": "pt"})
        done = self.run_cli("train", self.config, f"run.dir={run_dir}", "train.steps=30", "train.max_skips=3", code=1)
        last = done.stderr.decode().splitlines()[-1]
        self.assertTrue(last.startswith("train_iha: "))
        self.assertIn("in 4 steps in a row, the last of them step 8", last)
        self.assertIn("not finite", last)
        self.assertIn("final_norm.weight", last)
        self.assertEqual([r["skipped"] for r in lines_of(run_dir / "metrics.jsonl") if r["step"] > 4], [True] * 4)
        self.assertEqual(steps_in(run_dir), [4])


class Skipping(Case):
    STEPS = ["train.steps=60", "train.skip_zscore=0.8", "train.max_skips=60"]

    def test_outliers_are_skipped_by_their_zscore(self):
        """The decisions, recomputed from the norms in metrics.jsonl."""
        run_dir = self.train(*self.STEPS, "train.lr=1e-3")
        count, mean, variance, skips = 0, 0.0, 0.0, 0
        for r in lines_of(run_dir / "metrics.jsonl"):
            d = r["grad_norm"] - mean
            z = d / math.sqrt(variance) if count >= 16 and variance > 0 else 0
            self.assertEqual(r["skipped"], z > 0.8, r)
            skips += r["skipped"]
            if not r["skipped"]:
                w = 1 / min(count + 1, 128)
                count += 1
                mean += w * d
                variance = (1 - w) * (variance + w * d * d)
        self.assertGreater(skips, 3)
        self.assertLess(skips, 40)
        trainer = json.loads((step_dir(run_dir, 60) / "trainer.json").read_text())
        self.assertEqual(trainer["updates"], 60 - skips)
        self.assertAlmostEqual(trainer["norm_mean"], mean, places=6)

    def test_the_history_survives_a_resume(self):
        parts = self.new_dir()
        for steps in (21, 37, 60):
            self.train(*self.STEPS, f"train.steps={steps}", "train.schedule=constant", run_dir=parts)
        whole = self.train(*self.STEPS, "train.schedule=constant")
        self.assertEqual(without_timings(lines_of(parts / "metrics.jsonl")),
                         without_timings(lines_of(whole / "metrics.jsonl")))
        self.assertEqual((step_dir(parts, 60) / "model.safetensors").read_bytes(),
                         (step_dir(whole, 60) / "model.safetensors").read_bytes())

    def test_too_many_outliers_end_the_run(self):
        run_dir = self.new_dir()
        done = self.run_cli("train", self.config, f"run.dir={run_dir}", *self.STEPS, "train.skip_zscore=1e-6",
                            "train.max_skips=2", "train.lr=0", code=1)
        last = done.stderr.decode().splitlines()[-1]
        self.assertRegex(last, r"outlier \(train.skip_zscore = 1e-06\) in 3 steps in a row, the last of them step \d+")
        self.assertRegex(last, r"largest part in [a-z0-9_.]+\.(weight|alpha_[qkv]|collapse)")

    def test_a_checkpoint_under_way_is_finished_when_the_run_gives_up(self):
        """The step after a save fails, so only the end of the run can publish the checkpoint."""
        giving_up = ["train.steps=60", "train.skip_zscore=1e-6", "train.max_skips=0", "train.lr=0", "data.val=none"]
        first, second = self.new_dir(), self.new_dir()
        self.train(*giving_up, "run.save_every=0", run_dir=first, code=1)
        last = lines_of(first / "metrics.jsonl")[-1]["step"]
        self.train(*giving_up, f"run.save_every={last - 1}", run_dir=second, code=1)
        self.assertEqual(steps_in(first), [])
        self.assertEqual([p.name for p in second.glob("step_*")], [f"step_{last - 1:08d}"])


# ---- generate and info ---------------------------------------------------------------------------------------------

class Generate(Case):
    TEXT = b"pack my box with five dozen jugs. "

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write_shard(cls.data / "repeat.bin", np.frombuffer(cls.TEXT * 60, np.uint8))
        cls.run_dir = cls.tmp / "repeat"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", f"data.train={cls.data}/repeat.bin",
                        "data.val=none", "model.hidden_size=32", "train.steps=120", "train.seq_len=48",
                        "train.micro_batch=4", "train.batch_tokens=192", "train.lr=2e-2"],
                       check=True, capture_output=True, timeout=TIMEOUT, env=ENVIRONMENT)

    def generate(self, *args, run_dir=None):
        return self.run_cli("generate", run_dir or self.run_dir, *args).stdout

    def test_reproduces_what_it_learned(self):
        out = self.generate("--prompt", self.TEXT[:20].decode(), "--tokens", 28, "--temperature", 0)
        self.assertEqual(out, (self.TEXT * 2)[:48] + b"\n")

    def test_seeds(self):
        def sample(*more, temperature=3):
            return self.generate("--prompt", "pa", "--tokens", 60, "--temperature", temperature, *more)

        self.assertEqual(sample("--seed", 5), sample("--seed", 5))
        self.assertEqual(sample(), sample("--seed", 1))
        self.assertNotEqual(sample("--seed", 5), sample("--seed", 6))
        greedy = sample("--seed", 5, temperature=0)
        self.assertEqual(greedy, sample("--seed", 6, temperature=0))
        self.assertEqual(greedy, sample("--top-k", 1, "--seed", 7))

    def test_number_of_tokens(self):
        for n in (0, 1, 7, 100):
            ids = self.generate("--prompt", "7 8 9", "--tokens", n, run_dir=self.ids_run()).split()
            self.assertEqual(len(ids), 3 + n)
            self.assertEqual(ids[:3], [b"7", b"8", b"9"])
            self.assertTrue(all(0 <= int(i) < 257 for i in ids))
        self.assertEqual(len(self.generate(run_dir=self.ids_run()).split()), 1 + 256)

    def ids_run(self):
        if not hasattr(Generate, "ids"):
            Generate.ids = self.train("data.tokenizer=none")
        return Generate.ids

    def test_prompt_longer_than_a_chunk(self):
        # Prompts are fed in chunks; the continuation must not depend on where these end.
        greedy = ["--temperature", 0]
        ids = [str(i) for i in documents(20, 3)[:150]]
        whole = self.generate("--prompt", " ".join(ids), "--tokens", 10, *greedy, run_dir=self.ids_run()).split()
        more = self.generate("--prompt", " ".join(x.decode() for x in whole[:155]), "--tokens", 5, *greedy,
                             run_dir=self.ids_run()).split()
        self.assertEqual(whole, more)

    def test_overrides_follow(self):
        self.assertEqual(self.generate("--prompt", "pa", "--tokens", 9, "--temperature", 0, "system.threads=1"),
                         self.generate("system.threads=2", "--tokens", 9, "--temperature", 0, "--prompt", "pa"))

    @unittest.skipUnless(importlib.util.find_spec("tokenizers"), "needs the tokenizers package")
    def test_tokenizer_travels(self):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        folder = self.new_dir("bpe")
        folder.mkdir()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(sentences(100, 1), trainers.BpeTrainer(
            vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tokenizer.save(str(folder / "tokenizer.json"))
        content = (folder / "tokenizer.json").read_bytes()
        write_shard(folder / "train.bin", tokenizer.encode("".join(sentences(400, 2))).ids)
        run_dir = self.train(f"data.train={folder}/train.bin", "data.val=none", "model.vocab_size=300",
                             f"data.tokenizer={folder}/tokenizer.json", "run.sample_every=10", "train.steps=40")
        self.assertEqual((step_dir(run_dir, 40) / "tokenizer.json").read_bytes(), content)
        moved = self.new_dir("moved")
        shutil.move(step_dir(run_dir, 40), moved)
        shutil.rmtree(folder)
        out = self.generate("--prompt", "anna sees", "--tokens", 12, "--temperature", 0, run_dir=moved).decode()
        self.assertTrue(out.startswith("anna sees"))
        self.assertGreater(len(out), 15)
        self.assertRegex(out, "[a-z. ]{10,}\n$")


class SingleProcess(Case):
    def test_comm_is_ignored(self):
        """A single process says so on a line of its own."""
        for comm, lines in (("auto", 0), ("mpi", 1), ("nccl", 1)):
            run_dir = self.train("train.steps=1", f"system.comm={comm}")
            evaluated = self.run_cli("eval", run_dir, f"data.val={self.val}", *CPU, f"system.comm={comm}")
            for text in (self.last.stderr.decode(), evaluated.stderr.decode()):
                self.assertEqual(text.count("system.comm ignored: single-process run\n"), lines, text)


class Profile(Case):
    outer = ("forward", "backward", "update")  # a step consists of these

    def table(self, text):
        """{name: times a step}, and the sum of all times, in ms a step."""
        lines = re.findall(r"^(\w[\w ]*?) +(\d+\.\d{3}) +(\d+\.\d)% +(\d+\.\d)$", text, re.M)
        total = float(re.search(r"^all of a step +(\d+\.\d+)$", text, re.M)[1])
        self.assertAlmostEqual(sum(float(ms) for _, ms, _, _ in lines), total, delta=0.001 * len(lines))
        return {name: float(times) for name, _, _, times in lines}, total

    def check(self, text, run_dir, steps, apart):
        times, total = self.table(text)
        self.assertEqual((times["forward"], times["update"], times["layer"]), (2, 1, 8))
        events = json.loads((run_dir / "profile.json").read_text())["traceEvents"]
        self.assertEqual([e["name"] for e in events].count("update"), steps)
        self.assertAlmostEqual(total * steps * 1e3, sum(e["dur"] for e in events if e["name"] in self.outer),
                               delta=steps + 0.001 * len(events))
        printed = re.findall(r"^not counted: (\d+\.\d+) ms in all of evaluation, sampling and saving$", text, re.M)
        between = [e["dur"] for e in events if e["name"] == "between steps"]
        self.assertEqual((len(printed), len(between)), (min(apart, 1), apart))
        if apart:
            self.assertAlmostEqual(float(printed[0]) * 1e3, sum(between), delta=apart)

    def test_what_lies_between_steps_is_not_counted(self):
        plain = self.train("--profile", "4")
        self.check(self.last.stderr.decode(), plain, 4, 0)
        busy = self.train("--profile", "4", "run.eval_every=1", "run.save_every=2", "run.sample_every=3")
        self.check(self.last.stderr.decode(), busy, 4, 3)  # the table is printed before what follows the last step
        np.testing.assert_array_equal(losses(plain), losses(busy))

    def test_a_signal_ends_it(self):
        for step, traced in ((2, 0), (4, 2)):
            process, run_dir = self.stop_between_steps(step, "--profile", "6", "train.min_lr=1e-2")
            process.send_signal(signal.SIGTERM)
            code, err = self.free(process, run_dir)
            self.assertEqual(code, 0, err)
            self.assertEqual(steps_in(run_dir), [step + 1])
            self.assertEqual("the run stops before the first traced step" in err, not traced, err)
            if traced:
                self.assertIn("steps 4 to 5, ", err)
                self.check(err, run_dir, traced, 1)
            else:
                self.assertNotIn("self time", err)

    def test_a_file_that_cannot_be_written(self):
        run_dir = self.new_dir()
        (run_dir / "profile.json").mkdir(parents=True)
        self.train("--profile", "2", run_dir=run_dir)
        text = self.last.stderr.decode()
        self.assertRegex(text, rf"\nwarning: {run_dir}/profile.json: cannot write: .*\n")
        self.table(text)
        self.assertEqual(text.count("self time of"), 1)
        self.assertEqual(steps_in(run_dir), [20])

    def test_refused(self):
        run_dir = self.new_dir()
        self.refused("train", self.config, f"run.dir={run_dir}", "--profile", "18", names=["--profile 18", "20 left"])
        self.assertFalse(run_dir.exists())
        self.train("--profile", "17", run_dir=run_dir)
        self.train("--profile", "18", run_dir=run_dir)  # a finished run says so
        self.assertIn(b"finished", self.last.stdout)
        self.train("train.steps=24", "--profile", "1", run_dir=run_dir)
        before = tree(run_dir)
        done = self.run_cli("train", self.config, f"run.dir={run_dir}", "train.steps=28", "--profile", "2", code=2)
        self.assertIn("the run has 4 left", done.stderr.decode())
        after = tree(run_dir)
        before.pop("lock"), after.pop("lock")  # holds a process id
        self.assertEqual(before, after)


class Info(Case):
    gpu = ["system.device=auto", "system.precision=auto"]  # the tiny configuration is for CPUs

    def test_configurations(self):
        for path in sorted((ROOT / "configs").rglob("*.ini")):
            text = self.run_cli("info", path).stdout.decode()
            for word in ("Parameters", "Memory", "FLOPs per token", "Layer schedule", "embeddings", "activations"):
                self.assertIn(word, text)
            self.assertLessEqual(max(map(len, text.splitlines())), 80, path)
            if path.name == "2.4b_iha.ini":
                text += self.run_cli("info", path, "--gpus", 8).stdout.decode()
                self.assertLessEqual(max(map(len, text.splitlines())), 80)
                count = int(re.search(r"Parameters: .*\((\d+)\)", text)[1])
                self.assertEqual(round(count / 1e8), 24)
        self.assertEqual(list(self.tmp.glob("runs")), [])

    def test_counts(self):
        overrides = ["model.bias=true", "model.norm=layernorm", "model.tie_word_embeddings=false",
                     "model.position_embedding=learned", "model.activation=swiglu"]
        run_dir = self.train("train.steps=1", *overrides)
        count = sum(x.size for x in load_file(step_dir(run_dir, 1) / "model.safetensors").values())
        for what in ([run_dir], [step_dir(run_dir, 1)], [self.config, *overrides]):
            text = self.run_cli("info", *what).stdout.decode()
            self.assertEqual(int(re.search(r"Parameters: .*\((\d+)\)", text)[1]), count)
            groups = re.findall(r"^  \S.*? {2,}(\d+)  +[\d.]+%$", text, re.M)
            self.assertEqual(sum(map(int, groups)), count)
            self.assertRegex(text, r"0 +iha_local +8 ")
            self.assertRegex(text, r"1 +mha_global ")

    def test_overrides(self):
        def memory(*overrides):
            text = self.run_cli("info", self.config, "train.seq_len=512", "train.batch_tokens=32768",
                                "train.micro_batch=64", *overrides).stdout.decode()
            return float(re.search(r"activations +([\d.]+) MB", text)[1])

        none, light, full = (memory(f"system.recompute={mode}") for mode in ("none", "light", "full"))
        self.assertTrue(none > light > full, (none, light, full))
        self.refused("info", self.config, "model.hiden_size=2", names=["hidden_size"])

    def plan(self, *args):
        return self.run_cli("info", *args).stdout.decode()

    def test_plan_of_the_paper(self):
        """The 2.4B model on 128 GPUs: numbers that must be consistent."""
        path = ROOT / "configs" / "paper" / "2.4b_iha.ini"
        text = self.plan(path, "--gpus", "128", "--gpu", "h200", "--link", "ib400")
        self.assertIn("128 x h200", text)
        self.assertIn("not measured", text)
        self.assertIn("1 pass of 1 x 8192", text)
        self.assertRegex(text, r"fits: [\d.]+ of 141 GB")
        step = float(re.search(r"^  step +([\d.]+) ms", text, re.M)[1])
        speed = float(re.search(r"^  speed +(\d+) tokens/s", text, re.M)[1])
        mfu = float(re.search(r"^  MFU +([\d.]+) %", text, re.M)[1])
        flops = float(re.search(r"FLOPs per token .*: ([\d.]+)B", text)[1]) * 1e9
        self.assertAlmostEqual(speed * step / 1e3 / 1048576, 1, places=2)
        self.assertAlmostEqual(mfu / 100, flops * speed / 128 / 989e12, places=2)
        parts = [float(x) for x in re.findall(r"^  [a-z, -]+? +([\d.]+) ms +[\d.]+%", text, re.M)]
        self.assertEqual(len(parts), 9)
        self.assertAlmostEqual(sum(parts) / step, 1, places=3)
        memory = text[text.index("Memory for training"):]
        families = re.findall(r"^  [a-z]+ +([\d.]+) ([GM])B$", memory, re.M)
        total = float(re.search(r": ([\d.]+) GB$", memory, re.M)[1])
        self.assertAlmostEqual(sum(float(n) * (1 if unit == "G" else 1e-3) for n, unit in families), total, delta=0.1)

    def test_plan(self):
        batch = ["train.batch_tokens=1024", "train.micro_batch=4", *self.gpu]
        alone = self.plan(self.config, "--gpus", "1", *batch)
        self.assertIn("1 x h200", alone)
        self.assertIn("8 passes of 4 x 32", alone)
        self.assertNotIn("waiting", alone)
        several = self.plan(self.config, *batch, "--link", "nvlink", "--gpus", "8", "--gpu", "a100")
        self.assertIn("8 x a100", several)
        self.assertIn("1 pass of 4 x 32", several)
        self.assertIn("waiting for all-gather", several)
        self.assertIn("GB per GPU", several)
        self.assertNotIn("ignored", several)
        self.assertEqual(self.plan("--gpus", "8", "--gpu", "a100", "--link", "nvlink", self.config, *batch), several)
        self.assertIn("--link ib400 ignored", self.plan(self.config, *batch, "--link", "ib400", "--gpus", "8"))
        nodes = self.plan(self.config, *batch[1:], "train.batch_tokens=2048", "--link", "ib400", "--gpus", "16")
        self.assertNotIn("ignored", nodes)
        large = ["model.hidden_size=8192", "model.num_hidden_layers=40", "model.num_attention_heads=64",
                 "model.intermediate_size=32768", "train.seq_len=2048", "train.batch_tokens=262144"]
        large += ["train.micro_batch=16", "system.zero_stage=1", *self.gpu]
        self.assertIn("DOES NOT FIT", self.plan(self.config, *large, "--gpus", "8", "--gpu", "h100"))
        text = self.plan(self.config, *large, "--gpus", "8", "--gpu", "h200")
        advice = re.search(r"DOES NOT FIT.*\n +((?:[a-z_.]+=\S+ ?)+) +\(", text)[1].split()
        self.assertIn("fits: ", self.plan(self.config, *large, *advice, "--gpus", "8", "--gpu", "h200"))

    def test_launches(self):
        """Layer by layer, and in all as many kernels as rows have."""
        text = self.plan(self.config, "--gpus", "1", "--launches", "train.batch_tokens=1024", "train.micro_batch=4", *self.gpu)
        self.assertIn("8 passes of 4 x 32", text)
        self.assertNotIn("MFU", text)
        rows = re.findall(r"^  (?:forward|backward|update|  +) +[a-z_]+ +(?:\d+ x \d+ x \d+ +)?(\d+) +[\d.]+ +[\d.]+ +\S+ +[\d.]+$",
                          text, re.M)
        everything = re.search(r"^  all +(\d+) ", text, re.M)
        self.assertEqual(sum(map(int, rows)), int(everything[1]), text)
        self.assertRegex(text, r"layer \d+, a pass: [\d.]+ u outside of products and attention")

    def test_more_gpus(self):
        """More GPUs are advised if the sharded memory is too large, not if the part of each GPU is."""
        for hidden, helps in ((8192, True), (16384, False)):
            large = [f"model.hidden_size={hidden}", "model.num_hidden_layers=40", "model.num_attention_heads=64",
                     f"model.intermediate_size={4 * hidden}", "train.micro_batch=1", "train.batch_tokens=32", *self.gpu]
            text = self.plan(self.config, *large, "--gpus", "1")
            advice = re.search(r"DOES NOT FIT.*\n    a smaller model, or a shorter train.seq_len(?:; or\n    (.*?) +\(.*)?\n",
                               text)
            self.assertTrue(advice, text)
            self.assertEqual(bool(advice[1]), helps, text)
            if helps:
                self.assertIn("fits: ", self.plan(self.config, *large, *advice[1].split()))

    def test_plan_refused(self):
        self.refused("info", self.config, "--gpus", "2", names=["bf16", *self.gpu])
        for override in ("system.precision=fp32", "system.device=cpu", "system.comm=mpi"):
            line = self.refused("info", self.config, "--gpus", "2", *self.gpu, override)
            self.assertIn("add " + override.split("=")[0] + "=auto", line)
        self.plan(self.config, "--gpus", "1", *self.gpu, "system.comm=mpi")  # one GPU communicates with no other
        for args, names in (
                (["--gpus", "16", "--link", "nvlink"], ["nvlink", "16", "ib400"]),
                (["--gpus", "2", "--gpu", "h20"], ["h20", "h200", "a100"]),
                (["--gpus", "2", "--link", "ib40"], ["ib40", "did you mean 'ib400'"]),
                (["--gpus", "0"], ["--gpus 0"]), (["--gpus", "two"], ["two"]), (["--gpus"], ["needs a value"]),
                (["--gpus", "2", "train.lr=1", "--gpus", "4"], ["--gpus", "twice"]),
                (["--gpus", "12"], ["12", "nodes", "16"]), (["--gpu", "h100"], ["--gpus N"]), (["--launches"], ["--gpus N"]),
                (["--gpu", "h100", "--links", "nvlink"], ["--links", "did you mean --link"]),
                (["--gpus", "3"], ["batch_tokens", "128", "192"]),
                (["--gpus", "2", "model.hiden_size=2"], ["hidden_size"])):
            with self.subTest(args):
                self.refused("info", self.config, *args, names=names)
        run_dir = self.train("train.steps=1")
        self.refused("info", run_dir, "--gpus", "2", names=[run_dir, "configuration"])


if __name__ == "__main__":
    unittest.main()
