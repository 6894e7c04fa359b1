"""OpenMP's variables, affinity masks, CPU quotas and stack limits: a run has the losses of its number of threads, to the
bit, or ends with exit code 2 and one line.

    make && python -m unittest tests.cli.test_threads        a sample; FAULTS=all: every combination
"""

import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from tests.lib.tiny import tiny_config, write_shard

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = str(Path(os.environ.get("TRAIN_IHA", ROOT / "train_iha")).resolve())
PROCESSORS = sorted(os.sched_getaffinity(0))
CGROUP = Path("/sys/fs/cgroup")
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # these files need not survive a power cut
# One step, whose gradient the validation loss shows.
SHORT = ("model.num_hidden_layers=1", "train.steps=1", "run.eval_every=1", "run.eval_batches=1")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | {"GOMP_SPINCOUNT": "100"}


class Threads(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="iha-threads-"))
        cls.addClassCleanup(shutil.rmtree, cls.dir)
        rng = np.random.default_rng(7)
        for name in ("train_0", "val_0"):
            write_shard(cls.dir / f"{name}.bin", rng.integers(0, 257, 3000))
        # Wide enough for products to be split over threads.
        text = tiny_config(cls.dir, seq_len=64, batch_tokens=128, steps=2, system="precision = fp32",
                           run="eval_every = 2").replace("hidden_size = 16", "hidden_size = 64")
        cls.config = cls.dir / "threads.ini"
        cls.config.write_text(text)
        cls.losses, cls.short_losses = ({n: cls.run_ok(f"system.threads={n}", *more)[1] for n in (1, 2)
                                         if n <= len(PROCESSORS)} for more in ((), SHORT))

    @classmethod
    def run_once(cls, *overrides, env=(), before=None, through=(), clean=CLEAN):
        """Exit code, losses, number of threads, standard error. `through`: a command that starts the run."""
        run_dir = tempfile.mkdtemp(dir=cls.dir)
        done = subprocess.run([*through, BINARY, "train", cls.config, f"run.dir={run_dir}", *overrides], text=True,
                              capture_output=True, env=clean | dict(env), preexec_fn=before, timeout=120)
        lines = []
        if done.returncode == 0:
            lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(run_dir)
        losses = [line.get("loss", line.get("val_loss")) for line in lines]
        threads = re.search(r"(\d+) threads?\b", done.stderr)
        return done.returncode, losses, int(threads[1]) if threads else None, done.stderr

    @classmethod
    def run_ok(cls, *overrides, **how):
        code, losses, threads, text = cls.run_once(*overrides, **how)
        if code != 0:
            raise AssertionError(text)
        return threads, losses

    def check(self, *overrides, env=(), before=None, code=None, threads=None, clean=CLEAN):
        """The losses of the threads it says it has, or exit code 2 with one line of ours."""
        with self.subTest(overrides=overrides, env=env):
            return self.judge(self.run_once(*overrides, env=env, before=before, clean=clean), self.losses, code, threads)

    def judge(self, outcome, expected, code=None, threads=None):
        got, losses, had, text = outcome
        self.assertIn(got, (0, 2) if code is None else (code,), text)
        if got == 0:
            self.assertEqual(losses, expected[had], text)
            if threads:
                self.assertEqual(had, threads, text)
        else:
            self.assertEqual(len([line for line in text.splitlines() if line.startswith("train_iha: ")]), 1, text)
            self.assertLessEqual(len(text.splitlines()), 3, text)  # and what OpenMP says by itself
        return text

    def test_every_combination(self):
        settings = {"OMP_DYNAMIC": (None, "true"), "OMP_THREAD_LIMIT": (None, "1", "2"),
                    "OMP_MAX_ACTIVE_LEVELS": (None, "0", "3"), "OMP_NESTED": (None, "true"),
                    "OMP_NUM_THREADS": (None, "1", "2", "1,2", "2,1", "20000")}
        masks, asked, workers = (None, PROCESSORS[0], PROCESSORS[-1]), (None, 1, 2), 4 * len(PROCESSORS)
        with ExitStack() as stack:
            free, quotas = SimpleQueue(), (None, 0.5, 1.6)
            try:  # control groups of its own for each of those side by side
                groups = [{q: stack.enter_context(self.group(q, w)) for q in quotas[1:]} for w in range(workers)]
            except OSError:
                groups, quotas = [{}] * workers, (None,)
            for g in groups:
                free.put(g)
            every = list(itertools.product(*settings.values(), masks, quotas, asked))
            if os.environ.get("FAULTS") != "all":  # half of them choose no processors themselves
                draw = random.Random(5)
                every = draw.sample(every, 20) + draw.sample([c for c in every if c[5:] == (None, None, None)], 20)

            def run(case):
                *values, mask, quota, threads = case
                env = {k: v for k, v in zip(settings, values) if v is not None}
                group, through = free.get(), []
                if quota:
                    through += ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', group[quota]]
                if mask is not None:
                    through += ["taskset", "-c", str(mask)]
                try:
                    return self.run_once(*SHORT, *([f"system.threads={threads}"] if threads else []), env=env,
                                         through=through)
                finally:
                    free.put(group)

            with ThreadPoolExecutor(workers) as pool:
                outcomes = list(pool.map(run, every))
        for case, outcome in zip(every, outcomes):
            with self.subTest(case=case):
                self.judge(outcome, self.short_losses)
        codes = [outcome[0] for outcome in outcomes]
        self.assertGreater(codes.count(0), len(codes) // 3)
        self.assertGreater(codes.count(2), 0)

    def test_smaller_teams(self):
        # What gave wrong losses: a team smaller than the number of threads that the library splits its work by.
        self.check(env={"OMP_DYNAMIC": "true"}, code=0, threads=len(PROCESSORS[:2]))
        self.check(env={"OMP_THREAD_LIMIT": "1"}, code=0, threads=1)
        self.check(env={"OMP_MAX_ACTIVE_LEVELS": "0"}, code=0)

    @unittest.skipIf(len(PROCESSORS) < 2, "needs two processors")
    def test_refused(self):
        text = self.check("system.threads=2", env={"OMP_THREAD_LIMIT": "1"}, code=2)
        self.assertIn("OMP_THREAD_LIMIT allows 1", text)
        text = self.check("system.threads=4096", code=2)
        self.assertIn(f"may use {len(PROCESSORS)} processors", text)
        text = self.check("system.threads=2", before=lambda: os.sched_setaffinity(0, PROCESSORS[:1]), code=2)
        self.assertIn("may use 1 processor;", text)

    def test_odd_values(self):
        self.check(env={"OMP_NUM_THREADS": "20000"}, code=0)
        for value in ("0", "-3", "many", "", "1e9", "99999999999999999999"):
            self.check(env={"OMP_NUM_THREADS": value}, code=0)

    def test_stacks(self):
        for size in ("1k", "16k", "64k", "1B", "99999999G"):
            self.assertIn("OMP_STACKSIZE", self.check(env={"OMP_STACKSIZE": size}, code=2))
        for size in ("512k", "8M", "1 M"):
            self.check(env={"OMP_STACKSIZE": size}, code=0)
        self.assertIn("GOMP_STACKSIZE", self.check(env={"GOMP_STACKSIZE": "20"}, code=2))
        stack = lambda size: lambda: resource.setrlimit(resource.RLIMIT_STACK, (size, size))
        self.assertIn("ulimit -s", self.check(before=stack(128 << 10), code=2))
        self.check(before=stack(1 << 20), code=0)
        # The environment is on the stack as well: of 16 KiB one of 2 KB leaves too little to the dynamic loader.
        for kib in (16, 20, 24, 32, 48, 255):
            self.assertIn(f"limited to {kib} KiB", self.check(before=stack(kib << 10), code=2, clean={}))
        self.assertIn("lower ulimit -s", self.check(before=stack(1 << 42), code=2))

    def test_memory_limits(self):
        # From what the libraries alone take to what a run needs: never a signal, always one line that names the limit.
        # CUDA's libraries alone take more than a gigabyte.
        limit = lambda mib: lambda: resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
        version = lambda mib: subprocess.run([BINARY, "--version"], env=CLEAN, capture_output=True,
                                             preexec_fn=limit(mib)).returncode
        low, high = 16, 16384  # the dynamic loader fails, and succeeds
        while high - low > 8:
            middle = (low + high) // 2
            low, high = (middle, high) if version(middle) != 0 else (low, middle)
        codes = set()
        for step, mib in enumerate(range(low, low + 400, 8)):
            code, _, _, text = self.run_once(before=limit(mib))
            lines = text.splitlines()
            if code not in (0, 1, 2) and version(mib) != 0:
                continue  # the libraries do not start: the loader fails, or one of them crashes before main()
            if code == 1:  # enough for the steps, but not for saving them
                self.assertIn("step 1/2", text)
                self.assertRegex(lines[-1] or lines[-2], "^train_iha: (out of memory|cannot .*: Cannot allocate memory).*ulimit -v")
                continue
            self.assertIn(code, (0, 2), text)
            codes.add(code)
            if code == 2:
                self.assertEqual(len(lines), 1, text)
                self.assertRegex(text, r"ulimit -v|out of memory")
            if code == 0 and step > 14:
                break
        self.assertEqual(codes, {0, 2})

    @staticmethod
    @contextmanager
    def group(processors, number=0):
        """A control group with so many processors' time, as a folder; OSError where this process may not make one."""
        name = f"iha-test-{os.getpid()}-{processors}-{number}"
        if (CGROUP / "cpu" / "cpu.cfs_quota_us").exists():
            group, file, value = CGROUP / "cpu" / name, "cpu.cfs_quota_us", int(processors * 100000)
        else:
            group, file, value = CGROUP / name, "cpu.max", f"{int(processors * 100000)} 100000"
        group.mkdir()
        try:
            (group / file).write_text(str(value))
            yield group
        finally:
            group.rmdir()

    @unittest.skipIf(len(PROCESSORS) < 2, "needs two processors")
    def test_quota(self):
        for quota, threads in ((0.5, 1), (1, 1), (1.2, 1), (1.6, 2), (2, 2)):
            with ExitStack() as stack:
                try:
                    group = stack.enter_context(self.group(quota))
                except OSError as e:
                    self.skipTest(f"no control group with a CPU quota can be made here: {e}")
                enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
                text = self.check(before=enter, code=0, threads=threads)
                self.assertEqual("CPU quota" in text, quota < len(PROCESSORS), text)
                self.check("system.threads=2", before=enter, code=0, threads=2)


if __name__ == "__main__":
    unittest.main()
