#!/usr/bin/env python3
"""Several ranks, each with a GPU of the emulator in tests/cuda/emulator/, over NCCL and through host memory: the curve of one
rank, the same bits whatever runs when, graphs, checkpoints, and --profile. What happens to ranks that fail is in
test_ranks_faults.

    make build/release/emulator/train_iha && python -m unittest tests.cuda.test_ranks

With EMULATOR_GPUS=1 ranks share one and talk through host memory; with as many as there are ranks, over NCCL.
"""

import json
import re
import shutil
import unittest

import numpy as np
from safetensors.numpy import load_file

from tests.lib.emulator import EXACT, ONE_PASS, THREE_PASSES, EmulatorRanksCase
from tests.lib.runs import step_dir

ONE_GPU = {"gpus": 1}


class Curves(EmulatorRanksCase):
    def test_fp32_is_one_rank_s(self):
        fp32 = ["system.precision=fp32"]
        jobs = {(1, 0, batch, "one"): (1, [*fp32, batch], {}) for batch in (ONE_PASS, THREE_PASSES)}
        for stage in (0, 1, 2):
            over = [*fp32, f"system.zero_stage={stage}"]
            jobs[2, stage, ONE_PASS, "NCCL"] = (2, [*over, ONE_PASS], {})
            jobs[2, stage, ONE_PASS, "host"] = (2, [*over, ONE_PASS], ONE_GPU)
            jobs[2, stage, THREE_PASSES, "NCCL"] = (2, [*over, THREE_PASSES], {})
            jobs[2, stage, THREE_PASSES, "host"] = (2, [*over, THREE_PASSES], ONE_GPU)
        jobs[3, 1, THREE_PASSES, "NCCL"] = (3, [*fp32, THREE_PASSES], {"start": "mpi"})
        jobs[3, 2, THREE_PASSES, "host"] = (3, [*fp32, THREE_PASSES, "system.zero_stage=2"], ONE_GPU)
        runs = self.all_of(jobs)
        for (ranks, stage, batch, how), run in runs.items():
            with self.subTest(ranks=ranks, stage=stage, batch=batch, how=how):
                one = runs[1, 0, batch, "one"]
                np.testing.assert_allclose(run.losses(), one.losses(), rtol=2e-6 if ranks == 1 else 2e-5)
                np.testing.assert_allclose([x for x, _ in run.losses()], [x for x, _ in one.losses()], rtol=2e-6)
                if ranks > 1:
                    name = {"NCCL": "NCCL", "host": "tcp through host memory"}[how]
                    self.assertIn(f"{ranks} ranks over {name}, zero_stage {stage}; each cuda: ", run.text)

    def test_bf16_stages_and_communicators_agree_to_the_bit(self):
        one = self.on(1, *EXACT, ONE_PASS)
        ways = {"NCCL": {}, "NCCL, MPI": {"start": "mpi"}, "host": ONE_GPU, "host, MPI": ONE_GPU | {"start": "mpi"}}
        jobs = {(stage, way): (2, [*EXACT, ONE_PASS, f"system.zero_stage={stage}"], options)
                for stage in (0, 1, 2) for way, options in ways.items() if way in ("NCCL", "host") or stage == 1}
        runs = self.all_of(jobs)
        first = runs[0, "NCCL"]
        self.assertNotEqual(one.lines(), first.lines())  # sums in another order
        self.assert_near(first, one, 1e-2)
        for (stage, way), run in runs.items():
            self.assertEqual(run.lines(), first.lines(), (stage, way))
            self.assertEqual(run.weights(4), first.weights(4), (stage, way))
            # Ranks over the same shards also write the same moments and master weights.
            self.assert_same(run, runs[max(stage, 1), "NCCL"] if stage else first, (stage, way))

    def test_muon_in_bf16_agrees_to_the_bit(self):
        muon = [*EXACT, ONE_PASS, "train.optimizer=muon"]
        runs = self.all_of({stage: (2, [*muon, f"system.zero_stage={stage}"], {}) for stage in (0, 1, 2)})
        for stage in (1, 2):
            self.assertEqual(runs[stage].lines(), runs[0].lines(), stage)
            self.assertEqual(runs[stage].weights(4), runs[0].weights(4), stage)

    def test_accumulation(self):
        jobs = {(stage, gpus): (2, [*EXACT, THREE_PASSES, f"system.zero_stage={stage}"], {"gpus": gpus})
                for stage in (0, 1, 2) for gpus in (1, 2)}
        runs = self.all_of(jobs)
        for stage in (0, 1, 2):
            self.assert_same(runs[stage, 1], runs[stage, 2], stage)
        self.assertEqual(runs[0, 2].weights(4), runs[1, 2].weights(4))
        self.assert_near(runs[2, 2], runs[1, 2], 1e-2)  # sums over ranks in every pass

    def test_reduce_dtype(self):
        """Rounded once, and summed in rank order whatever is asked for."""
        bf16 = ["system.precision=bf16", "system.reduce_dtype=bf16", THREE_PASSES]
        jobs = {"NCCL": (2, bf16, {}), "host": (2, bf16, ONE_GPU), "exact": (2, [*bf16, EXACT[0]], {}),
                "fp32": (2, [*EXACT, THREE_PASSES], {}),
                "2": (2, [*bf16, "system.zero_stage=2"], {}), "2, host": (2, [*bf16, "system.zero_stage=2"], ONE_GPU)}
        runs = self.all_of(jobs)
        self.assert_same(runs["host"], runs["NCCL"], "host")
        self.assert_same(runs["exact"], runs["NCCL"], "deterministic")
        self.assert_same(runs["2, host"], runs["2"], "stage 2")
        self.assertNotEqual(runs["fp32"].lines(), runs["NCCL"].lines())
        self.assert_near(runs["fp32"], runs["NCCL"], 1e-2)
        self.assert_near(runs["2"], runs["NCCL"], 1e-2)

    def test_system_comm(self):
        jobs = {"nccl": (2, [ONE_PASS, "system.comm=nccl"], {}),
                "mpi": (2, [ONE_PASS, "system.comm=mpi"], {"start": "mpi"}),
                "auto": (2, [ONE_PASS, "system.comm=auto"], {"start": "mpi"}),
                "not mpi": (2, [ONE_PASS, "system.comm=mpi"], {"code": 2}),
                "shared": (2, [ONE_PASS, "system.comm=nccl"], ONE_GPU | {"code": 2}),
                "cpu": (2, [ONE_PASS, "system.comm=nccl", "system.device=cpu", "system.precision=fp32"], {"code": 2})}
        runs = self.all_of(jobs)
        for name, said in {"nccl": "2 ranks over NCCL", "auto": "2 ranks over NCCL",
                           "mpi": "2 ranks over mpi through host memory",
                           "not mpi": "system.comm = mpi, but mpirun did not start these ranks",
                           "shared": "system.comm = nccl needs a GPU for every rank",
                           "cpu": "system.comm = nccl needs GPUs, but this run is on the CPU"}.items():
            self.assertEqual(runs[name].text.count(said), 1, runs[name].text)
            if runs[name].codes[0] == 2:
                self.assertEqual(runs[name].text.count("train_iha: "), 1, runs[name].text)


