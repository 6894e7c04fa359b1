#!/usr/bin/env python3
"""Text to token shards that train_iha reads (llm.c's format).

Reads text, JSONL and parquet files as a stream, tokenizes in --workers processes, and writes
OUT/train_000000.bin, ..., OUT/val_000000.bin and, for every tokenizer but `bytes`, the tokenizer.json that
sampling and `train_iha generate` need. The same input, tokenizer and seed give the same files, whatever
the number of workers. Nothing appears under its final name before everything is written.

How it flows: readers yield (text, ends_document) pieces -> documents get their split -> batches of about a
megabyte -> workers return token arrays -> one writer per split.
"""

import argparse
import base64
import collections
import contextlib
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit("prepare.py: numpy is not installed; run: make deps, then .venv/bin/python data/prepare.py ...")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers is the one knob

EXAMPLES = """\
examples:
  data/corpus.py bible
  data/prepare.py --tokenizer bytes --document-separator blank-lines --out data/bible data/corpus/bible.txt
  data/prepare.py --tokenizer gpt2 --field content --workers 8 --out data/web web-*.jsonl
  data/prepare.py --tokenizer tokenizer.model --pattern llama3 --out data/wiki wiki-*.parquet
  data/prepare.py --tokenizer my/tokenizer.json --out data/books books/*.txt
"""

PIECE = 256 << 10   # longest stretch of one document tokenized at once
BATCH = 1 << 20     # text handed to a worker at once
MARGIN = 64 << 10   # a document separator may be this long


class UserError(Exception):
    """What the user gave is wrong; the message is the one line they see, the exit code 2."""


# ------------------------------------------------------------------------------------------ reading
# A reader yields (text, ends_document, position): bytes or str, and how far into its file it has read.


def piece_end(buffer, start, end):
    """Where to cut near `end` so that both sides tokenize as the whole does: between two lower-case
    words, which no known pre-tokenizer joins; failing that after a line, failing that after a character."""
    window = max(start + 1, end - MARGIN)
    space = [match.end() for match in re.finditer(rb"[a-z](?= [a-z])", buffer[window:end + 2])]
    if space:
        return window + space[-1]
    line = buffer.rfind(b"\n", window, end)
    if line > 0:
        return line + 1
    while end - 1 > start and buffer[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        end -= 1
    return end


def split_documents(read, separator):
    """Pieces (bytes, ends_document) of a byte stream, in constant memory; the separators are dropped.
    A separator counts only when MARGIN bytes follow it, lest more text should lengthen the match."""
    buffer, start, search, done = b"", 0, 0, False
    while True:
        match = separator.search(buffer, search) if separator else None
        if match and (done or match.end() + MARGIN <= len(buffer)):
            yield buffer[start:match.start()], True
            start = match.end()
            search = start + (match.start() == match.end())  # an empty match must not be found again
            continue
        if done:
            break
        settled = min(match.start() if match else len(buffer), len(buffer) - MARGIN)
        while settled - start > PIECE:
            cut = piece_end(buffer, start, start + PIECE)
            yield buffer[start:cut], False
            start = cut
        search = max(search, start)
        drop = max(0, start - 1)  # the byte before stays, for ^ and look-behind
        chunk = read(BATCH)
        done = not chunk
        buffer, start, search = buffer[drop:] + chunk, start - drop, search - drop
    yield buffer[start:], True


def read_text(path, begin, end, separator, as_str):
    """Bytes [begin, end) of a text file; decoded when the tokenizer wants characters."""
    position = begin
    with open(path, "rb") as file:
        if begin == 0 and file.read(3) == b"\xef\xbb\xbf":
            position = 3  # a byte order mark is no text
        file.seek(position)
        left = [end - position]

        def read(size):
            chunk = file.read(min(size, left[0]))
            left[0] -= len(chunk)
            return chunk

        for piece, ends in split_documents(read, separator):
            if as_str:
                try:
                    piece = piece.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} in "
                                    f"{error.object[max(0, error.start - 10):error.start + 10]!r}); convert it, "
                                    "or use --tokenizer bytes") from None
            yield piece, ends, end - left[0]


