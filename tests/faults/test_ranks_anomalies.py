#!/usr/bin/env python3
"""Nothing saved is lost on several ranks either: one rank's call fails, or one process is killed, and all ranks end.

    make && python -m unittest tests.faults.test_ranks_anomalies        a sample of the calls; FAULTS=all: every one

As tests.faults.test_faults, for runs under mpirun, with faults on one rank. After each, every rank ends within the
timeout; one line says what failed and on which rank; the exit code is 1, or 2 before the first step; every checkpoint is
complete; and the same command without the fault ends with the same bytes as a run without faults.
"""

import os
import random
import re
import shutil
import subprocess
import time
import unittest
from collections import Counter, namedtuple
from pathlib import Path

from tests.faults import harness
from tests.faults.fault_case import FaultCase
from tests.faults.harness import BINARY, ENVIRONMENT, EVERYTHING, LIBRARY, SANITIZED, Done, Scenario, \
    checkpoints, need, try_all, wait_for_save
from tests.lib.ranks import AS_ROOT, MARK, MPIRUN, kill, marked

PEER_TIMEOUT = 20 if SANITIZED else 6  # seconds without an answer
LIMIT = PEER_TIMEOUT + 30  # the other ranks time out, let the first one report, and abort MPI
RanksDone = namedtuple("RanksDone", (*Done._fields, "traces"))

# Calls whose failure does not matter: a name in a message, or MPI_Abort, after which the process exits anyway.
HARMLESS = {"MPI_Get_processor_name", "MPI_Error_string", "MPI_Abort"}
# Kinds of calls, and of how many one is tried when only a sample is wanted.
STRIDES = {"mpi": 120, "poll": 700, "alloc": 220, "library": 500, "map": 5, "thread": 1, "open_read": 15, "read": 35,
           "stat": 12, "list": 80, "space": 1, "lock": 1, "open_write": 16, "write": 16, "close": 16, "sync": 16, "rename": 3,
           "mkdir": 3, "remove": 4, "link": 2, "truncate": 1}
CHANGES = ("open_write", "write", "close", "sync", "rename", "mkdir", "remove", "link", "truncate")
READS = ("open_read", "read", "stat", "list", "space", "lock")
MEMORY = ("alloc", "library", "map", "thread")


def environment(scratch, mark):
    """Open MPI's temporary files, which it leaves when killed, are in the scratch folder, in one for each job."""
    scratch = scratch / f"mpi-{mark}"
    scratch.mkdir()
    return {**ENVIRONMENT, **AS_ROOT, MARK: mark,
            "OMPI_MCA_orte_tmpdir_base": str(scratch), "OMPI_MCA_btl_vader_backing_directory": str(scratch),
            "PRTE_MCA_prte_tmpdir_base": str(scratch), "OMPI_MCA_btl_sm_backing_directory": str(scratch),  # Open MPI 5
            "ASAN_OPTIONS": ENVIRONMENT["ASAN_OPTIONS"] + ":detect_leaks=0"}


def wait_until_gone(mark, limit):
    """Wait for the marked processes to end. Returns those that were left after the limit, and kills them."""
    deadline = time.monotonic() + limit
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = left
    while left:
        for pid in left:
            kill(pid)
        time.sleep(0.02)
        left = marked(mark)
    return found


