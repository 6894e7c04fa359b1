#!/usr/bin/env python3
"""data/prepare.py, data/corpus.py and scripts/plot_loss.py, as a user runs them.

    python -m unittest tests.cli.test_prepare

Shards are read back here with struct, independently of the writer. What needs a library or a package that is
missing is skipped.
"""

import base64
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent


sys.path[:0] = [str(ROOT / "data"), str(ROOT / "scripts")]  # by name, since worker processes import them too

import corpus  # noqa: E402
import plot_loss  # noqa: E402
import prepare  # noqa: E402
import prepare_readers  # noqa: E402
import prepare_text  # noqa: E402
import prepare_tokenizers  # noqa: E402
import prepare_workers  # noqa: E402


def has(*modules):
    return all(importlib.util.find_spec(name) for name in modules)


def call(module, *arguments):
    """(exit code, stdout, stderr) of a script, run in this process for speed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch.object(sys, "argv", [module.__name__, *map(str, arguments)]):
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def read_shard(path):
    """(magic, version, tokens), the size and the header's zeros checked."""
    raw = path.read_bytes()
    magic, version, count, *zeros = struct.unpack("<256i", raw[:1024])
    assert not any(zeros), path
    code, width = ("H", 2) if magic == 20240520 else ("I", 4)
    assert len(raw) == 1024 + width * count, path
    return magic, version, list(struct.unpack(f"<{count}{code}", raw[1024:]))


def read_split(folder, split):
    return [token for path in sorted(folder.glob(f"{split}_*.bin")) for token in read_shard(path)[2]]


def documents(tokens, separator):
    """The documents of a token stream, each of which must be ended."""
    found, current = [], []
    for token in tokens:
        if token == separator:
            found.append(current)
            current = []
        else:
            current.append(token)
    assert not current, "the last document is not ended"
    return found


