#!/usr/bin/env python3
"""data/prepare.py and inputs as they really come: compressed, piped, damaged, oddly named, into folders that are full,
shared or hard to name.

    make && python -m unittest tests.cli.test_prepare_inputs
"""

import bz2
import contextlib
import fcntl
import gzip
import importlib.util
import io
import json
import lzma
import os
import random
import re
import resource
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
SCRIPT = ROOT / "data" / "prepare.py"
BINARY = str(Path(os.environ.get("TRAIN_IHA", ROOT / "train_iha")).resolve())
sys.path[:0] = [str(ROOT / "data"), str(ROOT)]

import prepare  # noqa: E402
import prepare_readers  # noqa: E402
from tests.lib.tiny import tiny_config  # noqa: E402

TEXTS = [f"document {i}: é {'word ' * (i % 50)}" for i in range(400)]


def has(module):
    return importlib.util.find_spec(module) is not None


def zstd(data):
    import zstandard
    return zstandard.ZstdCompressor().compress(data)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
            "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)}
if has("zstandard"):
    COMPRESS["zst"] = zstd


def split_at(tokens, separator):
    found, current = [], []
    for token in tokens:
        if token == separator:
            found.append(bytes(current))
            current = []
        else:
            current.append(token)
    assert not current
    return found


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.out = self.folder / "out"

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run_script(self, *arguments, tokenizer="bytes", out=None, cwd=None, **options):
        """With options of subprocess.run as a program; without any in this process, which is faster."""
        arguments = ["--tokenizer", str(tokenizer), f"--out={out or self.out}", *map(str, arguments)]
        if options or "--workers" in arguments:
            return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=cwd, **({"capture_output": True} | options))
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape") for _ in range(2))
        with contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                mock.patch.object(sys, "argv", ["prepare.py", *arguments]):
            try:
                code = prepare.main()
            except SystemExit as end:
                code = end.code
            out.flush()
            err.flush()
        return subprocess.CompletedProcess(arguments, code, out.buffer.getvalue(), err.buffer.getvalue())

    def run_ok(self, *arguments, **options):
        run = self.run_script(*arguments, **options)
        self.assertEqual(run.returncode, 0, run.stderr)
        return run

    def refused(self, *arguments, says=(), code=2, **options):
        run = self.run_script(*arguments, **options)
        self.assertEqual(run.returncode, code, run.stderr)
        progress = rb"^ *[\d.,]+(% [\d.,]+ of [\d.,]+)? MB  .*\n"  # of a run that takes long
        self.assertEqual(re.sub(progress, b"", run.stderr, flags=re.M).strip().count(b"\n"), 0, run.stderr)
        for text in says:
            self.assertIn(text.encode(), run.stderr)
        self.assertFalse(self.out.exists() and list(self.out.iterdir()))
        return run

    def tokens(self, split="train", out=None):
        tokens = []
        for path in sorted((out or self.out).glob(f"{split}_*.bin")):
            raw = path.read_bytes()
            tokens += struct.unpack(f"<{(len(raw) - 1024) // 2}H", raw[1024:])
        return tokens

    def all_documents(self, *arguments, **options):
        """The documents of a run without a split, in order."""
        self.run_ok("--val-fraction", 0, "--overwrite", *arguments, **options)
        return [text.decode() for text in split_at(self.tokens(), 256)]


JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Compressed(Case):
    def test_every_kind(self):
        self.assertIn("zst", COMPRESS)
        for suffix, compress in COMPRESS.items():
            self.assertEqual(self.all_documents(self.file(f"a.jsonl.{suffix}", compress(JSONL))), TEXTS, suffix)
            text = "\n\n".join(TEXTS).encode()
            found = self.all_documents("--document-separator", "blank-lines", self.file(f"a.txt.{suffix}", compress(text)))
            self.assertEqual(found, TEXTS, suffix)

    def test_content_decides_and_not_the_name(self):
        for name, content in (("a.jsonl", gzip.compress(JSONL)), ("a", gzip.compress(JSONL)), ("a.gz", JSONL),
                              ("a.jsonl.zst", gzip.compress(JSONL)), ("a.gz.bz2", bz2.compress(gzip.compress(JSONL)))):
            self.assertEqual(self.all_documents(self.file(name, content)), TEXTS, name)

    def test_streams_one_after_another(self):
        half = JSONL.index(b"\n", len(JSONL) // 2) + 1
        for suffix, compress in COMPRESS.items():
            if suffix != "lzma":
                parts = compress(JSONL[:half]) + compress(JSONL[half:])
                self.assertEqual(self.all_documents(self.file(f"a.jsonl.{suffix}", parts)), TEXTS, suffix)
        self.assertEqual(self.all_documents(self.file("p.jsonl.gz", gzip.compress(JSONL) + bytes(1000))), TEXTS)

    def test_damaged(self):
        noise = random.Random(1).randbytes(200_000).hex().encode()
        for suffix, compress in COMPRESS.items():
            whole = compress(noise)
            for kind, content in (("truncated", whole[:len(whole) // 2]), ("trailing", whole + b"garbage behind it"),
                                  ("flipped", whole[:60_000] + bytes(byte ^ 0x55 for byte in whole[60_000:60_100])
                                   + whole[60_100:])):
                if suffix == "lzma" and kind == "flipped":
                    continue  # it has no checksum
                if suffix == "zst" and kind == "flipped":
                    import zstandard
                    content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(noise))
                    content[60_000] ^= 0x55
                path = self.file(f"{kind}.txt.{suffix}", bytes(content))
                self.refused("--val-fraction", 0, path, says=[path.name, "damaged", "near byte"])

    def test_single_text_is_cut_where_the_plain_one_is(self):
        text = ("\n\n".join(TEXTS) * 40).encode()
        self.run_ok(self.file("a.txt", text))
        want = [self.tokens(split) for split in ("train", "val")]
        for suffix in ("gz", "bz2"):
            self.run_ok("--overwrite", self.file(f"a.txt.{suffix}", COMPRESS[suffix](text)))
            self.assertTrue(want == [self.tokens(split) for split in ("train", "val")])

    def test_refusals(self):
        self.refused(self.file("e.gz", gzip.compress(b"")), says=["e.gz", "empty once decompressed"])
        self.refused(self.file("p.parquet.gz", gzip.compress(b"PAR1" + bytes(100))), says=["p.parquet.gz", "inside gzip"])
        for content, kind in ((b"PK\x03\x04" + bytes(50), "zip"), (b"\x04\x22\x4d\x18" + bytes(50), "lz4"),
                              (bytes(257) + b"ustar\0" + bytes(300), "tar")):
            self.refused(self.file("a.jsonl.x", content), says=["a.jsonl.x", kind])
            self.refused(self.file("a.txt.gz", gzip.compress(content)), says=["a.txt.gz", kind, "inside gzip"])


class Json(Case):
    def test_layouts(self):
        rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
        layouts = {"array": json.dumps(rows), "pretty array": json.dumps(rows, indent=2), "strings": json.dumps(TEXTS),
                   "pretty objects": "\n".join(json.dumps(row, indent=4) for row in rows), "lines": JSONL.decode(),
                   "marked": "\ufeff" + json.dumps(rows, ensure_ascii=False)}
        for layout, content in layouts.items():
            for name in ("a.json", "a.jsonl", "a", "a.json.gz"):
                data = content.encode()
                path = self.file(name, gzip.compress(data) if name.endswith("gz") else data)
                self.assertEqual(self.all_documents(path), TEXTS, (layout, name))

    def test_values_cut_anywhere(self):
        """However the reads cut the text, the values are those of json.loads."""
        value = {"text": 'a"\\ \u00e9\U0001f600', "n": [1, -2.5e-3, True, None, float("inf")], "u": "\u2028", "text2": {}}
        content = (json.dumps([value, "s", None, value], indent=1) + json.dumps(value, ensure_ascii=False)).encode()
        want = [value["text"], "s", "", value["text"], value["text"]]

        class Slow:
            name, consumed = "slow", 0

            def __init__(self, step):
                self.left, self.step = content, step

            def read(self, size):
                chunk, self.left = self.left[:self.step], self.left[self.step:]
                return chunk
        for step in list(range(1, 40)) + [1000]:
            stream = Slow(step)
            self.assertEqual([text for text, *_ in prepare_readers.read_json(stream, stream, "text")], want, step)

    def test_deep_brackets_in_a_line(self):
        """In a field that is not read, whatever it holds."""
        deep = "".join('[{"a]": "}\\\\\\"", "b": [1, ["x"], ' for _ in range(500)) + "0" + "]}]" * 500
        rows = [f'{{"before": {deep}, "text": "document {i}", "after": {deep}}}' for i in range(3)]
        for name, content in (("d.jsonl", "\n".join(rows)), ("a.json", "[" + ",\n".join(rows) + "]"),
                              ("p.json", "\n".join(rows).replace('"text":', '"text":\n'))):
            found = self.all_documents(self.file(name, content))
            self.assertEqual(found, [f"document {i}" for i in range(3)], name)

    def test_deep_brackets_cut_anywhere(self):
        deep = '{"text": "a", "b": ' + "[" * 1500 + '"]\\"["' + "]" * 1500 + "}"
        stream = io.BytesIO((f"[{deep}, {deep}]").encode())
        for step in (97, 1000):
            stream.seek(0)
            slow = mock.Mock(read=lambda size: stream.read(step), consumed=0)
            slow.name = "slow"
            self.assertEqual([text for text, *_ in prepare_readers.read_json(slow, slow, "text")], ["a", "a"], step)

    def test_refusals(self):
        deep = '{"text": "a", "other": ' + "[" * 3000 + "]" * 3000 + "}\n"
        for damaged in (deep.replace("]}", "}"), deep.replace("[]", "[}"), deep.replace("]}", "]]}")):
            self.refused(self.file("d.jsonl", '{"text": "b"}\n' + damaged), says=["d.jsonl:2", "not JSON"])
            self.refused(self.file("d.json", '[\n{"text": "b"},\n' + damaged + "]"), says=["d.json:3", "not JSON"])
        for content, line in (('[\n{"text": "a"}\n{"text": "b"}]', 3), ('[\n{"text": "a"},\n]', 3), ('[\n{"text": "a"}', 2),
                              ('{\n"text": "a"\n"b": 1}', 3), ('[{"text": "a"}, 3]', 1), ('[{"text": "a"}, ["b"]]', 1),
                              ('{\n"text": "a}\n', 2), ("[{]", 1)):
            self.refused(self.file("b.json", content), says=[f"b.json:{line}:"])
        self.refused(self.file("u.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'), says=["u.jsonl:2", "0xe9 at byte 10"])
        self.refused(self.file("u.json", b'[{"text": "\xe9"}]'), says=["u.json", "0xe9 at byte 11"])
        self.refused(self.file("o.json", '{"version": 1, "data": [{"text": "a"}]}'), says=["o.json:1", '"text"', "version, data"])
        self.refused(self.file("f.jsonl", '{"a\\nb\\u001b": 1}\n'), says=["f.jsonl:1", "a\\nb\\x1b"])

    def test_a_text_that_looks_like_json_gets_a_word(self):
        run = self.run_ok("--val-fraction", 0, self.file("a.txt", '{"text": "a"}\n{"text": "b"}\n'))
        self.assertIn(b"a.txt: looks like JSON and is read as text", run.stderr)
        run = self.run_ok("--val-fraction", 0, "--overwrite", self.file("b.txt", "{ a set }\n[1] a footnote\n"))
        self.assertEqual(run.stderr, b"")

    def test_null_is_a_blank_document_everywhere(self):
        rows = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}]
        inputs = [self.file("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), self.file("a.json", json.dumps(rows)),
                  self.file("s.json", json.dumps([row["text"] for row in rows]))]
        if has("pyarrow"):
            import pyarrow
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), self.folder / "a.parquet")
            inputs.append(self.folder / "a.parquet")
        for path in inputs:
            run = self.run_ok("--val-fraction", 0, "--overwrite", path)
            self.assertEqual(split_at(self.tokens(), 256), [b"a", b"b"], path)
            self.assertIn(b"2 blank ones left out", run.stdout)


class Texts(Case):
    def test_encodings(self):
        for encoding, name in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
            for suffix in ("txt", "jsonl"):
                self.refused(self.file(f"a.{suffix}", '{"text": "abc"}'.encode(encoding)), says=[f"a.{suffix}", name, "iconv"])
        self.refused("--val-fraction", 0, self.file("z.txt", "é" * 200_000 + "\0\n"), says=["z.txt", "zero byte at byte 400,000"])
        self.refused("--val-fraction", 0, self.file("z.txt", b"\xef\xbb\xbfab\0c"), says=["z.txt", "zero byte at byte 5"])
        self.run_ok("--val-fraction", 0, "--format", "text", self.file("z.txt", b"a\0\xff"))
        self.assertEqual(self.tokens(), [97, 0, 255, 256])

    @unittest.skipUnless(has("tokenizers"), "needs tokenizers")
    def test_invalid_utf8_names_the_byte(self):
        import tokenizers
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1, "</s>": 2}, unk_token="?"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.save(str(self.folder / "w.json"))
        text = b"ab\n" * 300_000
        for mark in (b"", b"\xef\xbb\xbf"):
            content = mark + text + b"\xe9x" + text
            for path in (self.file("l.txt", content), self.file("l.txt.gz", gzip.compress(content))):
                self.refused("--document-separator", "lines", "--workers", 1, path, tokenizer=self.folder / "w.json",
                             says=[path.name, "not UTF-8", f"0xe9 at byte {900_000 + len(mark):,}"])

    def test_separator_is_literal(self):
        text = "one<|endoftext|>two|three<|endoftext|>four"
        for separator, want in (("<|endoftext|>", ["one", "two|three", "four"]), ("|", None), ("regex:<[|]endoftext[|]>|[|]",
                                ["one", "two", "three", "four"])):
            found = self.all_documents("--document-separator", separator, self.file("a.txt", text))
            self.assertEqual(found, want or text.split("|"))
        run = self.run_ok("--val-fraction", 0, "--overwrite", "--document-separator", r"\n\n", self.file("b.txt", "a\n\nb"))
        self.assertIn(rb"'\n\n' stands in no text input; it is taken literally (regex:PATTERN", run.stderr)
        for separator in ("", "regex:", "regex:("):
            run = self.run_script("--document-separator", separator, "--overwrite", self.file("a.txt", "a"))
            self.assertEqual(run.returncode, 2)
            self.assertIn(b"--document-separator", run.stderr)

    def test_why_there_is_only_one_document(self):
        for separator, text, why in (("XX", "a\nb\n", b"'XX' stands in no text input; it is taken literally"),
                                     ("blank-lines", "a\nb\n", b"'blank-lines' stands in no text input, so"),
                                     ("b", "a\nb\n", b"only one document that is not blank"),
                                     (None, "one two three four\n", None)):
            options = ["--document-separator", separator] if separator else []
            run = self.run_script("--val-fraction", "0.5", "--overwrite", *options, self.file("a.txt", text))
            self.assertEqual(run.returncode, 2 if why else 0, run.stderr)
            if why:
                self.assertIn(why, run.stderr)
                self.assertIn(b"--val-fraction 0", run.stderr)

    def test_separator_that_matches_nothing_at_all(self):
        for pattern in ("x*", "$", r"\Z", "a|"):
            run = self.run_script("--val-fraction", 0, "--overwrite", f"--document-separator=regex:{pattern}",
                                  self.file("a.txt", "a\n\nb\n\nc"), timeout=60)
            self.assertEqual(run.returncode, 0, run.stderr)
        run = self.run_script("--document-separator=--", self.file("a.txt", "a"))
        self.assertEqual((run.returncode, run.stderr.strip().count(b"\n")), (2, 0), run.stderr)

    def test_no_cut_before_a_mark(self):
        text = "e\u0301" * 600_000
        pieces = [piece for piece, *_ in prepare_readers.split_documents(io.BytesIO(text.encode()).read, None)]
        self.assertGreater(len(pieces), 1)
        self.assertEqual(b"".join(pieces).decode(), text)
        self.assertFalse([piece for piece in pieces if piece.decode().startswith("\u0301")])

    @unittest.skipUnless(has("tokenizers"), "needs tokenizers")
    def test_nested_tokenizer_files_and_end_ids(self):
        import tokenizers
        words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate("abc")}, merges=[]))
        words.add_special_tokens(["<end>"])
        words.save(str(self.folder / "w.json"))
        text = self.file("t.txt", "abc" * 50)
        self.file("generation_config.json", json.dumps({"eos_token_id": [3, 1]}))
        self.run_ok("--val-fraction", 0, "--separator", 3, text, tokenizer=self.folder / "w.json")
        self.assertEqual(json.loads((self.out / "generation_config.json").read_text()), {"eos_token_id": [3, 1]})
        shutil.rmtree(self.out)
        deep = '{"eos_token": "<end>", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
        for name in ("tokenizer_config.json", "w.json"):
            self.file(name, deep)
            self.refused(text, says=[name], tokenizer=self.folder / "w.json")

    def test_numbers_of_any_length(self):
        path = self.file("n.jsonl", '{"n": ' + "9" * 10_000 + ', "text": "a"}\n{"text": "b"}\n')
        self.assertEqual(self.all_documents(path), ["a", "b"])

    def test_special_tokens_in_the_text(self):
        text = "one<|endoftext|>two<|endoftext|>three"
        run = self.run_ok("--val-fraction", 0, self.file("a.txt", text))
        self.assertIn(b"<|endoftext|> stands in the text 2 times and was encoded as ordinary text", run.stderr)
        self.assertEqual(self.tokens(), list(text.encode()) + [256])
        run = self.run_ok("--val-fraction", 0, "--overwrite", "--document-separator", "<|endoftext|>", self.folder / "a.txt")
        self.assertEqual(run.stderr, b"")

    @unittest.skipUnless(has("tokenizers"), "needs tokenizers")
    def test_special_tokens_of_a_tokenizer(self):
        import tokenizers
        words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate("<|end>x ")}, merges=[]))
        words.add_special_tokens(["<|end|>", "<|end|>x"])
        words.save(str(self.folder / "w.json"))
        rows = self.file("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["x<|end|>x", "<|end|>", "x"] * 5))
        for workers in (1, 2):
            run = self.run_ok("--val-fraction", 0, "--overwrite", "--workers", workers, "--separator", 0, rows,
                              tokenizer=self.folder / "w.json")
            self.assertIn(b"<|end|> stands in the text 5 times and", run.stderr)
            self.assertIn(b"<|end|>x stands in the text 5 times and", run.stderr)
            self.assertNotIn(len("<|end>x "), self.tokens())


class Pipes(Case):
    def shell(self, command, *arguments):
        """A bash command that names prepare.py and its options "$@"."""
        command = command.replace("PREPARE", '"$@"')
        return subprocess.run(["bash", "-c", command, "bash", sys.executable, SCRIPT, "--tokenizer", "bytes", "--out", self.out,
                               "--overwrite", *map(str, arguments)], capture_output=True, cwd=self.folder)

    def test_same_as_files(self):
        self.file("a.jsonl", JSONL)
        self.file("a.jsonl.gz", gzip.compress(JSONL))
        self.run_ok(self.folder / "a.jsonl")
        want = [self.tokens("train"), self.tokens("val")]
        for command in ("PREPARE - <a.jsonl.gz", "cat a.jsonl.gz | PREPARE -", "PREPARE <(zcat a.jsonl.gz)",
                        "zcat a.jsonl.gz | PREPARE /dev/stdin", "PREPARE <(head -n 100 a.jsonl) <(tail -n +101 a.jsonl)",
                        "mkfifo f1 f2; (head -n 100 a.jsonl >f1; tail -n +101 a.jsonl >f2) & PREPARE f1 f2; rm f1 f2",
                        "(sleep 0.3; cat a.jsonl) | PREPARE -", "(head -n 3 a.jsonl; sleep 0.2; tail -n +4 a.jsonl) | PREPARE -",
                        "PREPARE a.jsonl", "(read -r line; read -r line; cat) <<<$'x\\ny'\"\n$(cat a.jsonl)\" | PREPARE -"):
            run = self.shell(command)
            self.assertEqual(run.returncode, 0, (command, run.stderr))
            self.assertTrue(want == [self.tokens("train"), self.tokens("val")], command)

    def test_a_single_text(self):
        text = "\n\n".join(TEXTS) * 300  # 6 MB, more than is kept in memory
        self.file("a.txt", text)
        self.run_ok(self.folder / "a.txt")
        want = [self.tokens("train"), self.tokens("val")]
        for command in ("cat a.txt | PREPARE -", "PREPARE <(cat a.txt)", "gzip <a.txt | PREPARE -"):
            run = self.shell(command)
            self.assertEqual(run.returncode, 0, (command, run.stderr))
            self.assertTrue(want == [self.tokens("train"), self.tokens("val")], command)
            self.assertEqual(sorted(path.name for path in self.out.iterdir()),
                             ["dataset.json", "train_000000.bin", "val_000000.bin"])

    def test_few_documents_fill_both_sides(self):
        """All fall to one split, so that they are read again."""
        self.file("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three")))
        run = self.shell("cat a.jsonl | PREPARE -", "--val-fraction", 0.01)
        self.assertEqual(run.returncode, 0, run.stderr)
        sides = [split_at(self.tokens(split), 256) for split in ("train", "val")]
        self.assertTrue(all(sides))
        self.assertEqual(sorted(sides[0] + sides[1]), sorted([b"one", b"two", b"three"]))

    @unittest.skipUnless(has("pyarrow"), "needs pyarrow")
    def test_parquet(self):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), self.folder / "a.parquet")
        for command in ("cat a.parquet | PREPARE -", "PREPARE <(cat a.parquet)", "PREPARE - <a.parquet"):
            run = self.shell(command, "--val-fraction", 0)
            self.assertEqual(run.returncode, 0, (command, run.stderr))
            self.assertEqual([text.decode() for text in split_at(self.tokens(), 256)], TEXTS)

    def test_refusals(self):
        self.file("a.jsonl", JSONL)
        for command, says in (("PREPARE - <&-", "standard input is closed"), ("PREPARE - </dev/null", "standard input: empty"),
                              ("PREPARE <(true)", "empty"), ("PREPARE - - <a.jsonl", "only be read once"),
                              ("PREPARE /dev/null", "/dev/null: empty"),
                              ("head -c 1000 a.jsonl | gzip | head -c 100 | PREPARE -", "standard input: damaged gzip"),
                              ("echo '{\"text\": 1}' | PREPARE -", "standard input:1: field")):
            run = self.shell(command)
            self.assertEqual(run.returncode, 2, (command, run.stderr))
            self.assertIn(says.encode(), run.stderr)
            self.assertEqual(run.stderr.strip().count(b"\n"), 0, run.stderr)

    def test_a_pipe_that_does_not_block(self):
        theirs, ours = os.pipe()
        os.set_blocking(theirs, False)
        run = subprocess.Popen([sys.executable, SCRIPT, "--tokenizer", "bytes", "--out", self.out, "-"], stdin=theirs,
                               stderr=subprocess.PIPE)
        os.close(theirs)
        with open(ours, "wb") as writer:
            time.sleep(1)
            writer.write(JSONL)
        self.assertEqual((run.wait(timeout=60), run.stderr.read()), (0, b""))
        run.stderr.close()

    def test_proc_files(self):
        """They have content, though their size is 0."""
        self.run_ok("--val-fraction", 0, "/proc/self/status")
        self.assertIn(b"Name:", bytes(self.tokens()[:-1]))