class Job:
    """A command on several ranks. A fault is (rank, IHA_FAULT of inject.c)."""

    def __init__(self, name, ranks, args, scratch):
        self.name, self.ranks, self.runs, self.scratch = name, ranks, 0, scratch
        self.args = [*args, f"system.peer_timeout={PEER_TIMEOUT}"]

    def command(self, variables=(), more=()):
        given = [word for item in dict(variables).items() for word in ("-x", "=".join(map(str, item)))]
        return [*MPIRUN, "-np", str(self.ranks), *given, BINARY, *map(str, self.args), *more]

    def mark(self):
        return f"{os.getpid()}-{time.monotonic_ns()}"

    def run(self, folder, fault=None, trace=None, more=()):
        rank, spec = fault or (0, "")
        variables = {}
        if fault or trace:
            variables = {"LD_PRELOAD": LIBRARY, "IHA_FAULT": spec, "IHA_FAULT_RANK": rank}
        if trace:
            variables["IHA_FAULT_TRACE"] = trace
        mark = self.mark()
        process = subprocess.Popen(self.command(variables, more), cwd=folder, env=environment(self.scratch, mark),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True)
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            wait_until_gone(mark, 0)
            err = process.communicate()[1]
            raise harness.Wrong(f"{self.name}: {fault} in {folder}: still running after {LIMIT} s: {err}") from None
        left = wait_until_gone(mark, 20)
        need(not left, f"{self.name}: {fault} in {folder}: left behind:", left)
        traces = [harness.read_trace(Path(f"{trace}.{r}")) for r in range(self.ranks)] if trace else []
        if trace and not self.runs:
            self.traces = traces  # the first run is without a fault
        self.runs += bool(trace)
        code = process.returncode
        if code < 0 and b"PMIx_server_finalize" in err:  # mpirun itself crashed, after the ranks ended
            code = int(b"train_iha: " in err)
        if shutil.which("prterun"):  # Open MPI 5's: some of its messages end with bytes that are no text, and no line break
            err = re.sub(rb"^(?=[ -~]*[^ -~\n]).{1,200}?(?=train_iha: )", b"", err, flags=re.M)
        return RanksDone(code, out, err.decode(errors="replace"), traces[0] if trace else [], traces)

    def check_ending(self, done, rank, what):
        """As harness.check_ending: one line from all ranks together, which names the rank with the fault."""
        lines = [line for line in done.err.splitlines() if "train_iha: " in line]
        need(done.code in (0, 1, 2), what, "exit code", done.code, done.err[-3000:])
        need("Sanitizer" not in done.err and "runtime error" not in done.err, what, done.err[-3000:])
        need("exited on signal" not in done.err, what, done.err[-3000:])
        need(len(lines) == (done.code != 0), what, "exit code", done.code, "with", lines, done.err[-3000:])
        if done.code:
            need(lines[0].startswith("train_iha: ") and len(lines[0]) > 20, what, lines)
            need(lines[0].startswith(f"train_iha: rank {rank}"), what, "names another rank, or none:", lines)
        need(not (Scenario.has_started(done.trace) and done.code == 2), what, "exit code 2 after the first step:", lines)


class RanksScenario(Job, Scenario):
    def __init__(self, name, ranks, args, scratch, **options):
        Job.__init__(self, name, ranks, args, scratch)
        Scenario.__init__(self, name, self.args, scratch, **options)

    def counts_of(self, rank):
        return self.counts_in(self.traces[rank])

    def fault(self, spec):
        rank, text = spec
        folder = self.folder()
        kind, number, option = (text.split(":") + [""])[:3]
        done = self.run(folder, spec, folder / "trace")
        events = done.traces[rank]
        failed = next((e for e in events if e.kind == kind and e.number == int(number.rstrip("+"))), None)
        what = f"{self.name}: IHA_FAULT={text} on rank {rank} "
        what += f"({failed.call} {failed.path} {failed.path2}) in {folder}" if failed else f"in {folder}"
        self.tried[kind if kind != "crash" else f"crash {option}"] += 1
        if kind == "crash":
            need(done.code not in (0, 2), what, "exit code", done.code, done.err[-500:])
            need("train_iha: " not in done.err, what, done.err[-3000:])
        else:
            self.check_ending(done, rank, what)
            if failed:
                self.check_reported(done._replace(trace=events), failed, kind, number, option,
                                    self.has_started(done.trace), what)
        known = done.trace[:-1] if done.trace and done.trace[-1] is failed or kind == "crash" else done.trace
        self.check_left(folder / "run", known, what)
        if done.code == 0 and "warning: " not in done.err:
            self.check_end(folder, what)
        if EVERYTHING or sum(self.tried.values()) % 3 == 0:  # in a sample only every third one, to save time
            self.again(folder, what)
        shutil.rmtree(folder)
        return done

    def check_reported(self, done, failed, kind, number, option, started, what):
        super().check_reported(done, failed, kind, number, option, started, what)
        if kind in ("mpi", "poll", "finalize", "thread") and failed.call not in HARMLESS:
            need(done.code == 1, what, "exit code", done.code, done.err[-2000:])


