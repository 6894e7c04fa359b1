#!/usr/bin/env python3
"""Tokenizers from both sides: what data/prepare.py writes and what train_iha makes of it.

    make && python -m unittest tests.cli.test_tokenizers

Which id ends a document is decided by one rule, recorded in dataset.json and obeyed by generation; documents are
tokenized as if they had not been cut; kinds of files that --tokenizer takes.
"""

import base64
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

from tests.lib.folder_case import FolderCase

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = str(Path(os.environ.get("TRAIN_IHA", ROOT / "train_iha")).resolve())
sys.path.insert(0, str(ROOT / "data"))

import prepare  # noqa: E402
import prepare_cuts  # noqa: E402
import prepare_readers  # noqa: E402
import prepare_text  # noqa: E402
import prepare_tokenizers  # noqa: E402

HAS_LIBRARY = importlib.util.find_spec("tokenizers") is not None
KINDS = {kind["name"]: kind["tokenizer"] for kind in json.loads(
    (ROOT / "tests" / "golden" / "tokenizer_kinds.json").read_text(encoding="utf-8"))}
ALPHABET = "".join(sorted(prepare_tokenizers.byte_alphabet().values()))
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_vocabulary(extra=(), added=(), **members):
    """A tokenizer.json of 256 bytes, then ordinary tokens, then added ones."""
    vocab = {character: i for i, character in enumerate(ALPHABET)} | {name: 256 + i for i, name in enumerate(extra)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None, "decoder": BYTE_LEVEL,
        "added_tokens": [{"id": len(vocab) + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, name in enumerate(added)],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []},
    } | members