class MixedHosts(EmulatorRanksCase):
    def test_gpus_on_some_hosts_only(self):
        """With system.device = auto all ranks compute on the same kind of device, or none does."""
        for gpus in ((1, 0), (0, 1, 0)):
            of_rank = [{"EMULATOR_GPUS": str(n)} for n in gpus]
            rank1 = f"rank 1: system.device = auto finds {'a' if gpus[1] else 'no'} GPU on "
            run = self.on(len(gpus), "system.device=auto", "train.batch_tokens=48", of_rank=of_rank, code=2)
            self.assertEqual(run.text.count("train_iha: "), 1, run.text)
            self.assertIn(rank1, run.text)
            self.on(len(gpus), "system.device=cpu", "system.precision=fp32", "train.batch_tokens=48", of_rank=of_rank)


class Order(EmulatorRanksCase):
    """What runs when, on GPUs and between them, changes nothing: not a bit. A missing wait, or a buffer used while a
    message is in flight, changes something or is detected by the emulator."""

    BETWEEN = ["data.val={data}/val_0.bin", "run.eval_every=2", "run.eval_batches=3", "run.sample_every=3",
               "run.save_every=2"]

    def check(self, gpus):
        between = [x.format(data=self.data) for x in self.BETWEEN]
        whens = {"at once": {"EMULATOR_SEED": "2"},
                 "late messages": {"EMULATOR_SEED": "4", "EMULATOR_NCCL_DELAY_US": "5000"},
                 "late kernels": {"EMULATOR_SEED": "7", "EMULATOR_DELAY_US": "300"}}
        jobs = {(stage, when): (2, [*EXACT, *between, THREE_PASSES if stage == 2 else ONE_PASS,
                                    f"system.zero_stage={stage}"], {"gpus": gpus} | environment)
                for stage in (0, 1, 2) for when, environment in whens.items()}
        runs = self.all_of(jobs)
        for stage, when in jobs:
            self.assert_same(runs[stage, when], runs[stage, "at once"], (stage, when))
            self.assertEqual((runs[stage, when].dir / "samples.txt").read_bytes(),
                             (runs[stage, "at once"].dir / "samples.txt").read_bytes())
        self.assertEqual(runs[0, "at once"].lines(), runs[1, "at once"].lines())

    def test_over_nccl(self):
        self.check(gpus=2)

    def test_through_host_memory(self):
        self.check(gpus=1)


