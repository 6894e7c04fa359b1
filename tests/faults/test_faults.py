#!/usr/bin/env python3
"""Nothing saved is lost when memory runs out, disks fail, processes are killed at any moment, or the power is cut.

    make && python -m unittest tests.faults.test_faults        a sample of the calls; FAULTS=all: every one

As in SQLite's anomaly tests, a library (tests/faults/inject.c) makes the N-th call of a class fail, or kills the process
there, for one N after the other. After each fault the exit code is right, every checkpoint in the run's directory is
complete, and the same command without the fault ends with the same bytes as a run without faults.
"""

import os
import random
import shutil
import subprocess
import time
import unittest
from collections import Counter

from tests.faults import harness
from tests.faults.fault_case import FaultCase
from tests.faults.harness import BINARY, ENVIRONMENT, EVERYTHING, TIMEOUT, Scenario, every, need, run, sample, \
    try_all, wait_for_save

# Classes of calls, and the stride of a sample, which has the first and the last call of each file besides (FAULTS=all
# tries every one).
KINDS = {"alloc": 17, "library": 120, "map": 1, "open_read": 12, "open_write": 6, "read": 12, "write": 6, "close": 6,
         "sync": 6, "rename": 4, "mkdir": 1, "remove": 6, "link": 1, "truncate": 1, "lock": 1, "space": 1, "stat": 12,
         "list": 22, "thread": 1, "mpi": 1}
EACCES, ENOSPC, EIO = 13, 28, 5


class Case(FaultCase):
    @classmethod
    def fresh(cls):
        """A new run with the byte tokenizer; its best checkpoint is always the newest."""
        if "fresh" not in cls.scenarios:
            cls.scenarios["fresh"] = Scenario("fresh", ["train", cls.config], cls.scratch)
        return cls.scenarios["fresh"]

    @classmethod
    def killed(cls, name, args, at, wanted):
        """A folder whose run was killed at about its `at`-th change of the disk, in a state for which `wanted` holds.
        Checkpoints are written by a thread of their own, so the order of the changes varies."""
        folder = cls.scratch / name
        for attempt in range(60):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            offset = (attempt + 1) // 2 * (1 if attempt % 2 else -1) // 2
            if run(args, folder, f"crash:{max(1, at + offset)}:before").code == -9 and wanted(folder / "run"):
                return folder
        raise AssertionError(f"{name}: never killed at the right moment")

    @classmethod
    def resumed(cls):
        """Resuming a run that was killed just before it renamed its third checkpoint, and left every kind of file that
        a killed run can leave; with a tokenizer file, and a learning rate that makes the first checkpoint the best."""
        if "resumed" not in cls.scenarios:
            args = ["train", cls.config, f"data.tokenizer={cls.tokenizer}", "train.steps=8", "train.lr=2",
                    "train.schedule=constant", "train.warmup_steps=0", "train.grad_clip=0"]
            plain = Scenario("plain", args, cls.scratch)
            at = next(i for i, e in enumerate(plain.disk_events())
                      if e.kind == "rename" and e.path2.endswith("step_00000006"))
            template = cls.killed("killed", args, at + 1, lambda at: (at / "step_00000006.tmp/trainer.json").exists()
                                  and (at / "step_00000004").exists())
            run_dir = template / "run"
            with open(run_dir / "metrics.jsonl", "a") as f:
                f.write('{"step": 7, "loss": 4.')
            with open(run_dir / "samples.txt", "a") as f:
                f.write("---- step 7\nanna s")
            (run_dir / "metrics.jsonl.tmp").write_text("{")
            (run_dir / "samples.txt.tmp").write_text("--")
            (run_dir / "best.tmp").symlink_to("step_00000006")
            (run_dir / "step_00000002.tmp").mkdir()
            scenario = Scenario("resumed", args, cls.scratch, template)
            scenario.steps.update(plain.steps)
            scenario.left, scenario.metrics = plain.left, plain.metrics
            cls.scenarios["resumed"] = scenario
        return cls.scenarios["resumed"]

    @classmethod
    def patient(cls):
        """A run that saves each new best at once, and that train.patience ends."""
        if "patient" not in cls.scenarios:
            scenario = Scenario("patient", ["train", cls.config, "train.steps=40", "train.patience=2", "train.lr=0.3",
                                            "train.schedule=constant", "run.save_every=5", "run.sample_every=0"], cls.scratch)
            saved, last = sorted(cls.published(scenario)), max(scenario.steps)
            need(last < 40 and last not in (5, 10, 15), "patience did not end the run:", saved)
            need(any(step % 5 for step in saved[:-1]), "no new best between checkpoints:", saved)
            cls.scenarios["patient"] = scenario
        return cls.scenarios["patient"]

    @staticmethod
    def published(scenario):
        """The steps of which a checkpoint was renamed into its place."""
        return {int(e.path2[-8:]) for e in scenario.trace if e.kind == "rename" and e.path.endswith(".tmp")
                and "/step_" in e.path2 and not e.path2.endswith(".tmp")}

    @classmethod
    def damaged(cls):
        """Resuming a run whose newest checkpoint is damaged: it uses the one before and saves the step again."""
        if "damaged" not in cls.scenarios:
            plain = Scenario("plain", ["train", cls.config], cls.scratch)
            at = next(i for i, e in enumerate(plain.disk_events())
                      if e.kind == "mkdir" and e.path.endswith("step_00000006.tmp"))
            template = cls.killed("damaged", plain.args, at + 1, lambda at: (at / "step_00000004").exists()
                                  and not (at / "step_00000006").exists())
            model = template / "run" / "step_00000004" / "model.safetensors"
            model.write_bytes(model.read_bytes()[:1000])
            scenario = Scenario("damaged", plain.args, cls.scratch, template, damaged=[4])
            scenario.steps.update(plain.steps)
            cls.scenarios["damaged"] = scenario
        return cls.scenarios["damaged"]