@unittest.skipUnless(shutil.which("mpirun"), "mpirun is not installed: run make deps")
class Case(FaultCase):
    at_once = 3 * os.cpu_count()  # a run mostly waits for Open MPI

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.config.write_text(cls.config.read_text().replace("sample_every = 1", "sample_every = 3"))

    @classmethod
    def two(cls):
        if "two" not in cls.scenarios:
            cls.scenarios["two"] = RanksScenario("two", 2, ["train", cls.config], cls.scratch)
        return cls.scenarios["two"]

    @classmethod
    def three(cls):
        if "three" not in cls.scenarios:
            args = ["train", cls.config, "train.batch_tokens=192", "system.zero_stage=2"]
            cls.scenarios["three"] = RanksScenario("three", 3, args, cls.scratch)
        return cls.scenarios["three"]

    @classmethod
    def resumed(cls):
        """Resuming a run whose rank 0 was killed just before it renamed its second checkpoint."""
        if "resumed" not in cls.scenarios:
            args = ["train", cls.config, f"data.tokenizer={cls.tokenizer}"]
            plain = RanksScenario("plain", 2, args, cls.scratch)
            at = next(i for i, e in enumerate(plain.disk_events())
                      if e.kind == "rename" and e.path2.endswith("step_00000004"))
            template = cls.scratch / "killed"
            template.mkdir()
            plain.run(template, (0, f"crash:{at + 1}:before"))
            need(list(checkpoints(template / "run")) == [2], "left:", checkpoints(template / "run"))
            scenario = RanksScenario("resumed", 2, args, cls.scratch, template=template)
            scenario.steps.update(plain.steps)
            scenario.left, scenario.metrics = plain.left, plain.metrics
            cls.scenarios["resumed"] = scenario
        return cls.scenarios["resumed"]

    @staticmethod
    def each(scenario, kinds, ranks, option="", stride=1, whole=1):
        return [(scenario, (rank, f"{kind}:{n}{option}")) for rank in ranks for kind in kinds
                for n in pick(scenario.counts_of(rank)[kind], stride * STRIDES[kind], whole)]