class Graphs(EmulatorRanksCase):
    def launches(self, run):
        """Graphs that each rank launched."""
        return [int(x) for x in re.findall(r"^emulator: (\d+) graphs launched$", run.text, re.M)]

    def test_the_same_bits(self):
        between = [x.format(data=self.data) for x in Order.BETWEEN]
        cases = {"one": (1, [THREE_PASSES]), "NCCL": (2, [ONE_PASS]), "passes": (2, [THREE_PASSES]),
                 "stage 0": (2, [THREE_PASSES, "system.zero_stage=0"]),
                 "stage 2": (2, [THREE_PASSES, "system.zero_stage=2"]),
                 "host": (2, [THREE_PASSES]),
                 "light": (1, [ONE_PASS, "system.recompute=light"]), "full": (2, [ONE_PASS, "system.recompute=full"])}
        jobs = {}
        for name, (ranks, over) in cases.items():
            for graph in ("auto", "off"):
                options = {"gpus": 1 if name == "host" else ranks, "EMULATOR_REPORT": "1", "EMULATOR_DELAY_US": "50"}
                jobs[name, graph] = (ranks, [*EXACT, *over, *between, "train.steps=6", f"system.graph={graph}"], options)
        runs = self.all_of(jobs)
        # All passes are launched but the first of each kind, which backward has by whether it adds and whether it
        # reduces, and the forward passes that wait for new parameters: in stages 1 and 2 the first pass of a step does,
        # but for steps 1, 3, 4 and 5, where nothing, an evaluation or a sample has come before. The passes that reduce
        # through host memory are not launched.
        launched = {"one": 35 + 5 + 29, "NCCL": 3 + 5, "passes": 15 + 5 + 5 + 5, "stage 0": 17 + 5 + 5 + 5,
                    "stage 2": 15 + 5 + 11, "host": 15 + 5 + 5, "light": 11 + 5 + 5, "full": 3 + 5}
        for name, (ranks, _) in cases.items():
            self.assert_same(runs[name, "auto"], runs[name, "off"], name, step=6)
            self.assertEqual(self.launches(runs[name, "off"]), [0] * ranks, name)
            self.assertEqual(self.launches(runs[name, "auto"]), [launched[name]] * ranks, name)

    def test_a_driver_that_cannot_capture(self):
        stage_2 = [*EXACT, THREE_PASSES, "system.zero_stage=2"]
        jobs = {what: (2, stage_2, {"EMULATOR_NO_CAPTURE": what, "EMULATOR_REPORT": "1"}) for what in ("begin", "end", "instantiate")}
        runs = self.all_of(jobs | {"off": (2, [*stage_2, "system.graph=off"], {})})
        for what in jobs:
            self.assert_same(runs[what], runs["off"], what)
            self.assertEqual(self.launches(runs[what]), [0, 0])
            for text in runs[what].printed:
                self.assertEqual(text.count("CUDA graphs cannot be used here"), 1, text)