def read_jsonl(path, field):
    """A document per line: the string in `field`."""
    position = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            if field not in row:
                raise UserError(f"{path}:{number}: no field \"{field}\"; it has {', '.join(row) or 'none'} (--field NAME)")
            if not isinstance(row[field], str):
                raise UserError(f"{path}:{number}: field \"{field}\" is not a string")
            yield row[field], True, position


def read_parquet(path, field):
    """A document per row: the string in column `field`; a null is an empty document."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    names = file.schema_arrow.names
    if field not in names:
        raise UserError(f"{path}: no column \"{field}\"; it has {', '.join(names) or 'none'} (--field NAME)")
    kind = file.schema_arrow.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column \"{field}\" holds {kind}, not strings")
    size, rows, done = os.path.getsize(path), file.metadata.num_rows, 0
    for batch in file.iter_batches(columns=[field], batch_size=256):
        for text in batch.column(0).to_pylist():
            done += 1
            yield text or "", True, size * done // rows


def paragraph_boundary(path, size, fraction):
    """Where a single text is cut in two: (position, what it follows). The best kind of boundary that lies near
    enough to leave the last part between half and one and a half of `fraction`."""
    target = min(max(1, int(size * (1 - fraction))), size - 1)
    begin = max(0, target - BATCH)
    with open(path, "rb") as file:
        file.seek(begin)
        text = file.read(target + BATCH - begin)

    def nearest(places):
        return min((place for place in places if 0 < begin + place < size),
                   key=lambda place: abs(begin + place - target), default=None)

    for pattern, name in ((rb"\n[ \t\r]*\n\s*", "paragraph"), (rb"\n\s*", "line"), (rb"\s+", "word")):
        place = nearest(match.end() for match in re.finditer(pattern, text))
        if place is not None and abs(begin + place - target) <= size * fraction / 2:
            return begin + place, name
    place = nearest(i for i, byte in enumerate(text) if byte & 0xC0 != 0x80)
    return (target if place is None else begin + place), "character"


# --------------------------------------------------------------------------------------- tokenizers

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# tiktoken keeps white space that ends the text in one piece here. Its $ is spelled so that $'s several
# meanings elsewhere (the end of a line, before a last newline) do not matter.
CL100K_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")
LLAMA3_SPECIALS = (["<|begin_of_text|>", "<|end_of_text|>"]
                   + [f"<|reserved_special_token_{i}|>" for i in range(4)]
                   + ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
                   + [f"<|reserved_special_token_{i}|>" for i in range(5, 251)])

# --pattern: how text is cut into words, and the special tokens' places after the last rank
PATTERNS = {
    "gpt2": (GPT2_PATTERN, {"<|endoftext|>": 0}),
    "cl100k": (CL100K_PATTERN, {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4,
                                "<|endofprompt|>": 20}),
    "llama3": (LLAMA3_PATTERN, {name: i for i, name in enumerate(LLAMA3_SPECIALS)}),
}
KNOWN_SIZES = {50256: "gpt2", 100256: "cl100k", 128000: "llama3"}


class Bytes:
    """Ids 0-255 are bytes, 256 ends a document."""
    vocab_size, end_of_text, wants_str, json = 257, 256, False, None

    def encode(self, texts):
        return [np.frombuffer(text if isinstance(text, bytes) else text.encode(errors="replace"), dtype=np.uint8)
                for text in texts]


class Tiktoken:
    """A tiktoken.Encoding. Special tokens written out in a text stay ordinary text."""
    wants_str = True

    def __init__(self, encoding, pattern):
        self.encoding, self.pattern = encoding, pattern
        self.vocab_size = encoding.n_vocab
        self.end_of_text = next((encoding._special_tokens[name] for name in END_OF_TEXT
                                 if name in encoding._special_tokens), None)

    @property
    def json(self):
        return json.dumps(tokenizer_json(self.encoding._mergeable_ranks, self.encoding._special_tokens, self.pattern),
                          ensure_ascii=False, indent=1)

    def encode(self, texts):
        return [self.encoding.encode_ordinary(text) for text in texts]


class HuggingFace:
    """A tokenizer.json. Special tokens written out in a text stay ordinary text; none are added."""
    wants_str = True

    def __init__(self, path):
        import tokenizers
        self.json = Path(path).read_text(encoding="utf-8")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have holes
        self.end_of_text = next((vocab[name] for name in END_OF_TEXT if name in vocab), None)

    def encode(self, texts):
        self.tokenizer.encode_special_tokens = True  # not kept by pickle, so set here
        return [row.ids for row in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def greedy_parts(ranks, token):
    """The token as tiktoken would build it: merge the leftmost of the pairs whose union has the lowest rank,
    again and again; stop at two parts, or where nothing merges."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1)]
        rank, i = min(pairs)
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_alphabet():
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokenizer_json(ranks, specials, pattern):
    """A tiktoken encoding as a byte-level BPE tokenizer.json that encodes identically.

    tiktoken keeps no merges: any pair whose union is a token may merge, lowest rank first. But of all pairs
    that spell a token only one is ever reached, the last step of building that token alone, so these pairs
    in rank order are the merges. A token that cannot be built is only ever found as a whole word, which
    ignore_merges does. Ids between the ranks and the specials are filled in, since the tokenizers library
    numbers added tokens without gaps.
    """
    alphabet = byte_alphabet()
    spell = lambda token: "".join(alphabet[byte] for byte in token)
    merges, unreachable = [], False
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            parts = greedy_parts(ranks, token)
            unreachable |= len(parts) != 2
            if len(parts) == 2:
                merges.append([spell(part) for part in parts])
    names = {id: name for name, id in specials.items()}
    first, last = len(ranks), max(names, default=len(ranks) - 1)
    added = [{"id": id, "content": names.get(id, f"<|unused_{id}|>"), "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": True} for id in range(first, last + 1)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern == "gpt2"}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern][0]}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level if pattern == "gpt2" else {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": unreachable,
                  "vocab": {spell(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
                  "merges": merges},
    }


def load_gpt2():
    import tiktoken
    try:
        return Tiktoken(tiktoken.get_encoding("gpt2"), "gpt2")
    except Exception as error:  # requests' errors, and whatever stands between
        raise UserError(
            f"gpt2: cannot download its vocabulary ({type(error).__name__}); fetch "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken elsewhere and pass "
            "--tokenizer r50k_base.tiktoken --pattern gpt2") from None


def load_ranks(path, pattern):
    """A rank file: lines of base64 token and rank."""
    import tiktoken
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in Path(path).read_bytes().splitlines() if line)}
    except ValueError:
        raise UserError(f"{path}: neither a tokenizer.json nor a tiktoken rank file (a SentencePiece model "
                        "must be converted to tokenizer.json)") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: ranks must count from 0 without gaps and include all 256 bytes")
    pattern = pattern or KNOWN_SIZES.get(len(ranks))
    if pattern is None:
        raise UserError(f"{path}: {len(ranks)} ranks, no encoding known; say --pattern {'|'.join(PATTERNS)}")
    regex, places = PATTERNS[pattern]
    specials = {name: len(ranks) + place for name, place in places.items()}
    return Tiktoken(tiktoken.Encoding(Path(path).stem, pat_str=regex, mergeable_ranks=ranks, special_tokens=specials),
                    pattern)