def pick(count, stride, whole=1):
    """As every(), but without the last but one and two; `whole` is the stride when FAULTS=all."""
    stride = whole if EVERYTHING else stride * (4 if SANITIZED else 1)
    return sorted({*range(1 + count // 2 % stride, count + 1, stride), count}) if count else []


class Faults(Case):
    """One call of one rank fails."""

    def polls(self, scenario, ranks):
        """The number of polls differs from run to run; a fault whose number is not reached does not happen."""
        count = min(scenario.counts_of(r)["poll"] for r in ranks)
        numbers = range(1, count + 1, max(1, count // (100 if EVERYTHING else 2)))
        return [(scenario, (r, f"poll:{n}")) for r in ranks for n in numbers]

    def test_mpi_init_and_finalize_fail(self):
        for scenario, ranks in ((self.two(), (0, 1)), (self.three(), (2,))):
            first = next(e.number for e in scenario.traces[1] if e.call == "MPI_Isend")
            self.try_faults(*[(scenario, (r, "finalize:1")) for r in ranks],
                            *[(scenario, (r, f"mpi:{n}")) for r in ranks
                              for n in range(1, first + 1, 1 if r == 1 or EVERYTHING else 3)])

    def test_mpi_call_fails_while_training(self):
        two, three = self.two(), self.three()
        self.try_faults(*self.each(two, ["mpi"], (0, 1)), *self.polls(two, (0, 1)),
                        *self.each(three, ["mpi"], (1, 2), stride=6, whole=7),
                        *self.each(self.resumed(), ["mpi"], (0, 1), stride=4, whole=7))

    def test_mpi_keeps_failing(self):
        self.try_faults(*self.each(self.two(), ["mpi"], (0, 1), "+", stride=3, whole=7))

    def test_rank_hangs_in_mpi(self):
        """The others wait for peer_timeout, then name the rank, or report that MPI_Finalize does not return."""
        two = self.two()
        last = 4 * two.counts_of(1)["mpi"] // 5  # the number of tests for the end of a save differs from run to run

        def one(call):
            folder = two.folder()
            done = two.run(folder, (1, f"{call}:stop"), folder / "trace")
            lines = [line for line in done.err.splitlines() if "train_iha: " in line]
            what = f"rank 1 stops at {call} in {folder}"
            need((done.code, len(lines)) == (1, 1), what, "exit code", done.code, done.err[-2000:])
            need("no answer from rank 1 " in lines[0] or (call == "finalize:1" and "rank 0: MPI_Finalize" in lines[0]), what,
                 lines)  # its last message may still be in flight
            two.check_left(folder / "run", done.trace, what)
            two.again(folder, what)
            shutil.rmtree(folder)

        numbers = range(last // 8, last, last // 8) if EVERYTHING else (last // 3, 2 * last // 3)
        calls = ["finalize:1", *(f"mpi:{n}" for n in numbers)]
        wrong = try_all([lambda c=c: one(c) for c in calls], 4)
        self.assertEqual(len(wrong), 0, "\n".join(wrong))

    def test_out_of_memory(self):
        self.try_faults(*self.each(self.two(), MEMORY, (0, 1)),
                        *self.each(self.resumed(), MEMORY if EVERYTHING else ["alloc", "library"], (1, 0), stride=2))

    def test_memory_stays_exhausted(self):
        self.try_faults(*self.each(self.two(), ["alloc"], (1, 0), "+", stride=2, whole=5))

    def test_reading_fails(self):
        self.try_faults(*self.each(self.two(), READS, (1,)), *self.each(self.resumed(), READS, (0, 1), stride=2))

    def test_writing_fails(self):
        self.try_faults(*self.each(self.two(), CHANGES, (1,)), *self.each(self.two(), CHANGES, (0,), stride=2),
                        *self.each(self.resumed(), CHANGES if EVERYTHING else ["rename", "remove"], (0, 1), stride=2))

    def test_disk_stays_full(self):
        kinds = ("write",)
        self.try_faults(*self.each(self.two(), kinds, (0, 1), "+", stride=2))

    def crash(self, scenario, rank, moment, stride):
        count = scenario.counts_of(rank)["disk"]
        return [(scenario, (rank, f"crash:{n}:{moment}")) for n in pick(count, stride)]

    def test_killed_at_a_change_of_the_disk(self):
        two, resumed = self.two(), self.resumed()
        self.try_faults(*self.crash(two, 0, "before", 25), *self.crash(two, 1, "before", 4), *self.crash(two, 1, "after", 6),
                        *self.crash(two, 0, "cut", 35), *self.crash(two, 1, "cut", 9), *self.crash(resumed, 1, "before", 6))

    def test_out_of_memory_for_a_snapshot(self):
        """Allocations between a step and the first file of a checkpoint fail."""
        specs = []
        for rank in (1, 0):
            trace = self.two().traces[rank]
            file = next(i for i, e in enumerate(trace) if e.kind == "open_write" and ".tmp/" in e.path)
            specs += [(self.two(), (rank, f"alloc:{e.number}")) for e in
                      [e for e in trace[:file] if e.kind == "alloc"][-20 if EVERYTHING else -13::1 if EVERYTHING else 2]]
        self.try_faults(*specs)

    def test_background_save_fails(self):
        scenario = RanksScenario("behind", 2, ["train", self.config, "train.steps=60", "run.save_every=30",
                                               "run.eval_every=30", "run.sample_every=0"], self.scratch)
        specs = []
        for rank in (0, 1):
            for kind in ("open_write", "write", "sync"):
                numbers = [e.number for e in scenario.traces[rank] if e.kind == kind and "step_00000030.tmp" in
                           e.path + e.path2 and (not e.path.endswith("step_00000030.tmp"))]
                specs += [(rank, f"{kind}:{n}:late") for n in (numbers if EVERYTHING else numbers[:1])]
        ahead = []

        def one(spec):
            folder = scenario.fault(spec)
            lines = sum(e.kind == "write" and e.path.endswith("/metrics.jsonl") for e in folder.trace)
            ahead.append(lines)
            need(folder.code == 1, spec, "exit code", folder.code, folder.err[-500:])

        wrong = try_all([lambda s=s: one(s) for s in specs], self.at_once)
        self.say(len(specs), "failing writers; lines of metrics written:", sorted(ahead))
        self.assertEqual(len(wrong), 0, "\n".join(wrong[:10]))
        self.assertGreater(len(specs), 5)
        self.assertGreater(min(ahead), 32)  # 30 steps, an evaluation, and at least one step during the save

    def test_metrics_fail_in_a_skipped_step(self):
        """Writing the last line of metrics fails in the step in which all ranks exchange their gradient norms."""
        job = Job("skips", 2, ["train", self.config, "train.lr=0", "train.skip_zscore=1e-6",
                               "train.steps=200", "train.max_skips=1", "run.save_every=0", "run.eval_every=0",
                               "run.sample_every=0"], self.scratch)
        writes = 0
        for back, message in ((None, "outlier"), (0, "outlier"), (1, "cannot write")):
            folder = self.scratch / f"skips_{back}"
            folder.mkdir()
            done = job.run(folder, None if back is None else (0, f"write:{writes - back}"), folder / "trace")
            lines = [line for line in done.err.splitlines() if "train_iha: " in line]
            self.assertEqual((done.code, len(lines)), (1, 1), done.err)
            self.assertIn(message, lines[0])
            writes = sum(e.kind == "write" for e in done.trace)


class Kills(Case):
    """kill -9 of a rank or of mpirun at any moment, again and again, until the run is finished."""

    KILLS = int(os.environ.get("KILLS", 200 if EVERYTHING else 24))
    SEED = int(os.environ.get("SEED", 0)) or random.SystemRandom().randrange(1, 1 << 30)

    @staticmethod
    def children(pid):
        """Process ids; mpirun's children are the ranks."""
        found = []
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                pass
        return sorted(found)

    def kill_one(self, scenario, draw, folder, seconds):
        """Start the run and kill one of its processes. Returns "rank" or "mpirun", or None when the run finished."""
        mark, run_dir = scenario.mark(), folder / "run"
        process = subprocess.Popen(scenario.command(), cwd=folder, env=environment(self.scratch, mark),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   start_new_session=True)
        delay, victim = draw.uniform(0, seconds), draw.randrange(3)
        if draw.random() < 0.7:  # at a save: as soon as its directory is there, or a little later
            wait_for_save(process, run_dir)
            delay = draw.uniform(0, 0.004)
        kill_time = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < kill_time:
            time.sleep(0.0002)
        while victim and process.poll() is None and len(self.children(process.pid)) < 2:
            time.sleep(0.001)
        seen = max(checkpoints(run_dir), default=0)
        ranks = self.children(process.pid)
        finished = process.poll() is not None
        if not finished:
            kill(ranks[victim - 1] if victim and len(ranks) == 2 else process.pid)
        try:
            err = process.communicate(timeout=LIMIT)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            left = wait_until_gone(mark, 0)
            need({program for program, _ in left.values()} <= {"orterun", "prterun"}, self.what, "still running:", left)
            self.hung.append(left)  # Open MPI's: launch.sh kills an mpirun whose ranks have ended
            err = process.communicate()[1].decode(errors="replace")
        left = wait_until_gone(mark, LIMIT)
        need(not left, self.what, "in", folder, "left behind:", left)
        newest = max(checkpoints(run_dir), default=0)
        need(newest >= seen, self.what, "in", folder, "had", seen, "and has", newest)
        scenario.check_left(run_dir, [], f"{self.what} in {folder}:")
        if process.returncode == 0:
            scenario.check_end(folder, f"{self.what} in {folder}:")
            return None
        need(not finished, self.what, "exit code", process.returncode, err[-2000:])
        return "rank" if victim and len(ranks) == 2 else "mpirun"

    def chain(self, scenario, seed, seconds, kills):
        draw, folder = random.Random(seed), scenario.folder()
        while sum(kills.values()) < self.KILLS:
            whom = self.kill_one(scenario, draw, folder, seconds)
            if whom:
                kills[whom] += 1
            else:
                kills["finished"] -= 1  # not a kill: offsets "chains" in the sum
                kills["chains"] += 1
                shutil.rmtree(folder)
                folder = scenario.folder()
        scenario.again(folder, f"{self.what} in {folder}")
        shutil.rmtree(folder)

    def test_killed_until_finished(self):
        self.what, self.hung = f"SEED={self.SEED}", []
        scenario = RanksScenario("long", 2, ["train", self.config, "train.steps=120", "run.save_every=3", "run.eval_every=6",
                                             "run.sample_every=10"], self.scratch)
        begin = time.monotonic()
        folder = scenario.folder()
        self.assertEqual(scenario.run(folder).code, 0)
        seconds, kills, begin = time.monotonic() - begin, Counter(), time.monotonic()
        wrong = try_all([lambda s=s: self.chain(scenario, self.SEED + s, seconds, kills) for s in range(4)], 4)
        self.say(dict(kills), f"in {time.monotonic() - begin:.1f} s ({self.what}); mpirun hung:", self.hung)
        self.assertEqual(len(wrong), 0, "\n".join(wrong[:4]))
        self.assertLessEqual(len(self.hung), 1 + self.KILLS // 50, self.hung)


if __name__ == "__main__":
    unittest.main()
