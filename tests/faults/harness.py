"""Runs of train_iha in which one call fails or the process is killed, and checks of what they leave.

A Scenario is a command, the state it starts from, and a reference: what the same command leaves without a fault.
Scenario.fault() runs it once with a fault, checks the files the run left, runs the same command again without a fault
and checks that it ends with the same bytes as the reference. inject.c describes the faults.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import traceback
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lib.runs import BINARY, ROOT, tree

LIBRARY = ROOT / "build" / "faults" / "inject.so"
EVERYTHING = os.environ.get("FAULTS") == "all"  # every call, not a sample
SANITIZED = "sanitize" in BINARY
TIMEOUT = 180  # seconds, where others use the machine too; runs here take a few hundredths of one
SANITIZER_EXIT = 86
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # these files need not survive a power cut

ENVIRONMENT = {k: x for k, x in os.environ.items() if not k.startswith("IHA_FAULT")}
ENVIRONMENT["GOMP_SPINCOUNT"] = "100"
# The fault library must be loaded before the sanitizer's runtime, whose allocator it calls.
ENVIRONMENT["ASAN_OPTIONS"] = f"verify_asan_link_order=0:exitcode={SANITIZER_EXIT}"
ENVIRONMENT["UBSAN_OPTIONS"] = "print_stacktrace=1"

Event = namedtuple("Event", "kind number call path path2")
Done = namedtuple("Done", "code out err trace")

# Calls that change the disk: killing a run at each leaves a different state.
DISK = {"open_write", "write", "sync", "rename", "mkdir", "remove", "link", "truncate"}
# When one of these fails, something was not saved, so the run must fail.
MUST_FAIL = {"write", "close", "sync", "open_write", "mkdir", "link"}
EACCES = 13


def read_trace(path):
    if not path.exists():
        return []
    events = []
    for line in path.read_text(errors="replace").splitlines():
        kind, number, call, first, second = (line.split("\t") + [""] * 5)[:5]
        events.append(Event(kind, int(number or 0), call, first, second))
    return events


def run(args, cwd, fault=None, trace=None, binary=BINARY):
    env = dict(ENVIRONMENT)
    if fault or trace:
        env["LD_PRELOAD"] = str(LIBRARY)
        env["IHA_FAULT"] = fault or ""
    if trace:
        env["IHA_FAULT_TRACE"] = str(trace)
    done = subprocess.run([binary, *map(str, args)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=TIMEOUT)
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"), read_trace(trace) if trace else [])


def checkpoint(folder):
    """{name: content} of a checkpoint, without what differs between runs."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    if "trainer.json" in files:
        trainer = json.loads(files["trainer.json"])
        trainer.pop("seconds", None)
        for key in ("run.keep", "run.save_every"):
            trainer["config"].pop(key, None)
        files["trainer.json"] = trainer
    return files


def checkpoints(run_dir):
    """{step: folder}"""
    return {int(p.name[5:]): p for p in Path(run_dir).glob("step_*") if re.fullmatch(r"step_\d+", p.name)}


def metrics(run_dir):
    """The lines of metrics.jsonl without timings, and without an incomplete last line."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: x for k, x in json.loads(line).items() if k not in ("tokens_per_second", "mfu")} for line in lines]


class Wrong(AssertionError):
    pass


def brief(content):
    text = repr(content)
    return text if len(text) < 1000 else f"{text[:300]} ... {text[-600:]}"


def need(condition, *what):
    if not condition:
        raise Wrong(" ".join(map(str, what)))


def check_ending(done, started, what):
    """Exit codes: 0 done, 1 failed while running, 2 refused before the first step, with one line on stderr. Never a
    signal, never a sanitizer's report."""
    need(done.code in (0, 1, 2), what, "exit code", done.code, done.err[-3000:])
    need("Sanitizer" not in done.err and "runtime error" not in done.err, what, done.err[-3000:])
    lines = [line for line in done.err.splitlines() if line.startswith("train_iha: ")]
    need(len(lines) == (done.code != 0), what, "exit code", done.code, "with", lines)
    if done.code:
        need(done.err.splitlines()[-1] == lines[0] and len(lines[0]) > 20, what, "stderr ends", done.err[-500:])
    need(not (started and done.code == 2), what, "exit code 2 after the first step:", lines)


def wait_for_save(process, run_dir):
    while process.poll() is None:
        try:
            if any(name.endswith(".tmp") for name in os.listdir(run_dir)):
                return
        except FileNotFoundError:
            pass