def expected_split(index, seed=1, fraction=0.05):
    digest = hashlib.blake2b(b"%d:%d" % (seed, index), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < fraction * 2**64 else "train"


SAMPLES = ["In the beginning God created the heaven and the earth.", "It's 12345 o'clock; we'LL see.",
           "  two  spaces\n\n\nand lines\r\n\t tab ", "naïve façade — “quoted” 日本語 🙂👍🏽 ½ ", "a", "x=1;\n\n  y=2",
           "<|endoftext|> is text here <|end_of_text|>", "'s't'RE'Ve ſ 'ſ  ", "................ !!!??\n\n", " \n ", "0 00 000 0000"]


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.out = self.folder / "out"

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def jsonl(self, texts, field="text", name="rows.jsonl"):
        return self.file(name, "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))

    def run_ok(self, *arguments):
        code, out, err = call(prepare, *arguments)
        self.assertEqual(code, 0, err)
        return out

    def same(self, found, want):
        """assertEqual for long sequences, whose full difference takes minutes to print."""
        if found != want:
            first = next((i for i, pair in enumerate(zip(found, want)) if pair[0] != pair[1]), min(len(found), len(want)))
            self.fail(f"lengths {len(found)} and {len(want)}; at {first}: {found[first:first + 3]!r:.200} is not "
                      f"{want[first:first + 3]!r:.200}")

    def refused(self, *arguments, says=(), module=prepare):
        """Exit code 2 and one line that says each of `says`; nothing left behind."""
        code, _, err = call(module, *arguments)
        self.assertEqual(code, 2, err)
        self.assertEqual(err.strip().count("\n"), 0, err)
        for text in says:
            self.assertIn(text, err)
        self.assertEqual(list(self.folder.glob("**/*.tmp")), [])


class Shards(Case):
    def test_bytes_exact(self):
        texts = [f"document {i}: " + "é\n" * (i % 7) for i in range(300)]
        printed = self.run_ok("--tokenizer", "bytes", "--out", self.out, self.jsonl(texts))
        for split in ("train", "val"):
            magic, version, tokens = read_shard(self.out / f"{split}_000000.bin")
            self.assertEqual((magic, version), (20240520, 1))
            want = [list(text.encode()) for i, text in enumerate(texts) if expected_split(i) == split]
            self.same(documents(tokens, 256), want)
        self.assertEqual(sorted(path.name for path in self.out.iterdir()), ["dataset.json", "train_000000.bin", "val_000000.bin"])
        for line in ("vocab_size = 257", f"train = {self.out}/train_*.bin", f"val = {self.out}/val_*.bin", "tokenizer = bytes"):
            self.assertIn(line, printed.splitlines())

    def test_seed_and_fraction(self):
        rows = self.jsonl([f"{i}" for i in range(1000)])
        kept = {}
        for seed, fraction in ((1, 0.2), (2, 0.2), (1, 0.0)):
            out = self.folder / f"{seed}-{fraction}"
            self.run_ok("--tokenizer", "bytes", "--seed", seed, "--val-fraction", fraction, "--out", out, rows)
            kept[seed, fraction] = read_split(out, "val")
        self.assertNotEqual(kept[1, 0.2], kept[2, 0.2])
        self.assertTrue(150 < len(documents(kept[1, 0.2], 256)) < 250)
        self.assertFalse(list((self.folder / "1-0.0").glob("val_*")))

    def test_few_documents_fill_both_sides(self):
        for texts, fraction in ((["one", "two", "three"], 0.01), (["one", "two", "three"], 0.99)):
            self.run_ok("--tokenizer", "bytes", "--val-fraction", fraction, "--overwrite", "--out", self.out, self.jsonl(texts))
            sides = [documents(read_split(self.out, split), 256) for split in ("train", "val")]
            self.assertTrue(all(sides))
            self.assertEqual(sorted(sides[0] + sides[1]), sorted(list(text.encode()) for text in texts))

    def test_shard_tokens(self):
        text = self.file("a.txt", bytes(range(97, 123)) * 10)  # 260 tokens and the separator
        self.run_ok("--tokenizer", "bytes", "--val-fraction", 0, "--shard-tokens", 100, "--out", self.out, text)
        shards = [read_shard(path)[2] for path in sorted(self.out.glob("*.bin"))]
        self.assertEqual([len(shard) for shard in shards], [100, 100, 61])
        self.assertEqual(sum(shards, []), list(text.read_bytes()) + [256])
        # a last shard of 1 token joins the one before, and the overwritten run's third file is gone
        self.run_ok("--tokenizer", "bytes", "--val-fraction", 0, "--shard-tokens", 130, "--overwrite", "--out", self.out, text)
        shards = [read_shard(path)[2] for path in sorted(self.out.glob("*.bin"))]
        self.assertEqual([len(shard) for shard in shards], [130, 131])
        self.assertEqual(sum(shards, []), list(text.read_bytes()) + [256])

    def test_width_follows_vocabulary(self):
        rows = self.jsonl(["abc"])
        for separator, magic, version, vocab in ((65535, 20240520, 1, 65536), (65536, 20240801, 7, 65537)):
            printed = self.run_ok("--tokenizer", "bytes", "--separator", separator, "--val-fraction", 0, "--overwrite",
                                  "--out", self.out, rows)
            self.assertEqual(read_shard(self.out / "train_000000.bin"), (magic, version, [97, 98, 99, separator]))
            self.assertIn(f"vocab_size = {vocab}", printed)

    def test_command_line(self):
        """The script itself, its help, and no one-letter option."""
        run = lambda *arguments: subprocess.run([sys.executable, ROOT / "data" / "prepare.py", *map(str, arguments)],
                                                capture_output=True, text=True)
        self.assertEqual(run("--tokenizer", "bytes", "--val-fraction", 0, "--out", self.out, self.jsonl(["a"])).returncode, 0)
        self.assertIn("examples:", run("--help").stdout)
        self.assertEqual(run("-h").returncode, 2)


class Texts(Case):
    def test_single_text_is_cut_at_a_paragraph(self):
        paragraphs = [f"Paragraph {i} " + "word " * (i % 13) for i in range(400)]
        text = "\n\n".join(paragraphs)
        printed = self.run_ok("--tokenizer", "bytes", "--out", self.out, self.file("a.txt", text))
        (train,), (val,) = (documents(read_split(self.out, split), 256) for split in ("train", "val"))
        self.same(bytes(train) + bytes(val), text.encode())
        self.assertTrue(val[:10] == list(b"Paragraph ") and train[-2:] == [10, 10])
        self.assertAlmostEqual(len(val) / len(text), 0.05, delta=0.01)
        self.assertIn(f"cut after a paragraph at byte {len(train):,}", printed)

    def test_single_text_without_paragraphs(self):
        for text in ("a b", "ééééé", "one\ntwo\nthree", "T\n\n" + "x" * 300):
            self.run_ok("--tokenizer", "bytes", "--overwrite", "--out", self.out, self.file("a.txt", text))
            parts = [bytes(documents(read_split(self.out, split), 256)[0]) for split in ("train", "val")]
            self.assertEqual("".join(part.decode() for part in parts), text)  # no character cut through

    def test_document_separator(self):
        text = "\ufeffone\nstill\n\n\ntwo\n \nthree\r\n\r\nfour\n"
        for separator, want in (("blank-lines", ["one\nstill", "two", "three", "four\n"]),
                                ("lines", ["one", "still", "two", "three", "four"]),
                                ("regex:(?=^t)", ["one\nstill\n\n\n", "two\n \n", "three\r\n\r\nfour\n"])):
            self.run_ok("--tokenizer", "bytes", "--document-separator", separator, "--val-fraction", 0, "--overwrite",
                        "--out", self.out, self.file("a.txt", text))
            found = [bytes(document).decode() for document in documents(read_split(self.out, "train"), 256)]
            self.assertEqual(found, want)

    def test_streaming_splits_as_the_whole_does(self):
        """With a window of a few bytes, every place a separator can lie in the buffer comes up."""
        rng = random.Random(1)
        for separator in (r"\n(?:[ \t]*\n)+", r"\n", r"(?=^#)", "##", "b|^#"):
            regex = re.compile(separator.encode(), re.MULTILINE)
            for _ in range(60):
                text = bytes(rng.choices(b"ab \n#\xc3\xa9", (4, 4, 2, 4, 2, 0, 0))[0] for _ in range(rng.randrange(1, 400)))
                with mock.patch.multiple(prepare_readers, PIECE=40, MARGIN=24, BATCH=rng.randrange(1, 50)):
                    stream = io.BytesIO(text)
                    found, current = [], b""
                    for piece, ends, _ in prepare_readers.split_documents(lambda size: stream.read(prepare_readers.BATCH), regex):
                        current += piece
                        if ends:
                            found.append(current)
                            current = b""
                self.same(found, regex.split(text))

    def test_long_document_is_tokenized_in_pieces(self):
        text = ("Ünder the sün, ich weiß.\n" * 3000).encode()
        with mock.patch.multiple(prepare_readers, PIECE=1000, MARGIN=100, BATCH=3000):
            self.run_ok("--tokenizer", "bytes", "--val-fraction", 0, "--out", self.out, self.file("a.txt", text))
        self.same(read_split(self.out, "train"), list(text) + [256])

    def test_pieces_never_cut_characters(self):
        text = ("日本語のテキスト" * 500).encode()
        with mock.patch.multiple(prepare_readers, PIECE=1000, MARGIN=100, BATCH=3001):
            stream = io.BytesIO(text)
            pieces = [piece for piece, *_ in prepare_readers.split_documents(stream.read, None)]
        self.assertGreater(len(pieces), 5)
        self.assertEqual("".join(piece.decode() for piece in pieces), text.decode())


@unittest.skipUnless(has("pyarrow"), "needs pyarrow")
class Parquet(Case):
    def test_same_as_jsonl(self):
        import pyarrow
        import pyarrow.parquet
        texts = [f"row {i} é" for i in range(700)] + [None, ""]
        table = pyarrow.table({"id": list(range(len(texts))), "body": texts})
        pyarrow.parquet.write_table(table, self.folder / "rows.parquet", row_group_size=100)
        rows = self.jsonl([text or "" for text in texts], field="body")
        for name, path in (("p", self.folder / "rows.parquet"), ("j", rows)):
            printed = self.run_ok("--tokenizer", "bytes", "--field", "body", "--out", self.folder / name, path)
            self.assertIn("2 blank ones left out", printed)
        for split in ("train", "val"):
            self.same(read_split(self.folder / "p", split), read_split(self.folder / "j", split))
        self.assertEqual(len(documents(read_split(self.folder / "p", "train") + read_split(self.folder / "p", "val"), 256)), 700)
        self.refused("--tokenizer", "bytes", "--out", self.out, self.folder / "rows.parquet", says=['"text"', "id, body"])
        self.refused("--tokenizer", "bytes", "--field", "id", "--out", self.out, self.folder / "rows.parquet", says=["int64"])
        self.refused("--tokenizer", "bytes", "--out", self.out, self.file("x.parquet", "nonsense"), says=["not a parquet"])


def tiny_tokenizer(folder):
    """A byte-level BPE of 400 tokens with an end-of-text token; it truncates, which must not matter."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SAMPLES * 20, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tiny.json"))
    tokenizer.no_truncation()
    return folder / "tiny.json", tokenizer


@unittest.skipUnless(has("tokenizers"), "needs tokenizers")
class HuggingFace(Case):
    def test_encodes_as_the_library(self):
        path, tokenizer = tiny_tokenizer(self.folder)
        texts = SAMPLES * 30
        printed = self.run_ok("--tokenizer", path, "--workers", 1, "--out", self.out, self.jsonl(texts))
        end = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.encode_special_tokens = True  # a document cannot forge its end
        ids = [tokenizer.encode(text).ids for text in texts if text.strip()]
        for split in ("train", "val"):
            want = [row for i, row in enumerate(ids) if expected_split(i) == split]
            self.same(documents(read_split(self.out, split), end), want)
        self.assertEqual((self.out / "tokenizer.json").read_bytes(), path.read_bytes())
        self.assertIn(f"tokenizer = {self.out}/tokenizer.json", printed)
        self.assertIn("vocab_size = 400", printed)

    def test_workers_change_nothing(self):
        path, _ = tiny_tokenizer(self.folder)
        rows = self.jsonl([text * 3000 for text in SAMPLES] * 2)
        for workers in (1, 2):
            subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--tokenizer", path, "--workers", str(workers),
                            "--out", self.folder / f"{workers}", rows], check=True, capture_output=True)
        for name in ("train_000000.bin", "val_000000.bin", "tokenizer.json"):
            self.same((self.folder / "1" / name).read_bytes(), (self.folder / "2" / name).read_bytes())

    def test_many_batches_keep_their_order(self):
        rows = self.jsonl([f"{i} " * 100_000 for i in range(10, 50)])
        for workers in (1, 3):
            subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--tokenizer", "bytes", "--workers", str(workers),
                            "--out", self.folder / f"{workers}", rows], check=True, capture_output=True)
        for name in ("train_000000.bin", "val_000000.bin"):
            self.same((self.folder / "1" / name).read_bytes(), (self.folder / "3" / name).read_bytes())

    def test_a_worker_that_dies_or_fails(self):
        encoder = prepare_text.TextEncoder(prepare_tokenizers.Bytes(), 256, "not a type")
        with self.assertRaises(TypeError):
            list(prepare_workers.ordered_map([[("train", b"a", True)]] * 5, 2, encoder))
        # a process that cannot even start its work: its tokenizer does not unpickle
        encoder = prepare_text.TextEncoder(Poison(), 256, "uint16")
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaisesRegex(OSError, "process died"):
            list(prepare_workers.ordered_map([[("train", b"a", True)]] * 5, 2, encoder))

    def test_interrupt(self):
        """Ctrl-C in mid-work: exit code 130, no shard, no temporary file, and it does end."""
        rows = self.jsonl(["word " * 1_000_000] * 30)
        for workers in ("1", "2"):
            run = subprocess.Popen([sys.executable, ROOT / "data" / "prepare.py", "--tokenizer", "bytes", "--workers", workers,
                                    "--out", self.out, rows], stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # "&" ignores it
            while run.poll() is None and not list(self.out.glob("*.tmp")):
                time.sleep(0.005)
            run.send_signal(signal.SIGINT)
            _, err = run.communicate(timeout=10)
            self.assertEqual((run.returncode, err.splitlines()[-1]), (130, "prepare.py: stopped; nothing was written"))
            self.assertEqual(list(self.out.glob("*")), [])

    def test_no_end_of_text(self):
        import tokenizers
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 70000}, unk_token="?"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        path = self.folder / "words.json"
        tokenizer.save(str(path))
        rows = self.jsonl(["a b c"])
        self.refused("--tokenizer", path, "--val-fraction", 0, "--out", self.out, rows, says=["end-of-text", "--separator ID"])
        self.run_ok("--tokenizer", path, "--separator", 1, "--val-fraction", 0, "--out", self.out, rows)
        self.assertEqual(read_shard(self.out / "train_000000.bin"), (20240801, 7, [0, 1, 70000, 1]))


class Poison:
    def __reduce__(self):
        return sys.exit, (1,)


def random_ranks(seed, trained):
    """Ranks that a BPE trainer makes, or a harder kind: random substrings in random order, of which some
    cannot be built from pairs and others only by merges of higher rank than their own."""
    rng = random.Random(seed)
    ranks = {bytes([byte]): byte for byte in range(256)}
    if trained:
        words = [re.findall(rb" ?\w+|\s+|[^\w\s]+", text.encode()) for text in SAMPLES]
        words = [[word[i:i + 1] for i in range(len(word))] for row in words for word in row]
        while len(ranks) < 400:
            pairs = [pair for word in words for pair in zip(word, word[1:])]
            best = max(sorted(set(pairs)), key=pairs.count, default=None)
            if best is None:
                break
            ranks.setdefault(b"".join(best), len(ranks))
            for word in words:
                for i in range(len(word) - 1, 0, -1):
                    if tuple(word[i - 1:i + 1]) == best:
                        word[i - 1:i + 1] = [b"".join(best)]
        return ranks
    text = "abab ab aab bba abba  cab\n\n12 121 ''ll 's é日".encode()
    tokens = {text[i:i + rng.randrange(2, 7)] for i in (rng.randrange(len(text)) for _ in range(150))}
    tokens = sorted(token for token in tokens if len(token) > 1)
    rng.shuffle(tokens)
    return ranks | {token: 256 + i for i, token in enumerate(tokens)}


@unittest.skipUnless(has("tiktoken", "tokenizers"), "needs tiktoken and tokenizers")
class Tiktoken(Case):
    def rank_file(self, ranks):
        lines = sorted((rank, base64.b64encode(token).decode()) for token, rank in ranks.items())
        return self.file("small.tiktoken", "".join(f"{token} {rank}\n" for rank, token in lines))

    def texts(self, rng):
        alphabet = "aaabbbc  \n\r'sltv12é日.ſ🙂\t"
        return SAMPLES + ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(400)]

    def test_conversion_encodes_identically(self):
        import tiktoken
        import tokenizers
        reachable = []
        for pattern, (regex, places) in prepare_tokenizers.PATTERNS.items():
            for seed, trained in ((1, True), (2, False), (3, False), (4, False)):
                ranks = random_ranks(seed, trained)
                specials = {name: len(ranks) + place for name, place in places.items()}
                encoding = tiktoken.Encoding("test", pat_str=regex, mergeable_ranks=ranks, special_tokens=specials)
                converted = prepare_tokenizers.tokenizer_json(ranks, specials, pattern)
                tokenizer = tokenizers.Tokenizer.from_str(json.dumps(converted))
                reachable.append(not converted["model"]["ignore_merges"])
                for text in self.texts(random.Random(seed)):
                    want = encoding.encode(text, allowed_special="all")
                    self.assertEqual(tokenizer.encode(text).ids, want, (pattern, seed, text))
                    self.assertEqual(tokenizer.decode(want, skip_special_tokens=False), text)
                for name, id in specials.items():
                    self.assertEqual(tokenizer.token_to_id(name), id)
                self.assertEqual(tokenizer.get_vocab_size(), encoding.n_vocab)
        self.assertIn(True, reachable)
        self.assertIn(False, reachable)

    def test_rank_file(self):
        import tiktoken
        ranks = random_ranks(1, True)
        texts = SAMPLES * 10
        self.run_ok("--tokenizer", self.rank_file(ranks), "--pattern", "llama3", "--out", self.out, self.jsonl(texts))
        encoding = tiktoken.Encoding("test", pat_str=prepare_tokenizers.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        want = {"train": [], "val": []}
        for i, text in enumerate(text for text in texts if text.strip()):
            want[expected_split(i)].append(encoding.encode_ordinary(text))
        for split in want:
            self.same(documents(read_split(self.out, split), len(ranks) + 1), want[split])
        self.assertEqual(json.loads((self.out / "tokenizer.json").read_text())["added_tokens"][1]["content"], "<|end_of_text|>")

    def test_known_special_ids(self):
        """The published ids, from the published numbers of ranks."""
        for pattern, count, name, id in (("gpt2", 50256, "<|endoftext|>", 50256), ("cl100k", 100256, "<|endoftext|>", 100257),
                                         ("cl100k", 100256, "<|endofprompt|>", 100276), ("llama3", 128000, "<|end_of_text|>", 128001),
                                         ("llama3", 128000, "<|eot_id|>", 128009),
                                         ("llama3", 128000, "<|reserved_special_token_250|>", 128255)):
            self.assertEqual(count + prepare_tokenizers.PATTERNS[pattern][1][name], id)
            self.assertEqual(prepare_tokenizers.KNOWN_SIZES[count], pattern)

    def test_patterns_are_tiktokens(self):
        """tiktoken spells its patterns for speed; ours must cut the same."""
        import tiktoken
        import tiktoken_ext.openai_public as public
        rng = random.Random(5)
        ranks = random_ranks(1, True)
        theirs = {"gpt2": public.r50k_pat_str}
        with mock.patch.object(public, "load_tiktoken_bpe", return_value=ranks):
            theirs["cl100k"] = public.cl100k_base()["pat_str"]
        for pattern, regex in theirs.items():
            one, two = (tiktoken.Encoding("test", pat_str=each, mergeable_ranks=ranks, special_tokens={})
                        for each in (regex, prepare_tokenizers.PATTERNS[pattern][0]))
            for text in self.texts(rng):
                self.assertEqual(one.encode_ordinary(text), two.encode_ordinary(text), text)

    def test_refusals(self):
        rows = self.jsonl(["a"])
        path = self.rank_file(random_ranks(1, True))
        self.refused("--tokenizer", path, "--out", self.out, rows, says=["--pattern gpt2|cl100k|llama3"])
        self.refused("--tokenizer", self.file("x.model", b"\x0a\x0e\x0a\x05<unk>"), "--out", self.out, rows, says=["x.model"])
        self.refused("--tokenizer", self.file("y.tiktoken", "YQ== 0\nYg== 2\n"), "--out", self.out, rows, says=["256 bytes"])

    def test_gpt2_offline(self):
        nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
                   "TIKTOKEN_CACHE_DIR": str(self.folder / "cache")}
        run = subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--tokenizer", "gpt2", "--out", self.out,
                              self.jsonl(["a"])], capture_output=True, text=True, env=os.environ | nowhere)
        self.assertEqual(run.returncode, 2, run.stderr)
        self.assertEqual(run.stderr.strip().count("\n"), 0, run.stderr)
        self.assertIn("r50k_base.tiktoken --pattern gpt2", run.stderr)


class Refusals(Case):
    def test_inputs(self):
        base = ("--tokenizer", "bytes", "--out", self.out)
        self.refused(*base, self.folder / "none.txt", says=["none.txt", "no such file"])
        self.refused(*base, self.folder, says=["is a folder"])
        self.refused(*base, self.file("e.txt", ""), says=["e.txt", "empty"])
        self.refused(*base, self.file("w.txt", " \n\n "), says=["no text"])
        self.refused(*base, self.file("b.jsonl", '{"text": "a"}\n\n{"text": \n'), says=["b.jsonl:3", "not JSON"])
        self.refused(*base, self.file("l.jsonl", '{"text": "a"}\n[1]\n'), says=["l.jsonl:2", "not a JSON object"])
        self.refused(*base, self.file("n.jsonl", '{"text": 3}\n'), says=["n.jsonl:1", "not a string"])
        self.refused(*base, self.file("m.jsonl", '{"id": 1, "body": "a"}\n'), says=["m.jsonl:1", '"text"', "id, body"])
        self.refused(*base, self.jsonl(["only"]), says=["only one document", "--val-fraction 0"])
        self.assertEqual(list(self.out.glob("*")) if self.out.exists() else [], [])

    def test_options(self):
        rows = self.jsonl(["a", "b"])
        self.refused("--tokenizer", "gtp2", "--out", self.out, rows, says=["gtp2", "did you mean gpt2?"])
        self.refused("--tokenizer", "llama3", "--out", self.out, rows, says=["tokenizer.model --pattern llama3"])
        self.refused("--tokenizer", "bytes", "--pattern", "gpt2", "--out", self.out, rows, says=["--pattern"])
        self.refused("--tokenizer", "bytes", rows, says=["--out"])
        base = ("--tokenizer", "bytes", "--out", self.out, rows)
        self.refused(*base, "--val-fraction", 1, says=["--val-fraction"])
        self.refused(*base, "--shard-tokens", 0, says=["--shard-tokens"])
        self.refused(*base, "--shard-tokens", "many", says=["--shard-tokens", "many"])
        self.refused(*base, "--workers", 0, says=["--workers"])
        self.refused(*base, "--document-separator", "lines", says=["is for text files"])
        self.refused(*base, "--colour", "red", says=["--colour"])
        self.refused("--tokenizer", "bytes", "--out", self.out, "--document-separator", "regex:(", self.file("a.txt", "a"), says=["("])

    def test_shards_are_not_mixed(self):
        base = ("--tokenizer", "bytes", "--out", self.out)
        self.run_ok(*base, self.jsonl(["a", "b"]))
        self.refused(*base, self.jsonl(["c", "d"]), says=["already holds shards", "--overwrite"])
        before = {path.name: path.read_bytes() for path in self.out.iterdir()}
        self.refused(*base, "--overwrite", self.file("bad.jsonl", '{"text": "a"}\nbad\n'), says=["bad.jsonl:2"])
        self.assertEqual(before, {path.name: path.read_bytes() for path in self.out.iterdir()})

    @unittest.skipUnless(has("tokenizers"), "needs tokenizers")
    def test_not_utf8(self):
        path, _ = tiny_tokenizer(self.folder)
        self.refused("--tokenizer", path, "--out", self.out, self.file("latin.txt", b"fa\xe7ade\n\nx"), says=["latin.txt", "0xe7"])
        self.refused("--tokenizer", self.file("z.json", "{}"), "--out", self.out, self.jsonl(["a"]), says=["not a tokenizer.json"])

    def test_lone_surrogate(self):
        self.run_ok("--tokenizer", "bytes", "--val-fraction", 0, "--out", self.out, self.file("s.jsonl", '{"text": "a\\ud800b"}\n'))
        self.same(read_split(self.out, "train"), [97, ord("?"), 98, 256])


class Corpus(Case):
    @unittest.skipUnless(shutil.which("bible"), "needs bible-kjv")
    def test_bible(self):
        path = self.folder / "bible.txt"
        self.assertEqual(call(corpus, "bible", "--out", path)[0], 0)
        text = path.read_text(encoding="ascii")
        self.assertEqual(text.count("\n\n"), 1188)
        self.assertTrue(text.startswith("In the beginning God created") and text.endswith("be with you all. Amen.\n"))
        self.assertIsNone(re.search(r"[^\n -~]|\d|  |\n\n\n", text))

    def test_gcide_entries(self):
        source = ("00-database-info\n   notices\n" 'Lamina \\Lam"i*na\\ (l[a^]m"[i^]*n[.a]), n.; pl. L. {Lamin[ae]}\n'
                  "   (-n[=e]). [L. cf. {Lamella}.]\n   1. A thin\n      plate. [1913 Webster]\n   [1913 Webster] Laminar\n\n"
                  "   2. The stock market\x92s.   --Gray.\n      [1913 Webster]\n\nlock-gate \\lock-gate\\ n.\n   a gate.\n"
                  "   [WordNet 1.5 +PJC]\n")
        with gzip.open(self.folder / "g.dz", "wb") as file:
            file.write(source.encode("latin-1"))
        with mock.patch.object(corpus, "GCIDE", self.folder / "g.dz"):
            self.assertEqual(list(corpus.gcide()), [
                "Lamina, n.; pl. L. Laminae. [L. cf. Lamella.] 1. A thin plate.\n2. The stock market's. --Gray.",
                "lock-gate: n. a gate."])

    def test_missing_package(self):
        with mock.patch.object(corpus, "GCIDE", self.folder / "none"):
            self.refused("gcide", "--out", self.folder / "g.txt", says=["apt-get install dict-gcide"], module=corpus)
        with mock.patch.dict(os.environ, PATH=""):
            self.refused("bible", "--out", self.folder / "b.txt", says=["apt-get install bible-kjv"], module=corpus)
        self.refused("koran", says=["koran", "bible"], module=corpus)


@unittest.skipUnless(has("matplotlib"), "needs matplotlib")
class Plot(Case):
    def metrics(self, name, lines):
        (self.folder / name).mkdir()
        (self.folder / name / "metrics.jsonl").write_text("\n".join(lines))
        return self.folder / name

    def killed_run(self, name="killed"):
        lines = []
        for step in range(1, 60):
            loss = "NaN" if step == 30 else 2 + 3 / step
            lines.append(f'{{"step": {step}, "loss": {loss}, "tokens": {step * 64}, "tokens_per_second": 32, "skipped": 0}}')
            if step % 20 == 0:
                lines.append(f'{{"step": {step}, "val_loss": {2.5}}}')
        return self.metrics(name, lines + ['{"step": 60, "lo'])

    def test_killed_run(self):
        run = self.killed_run()
        for axis in ("tokens", "step", "time"):
            code, out, err = call(plot_loss, run, "--x", axis, "--bytes", "4.2")
            self.assertEqual((code, err), (0, ""))
            self.assertEqual((run / "curve.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_points(self):
        path = self.killed_run()
        run = plot_loss.Run(path, "tokens")
        self.assertEqual(len(run.steps), 59)
        self.assertTrue(math.isnan(run.loss[29]))
        self.assertEqual(list(run.val_x), [20 * 64, 40 * 64])
        self.assertEqual(list(plot_loss.Run(path, "time").x[:3]), [2, 4, 6])
        curve = plot_loss.smooth(run.loss, 10)
        self.assertEqual(curve[0], 5)
        self.assertTrue(all(2 < value < 5.01 for i, value in enumerate(curve) if i != 29))

    def test_overlay_and_odd_runs(self):
        runs = [self.killed_run("a"), self.killed_run("b"), self.metrics("one", ['{"step": 1, "loss": 5.0, "tokens": 8}']),
                self.metrics("val", ['{"step": 5, "val_loss": 3.0}']), self.metrics("none", [""])]
        code, _, err = call(plot_loss, *runs, "--x", "step", "--out", self.folder / "all.svg")
        self.assertEqual(code, 0, err)
        self.assertIn("contains no loss", err)
        picture = (self.folder / "all.svg").read_text()
        for text in ("a   val 2.5000", ">one<", "val 3.0000", "loss (nats per token)"):
            self.assertIn(text, picture)
        self.assertEqual(call(plot_loss, runs[2])[0], 0)

    def test_refusals(self):
        run = self.killed_run()
        self.refused(self.folder / "nowhere", says=["nowhere", "No such file"], module=plot_loss)
        self.refused(run, run, says=["--out"], module=plot_loss)
        self.refused(run, "--out", self.folder / "a.foo", says=["a.foo"], module=plot_loss)
        self.refused(run, "--bytes", "-1", says=["--bytes"], module=plot_loss)
        self.refused(self.metrics("bare", ['{"step": 1, "loss": 5.0}']), says=["--x step"], module=plot_loss)


if __name__ == "__main__":
    unittest.main()