class Checkpoints(EmulatorRanksCase):
    def test_resumes_to_the_bit(self):
        """Sharded master weights: a run that was stopped and resumed has the bytes of one that was not."""
        for stage, gpus in ((1, 2), (2, 2), (2, 1)):
            over = [*EXACT, THREE_PASSES, f"system.zero_stage={stage}", "run.save_every=2"]
            whole = self.on(2, *over, gpus=gpus)
            shutil.copytree(whole.dir, part := self.new_dir(), symlinks=True)
            shutil.rmtree(step_dir(part, 4))
            resumed = self.on(2, *over, gpus=gpus, run_dir=part)
            self.assertIn("resuming from", resumed.text)
            self.assert_same(resumed, whole, (stage, gpus))

    def test_weights_are_the_master_weights(self):
        """What a rank alone, which has all master weights, would have saved; and not the rounded weights that it trains with."""
        runs = self.all_of({stage: (2, [*EXACT, ONE_PASS, "train.steps=1", f"system.zero_stage={stage}"], {})
                            for stage in (0, 1, 2)})
        self.assertEqual(runs[1].weights(1), runs[0].weights(1))
        self.assertEqual(runs[2].weights(1), runs[0].weights(1))
        weights = load_file(step_dir(runs[1].dir, 1) / "model.safetensors")
        low = np.concatenate([w.ravel().view(np.uint32) & 0xffff for w in weights.values()])
        self.assertGreater(np.count_nonzero(low), low.size / 2)

    def test_other_numbers_of_ranks_and_other_devices(self):
        cpu = ["system.device=cpu", "system.precision=fp32", "system.deterministic=false"]
        over = [*EXACT, THREE_PASSES, "run.save_every=2"]
        whole = self.on(2, *over)

        def go_on(*args, **options):
            shutil.copytree(whole.dir, part := self.new_dir(), symlinks=True)
            shutil.rmtree(step_dir(part, 4))
            return self.on(*args, run_dir=part, **options)

        for label, run in {"three": go_on(3, *over, "system.zero_stage=2"), "one": go_on(1, *over),
                           "host": go_on(2, *over, "system.zero_stage=0", gpus=1),
                           "cpu": go_on(1, *over, *cpu)}.items():
            self.assertIn("resuming from", run.text, label)
            self.assertEqual(run.lines()[:2], whole.lines()[:2], label)
            self.assert_near(run, whole, 1e-2)
        back = self.on(2, *over, "train.steps=6", run_dir=self.on(1, *over, *cpu).dir)
        self.assertIn("resuming from", back.text)
        self.assertEqual(len(back.losses()), 6)

    def test_without_memory_for_a_copy(self):
        """Then training waits while the threads write, and the files are the same."""
        # In fp32 the thread writes the very parameters that ranks have just sent each other.
        for precision in ("bf16", "fp32"):
            over = ["system.deterministic=true", f"system.precision={precision}", ONE_PASS, "run.save_every=1"]
            late = {"EMULATOR_NCCL_DELAY_US": "20000"}
            runs = self.all_of({"copy": (2, over, {}), "none": (2, over, late | {"EMULATOR_HOST_MEMORY": "1000"})})
            self.assertIn("not enough host memory", runs["none"].text)
            self.assertNotIn("not enough host memory", runs["copy"].text)
            for step in (3, 4):
                self.assert_same(runs["none"], runs["copy"], (precision, step), step)