class Scenario:
    """A command that trains in ./run below a folder of its own, from a copy of the folder `template`."""

    def __init__(self, name, args, scratch, template=None, damaged=()):
        self.name, self.args, self.scratch, self.template = name, args, Path(scratch), template
        self.damaged = {step: checkpoint_bytes(template / "run", step) for step in damaged}
        # A run that cannot go on saves the step it is at before it ends, so every step; but how often a run saves also
        # decides which evaluations may make a checkpoint the best.
        self.steps = {}
        for more in (["run.save_every=1"], []):
            whole = self.folder()
            done = self.run(whole, more=["run.keep=0", *more])
            need(done.code == 0, name, done.err)
            self.steps.update({step: checkpoint(path) for step, path in checkpoints(whole / "run").items()})
            shutil.rmtree(whole)
        plain = self.folder()
        done = self.run(plain, trace=plain / "trace")
        need(done.code == 0, name, done.err)
        self.out, self.trace = done.out, done.trace
        self.left = self.describe(plain / "run")
        self.metrics = metrics(plain / "run")
        shutil.rmtree(plain)
        self.tried = Counter()

    def run(self, folder, fault=None, trace=None, more=()):
        return run([*self.args, *more], folder, fault, trace)

    def folder(self):
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        if self.template:
            shutil.copytree(self.template, folder, symlinks=True, dirs_exist_ok=True)
        return folder

    @staticmethod
    def describe(run_dir):
        """All files of a run, without what differs between runs."""
        left = {k: x for k, x in tree(run_dir).items() if not k.endswith("trainer.json")}
        left["lock"] = left["starts.jsonl"] = None  # a process id; times
        left["metrics.jsonl"] = metrics(run_dir)
        left.update({f"{p.name}/trainer.json": checkpoint(p).get("trainer.json") for p in checkpoints(run_dir).values()})
        return left

    @staticmethod
    def counts_in(trace):
        """The number of calls of each class; "disk": of those that change the disk."""
        counts = Counter(e.kind for e in trace)
        counts["disk"] = sum(counts[kind] for kind in DISK)
        return counts

    def counts(self):
        return self.counts_in(self.trace)

    def events(self, kind):
        return [e for e in self.trace if e.kind == kind]

    def disk_events(self):
        return [e for e in self.trace if e.kind in DISK]

    # ---- checks ----

    def check_left(self, run_dir, events, what):
        """Every checkpoint is complete and correct, the newest published one exists, and the metrics lead up to it."""
        found = checkpoints(run_dir)
        for step, folder in found.items():
            content = checkpoint_bytes(run_dir, step)
            if content == self.damaged.get(step):
                continue
            need(step in self.steps and set(content) == set(self.steps[step]),
                 what, f"{folder.name} is not complete:", sorted(content))
            content = checkpoint(folder)
            for name, bytes_ in self.steps[step].items():
                need(content[name] == bytes_, what, f"{folder.name}/{name} differs")
        newest = max((s for s in found if checkpoint_bytes(run_dir, s) != self.damaged.get(s)), default=0)
        need(newest >= self.newest_before(events), what, "lost a checkpoint; left:", sorted(found))
        if (run_dir / "best").is_symlink():
            need((run_dir / "best").resolve().is_dir(), what, "best is a dangling link")
        lines = [x for x in metrics(run_dir) if x["step"] <= newest]
        need(lines == [x for x in self.metrics if x["step"] <= newest], what, "metrics up to", newest, "are", lines)

    @staticmethod
    def has_started(trace):
        return any(e.kind == "write" and e.path.endswith("/metrics.jsonl") for e in trace)

    def newest_before(self, events):
        """The newest of the checkpoints that the run started with and those whose directory is synced."""
        newest = max((s for s in checkpoints(self.template / "run") if s not in self.damaged),
                     default=0) if self.template else 0
        renamed = 0
        for e in events:
            if e.kind == "rename" and re.search(r"step_\d+$", e.path2) and e.path.endswith(".tmp"):
                renamed = int(e.path2[-8:])
            elif e.kind == "sync" and e.path.endswith("/run"):
                newest = max(newest, renamed)
        return newest

    def check_end(self, folder, what):
        """The run's directory is as a run without faults leaves it, except for checkpoints saved by a run that could not
        go on: they may take the place of an older one."""
        left, expected = self.describe(folder / "run"), dict(self.left)
        step_of = lambda name: int(name[5:13]) if name.startswith("step_") else None
        early = {step_of(name) for name in left if name not in expected} & set(self.steps)
        for name in [x for x in expected if x not in left and early and (step_of(x) or max(early)) < max(early)]:
            del expected[name]
        left = {name: x for name, x in left.items() if step_of(name) not in early}
        need(set(left) == set(expected), what, "left behind:", sorted(set(left) - set(expected)), "missing:",
             sorted(set(expected) - set(left)))
        for name, content in expected.items():
            need(left[name] == content, what, name, "differs:", brief(left[name]), "instead of", brief(content))

    def again(self, folder, what):
        done = self.run(folder)
        need(done.code == 0, what, "then without a fault: exit code", done.code, done.err[-2000:])
        self.check_end(folder, what + ", then without a fault:")

    def fault(self, spec):
        """Try one fault. Raises Wrong, and keeps the folder for inspection, when a check fails."""
        folder = self.folder()
        kind, number, option = (spec.split(":") + [""])[:3]
        done = self.run(folder, spec, folder / "trace")
        failed = next((e for e in done.trace if e.kind == kind and e.number == int(number.rstrip("+"))), None)
        what = f"{self.name}: IHA_FAULT={spec} ({failed.call} {failed.path} {failed.path2})" if failed else \
            f"{self.name}: IHA_FAULT={spec}"
        what += f" in {folder}"
        run_dir = folder / "run"
        self.tried[kind if kind != "crash" else f"crash {option}"] += 1
        if kind == "crash":
            need(done.code == -9, what, "was not killed:", done.code, done.err[-500:])
            self.check_left(run_dir, done.trace[:-1], what)
        else:
            started = self.has_started(done.trace)
            check_ending(done, started, what)
            if option in ("short", "eintr"):
                need(done.code == 0, what, "must not fail:", done.err[-500:])
            elif failed:
                self.check_reported(done, failed, kind, number, option, started, what)
            self.check_left(run_dir, done.trace if failed != done.trace[-1] else done.trace[:-1], what)
            if done.code == 0 and "warning: " not in done.err:
                self.check_end(folder, what)
        # In a sample every second failing call, to save time: a process that goes on to its end leaves less behind.
        if EVERYTHING or kind == "crash" or sum(self.tried.values()) % 2:
            self.again(folder, what)
        shutil.rmtree(folder)

    def check_reported(self, done, failed, kind, number, option, started, what):
        if kind in MUST_FAIL and not self.safe_anyway(done.trace, failed):
            warned = failed.path.endswith("/starts.jsonl") and "starts.jsonl: cannot write" in done.err  # its last line
            need(done.code != 0 or warned, what, "was not reported")
        if option == str(EACCES) and not started and not failed.path.endswith(".tmp") and done.code:
            need(done.code == 2, what, "is a user error, but the exit code is", done.code)

    @staticmethod
    def safe_anyway(trace, failed):
        """A failing close loses nothing after a sync, or of the lock file; nor does creating a directory that exists."""
        before = trace[:trace.index(failed)]
        touched = [e for e in before if e.path == failed.path and e.kind in ("write", "sync")]
        made = any(e.kind == "open_write" and e.path.startswith("run/") for e in before)
        if failed.kind == "mkdir" and failed.path == "run":
            return not made  # the directory exists, or later calls would have failed
        return failed.kind == "close" and "/step_" not in failed.path and (
            failed.path.endswith("/lock") or (touched and touched[-1].kind == "sync"))


