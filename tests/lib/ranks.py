"""What tests of several ranks share: how ranks are started, waited for and killed.

A test gives the processes it starts a unique value of the environment variable MARK. Their children inherit it, so
all of them are found in /proc.
"""

import json
import os
import shlex
import signal
import socket
import time
from pathlib import Path

from tests.lib.runs import BINARY, ENVIRONMENT, Case, lines_of, step_dir, tree, without_timings

MARK = "IHA_RANKS_TEST"
SLOW = 4 if "sanitize" in BINARY else 1
LIMIT = 20 * SLOW  # seconds for what should take one or two
HOST = socket.gethostname()
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none"]  # ranks share the cores
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPI_ENVIRONMENT = {**ENVIRONMENT, **AS_ROOT, "TRAIN_IHA": BINARY, "ASAN_OPTIONS": "detect_leaks=0"}  # MPI itself leaks
ENDLESS = ["train.steps=1000000000", "train.schedule=constant", "data.val=none"]


def without_launcher(environment):
    """The environment of a process that neither mpirun nor Slurm started."""
    return {k: v for k, v in environment.items() if not k.startswith(("OMPI_COMM", "PMI", "SLURM_"))}


def mpirun_each(*commands):
    """An mpirun command that runs another command on each rank. Not `mpirun A : B`: if a rank of such a job fails, the
    mpirun of Open MPI 5.0 crashes."""
    cases = "\n".join(f"{rank}) exec {shlex.join(map(str, command))} ;;" for rank, command in enumerate(commands))
    return [*MPIRUN, "-n", str(len(commands)), "sh", "-c", f"case $OMPI_COMM_WORLD_RANK in\n{cases}\nesac"]


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def marked(mark):
    """{process id: (program, rank or None)} of the running processes with this mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(x.split(b"=", 1) for x in (folder / "environ").read_bytes().split(b"\0") if b"=" in x)
            program = os.readlink(folder / "exe")
        except OSError:  # it has ended
            continue
        if environment.get(MARK.encode()) == mark.encode():
            rank = environment.get(b"OMPI_COMM_WORLD_RANK") if program == BINARY else None
            found[int(folder.name)] = (Path(program).name, None if rank is None else int(rank))
    return found


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_until(condition, limit, what):
    """Wait for a condition. Returns the seconds it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > limit:
            raise AssertionError(f"{what}: not within {limit} s")
        time.sleep(0.02)
    return time.monotonic() - begin


def num_metrics(run_dir):
    """Lines in metrics.jsonl: the steps done, in a run without evaluations."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


class RanksCase(Case):
    """A Case whose batch is a multiple of two and of three ranks; every rank computes with one thread."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        text = cls.config.read_text().replace("threads = 2", "threads = 1")
        cls.config.write_text(text.replace("batch_tokens = 128", "batch_tokens = 384"))

    def assert_same_files(self, a, b):
        """Two checkpoints as tree() reads them; trainer.json holds timings."""
        self.assertEqual(set(a), set(b))
        for name in set(a) - {"trainer.json"}:
            self.assertEqual(a[name], b[name], name)

    def assert_same_end(self, run_dir, other, step):
        """Checkpoints and metrics of two runs, except for timings and [run] and [system] settings."""
        a, b = (tree(step_dir(folder, step)) for folder in (run_dir, other))
        self.assert_same_files(a, b)
        a, b = (json.loads(t["trainer.json"]) for t in (a, b))
        for t in (a, b):
            t.pop("seconds")
            t["config"] = {key: x for key, x in t["config"].items() if not key.startswith(("run.", "system."))}
        self.assertEqual(a, b)
        a, b = (without_timings(lines_of(folder / "metrics.jsonl")) for folder in (run_dir, other))
        self.assertEqual(a, b)
