"""What tests of ranks on emulated GPUs share: train_iha linked with the emulator of tests/cuda/emulator/.

The binary is emulator/train_iha in the build folder, or the one that EMULATOR_TRAIN_IHA names.
"""

import os
import subprocess
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.lib.ranks import MPI_ENVIRONMENT, MPIRUN, free_port, without_launcher
from tests.lib.runs import ROOT, Case, lines_of, step_dir, tree, without_timings

EMULATOR_BINARY = Path(os.environ.get("EMULATOR_TRAIN_IHA", ROOT / "build/release/emulator/train_iha")).resolve()
EMULATOR_TIMEOUT = 120  # seconds; a run here takes one or two
# Timing on the emulator is noise. Of what it chooses, this alone changes bits; runs with system.deterministic have it apart.
EMULATOR_ENVIRONMENT = without_launcher(MPI_ENVIRONMENT) | {"IHA_GELU": "apart"}
# Layers of different sizes, so that stage 2 lays out its gradient memory differently for each.
MODEL = ["model.num_hidden_layers=3", "model.layer_pattern=iha_local mha_global iha_global",
         "model.max_position_embeddings=8"]
COMMON = [*MODEL, "system.device=cuda", "train.seq_len=8", "train.micro_batch=1", "train.steps=4", "system.threads=1",
          "system.peer_timeout=15", "data.val=none"]
ONE_PASS, THREE_PASSES = "train.batch_tokens=16", "train.batch_tokens=48"  # of two ranks
EXACT = ["system.deterministic=true", "system.precision=bf16"]


class EmulatorRun:
    """The files of a finished run, and what its ranks printed."""

    def __init__(self, run_dir, codes, printed):
        self.dir, self.codes, self.printed = run_dir, codes, printed
        self.text = "\n".join(printed)

    def lines(self):
        return without_timings(lines_of(self.dir / "metrics.jsonl"))

    def files(self, step):
        """{name: bytes} of a checkpoint, without trainer.json, which holds timings and [system] settings."""
        files = tree(step_dir(self.dir, step))
        return {name: data for name, data in files.items() if name != "trainer.json"}

    def weights(self, step):
        return (step_dir(self.dir, step) / "model.safetensors").read_bytes()

    def losses(self):
        return [(line["loss"], line["grad_norm"]) for line in self.lines() if "loss" in line]


@unittest.skipUnless(EMULATOR_BINARY.exists(), "no CUDA headers")
class EmulatorRanksCase(Case):
    def on(self, ranks, *overrides, gpus=None, start="tcp", run_dir=None, binary=EMULATOR_BINARY, code=0,
           command="train", of_rank=(), **environment):
        """Train on so many ranks, with a GPU each unless `gpus` is given; of_rank[r]: the environment of rank r."""
        run_dir = run_dir or self.new_dir()
        arguments = [binary, command, self.config, f"run.dir={run_dir}", *COMMON, *overrides]
        environment = EMULATOR_ENVIRONMENT | {"EMULATOR_GPUS": str(ranks if gpus is None else gpus)} | environment
        if ranks == 1 or start == "mpi":
            launched = [(([*MPIRUN, "-np", str(ranks)] if ranks > 1 else []) + arguments, environment)]
        else:
            rendezvous = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
            launched = [(arguments, environment | rendezvous | {"RANK": str(r)} | (of_rank[r] if of_rank else {}))
                        for r in range(ranks)]
        processes = [subprocess.Popen([*map(str, what)], env=env, cwd=self.tmp, stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
                     for what, env in launched]
        try:
            with ThreadPoolExecutor(len(processes)) as readers:
                printed = list(readers.map(lambda p: p.communicate(timeout=EMULATOR_TIMEOUT)[0], processes))
        finally:
            for p in processes:
                p.kill()
                p.wait()
        done = EmulatorRun(run_dir, [p.returncode for p in processes], printed)
        self.assertEqual(set(done.codes), {code}, done.text)
        return done

    def all_of(self, jobs):
        """{name: run} of {name: (ranks, overrides, options)}, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            futures = {name: pool.submit(self.on, ranks, *overrides, **options)
                       for name, (ranks, overrides, options) in jobs.items()}
            return {name: future.result() for name, future in futures.items()}

    def assert_near(self, run, other, relative):
        np.testing.assert_allclose(run.losses(), other.losses(), rtol=relative, err_msg=run.text)

    def assert_same(self, run, other, label, step=4):
        self.assertEqual(run.lines(), other.lines(), label)
        a, b = run.files(step), other.files(step)
        self.assertEqual(set(a), set(b), label)
        self.assertEqual([name for name in a if a[name] != b[name]], [], label)
