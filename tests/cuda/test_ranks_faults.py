#!/usr/bin/env python3
"""Ranks over NCCL, on GPUs of the emulator in tests/cuda/emulator/, of which one fails: it dies, its process or its GPU hangs, NCCL
reports an error. All end, in time, and say which it was.

    make build/release/emulator/train_iha && python -m unittest tests.cuda.test_ranks_faults
"""

import os
import signal
import subprocess
import time
import unittest

from tests.lib.emulator import COMMON, EMULATOR_BINARY, EMULATOR_ENVIRONMENT, ONE_PASS, EmulatorRanksCase
from tests.lib.ranks import free_port, num_metrics, wait_until
from tests.lib.runs import step_dir

DEADLINE = 3
ENDLESS = ["train.steps=100000", "train.schedule=constant", "run.save_every=2", ONE_PASS,
           f"system.peer_timeout={DEADLINE}"]


class Faults(EmulatorRanksCase):
    def begin(self, *overrides, run_dir=None, **environment):
        """Two ranks that are training; their output goes to files."""
        self.run_dir = run_dir or self.new_dir()
        rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "EMULATOR_GPUS": "2"}
        self.outputs, self.processes = [], []
        for rank in range(2):
            output = open(self.tmp / f"output_{time.monotonic_ns()}", "w+b")
            self.addCleanup(output.close)
            p = subprocess.Popen([str(EMULATOR_BINARY), "train", str(self.config), f"run.dir={self.run_dir}", *COMMON,
                                  *ENDLESS, *overrides], cwd=self.tmp, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                 env=EMULATOR_ENVIRONMENT | rendezvous | {"RANK": str(rank)} | environment)
            self.addCleanup(lambda p=p: (p.kill(), p.wait()))
            self.outputs.append(output)
            self.processes.append(p)

    def reach(self, step):
        wait_until(lambda: num_metrics(self.run_dir) >= step, 60, f"step {step}\n{self.printed()}")

    def printed(self):
        texts = []
        for output in self.outputs:
            output.seek(0)
            texts.append(output.read().decode(errors="replace"))
        return "\n".join(texts)

    def ends(self, *living):
        """Those ranks end by themselves, by 1, within twice the deadline; what they say, and how long they took."""
        begun = time.monotonic()
        for rank in living:
            try:
                self.assertEqual(self.processes[rank].wait(2 * DEADLINE + 15), 1, self.printed())
            except subprocess.TimeoutExpired:
                self.fail(f"rank {rank} has not ended\n{self.printed()}")
        return self.printed(), time.monotonic() - begun

    def goes_on(self):
        """From the last checkpoint that the run left."""
        last = max(int(p.name[5:]) for p in self.run_dir.glob("step_????????"))
        run = self.on(2, ONE_PASS, "train.schedule=constant", f"train.steps={last + 1}", run_dir=self.run_dir)
        self.assertIn(f"resuming from {step_dir(self.run_dir, last)}\n", run.text)

    def test_killed(self):
        self.begin()
        self.reach(5)
        self.processes[1].kill()
        text, _ = self.ends(0)
        self.assertRegex(text, "rank 1")
        self.goes_on()

    def test_stopped(self):
        self.begin()
        self.reach(5)
        os.kill(self.processes[1].pid, signal.SIGSTOP)
        text, seconds = self.ends(0)
        self.assertGreater(seconds, DEADLINE - 0.5)
        self.assertIn("no answer from rank 1", text)
        self.processes[1].kill()
        self.goes_on()

    def test_dies_in_a_collective(self):
        self.begin(EMULATOR_NCCL_FAULT="1:150:die")
        text, _ = self.ends(0)
        self.assertIn("rank 1", text)
        self.goes_on()

    def test_error(self):
        self.begin(EMULATOR_NCCL_FAULT="1:150:error")
        text, _ = self.ends(0, 1)
        self.assertIn("connection to rank 1 broken", text)
        self.goes_on()

    def test_hangs_in_a_collective(self):
        """Both GPUs have come to it: nobody can say whose fault it is."""
        self.begin(EMULATOR_NCCL_FAULT="1:150:hang")
        text, _ = self.ends(0, 1)
        self.assertIn("a collective that the GPUs of all ranks have started has not finished for", text)
        self.goes_on()

    def test_full_queue(self):
        """The host waits in a launch, where it cannot look."""
        self.begin("system.graph=off", EMULATOR_NCCL_FAULT="1:150:hang", EMULATOR_QUEUE="20")
        text, _ = self.ends(0, 1)
        self.assertIn("its launch queue is full", text)
        self.goes_on()

    def test_stuck_gpu(self):
        self.begin("system.graph=off", EMULATOR_STUCK="1:1500")
        text, _ = self.ends(0, 1)
        self.assertIn("the GPU of rank 1 has not started a collective", text)
        self.goes_on()


if __name__ == "__main__":
    unittest.main()