@unittest.skipUnless(HAS_LIBRARY, "needs the tokenizers package")
class Case(FolderCase):
    def prepare(self, *arguments, out=None, fails=False):
        stderr = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr), \
                mock.patch.object(sys, "argv", ["prepare.py", "--val-fraction", "0", "--out", str(out or self.out),
                                                *map(str, arguments)]):
            code = prepare.main()
        self.assertEqual(code, 2 if fails else 0, stderr.getvalue())
        return stderr.getvalue()

    def tokens(self, out=None):
        return [int(token) for path in sorted((out or self.out).glob("train_*.bin"))
                for token in np.frombuffer(path.read_bytes()[1024:],
                                           "<u2" if int.from_bytes(path.read_bytes()[:4], "little") == 20240520 else "<u4")]

    def dataset(self, out=None):
        return json.loads(((out or self.out) / "dataset.json").read_text())

    def rows(self, texts):
        return self.write("rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))

    # ------------------------------------------------------------------------------------ the binary

    def train(self, *overrides, code=0, vocab=300, out=None):
        config = self.write("run.ini", f"""
[model]
vocab_size = {vocab}
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 16
layer_pattern = mha_global
[train]
seq_len = 8
micro_batch = 1
steps = 1
lr = 1e-3
[system]
device = cpu
precision = fp32
threads = 1
[data]
train = {out or self.out}/train_*.bin
[run]
dir = {self.folder}/run
""")
        run = subprocess.run([BINARY, "train", config, *overrides], capture_output=True, text=True, timeout=60)
        self.assertEqual(run.returncode, code, run.stderr)
        return run.stderr

    def end_ids(self, *overrides, **options):
        """Where a checkpoint of one step says that texts end."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        self.train(*overrides, **options)
        path = self.folder / "run" / "step_00000001" / "generation_config.json"
        return json.loads(path.read_text()).get("eos_token_id", [])


class EndOfText(Case):
    TEXTS = ["One text of some length.", "Another text."] * 4

    def both_sides(self, data, config=None):
        """The id that ends documents, by prepare.py and by the binary, which must be one."""
        shutil.rmtree(self.out, ignore_errors=True)
        path = self.write("hf/tokenizer.json", data)
        config_path = path.with_name("tokenizer_config.json")
        config_path.unlink(missing_ok=True)
        if config is not None:
            self.write("hf/tokenizer_config.json", config)
        self.prepare("--tokenizer", path, self.rows(self.TEXTS))
        separator = self.dataset()["separator"]
        self.assertEqual(self.tokens().count(separator), len(self.TEXTS))
        self.assertEqual(self.tokens()[-1], separator)
        # Without dataset.json the binary has the tokenizer and what lies beside it.
        (self.out / "dataset.json").unlink()
        self.assertEqual(self.end_ids(f"data.tokenizer={path}"), [separator])
        return separator

    def test_added_tokens_come_first(self):
        self.assertEqual(self.both_sides(byte_vocabulary(["</s>", "xx"], ["<eos>"])), 258)

    def test_ordinary_tokens_count_too(self):
        self.assertEqual(self.both_sides(byte_vocabulary(["xx", "</s>"], ["<pad>"])), 257)

    def test_the_order_of_the_list(self):
        self.assertEqual(self.both_sides(byte_vocabulary([], ["</s>", "<|endoftext|>"])), 257)

    def test_one_list_of_names(self):
        source = (ROOT / "data" / "end_of_text.c").read_text(encoding="utf-8")
        listed = re.search(r"end_of_text_names\[\] = \{(.*?)\};", source, re.S)[1]
        self.assertEqual(tuple(re.findall(r'"([^"]+)"', listed)), prepare_tokenizers.END_OF_TEXT)

    def test_every_known_name(self):
        for name in prepare_tokenizers.END_OF_TEXT:
            with self.subTest(name):
                self.assertEqual(self.both_sides(byte_vocabulary([], ["<other>", name])), 257)

    def test_tokenizer_config(self):
        data = byte_vocabulary(["<|stop|>"], ["<|endoftext|>", "<|im_end|>"])
        self.assertEqual(self.both_sides(data, {"eos_token": "<|im_end|>"}), 258)
        self.assertEqual(self.both_sides(data, {"eos_token": {"content": "<|im_end|>", "special": True}}), 258)
        self.assertEqual(self.both_sides(data, {"eos_token": "<|stop|>"}), 256)
        self.assertEqual(self.both_sides(data, {"eos_token": None}), 257)
        self.assertEqual(self.both_sides(data, {}), 257)

    def test_tokenizer_config_that_does_not_fit(self):
        path = self.write("hf/tokenizer.json", byte_vocabulary([], ["<|endoftext|>"]))
        self.prepare("--tokenizer", path, self.rows(self.TEXTS))
        for config in ({"eos_token": "<nope>"}, {"eos_token": 7}, "nonsense"):
            self.write("hf/tokenizer_config.json", config)
            self.assertIn("tokenizer_config.json", self.prepare("--tokenizer", path, "--overwrite", self.rows(self.TEXTS), fails=True))
            self.assertIn("tokenizer_config.json", self.train(f"data.tokenizer={path}", code=2))

    def test_json_that_readers_take_differently(self):
        # A key twice, of which Python takes the last and cJSON the first; NaN, which Python alone reads.
        path = self.write("hf/tokenizer.json", byte_vocabulary([], ["<|endoftext|>", "<|sep|>"]))
        self.prepare("--tokenizer", path, self.rows(self.TEXTS))
        for config, why in (('{"eos_token": "<|endoftext|>", "eos_token": "<|sep|>"}', "twice"),
                            ('{"eos_token": {"content": "<|sep|>", "content": "<|endoftext|>"}}', "twice"),
                            ('{"a": {"b": [{"c": 1, "d": 2, "c": 3}]}}', "twice"),
                            ('{"eos_token": "<|sep|>", "model_max_length": NaN}', "not "),
                            ('{"eos_token": "<|sep|>", "model_max_length": -Infinity}', "not ")):
            with self.subTest(config):
                self.write("hf/tokenizer_config.json", config)
                for said in (self.prepare("--tokenizer", path, "--overwrite", self.rows(self.TEXTS), fails=True),
                             self.train(f"data.tokenizer={path}", code=2)):
                    self.assertIn("tokenizer_config.json", said)
                    self.assertIn(why, said)
        self.write("hf/tokenizer_config.json", '\ufeff{"eos_token": "<|sep|>"}')
        self.prepare("--tokenizer", path, "--overwrite", self.rows(self.TEXTS))
        self.assertEqual(self.dataset()["separator"], 257)
        self.assertNotIn("warning", self.train(f"data.tokenizer={path}"))
        text = path.read_text()
        self.write("hf/tokenizer.json", text.replace('{"', '{"normalizer": null, "normalizer": null, "', 1))
        for said in (self.prepare("--tokenizer", path, "--overwrite", self.rows(self.TEXTS), fails=True),
                     self.train(f"data.tokenizer={path}", code=2)):
            self.assertIn("twice", said)

    def test_another_eos_token_than_the_separator(self):
        path = self.write("hf/tokenizer.json", byte_vocabulary([], ["<|endoftext|>", "<|sep|>"]))
        self.prepare("--tokenizer", path, self.rows(self.TEXTS))
        self.assertNotIn("warning", self.train(f"data.tokenizer={path}"))
        shutil.rmtree(self.folder / "run")
        self.write("hf/tokenizer_config.json", {"eos_token": "<|sep|>"})
        said = self.train(f"data.tokenizer={path}")
        self.assertIn("warning: documents of data.train end with id 256", said)
        self.assertIn("names id 257 as eos_token; generation stops at 256", said)

    def test_the_flag_comes_first_and_is_recorded(self):
        path = self.write("hf/tokenizer.json", byte_vocabulary([], ["<|endoftext|>", "<|sep|>"]))
        self.prepare("--tokenizer", path, "--separator", 257, self.rows(self.TEXTS))
        self.assertEqual(self.dataset()["separator"], 257)
        self.assertEqual(self.end_ids(f"data.tokenizer={self.out}/tokenizer.json"), [257])
        self.assertEqual(self.end_ids(f"data.tokenizer={path}"), [257])
        self.assertEqual(self.end_ids(), [257])  # no tokenizer: samples are ids, and end there

    def test_generation_config(self):
        path = self.write("hf/tokenizer.json", byte_vocabulary([], ["<|endoftext|>", "<|eot|>", "<|eom|>"]))
        self.write("hf/generation_config.json", {"eos_token_id": [258, 257]})
        self.prepare("--tokenizer", path, self.rows(self.TEXTS))
        self.assertEqual(self.end_ids(f"data.tokenizer={path}"), [256, 258, 257])

    def test_generation_stops(self):
        """At whichever id is an end: all of them are, so nothing is generated."""
        self.prepare("--tokenizer", "bytes", self.rows(self.TEXTS))
        self.train("data.tokenizer=bytes")
        checkpoint = self.folder / "run" / "step_00000001"
        command = [BINARY, "generate", checkpoint, "--prompt", "ab", "--tokens", "8", "--seed", "3", "system.precision=fp32"]
        self.assertEqual(json.loads((checkpoint / "generation_config.json").read_text()),
                         {"eos_token_id": [256], "bos_token_id": 256, "pad_token_id": 256})
        run = subprocess.run(command, capture_output=True)
        self.assertGreater(len(run.stdout), 3)
        for k in range(0, 300, 60):  # 64 ids at most are kept
            ids = list(range(k, k + 60))
            self.write("run/step_00000001/generation_config.json", {"eos_token_id": ids})
            out = subprocess.run(command, capture_output=True, check=True).stdout.removesuffix(b"\n")
            self.assertTrue(all(byte not in ids for byte in out.removeprefix(b"ab")), (ids, out))
        self.write("run/step_00000001/generation_config.json", {"eos_token_id": 300})
        run = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(run.returncode, 2)
        self.assertIn("generation_config.json", run.stderr)


class Dataset(Case):
    TEXTS = ["A text of a few words.", "naïve — façade", "x" * 100, "the end"] * 5

    def test_contents(self):
        path = self.write("tokenizer.json", byte_vocabulary([], ["<|endoftext|>"]))
        self.prepare("--tokenizer", path, "--shard-tokens", 100, self.rows(self.TEXTS))
        dataset = self.dataset()
        self.assertEqual({key: dataset[key] for key in ("tokenizer", "vocab_size", "separator")},
                         {"tokenizer": "tokenizer.json", "vocab_size": 257, "separator": 256})
        self.assertEqual(dataset["tokenizer_sha256"], hashlib.sha256((self.out / "tokenizer.json").read_bytes()).hexdigest())
        shards = sorted(self.out.glob("train_*.bin"))
        self.assertEqual(sorted(dataset["shards"]), [path.name for path in shards])
        for path in shards:  # a token is a byte here, but for the separator
            tokens = np.frombuffer(path.read_bytes()[1024:], "<u2")
            self.assertEqual(dataset["shards"][path.name]["tokens"], len(tokens))
            self.assertAlmostEqual(dataset["shards"][path.name]["bytes"], int((tokens < 256).sum()), delta=1)
        self.assertEqual(sum(shard["bytes"] for shard in dataset["shards"].values()),
                         sum(len(text.encode()) for text in self.TEXTS))

    def test_bytes(self):
        self.prepare("--tokenizer", "bytes", self.rows(self.TEXTS))
        self.assertEqual({key: value for key, value in self.dataset().items() if key != "shards"},
                         {"tokenizer": "bytes", "tokenizer_sha256": None, "vocab_size": 257, "separator": 256})
        self.assertEqual(self.end_ids("data.tokenizer=bytes"), [256])

    def test_checked_at_training(self):
        one = self.write("one.json", byte_vocabulary([], ["<|endoftext|>"]))
        two = self.write("two.json", byte_vocabulary([], ["<|endoftext|>", "<pad>"]))
        self.prepare("--tokenizer", one, self.rows(self.TEXTS))
        self.train(f"data.tokenizer={one}")
        for other in (two, "bytes"):
            said = self.train(f"data.tokenizer={other}", code=2)
            self.assertIn(f"{self.out}/dataset.json", said)
            self.assertIn("another tokenizer", said)
        self.assertIn("model.vocab_size", self.train(code=2, vocab=200))
        other = self.folder / "other"
        self.prepare("--tokenizer", one, "--separator", 7, self.rows(self.TEXTS), out=other)
        self.assertIn("documents end with id 7", self.train(f"data.val={other}/train_*.bin", code=2))
        for content in ("nonsense", "{}", '{"separator": "x", "vocab_size": 3}'):
            (self.out / "dataset.json").write_text(content)
            self.assertIn("dataset.json", self.train(code=2))
        (self.out / "dataset.json").unlink()  # llm.c's shards have none
        self.train(f"data.tokenizer={two}")


class Documents(Case):
    """A document is tokenized as a whole, however it is cut into pieces on the way."""

    def text(self, seed, words=400):
        rng = random.Random(seed)
        vocabulary = ["the", "quick", "brown", "fox", "Straße", "x1", "東京", "don't", "over", "dogs,", "lazy."]
        return "".join(rng.choice(vocabulary) + rng.choice([" "] * 8 + ["\n", "\n\n", "  ", ", "]) for _ in range(words))

    def same_as_whole(self, data, text):
        import tokenizers
        shutil.rmtree(self.out, ignore_errors=True)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        tokenizer.encode_special_tokens = True
        want = tokenizer.encode(text, add_special_tokens=False).ids
        with mock.patch.multiple(prepare_readers, PIECE=200, MARGIN=100, BATCH=900), mock.patch.object(prepare_text, "BATCH", 700):
            self.prepare("--tokenizer", self.write("tokenizer.json", data), "--separator", 0, "--workers", 1,
                         self.write("text.txt", text))
        self.assertEqual(self.tokens()[:-1], want)

    def test_no_cut_adds_a_space(self):
        for name in ("llama2", "gemma", "metaspace_first", "metaspace_always", "metaspace_never", "qwen2", "claude", "deepseek"):
            for seed in range(3):
                with self.subTest(name, seed=seed):
                    self.same_as_whole(KINDS[name], self.text(seed))

    SCRIPTS = {
        "words": "".join(random.Random(1).choices("abcdefgh", k=1200)), "one letter": "x" * 1200, "blanks": " " * 1200,
        "lines": "\n" * 1200, "mixed blanks": "".join(random.Random(2).choices(" \n\t\r", k=1200)),
        "capitals": "".join(random.Random(3).choices("AB CD 'S", k=1200)), "digits": "1234567890" * 120,
        "Chinese": "".join(random.Random(4).choices("東京大学日本語。，", k=500)),
        "marks": "e\u0301\u0323" * 300, "signs": "!?=+-/*" * 180, "code": "if (x==1) { y+=2; }\n\t" * 60,
        "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 80,
        "words and added tokens": "".join(random.Random(5).choices(["ab ", "Cd ", "quick fox", "<|im_end|>", "</s>", "7 "], k=300))}

    def test_cuts_in_any_script(self):
        """Where the text has no blank between words: in pieces its tokens are those of the whole, or it is held whole."""
        every = list(itertools.product((1024, 64), KINDS, self.SCRIPTS))
        if os.environ.get("FAULTS") != "all":
            every = random.Random(6).sample(every, 60)
        for context, name, script in every:
            with self.subTest(name, context=context, script=script), mock.patch.object(prepare_cuts, "CONTEXT", context):
                self.same_in_pieces(KINDS[name], self.SCRIPTS[script])

    def same_in_pieces(self, data, text):
        tokenizer = prepare_tokenizers.HuggingFace("tokenizer.json", json.dumps(data))
        check = None if tokenizer.whole_documents else prepare_cuts.CutCheck(tokenizer)
        with mock.patch.multiple(prepare_readers, PIECE=300, MARGIN=60, BATCH=900):
            pieces = [piece.decode() for piece, *_ in
                      prepare_readers.split_documents(io.BytesIO(text.encode()).read, None, check)]
        if tokenizer.whole_documents:
            pieces = ["".join(pieces)]
        found = tokenizer.encode(pieces, [i > 0 for i in range(len(pieces))])
        self.assertEqual(list(itertools.chain(*found)), list(tokenizer.encode([text])[0]))

    def test_text_without_a_place_to_cut(self):
        path = self.write("tokenizer.json", KINDS["qwen2"])
        text, cut = self.write("text.txt", "ab cd. " * 500), mock.patch.object(prepare_cuts.CutCheck, "__call__")
        with mock.patch.multiple(prepare_readers, PIECE=200, MARGIN=100, BATCH=900, MAX_UNCUT=2000), cut as is_cut:
            is_cut.return_value = False
            said = self.prepare("--tokenizer", path, "--separator", 0, text, fails=True)
        self.assertIn("without a place to cut", said)

    def test_added_tokens_in_a_later_piece(self):
        self.same_as_whole(KINDS["llama2"], self.text(1) + " the quick fox jumps quick fox " + self.text(2))

    def test_a_vocabulary_that_joins_words(self):
        data = json.loads(json.dumps(KINDS["llama2"]))
        vocab = data["model"]["vocab"]
        vocab |= {"k▁": len(vocab), "e▁": len(vocab) + 1}
        data["model"]["merges"] = [["k", "▁"], ["e", "▁"]] + data["model"]["merges"]
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < len(vocab) - 2]
        self.same_as_whole(data, self.text(3))

    def test_dropout_is_not_applied(self):
        data = json.loads(json.dumps(KINDS["qwen2"]))
        data["model"]["dropout"] = 0.5
        path = self.write("tokenizer.json", data)
        for out in ("a", "b"):
            self.prepare("--tokenizer", path, "--separator", 0, self.rows([self.text(4)]), out=self.folder / out)
        self.assertEqual(self.tokens(self.folder / "a"), self.tokens(self.folder / "b"))
        data["model"]["dropout"] = None
        self.prepare("--tokenizer", self.write("other.json", data), "--separator", 0, self.rows([self.text(4)]))
        self.assertEqual(self.tokens(), self.tokens(self.folder / "a"))


class Files(Case):
    """What --tokenizer and --pattern take."""
    TEXTS = ["It's 12345 o'clock; we'LL see.", "  two  spaces\n\nand lines", "naïve façade 日本語", "The HTTPServer x=1;"] * 3

    def ranks(self, first=0):
        rng = random.Random(1)
        tokens = [bytes([byte]) for byte in range(256)]
        rng.shuffle(tokens)
        for pair in ("th", "he", " t", "the", "in", "an", "er", "12", "  ", "HT", "TP", "日".encode()[:2], " the"):
            tokens.append(pair if isinstance(pair, bytes) else pair.encode())
        return tokens

    def rank_file(self):
        return self.write("small.tiktoken", "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                                                    for rank, token in enumerate(self.ranks())))

    def test_folder(self):
        self.write("hf/tokenizer.json", byte_vocabulary([], ["<|endoftext|>", "<|end|>"]))
        self.write("hf/tokenizer_config.json", {"eos_token": "<|end|>"})
        self.prepare("--tokenizer", self.folder / "hf", self.rows(self.TEXTS))
        self.assertEqual(self.dataset()["separator"], 257)
        (self.folder / "empty").mkdir()
        self.assertIn("without tokenizer.json", self.prepare("--tokenizer", self.folder / "empty", "--overwrite",
                                                              self.rows(self.TEXTS), fails=True))

    @unittest.skipUnless(importlib.util.find_spec("tiktoken"), "needs tiktoken")
    def test_tekken(self):
        import tiktoken
        ranks = {token: rank for rank, token in enumerate(self.ranks())}
        pattern = prepare_tokenizers.TEKKEN_PATTERN
        path = self.write("tekken.json", {
            "config": {"pattern": pattern, "num_vocab_tokens": len(ranks), "default_vocab_size": len(ranks) + 8,
                       "default_num_special_tokens": 10, "version": "v3"},
            "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
                      for token, rank in ranks.items()]})
        self.prepare("--tokenizer", path, self.rows(self.TEXTS))
        kept = {token: rank for token, rank in ranks.items() if rank < len(ranks) - 2}
        encoding = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=kept, special_tokens={})
        want = [id for text in self.TEXTS for id in [10 + id for id in encoding.encode_ordinary(text)] + [2]]
        self.assertEqual(self.tokens(), want)
        self.assertEqual(self.dataset()["separator"], 2)
        self.assertEqual(self.end_ids(f"data.tokenizer={self.out}/tokenizer.json"), [2])
        self.write("tekken.json", {"config": {}, "vocab": []})
        self.assertIn("not a tekken.json", self.prepare("--tokenizer", path, "--overwrite", self.rows(self.TEXTS), fails=True))

    def test_patterns(self):
        import tokenizers
        path = self.rank_file()
        for pattern in (*prepare_tokenizers.NAMED, r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"):
            with self.subTest(pattern):
                shutil.rmtree(self.out, ignore_errors=True)
                self.prepare("--tokenizer", path, "--pattern", pattern, "--workers", 1, self.rows(self.TEXTS))
                tokenizer = tokenizers.Tokenizer.from_file(str(self.out / "tokenizer.json"))
                tokenizer.encode_special_tokens = True
                end = self.dataset()["separator"]
                self.assertEqual(self.tokens(), [id for text in self.TEXTS for id in tokenizer.encode(text).ids + [end]])
        self.assertIn("did you mean qwen2?", self.prepare("--tokenizer", path, "--pattern", "qwen", "--overwrite",
                                                          self.rows(self.TEXTS), fails=True))
        self.assertIn("--pattern (a", self.prepare("--tokenizer", path, "--pattern", "(a", "--overwrite",
                                                   self.rows(self.TEXTS), fails=True))


class PublishedVocabularies(unittest.TestCase):
    """tests/reference/check_tokenizers.py needs packages that are not installed here, but its half in C is built."""

    @unittest.skipUnless(HAS_LIBRARY, "needs the tokenizers package")
    def test_the_script_for_them_still_works(self):
        sys.path.insert(0, str(ROOT / "tests" / "reference"))
        import check_tokenizers
        with tempfile.TemporaryDirectory() as folder:
            c = check_tokenizers.build_library(Path(folder), "-O0")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                same = check_tokenizers.compare(c, "bytes", byte_vocabulary(added=["<|endoftext|>"]), 20, 1, Path(folder))
            self.assertTrue(same, out.getvalue())


if __name__ == "__main__":
    unittest.main()