class Profile(EmulatorRanksCase):
    def check_time_line(self, run, steps):
        """Ranges lie in those around them and begin one after the other; every phase and layer is there."""
        events = json.loads((run.dir / "profile.json").read_text())["traceEvents"]
        names = [e["name"] for e in events]
        open_ranges = []
        for e in events:
            self.assertGreaterEqual(e["dur"], 0)
            while open_ranges and e["ts"] >= open_ranges[-1]["ts"] + open_ranges[-1]["dur"] - 0.002:  # printed to 0.001
                open_ranges.pop()
            if open_ranges:
                outer = open_ranges[-1]
                self.assertLessEqual(e["ts"] + e["dur"], outer["ts"] + outer["dur"] + 0.003, (e, outer))
            open_ranges.append(e)
        for name in ("forward", "backward"):
            self.assertEqual(names.count(name), 3 * steps)  # passes
        self.assertEqual(names.count("update"), steps)
        for layer in range(3):
            self.assertEqual(names.count(f"layer {layer}"), 2 * 3 * steps)
        self.assertEqual(names.count("attention_backward"), 3 * 3 * steps)
        self.assertGreater(names.count("adamw"), 0)
        self.assertEqual({e["pid"] for e in events}, {0})
        return events

    def check_table(self, run):
        lines = re.findall(r"^(\w[\w ]*?) +(\d+\.\d{3}) +(\d+\.\d)% +(\d+\.\d)$", run.text, re.M)
        total = float(re.search(r"^all of a step +(\d+\.\d+)$", run.text, re.M)[1])
        self.assertAlmostEqual(sum(float(ms) for _, ms, _, _ in lines), total, delta=0.001 * len(lines))
        self.assertAlmostEqual(sum(float(share) for _, _, share, _ in lines), 100, delta=0.05 * len(lines) + 0.1)
        times = {name: float(count) for name, _, _, count in lines}
        self.assertEqual((times["forward"], times["update"], times["layer"]), (3, 1, 18))
        return total

    def test_table_and_time_line(self):
        over = [THREE_PASSES, "train.steps=5", "--profile", "2"]
        jobs = {"gpu": (2, over, {}), "host": (2, over, ONE_GPU),
                "cpu": (2, [*over, "system.device=cpu", "system.precision=fp32"], {}),
                "one": (1, ["train.batch_tokens=24", *over[1:]], {})}
        for name, run in self.all_of(jobs).items():
            with self.subTest(name):
                events = self.check_time_line(run, 2)
                total = self.check_table(run)
                outer = sum(e["dur"] for e in events if e["name"] in ("forward", "backward", "update"))
                self.assertAlmostEqual(total * 2 * 1e3, outer, delta=0.02 * outer + 5)  # the table's time is that of these ranges
                self.assertEqual(run.text.count("all of a step"), 1)  # only rank 0 prints it

    def test_refusals(self):
        says = {"train: --profile needs a value": (["--profile"],),
                "not a whole number from 1 to 1000":
                    (["--profile", "0"], ["--profile", "-1"], ["--profile", "2x"], ["--profile", "1001"]),
                "--profile 2 traces steps after 3 warm-up steps, and the run has 4 left; raise train.steps": (["--profile", "2"],)}
        for message, cases in says.items():
            for case in cases:
                run = self.on(1, ONE_PASS, *case, code=2)
                self.assertIn(message, run.text, case)
                self.assertEqual(run.text.count("\n"), 1, run.text)
                self.assertFalse((run.dir / "profile.json").exists())


if __name__ == "__main__":
    unittest.main()
