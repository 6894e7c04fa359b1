#!/usr/bin/env python3
"""Several ranks without MPI: started with torchrun's or Slurm's variables, they meet over TCP, whoever else knocks;
train what ranks over MPI train; and end together, with one line, when one of them dies, hangs or never comes.

    make && python -m unittest tests.ranks.test_tcp
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import unittest
from pathlib import Path

import numpy as np

from tests.cli import test_cli as cli
from tests.faults.test_ranks_faults import ENDLESS, ENVIRONMENT, MPIRUN, end, until

SLOW = 4 if "sanitize" in cli.BINARY else 1
LIMIT = 20 * SLOW  # seconds for what should take one or two
HOST = socket.gethostname()


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


class Ranks:
    """Processes that are told of each other by variables, and what each prints."""

    def __init__(self, case, ranks, *args, run_dir=None, command=("train",), variables=None, each=None, started=None,
                 patience=20):
        self.port, self.run_dir = free_port(), Path(run_dir or case.new_dir())
        self.case, self.ranks, self.patience, self.processes, self.outputs = case, ranks, patience, {}, {}
        self.args = [*command, case.config, f"run.dir={self.run_dir}", *args] if command[0] == "train" else command
        self.variables = variables or self.torchrun
        self.each = each or {}
        case.addCleanup(self.kill)
        for rank in range(ranks) if started is None else started:
            self.start(rank)

    def torchrun(self, rank):
        return {"RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": self.port}

    def start(self, rank, place=None):
        environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("OMPI_COMM", "PMI", "SLURM_"))}
        environment |= {"IHA_START_TIMEOUT": self.patience} | self.variables(rank) | self.each.get(rank, {})
        place = rank if place is None else place
        self.outputs[place] = open(self.case.tmp / f"output_{time.monotonic_ns()}", "w+b")
        self.case.addCleanup(self.outputs[place].close)
        self.processes[place] = subprocess.Popen(
            [cli.BINARY, *map(str, self.args)], cwd=self.case.tmp, stdin=subprocess.DEVNULL,
            stdout=self.outputs[place], stderr=self.outputs[place], env={k: str(v) for k, v in environment.items()})

    def kill(self):
        for process in self.processes.values():
            end(process.pid)
            process.wait()

    def printed(self, rank):
        self.outputs[rank].flush()
        self.outputs[rank].seek(0)
        return self.outputs[rank].read().decode()

    def all_printed(self):
        return "".join(f"---- {rank}\n{self.printed(rank)}" for rank in self.processes)

    def steps(self):
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def reach(self, step):
        ended = lambda: any(p.poll() is not None for p in self.processes.values())
        until(lambda: self.steps() >= step or ended(), LIMIT, f"step {step}")
        self.case.assertFalse(ended(), self.all_printed())
        return self

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)
        return self

    def wait(self, limit=LIMIT, but=()):
        """{rank: exit code} of all (but some)."""
        deadline = time.monotonic() + limit
        codes = {}
        for rank in set(self.processes) - set(but):
            try:
                codes[rank] = self.processes[rank].wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} still runs after {limit} s\n{self.all_printed()}") from None
        return codes

    def succeed(self):
        self.case.assertEqual(set(self.wait().values()), {0}, self.all_printed())
        return self

    def lines(self):
        """[(rank, line)] of what went wrong."""
        return [(rank, line) for rank in self.processes for line in self.printed(rank).splitlines()
                if "train_iha: " in line]

    def fail(self, code, by, *names, limit=LIMIT, but=()):
        """All end with the code; one of them (`by`, or each of that list) says why, in one line, with these words."""
        codes = self.wait(limit, but)
        self.case.assertEqual(set(codes.values()), {code}, self.all_printed())
        lines = self.lines()
        self.case.assertEqual([rank for rank, _ in lines], by if isinstance(by, list) else [by], self.all_printed())
        for name in names:
            self.case.assertIn(name, lines[0][1])
        return self

    def files(self, step=20):
        return cli.tree(cli.step_dir(self.run_dir, step))


class Case(cli.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        text = cls.config.read_text().replace("threads = 2", "threads = 1")
        cls.config.write_text(text.replace("batch_tokens = 128", "batch_tokens = 384"))  # two or three ranks

    def assert_same(self, a, b):
        self.assertEqual(set(a), set(b))
        for name in set(a) - {"trainer.json"}:
            self.assertEqual(a[name], b[name], name)

    def one(self, *overrides):
        return cli.losses(self.train(*overrides))


class Training(Case):
    def test_bytes_of_mpi(self):
        if not shutil.which("mpirun"):
            self.skipTest("mpirun is not installed")
        for ranks, stage in ((2, 0), (3, 1), (3, 2)):
            settings = [f"system.zero_stage={stage}"]
            run = Ranks(self, ranks, *settings).succeed()
            self.assertIn(f"{ranks} ranks over tcp, zero_stage {stage}", run.printed(0))
            for rank in range(1, ranks):
                self.assertEqual(run.printed(rank), "")
            mpi = self.new_dir()
            subprocess.run([*MPIRUN, "-n", str(ranks), cli.BINARY, "train", self.config, f"run.dir={mpi}", *settings],
                           env=ENVIRONMENT, check=True, capture_output=True, timeout=LIMIT, cwd=self.tmp)
            self.assert_same(run.files(), cli.tree(cli.step_dir(mpi, 20)))

    def test_curve_of_one_process(self):
        np.testing.assert_allclose(cli.losses(Ranks(self, 3).succeed().run_dir), self.one(), rtol=2e-6)

    def test_other_number_resumes(self):
        first = Ranks(self, 2, "train.steps=8", "train.schedule=constant").succeed()
        second = Ranks(self, 3, "train.schedule=constant", run_dir=first.run_dir).succeed()
        self.assertIn("resuming from", second.printed(0))
        np.testing.assert_allclose(cli.losses(first.run_dir), self.one("train.schedule=constant"), rtol=2e-6)

    def test_gradients_in_bf16(self):
        fp32 = Ranks(self, 2).succeed()
        for stage in (1, 2):
            bf16 = Ranks(self, 2, "system.reduce_dtype=bf16", f"system.zero_stage={stage}").succeed()
            a, b = cli.losses(fp32.run_dir), cli.losses(bf16.run_dir)
            self.assertEqual(a[0], b[0])  # before the first update
            self.assertTrue((a[1:] != b[1:]).any())
            np.testing.assert_allclose(b, a, rtol=3e-3)

    def test_ipv6(self):
        if not Path("/proc/net/if_inet6").exists() or " lo\n" not in Path("/proc/net/if_inet6").read_text():
            self.skipTest("no IPv6 here")
        run = Ranks(self, 3, "train.steps=2", each={r: {"MASTER_ADDR": "::1"} for r in range(3)})
        self.assertIn("over tcp", run.succeed().printed(0))

    def test_slurm(self):
        step = time.monotonic_ns() % 1000  # the port depends on it

        def variables(rank):
            return {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": rank, "SLURM_JOB_ID": os.getpid(),
                    "SLURM_STEP_ID": step, "SLURM_STEP_NODELIST": "localhost,n[2-3]"}

        run = Ranks(self, 2, variables=variables).succeed()
        self.assertIn("2 ranks over tcp", run.printed(0))
        self.assert_same(run.files(), Ranks(self, 2).succeed().files())

    def test_signal(self):
        run = Ranks(self, 3, *ENDLESS).reach(4).signal(2, signal.SIGUSR1).succeed()
        self.assertEqual(cli.steps_in(run.run_dir), [run.steps()])

    def test_other_commands(self):
        trained = Ranks(self, 2).succeed()
        run = Ranks(self, 2, command=("eval", trained.run_dir, f"data.val={self.val}")).succeed()
        self.assertEqual(run.all_printed().count("val_loss"), 1)
        loss = float(re.search(r"val_loss (\S+)", run.printed(0))[1])
        self.assertAlmostEqual(loss, self.evaluate(trained.run_dir)[0], places=6)
        run = Ranks(self, 2, command=("info", self.config)).succeed()
        self.assertEqual((run.all_printed().count("FLOPs per token"), run.printed(1)), (1, ""))


class Peers(Case):
    def test_killed(self):
        for dead, speaker in ((1, 0), (0, 1)):
            run = Ranks(self, 3, *ENDLESS, "run.save_every=3").reach(8).signal(dead, signal.SIGKILL)
            run.fail(1, speaker, f"rank {dead} ({HOST})", "start again", but=[dead], limit=8 * SLOW)
        last = cli.steps_in(run.run_dir)[-1]
        more = Ranks(self, 3, f"train.steps={last + 2}", "train.schedule=constant", "data.val=none",
                     run_dir=run.run_dir).succeed()
        whole = Ranks(self, 3, f"train.steps={last + 2}", "train.schedule=constant", "data.val=none").succeed()
        self.assert_same(more.files(last + 2), whole.files(last + 2))

    def test_stopped(self):
        begin = time.monotonic()
        runs = [(stuck, Ranks(self, 3, *ENDLESS, "system.peer_timeout=2")) for stuck in (1, 0)]
        for stuck, run in runs:
            run.reach(4).signal(stuck, signal.SIGSTOP)
        for stuck, run in runs:
            run.fail(1, 1 - stuck, f"no answer from rank {stuck} ({HOST}) for 2 s in ", but=[stuck], limit=2 + 10 * SLOW)
            self.assertGreater(time.monotonic() - begin, 1.9)
            run.signal(stuck, signal.SIGCONT)  # it finds that the others have gone
            self.assertEqual(run.wait()[stuck], 1)

    def test_all_suspended(self):
        run = Ranks(self, 2, *ENDLESS, "system.peer_timeout=2").reach(4)
        for number, pause in ((signal.SIGSTOP, 4), (signal.SIGCONT, 0)):
            for rank in range(2):
                run.signal(rank, number)
            time.sleep(pause)
        run.reach(run.steps() + 3).signal(1, signal.SIGUSR1).succeed()

    def test_error_of_one(self):
        other = self.tmp / "other.ini"
        other.write_text(self.config.read_text().replace("lr = 1e-2", "lr = 1e-3"))
        run = Ranks(self, 3, started=[0, 1])
        run.args[1] = other
        run.start(2)
        run.fail(2, 0, "rank 2: its configuration differs from rank 0's")


class Start(Case):
    def test_missing(self):
        run = Ranks(self, 4, patience=2, started=[0, 2])
        short = Ranks(self, 3, patience=0.5, started=[0])
        alone = Ranks(self, 2, patience=1, started=[1])
        run.fail(1, 0, "ranks 1, 3 of 4 did not come", f"localhost, port {run.port}", "firewall", "IHA_START_TIMEOUT")
        short.fail(1, 0, "within 0.5 s")
        alone.fail(1, 1, "rank 1: cannot reach rank 0", f"port {alone.port}", "Connection refused", "MASTER_ADDR")

    def test_says_for_whom_it_waits(self):
        """In one line, after five seconds; a rank that rank 0 has heard leaves it to rank 0."""
        run = Ranks(self, 4, patience=300, started=[0, 2])
        alone = Ranks(self, 2, patience=300, started=[1], each={1: {"MASTER_ADDR": "::1"}})
        until(lambda: run.printed(0) and alone.printed(1), 5 + LIMIT, "two lines")
        time.sleep(0.5)  # for more of them
        left = r"\(29\d s left\)\n"
        self.assertRegex(run.printed(0), rf"\Awaiting for ranks 1, 3 of 4 at localhost:{run.port} {left}\Z")
        self.assertRegex(alone.printed(1), rf"\Arank 1: waiting for rank 0 at \[::1\]:{alone.port}: .* {left}\Z")
        self.assertEqual(run.printed(2), "")

    def test_signal_while_waiting(self):
        """It ends a rank at once: there is nothing to save."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for rank in range(2):
                run = Ranks(self, 2, patience=10 * LIMIT, started=[rank])
                until(lambda: self.listening(run.processes[rank].pid), LIMIT, "a rank that listens")
                run.signal(rank, number)
                self.assertEqual(run.wait(), {rank: -number}, run.all_printed())
                self.assertFalse(run.run_dir.joinpath("lock").exists())

    def test_two_of_rank_0(self):
        run = Ranks(self, 3, started=[0])
        until(lambda: self.can_connect(run.port), LIMIT, "rank 0 listens")
        run.start(0, place=1)
        run.fail(2, 0, "two processes were started as rank 0", "RANK")
        run = Ranks(self, 3, started=[0])  # of another run, it takes nothing from this one
        until(lambda: self.can_connect(run.port), LIMIT, "rank 0 listens")
        other = Ranks(self, 3, started=[], each={0: {"IHA_TOKEN": "another"}})
        other.port = run.port
        other.start(0)
        other.fail(2, 0, f"port {run.port} (MASTER_PORT)", "in use", "another")
        run.start(1)
        run.start(2)
        run.succeed()

    def test_late(self):
        run = Ranks(self, 3, started=[2], patience=30)
        time.sleep(0.5)
        run.start(0)
        time.sleep(0.5)
        run.start(1)
        run.succeed()

    def test_ended_and_started_again(self):
        run = Ranks(self, 3, started=[0, 1])
        time.sleep(0.7 * SLOW)
        run.signal(1, signal.SIGKILL)
        run.processes[1].wait()
        run.start(1)
        run.start(2)
        run.succeed()

    def test_other_numbers(self):
        Ranks(self, 2, each={1: {"WORLD_SIZE": 3}}).fail(2, 0, "one of 3 ranks", "one of 2", "WORLD_SIZE")
        run = Ranks(self, 3, started=[0, 1])
        run.start(1, place=2)
        run.fail(2, 0, "two processes were started as rank 1", "RANK")
        Ranks(self, 2, patience=1, each={1: {"RANK": 2}}, started=[1]).fail(2, 1, "RANK = 2", "WORLD_SIZE")
        # Not knowing of others, each speaks for itself.
        Ranks(self, 2, each={r: {"WORLD_SIZE": ""} for r in range(2)}).fail(2, [0, 1], "WORLD_SIZE is not set")
        Ranks(self, 2, each={r: {"MASTER_PORT": ""} for r in range(2)}).fail(2, 0, "MASTER_PORT is not set")

    def test_addresses(self):
        bad = {r: {"MASTER_ADDR": "no.such.host.invalid"} for r in range(2)}
        unknown = Ranks(self, 2, each=bad, started=[0])
        with socket.socket() as taken:
            run = Ranks(self, 2, started=[])
            taken.bind(("", run.port))
            taken.listen()
            run.start(0)
            run.fail(2, 0, f"port {run.port} (MASTER_PORT)", "in use", "another")
        unknown.fail(2, 0, "MASTER_ADDR = no.such.host.invalid: ")
        Ranks(self, 2, each={r: {"IHA_START_TIMEOUT": "soon"} for r in range(2)}).fail(2, 0, "IHA_START_TIMEOUT = soon")
        Ranks(self, 2, "system.comm=mpi").fail(2, 0, "system.comm = mpi", "auto")

    def test_strangers(self):
        """Who says something else, says nothing, stops in the middle of a word, or belongs to another run."""
        run = Ranks(self, 3, started=[0, 1])
        talk, sockets = [b"GET / HTTP/1.0\r\n\r\n", b"", b"IHA-T", b"IHA-TCP\0" + bytes(24), os.urandom(4000)], []
        stop = threading.Event()

        def knock(port, count):
            for i in range(count):
                try:
                    s = socket.create_connection(("localhost", port), 1)
                    s.sendall(talk[i % len(talk)])
                    sockets.append(s)
                except OSError:
                    pass

        until(lambda: self.can_connect(run.port), LIMIT, "rank 0 listens")
        with socket.create_connection(("localhost", run.port), LIMIT) as s:
            s.sendall(b"GET / ")
            self.assertEqual(s.recv(1), b"")  # hung up on at the first wrong word
        knock(run.port, 200)  # more than are heard at once
        another = Ranks(self, 3, patience=2, started=[])
        another.port = run.port
        another.each = {2: {"IHA_TOKEN": "another"}}
        another.start(2)
        ports = threading.Thread(target=self.knock_everywhere, args=(run, knock, stop))
        ports.start()
        another.fail(1, 2, "rank 0 of another run answers")
        run.start(2)
        run.succeed()
        stop.set()
        ports.join()
        for s in sockets:
            s.close()
        self.assert_same(run.files(), Ranks(self, 3).succeed().files())

    @staticmethod
    def can_connect(port):
        try:
            socket.create_connection(("localhost", port), 1).close()
            return True
        except OSError:
            return False

    @staticmethod
    def listening(pid):
        """The ports on which a process listens."""
        inodes = set()
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                if (match := re.match(r"socket:\[(\d+)\]", os.readlink(fd))):
                    inodes.add(match[1])
        except OSError:
            return []
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
                if Path(f"/proc/net/{name}").exists()]
        return [int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[9] in inodes and row[3] == "0A"]

    def knock_everywhere(self, run, knock, stop):
        while not stop.is_set():
            for process in list(run.processes.values()):
                for port in self.listening(process.pid):
                    knock(port, 5)
            time.sleep(0.05)


if __name__ == "__main__":
    unittest.main()