@unittest.skipUnless(has("pyarrow"), "needs pyarrow")
class Parquet(Case):
    def write(self, name, array, **options):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": array}), self.folder / name, **options)
        return self.folder / name

    def test_kinds_of_strings(self):
        import pyarrow
        arrays = {"dictionary": pyarrow.array(TEXTS).dictionary_encode(), "large": pyarrow.array(TEXTS, pyarrow.large_string())}
        if hasattr(pyarrow, "string_view"):
            arrays["view"] = pyarrow.array(TEXTS, pyarrow.string_view())
        for name, array in arrays.items():
            self.assertEqual(self.all_documents(self.write(f"{name}.parquet", array, row_group_size=100)), TEXTS, name)
            self.assertEqual(self.all_documents(self.write(name, array)), TEXTS)  # without a suffix too
        self.refused_kind(pyarrow.array([b"a"]), "binary")
        self.refused_kind(pyarrow.array([1, 2]).dictionary_encode(), "int64")
        self.refused_kind(pyarrow.array([["a"]]), "list")

    def refused_kind(self, array, says):
        shutil.rmtree(self.out, ignore_errors=True)
        self.refused(self.write("k.parquet", array), says=["k.parquet", says, "not strings"])

    def test_damaged_page(self):
        rng = random.Random(3)
        texts = [rng.randbytes(500).hex() for _ in range(300)]
        path = self.write("d.parquet", texts, row_group_size=100, compression="zstd", write_page_checksum=True,
                          use_dictionary=False)
        whole = bytearray(path.read_bytes())
        place = len(whole) // 2  # in the second of three row groups
        whole[place:place + 50] = bytes(50)
        path.write_bytes(whole)
        self.refused(path, says=["d.parquet", "row group 1", "damaged"])
        self.refused(self.file("h.parquet", whole[:len(whole) // 2]), says=["h.parquet", "not a parquet file"])


class Folder(Case):
    def test_two_runs_into_one_folder(self):
        rows = self.file("a.jsonl", JSONL)
        self.out.mkdir()
        descriptor = os.open(self.out, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self.refused(rows, says=[str(self.out), "another program"])
        os.close(descriptor)
        self.run_ok(rows)

    def test_really_two(self):
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        first = subprocess.Popen([sys.executable, SCRIPT, "--tokenizer", "bytes", "--out", self.out, fifo], stderr=subprocess.PIPE)
        writer = open(fifo, "wb")  # waits until the first run has opened it
        rows = self.file("a.jsonl", JSONL)
        self.refused_beside(rows)
        first.kill()  # leaves no lock behind
        first.communicate()
        writer.close()
        self.run_ok(rows)
        self.assertEqual(sorted(path.name for path in self.out.iterdir()), ["dataset.json", "train_000000.bin", "val_000000.bin"])

    def refused_beside(self, rows):
        run = self.run_script("--overwrite", rows)
        self.assertEqual((run.returncode, run.stderr.count(b"\n")), (2, 1), run.stderr)
        self.assertIn(b"another program", run.stderr)

    def test_killed_run(self):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)):
            run = subprocess.Popen([sys.executable, SCRIPT, "--tokenizer", "bytes", "--out", self.out, "--val-fraction", "0",
                                    "--format", "text", "/dev/zero"], stderr=subprocess.DEVNULL,
                                   preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
            while not list(self.out.glob("*.tmp")):
                self.assertIsNone(run.poll())
                time.sleep(0.01)
            run.send_signal(number)
            self.assertEqual(run.wait(timeout=20), code)
            if number != signal.SIGKILL:
                self.assertEqual(list(self.out.glob("*")), [])
        (self.out / "train_000007.bin.tmp").write_bytes(b"older")
        self.run_ok(self.file("a.jsonl", JSONL))
        self.assertEqual(list(self.out.glob("*.tmp")), [])

    def limited(self, size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def test_a_full_disk(self):
        rows = self.file("a.jsonl", JSONL)
        self.run_ok("--shard-tokens", 20_000, rows)
        before = {path.name: path.read_bytes() for path in self.out.iterdir()}
        run = self.run_script("--overwrite", self.file("b.jsonl", JSONL * 20), preexec_fn=self.limited(60_000))
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn(b"train_000000.bin: File too large", run.stderr)
        self.assertEqual(run.stderr.count(b"\n"), 1, run.stderr)
        self.assertEqual({path.name: path.read_bytes() for path in self.out.iterdir()}, before)

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("mount"), "needs root")
    def test_a_really_full_disk(self):
        mount = self.folder / "small"
        mount.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True).returncode:
            self.skipTest("no tmpfs can be mounted")
        self.addCleanup(subprocess.run, ["umount", mount])
        rows = self.file("b.jsonl", JSONL * 20)
        run = self.run_script("--shard-tokens", 30_000, rows, out=mount / "out")
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertRegex(run.stderr, rb"^prepare.py: \S+_00000\d.bin: No space left on device\n$")
        self.assertEqual(list(mount.glob("*")), [])
        # a copy of a pipe, of which all would be read before the cut
        run = self.run_script("-", out=mount / "out", input=b"text " * 2_000_000)
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn(b"No space left on device", run.stderr)
        self.assertIn(b"out: ", run.stderr)
        self.assertEqual(run.stderr.count(b"\n"), 1, run.stderr)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_summary_that_cannot_be_written(self):
        with open("/dev/full", "wb") as full:
            run = self.run_script(self.file("a.jsonl", JSONL), capture_output=False, stdout=full, stderr=subprocess.PIPE)
        self.assertEqual((run.returncode, run.stderr.count(b"\n")), (1, 1), run.stderr)
        self.assertIn(b"standard output: No space left on device; the shards are written", run.stderr)
        self.assertTrue(self.tokens())

    def test_unwritable(self):
        rows = self.file("a.jsonl", JSONL)
        self.refused(rows, out=self.file("plain", "x"), says=["plain", "is no folder"])
        self.refused(rows, out=self.folder / "plain" / "sub", says=[str(self.folder / "plain"), "Not a directory"], code=1)
        self.refused(rows, out="/proc/self/x", says=["/proc/self/x", "No such file or directory"], code=1)
        if os.geteuid():
            self.out.mkdir(mode=0o555)
            self.refused(rows, says=["train_000000.bin.tmp", "Permission denied"], code=1)

    def test_terminals(self):
        rows = Path(os.fsdecode(os.fsencode(self.folder) + b"/caf\xe9 \xc3\xa9.jsonl"))
        rows.write_bytes(JSONL)
        bad = Path(os.fsdecode(os.fsencode(self.folder) + b"/b\xe9d\xc3\xa9.jsonl"))
        bad.write_bytes(b"{x\n")
        out = Path(os.fsdecode(os.fsencode(self.folder) + b"/o\xe9\xc3\xa9"))
        for settings in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
                         {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"},
                         {"LC_ALL": "C.UTF-8"}):
            environment = os.environ | settings
            run = self.run_ok("--overwrite", rows, out=out, env=environment)
            self.assertIn(b"train = " + os.fsencode(out) + b"/train_*.bin\n", run.stdout, settings)
            run = self.run_script(bad, env=environment)
            self.assertEqual(run.returncode, 2, run.stderr)
            self.assertIn(os.fsencode(bad) + b":1: not JSON", run.stderr, settings)
            run = self.run_script(os.fsencode(self.folder).decode() + "/no\udce9", env=environment)
            self.assertIn(b"/no\xe9: no such file", run.stderr)




@unittest.skipUnless(os.access(BINARY, os.X_OK), "needs train_iha")
class Configuration(Case):
    """The [data] block that is printed works as it stands, whatever the folder's name."""
    NAMES = ["plain", "two words", "a'b", '"quoted"', "'quoted'", "a#b", "#a", "a;b", ";a", "a #b", "a ;b", "*", "a?b", "[a]", "[",
             "]", "a[!b]", "~", "~root", "trailing ", " leading", "back\\slash", "a\\*", "{a,b}", "a=b", "$HOME", "${HOME}", "%41",
             "-a", "é", "a  b", "[[]", "a]b[", "tab\\t", "!", "a\u00a0b", "\U0001f468\u200d\U0001f469", "a,b", "a:b", "=", "[data]"]

    def train(self, printed):
        """train_iha with the block that prepare.py printed."""
        config = self.folder / "c.ini"
        vocab_size = printed.split(b"vocab_size = ")[1].split()[0].decode()
        text = tiny_config("", 16, 32, 1, "threads = 1", f"dir = {self.folder}/run").replace("257", vocab_size)
        before, after = text.split("[data]")[0], text[text.index("[run]"):]
        config.write_bytes(before.encode() + b"[data]\n" + printed.split(b"\n[data]\n")[1] + b"\n" + after.encode())
        return subprocess.run([BINARY, "train", config], capture_output=True, cwd=self.folder)

    def check(self, names, **options):
        for name in names:
            for decoy in ("a", "b", "xb", "ax"):  # what a pattern in the name might match
                (self.folder / decoy).mkdir(exist_ok=True)
            printed = self.run_ok(self.file("a.jsonl", JSONL), "--overwrite", out=name, cwd=self.folder, **options).stdout
            self.assertTrue((self.folder / name / "train_000000.bin").exists())
            trained = self.train(printed)
            self.assertEqual(trained.returncode, 0, (name, printed, trained.stderr))
            shutil.rmtree(self.folder / "run")
            shutil.rmtree(self.folder / name)

    def test_names(self):
        self.check(self.NAMES + [os.fsdecode(b"\xe9")])

    @unittest.skipUnless(has("tokenizers"), "needs tokenizers")
    def test_names_with_a_tokenizer(self):
        import tokenizers
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        tokenizer.save(str(self.folder / "t.json"))
        self.check([name for name in self.NAMES if name not in ("a #b", "a ;b")], tokenizer=self.folder / "t.json")
        run = self.run_ok(self.folder / "a.jsonl", tokenizer=self.folder / "t.json", out="a #b", cwd=self.folder)
        self.assertIn(b"# tokenizer: the folder's name has a blank and then", run.stdout)

    def test_refused(self):
        for name in ("a\nb", "a\tb", "a\x1bb", "a\rb"):
            run = self.run_script(self.file("a.jsonl", JSONL), out=name, cwd=self.folder)
            self.assertEqual((run.returncode, run.stderr.count(b"\n")), (2, 1), run.stderr)
            self.assertIn(b"control character", run.stderr)


if __name__ == "__main__":
    unittest.main()
