"""What the fault tests share: small inputs, and a test case that tries many faults."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from collections import Counter
from pathlib import Path

import numpy as np

from tests.faults.harness import EVERYTHING, LIBRARY, ROOT, SCRATCH, try_all
from tests.lib.tiny import tiny_config, write_shard


def tiny(data):
    return tiny_config(data, seq_len=16, batch_tokens=64, steps=6, system="precision = fp32\nthreads = 1", run="""\
dir = run
save_every = 2
keep = 2
eval_every = 2
sample_every = 1""")


def text(seed, sentences):
    draw = random.Random(seed)
    return "".join(f"{draw.choice(['anna', 'boris'])} {draw.choice(['sees', 'takes'])} {draw.choice(['apples', 'cats'])}. "
                   for _ in range(sentences)).encode()


def byte_level_tokenizer():
    """A tokenizer.json of 256 bytes and no merges, in the alphabet of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {letters[b]: b for b in range(256)} | {"<|endoftext|>": 256}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
                  "merges": []}})


class FaultCase(unittest.TestCase):
    at_once = os.cpu_count()

    @classmethod
    def setUpClass(cls):
        if not LIBRARY.exists():
            subprocess.run(["make", "-s", "-C", ROOT, LIBRARY.relative_to(ROOT)], check=True)
        cls.scratch = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="iha_faults_"))
        cls.addClassCleanup(shutil.rmtree, cls.scratch)
        data = cls.scratch / "data"
        data.mkdir()
        write_shard(data / "train_0.bin", np.frombuffer(text(1, 60), np.uint8))
        write_shard(data / "train_1.bin", np.frombuffer(text(2, 60), np.uint8))
        write_shard(data / "val_0.bin", np.frombuffer(text(3, 8), np.uint8))
        cls.tokenizer = cls.scratch / "tokenizer.json"
        cls.tokenizer.write_text(byte_level_tokenizer())
        cls.config = cls.scratch / "tiny.ini"
        cls.config.write_text(tiny(data))
        cls.val = data / "val_0.bin"
        cls.scenarios = {}

    def try_faults(self, *specs):
        """specs: (scenario, fault)"""
        begin, before = time.monotonic(), Counter()
        for scenario in {id(s): s for s, _ in specs}.values():
            before += scenario.tried
        wrong = try_all([lambda s=scenario, f=fault: s.fault(f) for scenario, fault in specs], self.at_once)
        tried = sum((s.tried for s in {id(s): s for s, _ in specs}.values()), Counter()) - before
        self.say(f"{sum(tried.values())} faults in {time.monotonic() - begin:.1f} s:",
                 ", ".join(f"{kind} {n}" for kind, n in sorted(tried.items())))
        self.assertEqual(len(wrong), 0, "\n" + "\n".join(wrong[:10]) + f"\n{len(wrong)} of {len(specs)} went wrong")

    def say(self, *what):
        if EVERYTHING:
            print(f"  {self.id().split('.')[-1]}:", *what, file=sys.stderr, flush=True)
