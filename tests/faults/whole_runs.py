"""Every command once, with good and bad input, under a leak or race detector.

    python -m tests.faults.whole_runs lsan|tsan|valgrind BINARY

lsan and tsan are sanitizers that the binary was built with. A run fails when its exit code differs from the one
without the tool; the tools use codes of their own. All runs compute with one thread, because neither TSan nor Helgrind
understands the futexes of libgomp's barriers, and with two threads would report every parallel loop.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.faults.fault_case import byte_level_tokenizer, text, tiny
from tests.faults.harness import ENVIRONMENT, ROOT
from tests.lib.tiny import write_shard

SUPPRESSIONS = ROOT / "tests" / "faults" / "valgrind.supp"
TOOLS = {
    "lsan": [],
    "tsan": [],
    "valgrind": ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", f"--suppressions={SUPPRESSIONS}"],
}


def prepare(folder):
    for name, seed, n in (("train_0", 1, 60), ("val_0", 3, 8)):
        write_shard(folder / f"{name}.bin", np.frombuffer(text(seed, n), np.uint8))
    (folder / "tiny.ini").write_text(tiny("."))
    (folder / "bad.ini").write_text(tiny(".").replace("lr =", "lrr ="))
    (folder / "tokenizer.json").write_text(byte_level_tokenizer())
    (folder / "no.json").write_text("{")
    (folder / "blocked" / "samples.txt").mkdir(parents=True)


def damage(folder):
    shutil.copytree(folder / "run", folder / "damaged", symlinks=True)
    shutil.copytree(folder / "run", folder / "lost", symlinks=True)
    for path in [*folder.glob("lost/step_*/model.safetensors"), folder / "damaged/step_00000008/trainer.json",
                 folder / "damaged/step_00000008/model.safetensors"]:
        path.write_bytes(path.read_bytes()[:100])


def train(*overrides):
    return ["train", "tiny.ini", "data.tokenizer=tokenizer.json", *overrides]


GOOD = [
    (0, train("train.steps=4")),
    (0, train("train.steps=8")),  # resumes
    (0, train("train.steps=8")),  # finished already
    (0, ["eval", "run", "data.val=val_0.bin"]),
    (0, ["generate", "run/best", "--prompt", "anna", "--tokens", "3", "--top-k", "4"]),
    (0, ["info", "run"]),
    (0, train("run.dir=stopped", "train.steps=1000000", "run.sample_every=100", "run.save_every=0")),
]
BAD = [
    (0, ["--version"]), (0, ["--help"]), (0, ["info", "tiny.ini"]), (2, ["trian"]), (2, ["train", "bad.ini"]),
    (2, train("train.lr=x")), (2, train("data.train=none_*.bin", "run.dir=new")),
    (2, train("data.tokenizer=no.json", "run.dir=new")), (2, train("model.hidden_size=32", "train.steps=9")),
    (1, train("run.dir=blocked")), (0, train("run.dir=damaged", "train.steps=8")),
    (2, train("run.dir=lost", "train.steps=8")), (2, ["eval", "lost", "data.val=val_0.bin"]),
    (2, ["generate", "run", "--tokens", "x"]), (2, ["generate", "run", "data.tokenizer=no.json"]), (2, ["info", "new"]),
]


def main(tool, binary, commands=None):
    """Returns a text for each failure."""
    wrong, binary = [], str(Path(binary).resolve())
    with tempfile.TemporaryDirectory(prefix="iha_whole_runs_") as folder:
        folder = Path(folder)
        prepare(folder)
        for i, (code, args) in enumerate(commands or GOOD + BAD):
            if i == len(GOOD):
                damage(folder)
            process = subprocess.Popen([*TOOLS[tool], binary, *args], cwd=folder, env={**ENVIRONMENT, **TOOL_ENVIRONMENT},
                                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if "run.dir=stopped" in args:
                stop(process, folder / "stopped" / "metrics.jsonl")
            err = process.communicate(timeout=600)[1].decode(errors="replace")
            if process.returncode != code:
                wrong.append(f"{tool}: train_iha {' '.join(args)}: exit code {process.returncode}, not {code}\n{err[-6000:]}")
    return wrong


def stop(process, metrics):
    """SIGTERM after the first steps."""
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)


# eval and others use all cores by default.
TOOL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LSAN_OPTIONS": "exitcode=86", "ASAN_OPTIONS": "exitcode=86",
         "TSAN_OPTIONS": "exitcode=66"}

if __name__ == "__main__":
    failures = main(*sys.argv[1:3])
    print("\n".join(failures) or f"{sys.argv[1]}: {len(GOOD + BAD)} runs, nothing found")
    sys.exit(bool(failures))
