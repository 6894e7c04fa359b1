#!/usr/bin/env python3
"""Failures of runs on several ranks: a rank is killed or hangs, a signal stops the run, one rank finds an error, a
machine is disconnected.

    make && python -m unittest tests.faults.test_ranks_faults

Tests end by checking in /proc that no process they started is left. Machines are network namespaces joined by a bridge,
each with a host name of its own, which needs root and iproute2; without these, ranks of one machine use TCP, and tests
that disconnect a machine are skipped.
"""

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import tempfile
import termios
import time
import unittest
from pathlib import Path

import numpy as np

from tests.lib.ranks import ENDLESS, HOST, LIMIT, MARK, MPI_ENVIRONMENT, MPIRUN, RanksCase, kill, marked, \
    mpirun_each, num_metrics, wait_until
from tests.lib.runs import BINARY, ROOT, step_dir, steps_in
from tests.lib.tiny import write_shard

LAUNCH = ROOT / "scripts" / "launch.sh"


class Run:
    """A running command with its child processes; its output goes to a file."""

    def __init__(self, case, command, run_dir, terminal=None, environment=()):
        self.run_dir, self.mark = Path(run_dir), f"{os.getpid()}-{time.monotonic_ns()}"
        self.output = tempfile.TemporaryFile()
        case.addCleanup(self.output.close)
        case.addCleanup(self.kill)

        def begin():
            # Shells ignore SIGINT in background jobs and nohup SIGHUP; what is ignored at start stays ignored.
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        stream = {"stdin": subprocess.DEVNULL, "stdout": self.output, "stderr": self.output}
        if terminal is not None:
            stream = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen([*map(str, command)], start_new_session=True, cwd=case.tmp, preexec_fn=begin,
                                        env={**MPI_ENVIRONMENT, **dict(environment), MARK: self.mark}, **stream)

    def kill(self):
        while left := marked(self.mark):
            for pid in left:
                kill(pid)
            time.sleep(0.02)
        self.process.wait()

    def printed(self):
        self.output.flush()
        self.output.seek(0)
        return self.output.read().decode()

    def steps(self):
        return num_metrics(self.run_dir)

    def reach(self, step):
        wait_until(lambda: self.steps() >= step or self.process.poll() is not None, LIMIT, f"step {step}")
        if self.process.poll() is not None:
            raise AssertionError(f"ended early ({self.process.returncode}):\n{self.printed()}")
        return self

    def rank(self, number):
        """Process id."""
        return next(pid for pid, (_, rank) in marked(self.mark).items() if rank == number)

    def ranks(self):
        return [pid for pid, (_, rank) in marked(self.mark).items() if rank is not None]

    def wait(self, limit=LIMIT):
        """(exit code, output) of a run that ends by itself."""
        try:
            return self.process.wait(limit), self.printed()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit} s: {marked(self.mark)}\n{self.printed()}") from None

    def nothing_left(self, limit=3):
        wait_until(lambda: not marked(self.mark), limit, f"processes left behind: {marked(self.mark)}")


@unittest.skipUnless(shutil.which("mpirun"), "mpirun is not installed")
class Case(RanksCase):
    def mpirun(self, ranks, *overrides, run_dir=None, **options):
        run_dir = run_dir or self.new_dir()
        return Run(self, [*MPIRUN, "-n", ranks, BINARY, "train", self.config, f"run.dir={run_dir}", *overrides],
                   run_dir, **options)

    def launch(self, ranks, *overrides, run_dir=None, **options):
        run_dir = run_dir or self.new_dir()
        return Run(self, [LAUNCH, "-n", ranks, "train", self.config, f"run.dir={run_dir}", *overrides], run_dir,
                   **options)

    def assert_names(self, text, rank, host, once=True):
        """The timeout names this rank only."""
        named = re.findall(r"no answer from (.*) for \d+ s in ", text)
        self.assertEqual(named[:1], [f"rank {rank} ({host})"], text)
        if once:
            self.assertEqual(len(named), 1, text)

    def assert_resumes(self, run_dir, ranks):
        """The newest checkpoint resumes, and two steps later all files equal those of an uninterrupted run."""
        last = steps_in(run_dir)[-1]
        more = [f"train.steps={last + 2}", "train.schedule=constant", "data.val=none"]
        resumed = self.mpirun(ranks, *more, run_dir=run_dir)
        code, text = resumed.wait()
        self.assertEqual(code, 0, text)
        self.assertIn(f"resuming from {step_dir(run_dir, last)}\n", text)
        straight = self.mpirun(ranks, *more)
        self.assertEqual(straight.wait()[0], 0)
        self.assert_same_end(run_dir, straight.run_dir, last + 2)