class Faults(Case):
    def each(self, scenario, kinds, option="", stride=1, choose=sample):
        return [(scenario, f"{kind}:{n}{option}") for kind in kinds for n in choose(scenario.events(kind), stride * KINDS[kind])]

    def test_out_of_memory(self):
        kinds = ["alloc", "library", "map", "thread"]
        self.try_faults(*self.each(self.fresh(), kinds), *self.each(self.resumed(), kinds))

    def test_memory_stays_exhausted(self):
        n = self.fresh().counts()["alloc"]
        self.try_faults(*[(self.fresh(), f"alloc:{i}+") for i in every(n, 20)])

    def test_reading_fails(self):
        kinds = ["open_read", "read", "stat", "list", "space", "lock"]
        self.try_faults(*self.each(self.fresh(), kinds), *self.each(self.resumed(), kinds),
                        *self.each(self.damaged(), kinds))

    def test_writing_fails(self):
        kinds = ["open_write", "write", "close", "sync", "rename", "mkdir", "remove", "link", "truncate"]
        self.try_faults(*self.each(self.fresh(), kinds), *self.each(self.resumed(), kinds),
                        *self.each(self.damaged(), kinds))

    def test_disk_stays_full(self):
        kinds = ["write", "open_write", "mkdir", "link"]
        self.try_faults(*self.each(self.fresh(), kinds, "+"), *self.each(self.resumed(), kinds, "+"))

    def test_disk_keeps_failing(self):
        kinds = ["write", "sync", "rename", "remove", "open_read"]
        few = lambda events, stride: every(len(events), stride)  # the same places as for one failing call
        self.try_faults(*[fault for s in (self.fresh(), self.resumed()) for fault in self.each(s, kinds, f"+:{EIO}", 2, few)])

    def test_permission_denied(self):
        kinds = ["open_write", "mkdir"]
        self.try_faults(*self.each(self.fresh(), kinds, f":{EACCES}"), *self.each(self.resumed(), kinds, f":{EACCES}"))

    def test_short_and_interrupted_calls_are_retried(self):
        self.try_faults(*[(s, f"{kind}:{n}:{how}") for s in (self.fresh(), self.resumed())
                          for kind, how in (("write", "short"), ("write", "eintr"), ("read", "short"), ("read", "eintr"))
                          for n in (0, *sample(s.events(kind), 8)) if n == 0 or self.is_plain(s, kind, n)])

    @staticmethod
    def is_plain(scenario, kind, n):
        """Not stdio, which retries by itself."""
        return [e for e in scenario.trace if e.kind == kind][n - 1].call in ("read", "pread", "write", "pwrite")