def load_tokenizer(name, pattern):
    if pattern and name in ("bytes", "gpt2"):
        raise UserError(f"--pattern belongs to a rank file, not to {name}")
    if name == "bytes":
        return Bytes()
    try:
        if name == "gpt2":
            return load_gpt2()
        if name == "llama3" and not os.path.exists(name):
            raise UserError("llama3: its licence asks you to fetch it yourself: get original/tokenizer.model from "
                            "huggingface.co/meta-llama/Meta-Llama-3-8B and pass --tokenizer tokenizer.model --pattern llama3")
        if not os.path.isfile(name):
            near = difflib.get_close_matches(name, ["bytes", "gpt2", "llama3"], 1)
            raise UserError(f"--tokenizer {name}: no such file" + (f"; did you mean {near[0]}?" if near else
                                                                  "; give bytes, gpt2, llama3 or a file"))
        with open(name, "rb") as file:
            is_json = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        if is_json and pattern:
            raise UserError(f"--pattern belongs to a rank file; {name} is a tokenizer.json")
        return HuggingFace(name) if is_json else load_ranks(name, pattern)
    except ImportError as error:
        raise UserError(f"--tokenizer {name} needs {error.name}: pip install {error.name}") from None


# -------------------------------------------------------------------------------------- tokenizing