class SharedMemory(Case):
    @unittest.skipUnless(os.access("/dev/shm", os.W_OK), "needs /dev/shm")
    def test_every_rank_has_a_folder_of_its_own(self):
        """Files that Open MPI names by itself can be those of another job. What killed runs leave, the next removes."""
        run = self.mpirun(2, *ENDLESS).reach(3)
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in run.ranks())
        folders = [Path(path) for path in set(re.findall(r"/dev/shm/train_iha_mpi\.\w+", maps))]
        self.assertEqual(len(folders), 2, maps)
        self.assertFalse(re.search(r"/dev/shm/(sm|vader)_segment", maps), maps)
        for pid in run.ranks():
            os.kill(pid, signal.SIGSTOP)  # so that the next run has the processors; its folders are in use all the same
        code, text = self.mpirun(2, "train.steps=3").wait(3 * LIMIT)
        self.assertEqual((code, [f.exists() for f in folders]), (0, [True] * 2), text)
        run.kill()
        code, text = self.mpirun(2, "train.steps=3").wait()
        self.assertEqual((code, [f.exists() for f in folders]), (0, [False] * 2), text)


class Peers(Case):
    def test_killed_rank_ends_the_run(self):
        run = self.launch(3, *ENDLESS, "run.save_every=3").reach(8)
        os.kill(run.rank(1), signal.SIGKILL)
        code, text = run.wait(10)  # mpirun ends the others; they do not wait for peer_timeout
        self.assertEqual(code, 1, text)
        self.assertRegex(text, r"process rank 1 with PID \d+ on node \S+ exited on\s+signal 9")
        run.nothing_left()
        self.assert_resumes(run.run_dir, 3)

    def test_stopped_rank_ends_the_run_after_peer_timeout(self):
        run = self.mpirun(3, *ENDLESS, "system.peer_timeout=3").reach(8)
        begin = time.monotonic()
        os.kill(run.rank(1), signal.SIGSTOP)
        code, text = run.wait(3 + 15)
        self.assertGreater(time.monotonic() - begin, 2.9)
        self.assertEqual(code, 1, text)
        self.assert_names(text, 1, HOST, once=False)  # a second rank may print before mpirun ends it
        run.nothing_left()

    def test_suspending_all_ranks_is_no_timeout(self):
        # As by a batch scheduler that lets another job run for a while: this is no timeout.
        run = self.mpirun(2, *ENDLESS, "system.peer_timeout=2").reach(8)
        ranks = run.ranks()
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        run.reach(run.steps() + 3)
        run.process.send_signal(signal.SIGUSR1)
        code, text = run.wait()
        self.assertEqual(code, 0, text)