class Crashes(Case):
    def crash(self, moment, choose=sample):
        scenarios = [self.fresh(), self.resumed(), self.damaged()]
        self.try_faults(*[(s, f"crash:{n}:{moment}") for s in scenarios for n in choose(s.disk_events(), 8)
                          if moment != "torn" or s.disk_events()[n - 1].kind == "write"])

    def test_killed_before_each_change(self):
        self.crash("before", lambda events, stride: sample(events, stride, with_last=True))

    def test_killed_after_each_change(self):
        self.crash("after", lambda events, stride: every(len(events), stride))  # mostly the same as before the next change

    def test_killed_while_patience_counts(self):
        n = self.patient().counts()["disk"]
        self.try_faults(*[(self.patient(), f"crash:{i}:{moment}") for moment, stride in (("before", 5), ("cut", 9))
                          for i in every(n, stride)])

    def test_killed_within_each_write(self):
        self.crash("torn")

    def test_power_cut_before_each_change(self):
        self.crash("cut")


class Order(Case):
    """The order of syncs and renames, from the trace: a power cut may take whatever was not synced."""

    def check_trace(self, events):
        unsynced, names, published = {}, {}, 0  # files written since their sync; folders with new names
        for e in events:
            folder = os.path.dirname(e.path)
            if e.kind == "open_write" and not e.path.endswith("lock"):
                path = self.at + e.path
                names.setdefault(os.path.dirname(path), []).append(e.path)
                if path.endswith((".safetensors", ".json")):
                    unsynced[path] = "opened"
            elif e.kind == "write":
                unsynced[e.path] = "written"
            elif e.kind == "sync":
                unsynced.pop(e.path, None)
                names.pop(e.path, None)
            elif e.kind == "rename" and e.path2.startswith("run/step_") and not e.path2.endswith(".tmp"):
                published += 1
                self.assertTrue(e.path.endswith(".tmp"), e)
                inside = self.at + e.path
                self.assertFalse([p for p in unsynced if p.startswith(inside)], f"{e}: files not synced")
                self.assertNotIn(inside, names, f"{e}: the directory was not synced")
                names.setdefault(self.at + "run", []).append(e.path2)
            elif e.kind in ("remove", "link") or e.kind == "rename":
                # Not before the name of a new checkpoint is synced.
                fresh = [p for p in names.get(self.at + "run", [])
                         if p.startswith("run/step_") and not p.endswith(".tmp")]
                self.assertFalse(fresh, f"{e} before the directory of {fresh} was synced")
                if e.kind == "link" or e.path2 == "run/best":
                    names.setdefault(self.at + "run", []).append("best")
            elif e.kind == "mkdir":
                # metrics and samples up to a checkpoint must be on the disk before it. Later lines may be written
                # while the checkpoint is.
                for name in ("metrics.jsonl", "samples.txt") if e.path.startswith("run/step_") else ():
                    self.assertNotIn(f"{self.at}run/{name}", unsynced, f"{e}: {name} was not synced")
                names.setdefault(os.path.dirname(self.at + e.path), []).append(e.path)
                names.pop(self.at + e.path, None)
        for folder, what in names.items():
            self.assertFalse([w for w in what if "step_" in w and not w.endswith(".tmp")], f"{folder} was not synced")
        self.assertNotIn("best", names.get(self.at + "run", []))
        return published

    def test_checkpoints_are_synced_before_they_are_renamed(self):
        for scenario in (self.fresh(), self.resumed(), self.damaged()):
            with self.subTest(scenario.name):
                folder = scenario.folder()
                self.at = str(folder) + "/"
                done = run(scenario.args, folder, trace=folder / "trace")
                self.assertEqual(done.code, 0)
                self.assertGreaterEqual(self.check_trace(done.trace), 2)
                # The run's directory itself.
                made = [i for i, e in enumerate(done.trace) if e.kind == "mkdir" and e.path == "run"]
                if scenario.name == "fresh":
                    after = [e for e in done.trace[made[0]:] if e.kind == "sync"][0]
                    self.assertEqual(after.path, str(folder))