_tokenizer = _separator = _dtype = None  # a worker's own


def start_worker(*state):
    global _tokenizer, _separator, _dtype
    _tokenizer, _separator, _dtype = state


def encode_batch(batch):
    """A list of (split, text, ends_document) -> {split: tokens}."""
    tokens = {}
    for (split, _, ends), ids in zip(batch, _tokenizer.encode([text for _, text, _ in batch])):
        out = tokens.setdefault(split, [])
        out.append(np.asarray(ids, dtype=_dtype))
        if ends:
            out.append(np.array([_separator], dtype=_dtype))
    return {split: np.concatenate(arrays) for split, arrays in tokens.items()}


def serve(pipe, state):
    """A worker process: a batch in, its tokens (or the exception) out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    start_worker(*state)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                result = encode_batch(pipe.recv())
            except EOFError:
                raise
            except Exception as error:
                result = error
            pipe.send(result)


def ordered_map(batches, workers, state):
    """encode_batch over the batches, in order. Worker k has batches k, k + workers, ...: one under way each, so
    memory stays bounded, and pipes without threads, so that nothing can hang when a worker dies or Ctrl-C comes."""
    if workers == 1:
        start_worker(*state)
        yield from map(encode_batch, batches)
        return
    context = multiprocessing.get_context("spawn")  # not forked: a reader may have threads
    pipes, processes, sent = [], [], 0
    try:
        for batch in batches:
            if sent < workers:
                pipe, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, state), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                pipes.append(pipe)
            else:
                yield received(pipes[sent % workers])
            pipes[sent % workers].send(batch)
            sent += 1
        for i in range(max(0, sent - workers), sent):
            yield received(pipes[i % workers])
    except (EOFError, ConnectionError):
        raise OSError("a tokenizing process died (out of memory?); try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()


def received(pipe):
    result = pipe.recv()
    if isinstance(result, Exception):
        raise result
    return result


# ----------------------------------------------------------------------------------------- writing


class Writer:
    """The shards of one split. They carry temporary names until commit() renames them."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.counts, self.file = [], None

    def name(self, i, suffix=""):
        return self.folder / f"{self.split}_{i:06d}.bin{suffix}"

    def write(self, tokens):
        while len(tokens):
            if self.file is None or self.counts[-1] == self.shard_tokens:
                self.next_shard()
            part = tokens[:self.shard_tokens - self.counts[-1]]
            part.astype(self.dtype.newbyteorder("<")).tofile(self.file)
            self.counts[-1] += len(part)
            tokens = tokens[len(part):]

    def next_shard(self):
        self.close()
        self.file = open(self.name(len(self.counts), ".tmp"), "wb")
        self.file.write(bytes(1024))
        self.counts.append(0)

    def close(self):
        """The header, now that the count is known."""
        if self.file is None:
            return
        magic, version = (20240520, 1) if self.dtype.itemsize == 2 else (20240801, 7)
        self.file.seek(0)
        self.file.write(np.array([magic, version, self.counts[-1]], dtype="<i4").tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None

    def finish(self):
        """Close; a short last shard joins the one before, since one below a sequence's length is unusable."""
        self.close()
        if len(self.counts) > 1 and self.counts[-1] < self.shard_tokens / 16:
            last = self.name(len(self.counts) - 1, ".tmp")
            with open(last, "rb") as short, open(self.name(len(self.counts) - 2, ".tmp"), "r+b") as self.file:
                short.seek(1024)
                self.file.seek(0, os.SEEK_END)
                shutil.copyfileobj(short, self.file)
                self.counts[-2:] = [self.counts[-2] + self.counts[-1]]
                self.close()
            last.unlink()

    def commit(self):
        for i in range(len(self.counts)):
            os.replace(self.name(i, ".tmp"), self.name(i))

    def discard(self):
        if self.file:
            self.file.close()
        self.file, self.counts = None, []
        for path in self.folder.glob(f"{self.split}_*.bin.tmp"):
            path.unlink()


class Progress:
    """Bytes read, bytes per second and time left on stderr: one line redrawn on a terminal, else one every 10 s."""

    def __init__(self, total):
        self.total, self.begin, self.shown = total, time.monotonic(), time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, done, last=False):
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10) and not (last and self.terminal):
            return
        self.shown = now
        speed = done / max(now - self.begin, 1e-9)
        share = min(1, done / max(1, self.total))
        left = int((now - self.begin) * (1 - share) / max(share, 1e-9))
        bar = "#" * int(28 * share)
        line = (f"{100 * share:3.0f}% {done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB  {speed / 1e6:.1f} MB/s  "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self.terminal:
            print(f"\r[{bar:<28}] {line} ", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------- main


def score(seed, index):
    """A uniform number in [0, 1) of the document's own: below --val-fraction, the document is validation."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "big") / 2**64


class Preparation:
    """One run: what is read, how it is split, what was counted."""

    def __init__(self, options, tokenizer):
        self.options, self.tokenizer = options, tokenizer
        separator = options.separator if options.separator is not None else tokenizer.end_of_text
        if separator is None:
            raise UserError(f"{options.tokenizer}: no end-of-text token known in its vocabulary; say which id ends a "
                            "document: --separator ID")
        self.vocab_size = max(tokenizer.vocab_size, separator + 1)
        self.separator = separator
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        self.sizes = {path: os.path.getsize(path) for path in options.inputs}
        self.cut = self.single_text_cut()

    def single_text_cut(self):
        """(position, boundary) for one whole text, which has no second document to validate on."""
        options = self.options
        path = options.inputs[0]
        if (len(options.inputs) > 1 or file_format(path, options.format) != "text" or options.document_separator
                or options.val_fraction == 0):
            return None
        if self.sizes[path] < 2:
            raise UserError(f"{path}: too short to cut a validation part from; use --val-fraction 0")
        return paragraph_boundary(path, self.sizes[path], options.val_fraction)

    def pieces(self, path):
        options, kind = self.options, file_format(path, self.options.format)
        if kind == "jsonl":
            return read_jsonl(path, options.field)
        if kind == "parquet":
            return read_parquet(path, options.field)
        if self.cut:
            return (piece for begin, end in ((0, self.cut[0]), (self.cut[0], self.sizes[path]))
                    for piece in read_text(path, begin, end, None, self.tokenizer.wants_str))
        return read_text(path, 0, self.sizes[path], options.document_separator, self.tokenizer.wants_str)

    def split_of(self, index, forced):
        if self.cut:
            return ("train", "val")[index]
        return forced.get(index) or ("val" if score(self.options.seed, index) < self.options.val_fraction else "train")

    def batches(self, progress, forced):
        """Batches of (split, text, ends_document). Blank documents are left out."""
        self.documents, self.bytes, self.blank = collections.Counter(), collections.Counter(), 0
        batch, size, index, started, before = [], 0, 0, False, 0
        for path in self.options.inputs:
            for text, ends, position in self.pieces(path):
                progress.show(before + position)
                if ends and not started and not text.strip():
                    self.blank += 1
                    continue
                split = self.split_of(index, forced)
                length = len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode(errors="replace"))
                batch.append((split, text if isinstance(text, bytes) else unpaired(text), ends))
                self.bytes[split] += length
                size, started = size + length, not ends
                if ends:
                    self.documents[split] += 1
                    index += 1
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
            before += self.sizes[path]
        if batch:
            yield batch
        progress.show(sum(self.sizes.values()), last=True)

    def run(self, writers, forced={}):
        progress = Progress(sum(self.sizes.values()))
        state = (self.tokenizer, self.separator, self.dtype)
        workers = max(1, min(self.options.workers, -(-sum(self.sizes.values()) // BATCH)))
        for arrays in ordered_map(self.batches(progress, forced), workers, state):
            for split, tokens in arrays.items():
                writers[split].write(tokens)
        self.check_split(writers, forced)

    def check_split(self, writers, forced):
        """Few documents may all fall on one side; then the lowest score moves to val, or the highest to train."""
        count = sum(self.documents.values())
        if count == 0:
            raise UserError(f"{self.options.inputs[0]}: no text" + (" in any input" if len(self.sizes) > 1 else ""))
        if self.options.val_fraction == 0 or len(self.documents) == 2:
            return
        if count == 1 or self.cut:
            raise UserError("only one document, so none is left to validate on; use --val-fraction 0"
                            + ("" if self.cut else ", or cut it up with --document-separator"))
        missing = "train" if "val" in self.documents else "val"
        scores = [score(self.options.seed, index) for index in range(count)]
        index = scores.index(max(scores) if missing == "train" else min(scores))
        for writer in writers.values():
            writer.discard()
        self.run(writers, {index: missing})

    def report(self, writers):
        options, folder = self.options, self.options.out
        counts = {split: sum(writer.counts) for split, writer in writers.items()}
        splits = [split for split in writers if counts[split]]

        def row(label, values):
            print(f"{label:<16}" + "   ".join(f"{split} {values[split]}" for split in splits))

        row("documents", {split: f"{self.documents[split]:,}" for split in splits})
        if self.cut:
            print(f"                (one text, cut after a {self.cut[1]} at byte {self.cut[0]:,}: "
                  f"the last {100 - 100 * self.cut[0] / sum(self.sizes.values()):.2f}% is val)")
        if self.blank:
            print(f"                ({self.blank:,} blank ones left out)")
        row("tokens", {split: f"{counts[split]:,}" for split in splits})
        row("bytes per token", {split: f"{self.bytes[split] / counts[split]:.4f}" for split in splits})
        print(f"files           {folder}/: " + ", ".join(
            file_range(split, len(writers[split].counts)) for split in splits) + f" ({np.dtype(self.dtype).name})"
            + (", tokenizer.json" if self.tokenizer.json_path else ""))
        print(f"\n[model]\nvocab_size = {self.vocab_size}\n\n[data]")
        for split in splits:
            print(f"{split} = {folder}/{split}_*.bin")
        print(f"tokenizer = {self.tokenizer.json_path or 'bytes'}")


def unpaired(text):
    """Lone surrogates, which JSON can write and UTF-8 cannot, become question marks."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()


def file_range(split, count):
    return f"{split}_000000.bin" + (f" to {split}_{count - 1:06d}.bin" if count > 1 else "")


def file_format(path, asked):
    if asked != "auto":
        return asked
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(Path(path).suffix.lower(), "text")


def existing_shards(folder):
    return [path for split in ("train", "val") for path in folder.glob(f"{split}_[0-9]*.bin")]


def separator_regex(text):
    """--document-separator: a name, or a regular expression over the file's bytes."""
    names = {"blank-lines": r"\r?\n(?:[ \t]*\r?\n)+", "lines": r"\r?\n"}
    try:
        return re.compile(names.get(text, text).encode(), re.MULTILINE)
    except re.error as error:
        raise UserError(f"--document-separator {text}: {error}") from None


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1], epilog=EXAMPLES,
        add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(message)

    parser.error = fail
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=".jsonl or .ndjson, .parquet; anything else is text")
    add("--tokenizer", required=True, metavar="bytes|gpt2|llama3|FILE",
        help="FILE: a Hugging Face tokenizer.json, or a tiktoken rank file (.tiktoken, Llama 3's tokenizer.model)")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add("--pattern", choices=PATTERNS, help="how a rank file's encoding cuts words (default: by its size, if known)")
    add("--format", choices=("auto", "text", "jsonl", "parquet"), default="auto", help="of the inputs (default: by suffix)")
    add("--field", default="text", metavar="NAME", help="JSONL field or parquet column (default: text)")
    add("--document-separator", metavar="REGEX",
        help="what parts the documents of a text file: blank-lines, lines, or a regular expression, whose match is "
             "dropped (default: a file is one document)")
    add("--separator", type=int, metavar="ID", help="token that ends a document (default: the end-of-text token)")
    add("--val-fraction", type=float, default=0.05, metavar="X",
        help="share of the documents for validation, chosen by a hash of seed and index; of a single whole text, its "
             "last part; 0: none (default: 0.05)")
    add("--seed", type=int, default=1, metavar="N", help="of the split (default: 1)")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a file (default: 100,000,000)")
    add("--workers", type=int, metavar="N", help="tokenizing processes (default: one per core; bytes: 1)")
    add("--overwrite", action="store_true", help="replace the shards that FOLDER holds")
    add("--help", action="help", help="show this and stop")
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options):
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction}: must be at least 0 and below 1")
    if not 1 <= options.shard_tokens <= 2_000_000_000:  # the header's count is an int32; a short shard may join
        raise UserError(f"--shard-tokens {options.shard_tokens}: must be 1 to 2,000,000,000")
    if options.workers is None:
        options.workers = 1 if options.tokenizer == "bytes" else len(os.sched_getaffinity(0))
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if options.separator is not None and not 0 <= options.separator < 2**31:
        raise UserError(f"--separator {options.separator}: not a token id")
    for path in options.inputs:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file")
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; give its files, for example {path.rstrip('/')}/*.txt")
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: empty")
    if options.document_separator is not None:
        if not any(file_format(path, options.format) == "text" for path in options.inputs):
            raise UserError("--document-separator is for text files; a JSONL line or parquet row is a document")
        options.document_separator = separator_regex(options.document_separator)
    if not options.overwrite and existing_shards(options.out):
        raise UserError(f"{options.out}: already holds shards; give another --out, or --overwrite")


def write_tokenizer(tokenizer, folder):
    tokenizer.json_path = None
    if tokenizer.json is not None:
        tokenizer.json_path = folder / "tokenizer.json"
        partial = folder / "tokenizer.json.tmp"
        partial.write_text(tokenizer.json, encoding="utf-8")
        os.replace(partial, tokenizer.json_path)


def prepare(arguments):
    options = parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer, options.pattern)
    run = Preparation(options, tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    writers = {split: Writer(options.out, split, run.dtype, options.shard_tokens) for split in ("train", "val")}
    try:
        run.run(writers)
        for writer in writers.values():
            writer.finish()
        write_tokenizer(tokenizer, options.out)
        for old in existing_shards(options.out):
            old.unlink()
        for writer in writers.values():
            writer.commit()
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    run.report(writers)


def main():
    try:
        prepare(sys.argv[1:])
    except UserError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the summary has left; the shards are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
