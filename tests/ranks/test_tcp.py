#!/usr/bin/env python3
"""Several ranks without MPI: started with torchrun's or Slurm's variables, they connect over TCP whatever other programs
send to their ports, train the same as ranks over MPI, and end together, with one line, when one of them dies, hangs or
never starts.

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

from tests.lib.ranks import ENDLESS, HOST, LIMIT, MPI_ENVIRONMENT, MPIRUN, SLOW, RanksCase, free_port, \
    kill, num_metrics, wait_until, without_launcher
from tests.lib.runs import BINARY, losses, step_dir, steps_in, tree


class Ranks:
    """Ranks started with environment variables, and what each prints."""

    def __init__(self, case, ranks, *args, run_dir=None, command=("train",), variables=None, env=None, start=None,
                 start_timeout=20):
        self.port, self.run_dir = free_port(), Path(run_dir or case.new_dir())
        self.case, self.ranks, self.start_timeout, self.processes, self.outputs = case, ranks, start_timeout, {}, {}
        self.args = [*command, case.config, f"run.dir={self.run_dir}", *args] if command[0] == "train" else command
        self.variables = variables or self.torchrun
        self.env = env or {}
        case.addCleanup(self.kill)
        for rank in range(ranks) if start is None else start:
            self.start(rank)

    def torchrun(self, rank):
        return {"RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": self.port}

    def start(self, rank, key=None):
        environment = without_launcher(MPI_ENVIRONMENT)
        environment |= {"IHA_START_TIMEOUT": self.start_timeout} | self.variables(rank) | self.env.get(rank, {})
        key = rank if key is None else key
        self.outputs[key] = open(self.case.tmp / f"output_{time.monotonic_ns()}", "w+b")
        self.case.addCleanup(self.outputs[key].close)
        self.processes[key] = subprocess.Popen(
            [BINARY, *map(str, self.args)], cwd=self.case.tmp, stdin=subprocess.DEVNULL,
            stdout=self.outputs[key], stderr=self.outputs[key], env={k: str(v) for k, v in environment.items()})

    def kill(self):
        for process in self.processes.values():
            kill(process.pid)
            process.wait()

    def printed(self, rank):
        self.outputs[rank].flush()
        self.outputs[rank].seek(0)
        return self.outputs[rank].read().decode()

    def all_printed(self):
        return "".join(f"---- {rank}\n{self.printed(rank)}" for rank in self.processes)

    def steps(self):
        return num_metrics(self.run_dir)

    def reach(self, step):
        ended = lambda: any(p.poll() is not None for p in self.processes.values())
        wait_until(lambda: self.steps() >= step or ended(), LIMIT, f"step {step}")
        self.case.assertFalse(ended(), self.all_printed())
        return self

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)
        return self

    def wait(self, limit=LIMIT, but=()):
        """{rank: exit code} of all ranks but some."""
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
        """[(rank, line)] of all errors."""
        return [(rank, line) for rank in self.processes for line in self.printed(rank).splitlines()
                if "train_iha: " in line]

    def fail(self, code, by, *names, limit=LIMIT, but=()):
        """All ranks end with this exit code, and rank `by` (each of a list, one of a set) prints one line with these
        words."""
        codes = self.wait(limit, but)
        self.case.assertEqual(set(codes.values()), {code}, self.all_printed())
        lines = self.lines()
        ranks = [rank for rank, _ in lines]
        if isinstance(by, set):
            self.case.assertTrue(len(ranks) == 1 and ranks[0] in by, self.all_printed())
        else:
            self.case.assertEqual(ranks, by if isinstance(by, list) else [by], self.all_printed())
        for name in names:
            self.case.assertIn(name, lines[0][1])
        return self

    def files(self, step=20):
        return tree(step_dir(self.run_dir, step))


class Case(RanksCase):
    def one(self, *overrides):
        return losses(self.train(*overrides))


class Training(Case):
    def test_same_bytes_as_over_mpi(self):
        if not shutil.which("mpirun"):
            self.skipTest("mpirun is not installed")
        for ranks, stage in ((2, 0), (3, 1), (3, 2)):
            settings = [f"system.zero_stage={stage}"]
            run = Ranks(self, ranks, *settings).succeed()
            self.assertIn(f"{ranks} ranks over tcp, zero_stage {stage}", run.printed(0))
            for rank in range(1, ranks):
                self.assertEqual(run.printed(rank), "")
            mpi = self.new_dir()
            subprocess.run([*MPIRUN, "-n", str(ranks), BINARY, "train", self.config, f"run.dir={mpi}", *settings],
                           env=MPI_ENVIRONMENT, check=True, capture_output=True, timeout=LIMIT, cwd=self.tmp)
            self.assert_same_files(run.files(), tree(step_dir(mpi, 20)))

    def test_losses_are_those_of_one_process(self):
        np.testing.assert_allclose(losses(Ranks(self, 3).succeed().run_dir), self.one(), rtol=2e-6)

    def test_resuming_on_another_number_of_ranks(self):
        first = Ranks(self, 2, "train.steps=8", "train.schedule=constant").succeed()
        second = Ranks(self, 3, "train.schedule=constant", run_dir=first.run_dir).succeed()
        self.assertIn("resuming from", second.printed(0))
        np.testing.assert_allclose(losses(first.run_dir), self.one("train.schedule=constant"), rtol=2e-6)

    def test_gradients_in_bf16(self):
        fp32 = Ranks(self, 2).succeed()
        for stage in (1, 2):
            bf16 = Ranks(self, 2, "system.reduce_dtype=bf16", f"system.zero_stage={stage}").succeed()
            a, b = losses(fp32.run_dir), losses(bf16.run_dir)
            self.assertEqual(a[0], b[0])  # before the first update
            self.assertTrue((a[1:] != b[1:]).any())
            np.testing.assert_allclose(b, a, rtol=3e-3)

    def test_parameters_in_bf16(self):
        """Every rank rounds what it updates, by a hash of the index in the whole model: so all have the same."""
        one, over = self.one("system.precision=bf16"), ["system.precision=bf16"]
        for stage in (0, 1, 2):
            run = Ranks(self, 2, *over, f"system.zero_stage={stage}").succeed()
            np.testing.assert_allclose(losses(run.run_dir), one, rtol=1e-3)
        muon = "train.optimizer=muon"
        run = Ranks(self, 2, *over, muon, "system.zero_stage=2").succeed()
        np.testing.assert_allclose(losses(run.run_dir), self.one(*over, muon), rtol=1e-3)
        half = Ranks(self, 2, *over, "system.reduce_dtype=bf16").succeed()
        np.testing.assert_allclose(losses(half.run_dir), one, rtol=5e-3)
        parts = Ranks(self, 2, *over, "train.steps=8", "train.schedule=constant").succeed()
        Ranks(self, 2, *over, "train.schedule=constant", run_dir=parts.run_dir).succeed()
        whole = Ranks(self, 2, *over, "train.schedule=constant").succeed()
        self.assertEqual(losses(parts.run_dir).tolist(), losses(whole.run_dir).tolist())

    def test_ipv6(self):
        if not Path("/proc/net/if_inet6").exists() or " lo\n" not in Path("/proc/net/if_inet6").read_text():
            self.skipTest("no IPv6 here")
        run = Ranks(self, 3, "train.steps=2", env={r: {"MASTER_ADDR": "::1"} for r in range(3)})
        self.assertIn("over tcp", run.succeed().printed(0))

    def test_slurm_variables(self):
        step = time.monotonic_ns() % 1000  # the port depends on it

        def variables(rank):
            return {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": rank, "SLURM_JOB_ID": os.getpid(),
                    "SLURM_STEP_ID": step, "SLURM_STEP_NODELIST": "localhost,n[2-3]"}

        run = Ranks(self, 2, variables=variables).succeed()
        self.assertIn("2 ranks over tcp", run.printed(0))
        self.assert_same_files(run.files(), Ranks(self, 2).succeed().files())

    def test_signal_to_one_rank_stops_all(self):
        run = Ranks(self, 3, *ENDLESS).reach(4).signal(2, signal.SIGUSR1).succeed()
        self.assertEqual(steps_in(run.run_dir), [run.steps()])

    def test_eval_and_info(self):
        trained = Ranks(self, 2).succeed()
        run = Ranks(self, 2, command=("eval", trained.run_dir, f"data.val={self.val}")).succeed()
        self.assertEqual(run.all_printed().count("val_loss"), 1)
        loss = float(re.search(r"val_loss (\S+)", run.printed(0))[1])
        self.assertAlmostEqual(loss, self.evaluate(trained.run_dir)[0], places=6)
        run = Ranks(self, 2, command=("info", self.config)).succeed()
        self.assertEqual((run.all_printed().count("FLOPs per token"), run.printed(1)), (1, ""))


class Peers(Case):
    def test_killed_rank_ends_the_run(self):
        for dead, reporter in ((1, 0), (0, 1)):
            run = Ranks(self, 3, *ENDLESS, "run.save_every=3").reach(8).signal(dead, signal.SIGKILL)
            run.fail(1, reporter, f"rank {dead} ({HOST})", "resume from the last checkpoint", but=[dead], limit=8 * SLOW)
        last = steps_in(run.run_dir)[-1]
        more = Ranks(self, 3, f"train.steps={last + 2}", "train.schedule=constant", "data.val=none",
                     run_dir=run.run_dir).succeed()
        whole = Ranks(self, 3, f"train.steps={last + 2}", "train.schedule=constant", "data.val=none").succeed()
        self.assert_same_files(more.files(last + 2), whole.files(last + 2))

    def test_stopped_rank_ends_the_run_after_peer_timeout(self):
        begin = time.monotonic()
        runs = [(stopped, Ranks(self, 3, *ENDLESS, "system.peer_timeout=2")) for stopped in (1, 0)]
        for stopped, run in runs:
            run.reach(4).signal(stopped, signal.SIGSTOP)
        for stopped, run in runs:
            run.fail(1, {0, 1, 2} - {stopped}, f"no answer from rank {stopped} ({HOST}) for 2 s in ", but=[stopped],
                     limit=2 + 10 * SLOW)
            self.assertGreater(time.monotonic() - begin, 1.9)
            run.signal(stopped, signal.SIGCONT)  # it finds that the others have ended
            self.assertEqual(run.wait()[stopped], 1)

    def test_suspending_all_ranks_is_no_timeout(self):
        run = Ranks(self, 2, *ENDLESS, "system.peer_timeout=2").reach(4)
        for number, pause in ((signal.SIGSTOP, 4), (signal.SIGCONT, 0)):
            for rank in range(2):
                run.signal(rank, number)
            time.sleep(pause)
        run.reach(run.steps() + 3).signal(1, signal.SIGUSR1).succeed()

    def test_error_of_one_rank_is_reported_once(self):
        other = self.tmp / "other.ini"
        other.write_text(self.config.read_text().replace("lr = 1e-2", "lr = 1e-3"))
        run = Ranks(self, 3, start=[0, 1])
        run.args[1] = other
        run.start(2)
        run.fail(2, 0, "rank 2: its configuration differs from rank 0's")


class Start(Case):
    def test_missing_ranks_are_named(self):
        run = Ranks(self, 4, start_timeout=2, start=[0, 2])
        short = Ranks(self, 3, start_timeout=0.5, start=[0])
        alone = Ranks(self, 2, start_timeout=1, start=[1])
        run.fail(1, 0, "ranks 1, 3 of 4 did not connect", f"localhost, port {run.port}", "firewall", "IHA_START_TIMEOUT")
        short.fail(1, 0, "within 0.5 s")
        alone.fail(1, 1, "rank 1: cannot reach rank 0", f"port {alone.port}", "Connection refused", "MASTER_ADDR")

    def test_prints_which_ranks_it_waits_for(self):
        """In one line, after five seconds; a rank that has reached rank 0 prints nothing."""
        run = Ranks(self, 4, start_timeout=300, start=[0, 2])
        alone = Ranks(self, 2, start_timeout=300, start=[1], env={1: {"MASTER_ADDR": "::1"}})
        wait_until(lambda: run.printed(0) and alone.printed(1), 5 + LIMIT, "two lines")
        time.sleep(0.5)  # for further lines, which would be wrong
        left = r"\(29\d s left\)\n"
        self.assertRegex(run.printed(0), rf"\Awaiting for ranks 1, 3 of 4 at localhost:{run.port} {left}\Z")
        self.assertRegex(alone.printed(1), rf"\Arank 1: waiting for rank 0 at \[::1\]:{alone.port}: .* {left}\Z")
        self.assertEqual(run.printed(2), "")

    def test_signal_while_waiting_ends_a_rank(self):
        """A signal ends a waiting rank at once: there is nothing to save."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for rank in range(2):
                run = Ranks(self, 2, start_timeout=10 * LIMIT, start=[rank])
                wait_until(lambda: self.listening(run.processes[rank].pid), LIMIT, "a rank that listens")
                run.signal(rank, number)
                self.assertEqual(run.wait(), {rank: -number}, run.all_printed())
                self.assertFalse(run.run_dir.joinpath("lock").exists())

    def test_two_processes_started_as_rank_0(self):
        run = Ranks(self, 3, start=[0])
        wait_until(lambda: self.can_connect(run.port), LIMIT, "rank 0 listens")
        run.start(0, key=1)
        run.fail(2, 0, "two processes were started as rank 0", "RANK")
        run = Ranks(self, 3, start=[0])  # of another run: does not disturb this one
        wait_until(lambda: self.can_connect(run.port), LIMIT, "rank 0 listens")
        other = Ranks(self, 3, start=[], env={0: {"IHA_TOKEN": "another"}})
        other.port = run.port
        other.start(0)
        other.fail(2, 0, f"port {run.port} (MASTER_PORT)", "in use", "another")
        run.start(1)
        run.start(2)
        run.succeed()

    def test_ranks_may_start_late(self):
        run = Ranks(self, 3, start=[2], start_timeout=30)
        time.sleep(0.5)
        run.start(0)
        time.sleep(0.5)
        run.start(1)
        run.succeed()

    def test_rank_restarted_before_the_others_started(self):
        run = Ranks(self, 3, start=[0, 1])
        time.sleep(0.7 * SLOW)
        run.signal(1, signal.SIGKILL)
        run.processes[1].wait()
        run.start(1)
        run.start(2)
        run.succeed()

    def test_contradictory_variables(self):
        Ranks(self, 2, env={1: {"WORLD_SIZE": 3}}).fail(2, 0, "one of 3 ranks", "one of 2", "WORLD_SIZE")
        run = Ranks(self, 3, start=[0, 1])
        run.start(1, key=2)
        run.fail(2, 0, "two processes were started as rank 1", "RANK")
        Ranks(self, 2, start_timeout=1, env={1: {"RANK": 2}}, start=[1]).fail(2, 1, "RANK = 2", "WORLD_SIZE")
        # Ranks that cannot know of each other each print a line.
        Ranks(self, 2, env={r: {"WORLD_SIZE": ""} for r in range(2)}).fail(2, [0, 1], "WORLD_SIZE is not set")
        Ranks(self, 2, env={r: {"MASTER_PORT": ""} for r in range(2)}).fail(2, 0, "MASTER_PORT is not set")

    def test_unusable_addresses_and_ports(self):
        bad = {r: {"MASTER_ADDR": "no.such.host.invalid"} for r in range(2)}
        unknown = Ranks(self, 2, env=bad, start=[0])
        with socket.socket() as taken:
            run = Ranks(self, 2, start=[])
            taken.bind(("", run.port))
            taken.listen()
            run.start(0)
            run.fail(2, 0, f"port {run.port} (MASTER_PORT)", "in use", "another")
        unknown.fail(2, 0, "MASTER_ADDR = no.such.host.invalid: ")
        Ranks(self, 2, env={r: {"IHA_START_TIMEOUT": "soon"} for r in range(2)}).fail(2, 0, "IHA_START_TIMEOUT = soon")
        Ranks(self, 2, "system.comm=mpi").fail(2, 0, "system.comm = mpi", "auto")

    def test_unidentified_connections_change_nothing(self):
        """Connections that send something else, nothing, part of a hello, or belong to another run change nothing."""
        run = Ranks(self, 3, start=[0, 1])
        messages, sockets = [b"GET / HTTP/1.0\r\n\r\n", b"", b"IHA-T", b"IHA-TCP\0" + bytes(24), os.urandom(4000)], []
        stop = threading.Event()

        def connect(port, count):
            for i in range(count):
                try:
                    s = socket.create_connection(("localhost", port), 1)
                    s.sendall(messages[i % len(messages)])
                    sockets.append(s)
                except OSError:
                    pass

        wait_until(lambda: self.can_connect(run.port), LIMIT, "rank 0 listens")
        with socket.create_connection(("localhost", run.port), LIMIT) as s:
            s.sendall(b"GET / ")
            self.assertEqual(s.recv(1), b"")  # closed at the first wrong byte
        connect(run.port, 200)  # more than can be pending at once
        another = Ranks(self, 3, start_timeout=2, start=[])
        another.port = run.port
        another.env = {2: {"IHA_TOKEN": "another"}}
        another.start(2)
        ports = threading.Thread(target=self.connect_everywhere, args=(run, connect, stop))
        ports.start()
        another.fail(1, 2, "rank 0 of another run answers")
        run.start(2)
        run.succeed()
        stop.set()
        ports.join()
        for s in sockets:
            s.close()
        self.assert_same_files(run.files(), Ranks(self, 3).succeed().files())

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

    def connect_everywhere(self, run, connect, stop):
        while not stop.is_set():
            for process in list(run.processes.values()):
                for port in self.listening(process.pid):
                    connect(port, 5)
            time.sleep(0.05)


if __name__ == "__main__":
    unittest.main()