class OtherCommands(Case):
    """When calls fail, eval, generate and info end as train does, and change no files."""

    def test_out_of_memory_and_failing_reads(self):
        folder = self.fresh().folder()
        self.assertEqual(run(["train", self.config, f"data.tokenizer={self.tokenizer}"], folder).code, 0)
        before, described = harness.tree(folder), Scenario.describe(folder / "run")
        commands = (["eval", "run", f"data.val={self.val}"], ["generate", "run", "--prompt", "anna sees", "--tokens", 5],
                    ["generate", "run/best", "--tokens", 3, "--top-k", 9], ["info", "run"], ["info", self.config],
                    ["info", self.config, "--gpus", 2, "system.device=auto", "system.precision=auto"],
                    ["train", self.config, f"data.tokenizer={self.tokenizer}"])
        for args in commands:
            trace = self.scratch / "trace"
            trace.unlink(missing_ok=True)
            plain = run(args, folder, trace=trace)
            self.assertEqual(plain.code, 0, plain.err)
            counts = Counter(e.kind for e in plain.trace)
            kinds = ("alloc", "library", "map", "open_read", "read", "stat", "list")
            if args[0] == "train":
                kinds = ("open_read", "list", "stat", "alloc")
            specs = [f"{kind}:{n}" for kind in kinds for n in every(counts[kind], 4 * KINDS[kind])]

            def one(spec):
                done = run(args, folder, spec)
                harness.check_ending(done, False, f"{args} with IHA_FAULT={spec}:")
                # An older checkpoint may be used, with a warning; info prints the memory that is free now.
                need(done.code != 0 or done.out == plain.out or "warning: " in done.err or args[0] == "info", args,
                     spec, done.out)

            # One at a time for train: a second process would find the run in use.
            wrong = try_all([lambda s=s: one(s) for s in specs]) if args[0] != "train" else \
                [w for s in specs for w in try_all([lambda: one(s)])]
            self.say(args[0], len(specs), "faults")
            self.assertEqual(len(wrong), 0, "\n".join(wrong[:10]))
            # A finished run whose last checkpoint could not be read repeats the last steps, with the same result.
            left = Scenario.describe(folder / "run")
            self.assertTrue(left == described, f"{args}: what is in the run's directory has changed")
            self.assertTrue(args[0] == "train" or harness.tree(folder) == before, args)


class Kills(Case):
    """kill -9 at random moments, again and again, until the run is finished, or KILLS in all: then it is left to finish.
    So the test ends, however little a run advances between two kills."""

    KILLS = int(os.environ.get("KILLS", 300 if EVERYTHING else 40))
    SEED = int(os.environ.get("SEED", 0)) or random.SystemRandom().randrange(1, 1 << 30)

    def setUp(self):
        self.seed_line = f"SEED={self.SEED}"

    def chain(self, scenario, draw, folder, seconds, most):
        """Kill and restart a run until it finishes, but not more than so many times. Returns the number of kills, and of
        those aimed at a save."""
        kills = aimed = 0
        while True:
            process = subprocess.Popen([BINARY, *map(str, scenario.args)], cwd=folder, env=ENVIRONMENT,
                                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            aim = draw.random() < 0.5
            end = time.monotonic() + draw.uniform(0, seconds)
            if kills >= most:
                end = time.monotonic() + TIMEOUT
            elif aim:  # at a save: as soon as its directory is there, or a little later
                wait_for_save(process, folder / "run")
                end = time.monotonic() + draw.uniform(0, 0.002)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.0002)
            finished = process.poll() is not None
            process.kill()
            err = process.communicate(timeout=TIMEOUT)[1].decode(errors="replace")
            if finished:
                need(process.returncode == 0, self.seed_line, "exit code", process.returncode, err[-2000:])
                scenario.check_end(folder, f"{self.seed_line}, after {kills} kills in {folder}:")
                return kills, aimed
            kills, aimed = kills + 1, aimed + aim
            scenario.check_left(folder / "run", [], f"{self.seed_line}, kill {kills} in {folder}:")

    def test_killed_until_finished(self):
        steps = 200
        scenario = Scenario("long", ["train", self.config, f"train.steps={steps}", "run.save_every=3", "run.eval_every=4",
                                     "run.sample_every=5", "system.threads=2"], self.scratch)
        # A kill comes before a quarter of the steps is done, and often during start-up where that takes long.
        begin = time.monotonic()
        self.assertEqual(run([*scenario.args, "train.steps=1"], scenario.folder()).code, 0)
        start_up = time.monotonic() - begin
        self.assertEqual(run(scenario.args, scenario.folder()).code, 0)
        seconds = start_up + (time.monotonic() - begin - start_up) / 4
        draw, kills, aimed, chains = random.Random(self.SEED), 0, 0, 0
        begin = time.monotonic()
        while kills < self.KILLS and chains < 10 * self.KILLS:
            folder = scenario.folder()
            k, a = self.chain(scenario, draw, folder, seconds, self.KILLS - kills)
            kills, aimed, chains = kills + k, aimed + a, chains + 1
            shutil.rmtree(folder)
        self.say(f"{kills} kills, {aimed} of them aimed at a save, in {chains} chains and "
                 f"{time.monotonic() - begin:.1f} s ({self.seed_line})")
        self.assertGreaterEqual(kills, self.KILLS, self.seed_line)


if __name__ == "__main__":
    unittest.main()