class ChangedData(Case):
    def test_all_ranks_end_with_the_same_line(self):
        for how in ("train", "val"):
            data = self.new_dir("shards")
            data.mkdir()
            for p in self.data.glob("*.bin"):
                (data / p.name).write_bytes(p.read_bytes())
            run = self.mpirun(3, *ENDLESS, f"data.train={data}/train_*.bin", f"data.val={data}/val_*.bin",
                              "run.save_every=2", "run.eval_every=3").reach(8)
            path = data / ("train_1.bin" if how == "train" else "val_0.bin")
            os.truncate(path, 2000)
            code, text = run.wait()
            lines = [line for line in text.splitlines() if "train_iha: " in line]
            self.assertEqual((code, len(lines)), (1, 1), text)
            for part in (path, "2000 bytes"):
                self.assertIn(str(part), lines[0])
            run.nothing_left()
            last = steps_in(run.run_dir)[-1]
            again = self.mpirun(3, f"train.steps={last + 1}", "train.schedule=constant", "data.val=none",
                                run_dir=run.run_dir)
            code, text = again.wait()
            self.assertEqual(code, 0, text)
            self.assertIn(f"resuming from {step_dir(run.run_dir, last)}\n", text)

    @staticmethod
    def open_in(run, path):
        """The ranks that have a file open."""
        found = []
        for pid in run.ranks():
            try:
                if any(os.readlink(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir()):
                    found.append(pid)
            except OSError:  # closed meanwhile
                pass
        return found

    def test_eval(self):
        run_dir = self.new_dir()
        done = self.mpirun(2, "train.steps=2", run_dir=run_dir)
        self.assertEqual(done.wait()[0], 0)
        val = self.new_dir("val.bin")
        write_shard(val, np.arange(10_000_000) % 257)  # enough that the evaluation is still going on
        run = Run(self, [*MPIRUN, "-n", 2, BINARY, "eval", run_dir, f"data.val={val}", "system.threads=1",
                         "system.device=cpu"], run_dir)
        wait_until(lambda: len(self.open_in(run, val)) == 2, LIMIT, "ranks that read the file")
        time.sleep(2)  # every rank has checked it
        self.assertIsNone(run.process.poll(), run.printed())
        os.truncate(val, 5000)
        code, text = run.wait()
        lines = [line for line in text.splitlines() if "train_iha: " in line]
        self.assertEqual((code, len(lines)), (1, 1), text)
        self.assertIn(str(val), lines[0])
        run.nothing_left()


class Signals(Case):
    def assert_saved(self, run, number=signal.SIGUSR1):
        """A signal ended all ranks after the same step, which is saved."""
        code, text = run.wait()
        self.assertEqual(code, 0, text)
        done = run.steps()
        self.assertEqual(text.count(f"stopped by signal {int(number)} after step {done};"), 1, text)
        self.assertEqual(steps_in(run.run_dir), [done])
        run.nothing_left()
        return text

    def test_signal_to_the_launcher_saves(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            with self.subTest(number):
                run = self.launch(2, *ENDLESS).reach(4)
                run.process.send_signal(number)
                self.assert_saved(run)
        self.assert_resumes(run.run_dir, 2)

    def test_ctrl_c_in_a_terminal_saves(self):
        mine, theirs = pty.openpty()
        self.addCleanup(os.close, mine)
        run = self.launch(2, *ENDLESS, terminal=theirs).reach(4)
        os.close(theirs)
        os.write(mine, b"\x03")
        text = ""
        try:
            while data := os.read(mine, 4096):
                text += data.decode()
        except OSError:  # the other end is closed
            pass
        self.assertEqual(run.wait()[0], 0, text)
        self.assertEqual(steps_in(run.run_dir), [run.steps()])
        for what in ("launch: mpirun ", "2 ranks over mpi", "step 1/", "launch: stopping", "stopped by signal"):
            self.assertEqual(text.count(what), 1, text)
        self.assertNotIn("\033", text)
        run.nothing_left()

    def test_second_signal_ends_at_once(self):
        # Rank 0 blocks in writing its samples to a pipe, so the first signal has no effect yet.
        run_dir = self.new_dir()
        run_dir.mkdir()
        os.mkfifo(run_dir / "samples.txt")
        run = self.launch(2, *ENDLESS, "run.sample_every=4", run_dir=run_dir).reach(4)
        run.process.send_signal(signal.SIGTERM)
        run.process.send_signal(signal.SIGTERM)  # as timeout(1) does; counts as the same signal
        time.sleep(1.3)
        self.assertIsNone(run.process.poll())
        run.process.send_signal(signal.SIGTERM)
        code, text = run.wait(10)
        self.assertEqual(code, 143, text)
        self.assertEqual(steps_in(run_dir), [])
        run.nothing_left()

    def test_signal_to_mpirun_saves(self):
        run = self.mpirun(2, *ENDLESS).reach(4)
        run.process.send_signal(signal.SIGUSR1)
        self.assert_saved(run)

    def test_signal_to_one_rank_saves(self):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            run = self.mpirun(3, *ENDLESS).reach(4)
            os.kill(run.rank(2), number)
            self.assert_saved(run, number)
            names = [p.name for p in step_dir(run.run_dir, run.steps()).glob("optimizer-*")]
            self.assertEqual(sorted(names), [f"optimizer-0000{r}-of-00003.safetensors" for r in range(3)])


class Errors(Case):
    def assert_refused(self, run, *names):
        """One line for all ranks, and mpirun passes on the exit code."""
        code, text = run.wait()
        lines = [line for line in text.splitlines() if "train_iha: " in line]
        self.assertEqual((code, len(lines)), (2, 1), text)
        self.assertTrue(lines[0].startswith("train_iha: "), text)
        for name in names:
            self.assertIn(str(name), lines[0])
        run.nothing_left()

    def test_error_of_all_ranks_is_reported_once(self):
        self.assert_refused(self.mpirun(3, "train.learning_rate=1"), "learning_rate")
        self.assert_refused(self.launch(3, "model.hidden_size=-1"), "hidden_size")
        self.assert_refused(Run(self, [*MPIRUN, "-n", 3, BINARY, "trian", self.config], ""), "trian", "train")
        self.assert_refused(Run(self, [*MPIRUN, "-n", 3, BINARY, "eval", self.tmp / "none"], ""), "none")

    def test_error_of_one_rank_is_reported_once(self):
        def differing(*overrides):
            """The last rank gets other arguments."""
            run_dir = self.new_dir()
            common = [BINARY, "train", self.config, f"run.dir={run_dir}"]
            return Run(self, mpirun_each(common, [*common, *overrides]), run_dir)

        self.assert_refused(differing("data.train=/missing/*.bin"), "rank 1: ", "configuration differs")
        self.assert_refused(differing("train.lr=-1"), "rank 1: ", "lr")
        self.assert_refused(differing("data.val=/missing.bin"), "rank 1: ", "configuration differs")

    def test_run_dir_in_use(self):
        run_dir = self.new_dir()
        run_dir.mkdir()
        with open(run_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.assert_refused(self.mpirun(2, run_dir=run_dir), run_dir, "in use")

    def launcher(self, *args, code, **environment):
        done = subprocess.run([LAUNCH, *map(str, args)], env={**MPI_ENVIRONMENT, **environment}, capture_output=True,
                              text=True, timeout=3 * LIMIT, stdin=subprocess.DEVNULL, cwd=self.tmp)
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def test_launcher_refuses_wrong_arguments(self):
        self.assertIn("--hosts", self.launcher("--help", code=0).stdout)
        for args, environment, name in ((["-n", "0", "train", "x.ini"], {}, "-n 0"),
                                        (["-n", "two", "train", "x.ini"], {}, "two"),
                                        (["-n"], {}, "-n"), ([], {}, "command"),
                                        (["--host", "a", "train", "x.ini"], {}, "--host"),
                                        (["generate", "x"], {}, "generate"),
                                        (["--hostfile", "/missing", "train", "x.ini"], {}, "/missing"),
                                        (["--hostfile", "/dev/null", "--hosts", "a", "train", "x.ini"], {}, "--hosts"),
                                        (["train", "x.ini"], {"MPIRUN": "/missing/mpirun"}, "make deps"),
                                        (["train", "x.ini"], {"TRAIN_IHA": "/missing"}, "make")):
            with self.subTest(args):
                lines = self.launcher(*args, code=2, **environment).stderr.splitlines()
                self.assertEqual(len(lines), 1, lines)
                self.assertTrue(lines[0].startswith("launch: "), lines)
                self.assertIn(name, lines[0])

    def test_launcher_and_the_mpirun_of_open_mpi_5(self):
        # It exits with 0 when it loses a machine, and reads its daemons' settings under other names.
        mpirun = self.tmp / "mpirun5"
        mpirun.write_text("#!/bin/sh\nenv | grep ^PRTE_MCA_\nprintf \"PRTE $SAYS$END\" >&2\n")
        mpirun.chmod(0o755)
        lost = "has lost communication with a remote daemon."
        # Its last line may have no end.
        for says, end, code in ((lost, "\\n", 1), (lost, "", 1), ("is well.", "\\n", 0), ("is well.", "", 0)):
            done = self.launcher("--hosts", "localhost", "train", self.config, code=code, MPIRUN=str(mpirun), SAYS=says, END=end,
                                 OMPI_MCA_plm_rsh_agent="ssh -4", OMPI_MCA_oob_tcp_if_include="eth1")
            self.assertIn(f"PRTE {says}\n", done.stderr)
            self.assertEqual("launch: mpirun lost a machine" in done.stderr, code == 1, done.stderr)
            for setting in ("oob_tcp_keepalive_time=10", "plm_ssh_agent=ssh -4", "prte_if_include=eth1"):
                self.assertIn(f"PRTE_MCA_{setting}\n", done.stdout)

    def test_launcher_ends_an_mpirun_that_does_not(self):
        mpirun = self.tmp / "mpirun_hangs"
        mpirun.write_text("#!/bin/sh\n\"$RANK\" 1 &\nexec sleep 100\n")
        mpirun.chmod(0o755)
        rank = self.tmp / "train_iha_ends"
        shutil.copy(shutil.which("sleep"), rank)
        done = self.launcher("-n", 2, "train", self.config, code=1, MPIRUN=str(mpirun), RANK=str(rank), TRAIN_IHA=str(rank))
        self.assertIn("have ended and mpirun does not: killing mpirun", done.stderr)
        self.assertIn("resumes from the last checkpoint", done.stderr)

    def test_run_dir_with_spaces(self):
        run_dir = self.new_dir("a run")
        self.launcher("-n", 2, "train", self.config, f"run.dir={run_dir}", "train.steps=2", "data.val=none", code=0)
        self.assertEqual(steps_in(run_dir), [2])


# mpirun uses this in place of ssh to start processes on another machine: it enters the namespace of that name.
AGENT = """\
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$1"; shift; exec bash -c "$*"' sh "$host" "$@"
"""


class Machines(Case):
    """Three machines on one network switch."""

    def setUp(self):
        self.missing = None
        if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
            self.missing = "needs root, iproute2 and util-linux"
            return
        prefix = f"iha{os.getpid()}"
        self.switch, self.hosts = f"{prefix}s", [f"{prefix}h{i}" for i in range(3)]
        self.addCleanup(self.remove)
        try:
            for name in (self.switch, *self.hosts):
                self.ip("netns", "add", name)
            self.ip("-n", self.switch, "link", "add", "name", "br0", "type", "bridge")
            self.ip("-n", self.switch, "link", "set", "br0", "up")
            for i, host in enumerate(self.hosts):
                self.ip("link", "add", "name", "e0", "netns", host, "type", "veth", "peer", "name", f"p{i}", "netns",
                        self.switch)
                self.ip("-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "e0")
                self.ip("-n", self.switch, "link", "set", f"p{i}", "master", "br0", "up")
                for link in ("e0", "lo"):
                    self.ip("-n", host, "link", "set", link, "up")
        except subprocess.CalledProcessError as e:
            self.missing = f"no network namespaces here: {e.stderr.strip()}"
            return
        self.agent = self.tmp / "agent.sh"
        self.agent.write_text(AGENT)
        self.agent.chmod(0o755)

    def remove(self):
        for name in (*self.hosts, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @staticmethod
    def ip(*args):
        subprocess.run(["ip", *args], check=True, capture_output=True, text=True)

    def disconnect(self, i):
        self.ip("-n", self.switch, "link", "set", f"p{i}", "down")

    def start(self, *overrides, keepalive=None):
        """One rank per machine, started from the first."""
        run_dir = self.new_dir()
        settings = {"plm_rsh_agent": self.agent, "pml": "ob1", "btl": "tcp,self",
                    "btl_tcp_if_include": "10.77.0.0/24", "oob_tcp_if_include": "10.77.0.0/24"}
        for name in ("time", "intvl", "probes") if keepalive else ():
            settings[f"oob_tcp_keepalive_{name}"] = keepalive
        command = [self.agent, self.hosts[0], "exec", LAUNCH, "--hosts", ",".join(self.hosts), "-n", 3, "train",
                   self.config, f"run.dir={run_dir}", *overrides]
        return Run(self, command, run_dir,
                   environment={f"OMPI_MCA_{key}": str(x) for key, x in settings.items()})

    def needs_network(self):
        if self.missing:
            self.skipTest(self.missing)

    def test_same_bytes_as_on_one_machine(self):
        one = self.mpirun(3)
        self.assertEqual(one.wait()[0], 0)
        if self.missing:  # at least over TCP instead of shared memory
            run = self.mpirun(3, environment={"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self"})
        else:
            run = self.start()
        code, text = run.wait()
        self.assertEqual(code, 0, text)
        self.assert_same_end(run.run_dir, one.run_dir, 20)
        run.nothing_left()

    def test_signal_saves(self):
        self.needs_network()
        run = self.start(*ENDLESS).reach(4)
        run.process.send_signal(signal.SIGTERM)
        code, text = run.wait()
        self.assertEqual(code, 0, text)
        self.assertEqual(steps_in(run.run_dir), [run.steps()])
        run.nothing_left()

    def test_disconnected_machine_ends_the_run(self):
        # The ranks find the failure before Open MPI does.
        self.needs_network()
        run = self.start(*ENDLESS, "system.peer_timeout=3", "run.save_every=3").reach(8)
        last = steps_in(run.run_dir)[-1]
        self.disconnect(2)
        wait_until(lambda: not run.ranks(), 3 + 20, "ranks left")  # on any machine
        code, text = run.wait(15)  # mpirun alone would wait for the lost machine for many minutes
        self.assertEqual(code, 1, text)
        # While one of its daemons does not answer, mpirun takes seconds to end the ranks that it still reaches.
        self.assert_names(text, 2, self.hosts[2], once=False)
        # Open MPI's daemon on the disconnected machine has data to send, and runs until the system gives up sending it.
        self.assertLessEqual({name for name, _ in marked(run.mark).values()}, {"orted", "prted"})
        self.assertGreaterEqual(steps_in(run.run_dir)[-1], last)
        run.kill()
        self.assert_resumes(run.run_dir, 3)

    def test_disconnected_machine_found_by_mpirun(self):
        # Open MPI finds the failure before the ranks do, as with the default timeout of five minutes.
        self.needs_network()
        run = self.start(*ENDLESS, "system.peer_timeout=100", keepalive=1).reach(8)
        self.disconnect(2)
        code, text = run.wait(15)
        self.assertEqual(code, 1, text)
        self.assertRegex(text, rf"Remote daemon: .* on node {self.hosts[2]}\b")
        run.nothing_left(15)


if __name__ == "__main__":
    unittest.main()