def checkpoint_bytes(run_dir, step):
    folder = Path(run_dir) / f"step_{step:08d}"
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def every(count, stride):
    """1..count; in a sample every stride-th, and always the last three."""
    if EVERYTHING:
        stride = 1
    if SANITIZED and not EVERYTHING:
        stride *= 4
    return sorted(set(range(1, count + 1, stride)) | set(range(max(1, count - 2), count + 1))) if count else []


def place(event):
    """What an event does, without numbers of steps."""
    return event.kind, event.call, re.sub(r"\d+", "#", event.path), re.sub(r"\d+", "#", event.path2)


def sample(events, stride, with_last=False):
    """As every(len(events), stride), and always the first event of each place, or the first and the last."""
    first, last = {}, {}
    for number, event in enumerate(events, 1):
        first.setdefault(place(event), number)
        if with_last and not SANITIZED:
            last[place(event)] = number
    return every(len(events), stride) if EVERYTHING else sorted({*every(len(events), stride), *first.values(), *last.values()})


def try_all(tasks, at_once=os.cpu_count()):
    """Run functions in parallel. Returns the texts of what they raise."""
    with ThreadPoolExecutor(at_once) as pool:
        wrong = []
        for future in [pool.submit(task) for task in tasks]:
            try:
                future.result()
            except Wrong as e:
                wrong.append(str(e))
            except Exception as e:  # usually a file that cannot be parsed
                wrong.append("".join(traceback.format_exception(e)))
    return wrong
