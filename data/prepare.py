#!/usr/bin/env python3
"""Text to token shards that train_iha reads (llm.c's format).

Reads text, JSONL and parquet files as a stream, tokenizes in --workers processes, and writes
OUT/train_000000.bin, ..., OUT/val_000000.bin, dataset.json (see write_dataset) and, for every tokenizer but `bytes`,
the tokenizer.json that sampling and `train_iha generate` need. The same input, tokenizer and seed give the same files, whatever
the number of workers. Nothing appears under its final name before everything is written.

How it flows: readers yield (text, ends_document) pieces -> documents get their split -> batches of about a
megabyte -> workers return token arrays -> one writer per split.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit("prepare.py: numpy is not installed; run: make deps, then .venv/bin/python data/prepare.py ...")

from prepare_readers import BATCH, file_format, paragraph_boundary, read_jsonl, read_parquet, read_text, separator_regex
from prepare_tokenizers import NAMED, load_tokenizer
from user_error import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers is the one knob

EXAMPLES = """\
examples:
  data/corpus.py bible
  data/prepare.py --tokenizer bytes --document-separator blank-lines --out data/bible data/corpus/bible.txt
  data/prepare.py --tokenizer gpt2 --field content --workers 8 --out data/web web-*.jsonl
  data/prepare.py --tokenizer tokenizer.model --pattern llama3 --out data/wiki wiki-*.parquet
  data/prepare.py --tokenizer my/tokenizer.json --out data/books books/*.txt
"""

# -------------------------------------------------------------------------------------- tokenizing

_tokenizer = _separator = _dtype = None  # a worker's own


def start_worker(*state):
    global _tokenizer, _separator, _dtype
    _tokenizer, _separator, _dtype = state


def encode_batch(batch):
    """A list of (split, text, ends_document), with a True behind it where the text goes on with the document before ->
    {split: (tokens, ends)}, where row i of ends says how many tokens and bytes of text there are up to the end of text i."""
    tokens, ends = {}, {}
    encoded = _tokenizer.encode([text for _, text, *_ in batch], [bool(goes_on) for _, _, _, *goes_on in batch])
    for (split, text, ends_document, *_), ids in zip(batch, encoded):
        out = tokens.setdefault(split, [])
        out.append(np.asarray(ids, dtype=_dtype))
        if ends_document:
            out.append(np.array([_separator], dtype=_dtype))
        ends.setdefault(split, []).append((len(ids) + ends_document, byte_length(text)))
    return {split: (np.concatenate(arrays), np.cumsum(ends[split], axis=0)) for split, arrays in tokens.items()}


def byte_length(text):
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode(errors="replace"))


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
        self.counts, self.bytes, self.file = [], [], None

    def name(self, i, suffix=""):
        return self.folder / f"{self.split}_{i:06d}.bin{suffix}"

    def write(self, tokens, ends):
        """ends: see encode_batch. A text that two shards share counts in both, in proportion to its tokens there."""
        done = 0
        bytes_until = lambda count: round(np.interp(count, np.append(0, ends[:, 0]), np.append(0, ends[:, 1])))
        while done < len(tokens):
            if self.file is None or self.counts[-1] == self.shard_tokens:
                self.next_shard()
            part = tokens[done:done + self.shard_tokens - self.counts[-1]]
            part.astype(self.dtype.newbyteorder("<")).tofile(self.file)
            self.counts[-1] += len(part)
            self.bytes[-1] += bytes_until(done + len(part)) - bytes_until(done)
            done += len(part)

    def next_shard(self):
        self.close()
        self.file = open(self.name(len(self.counts), ".tmp"), "wb")
        self.file.write(bytes(1024))
        self.counts.append(0)
        self.bytes.append(0)

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
                self.bytes[-2:] = [self.bytes[-2] + self.bytes[-1]]
                self.close()
            last.unlink()

    def commit(self):
        for i in range(len(self.counts)):
            os.replace(self.name(i, ".tmp"), self.name(i))

    def discard(self):
        if self.file:
            self.file.close()
        self.file, self.counts, self.bytes = None, [], []
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

    def whole_documents(self, pieces):
        """The pieces of a document put together again, for a tokenizer that a cut anywhere would change."""
        if not self.tokenizer.whole_documents:
            yield from pieces
            return
        held = []
        for text, ends, position in pieces:
            held.append(text)
            if ends:
                yield "".join(held), ends, position
                held = []

    def split_of(self, index, forced):
        if self.cut:
            return ("train", "val")[index]
        return forced.get(index) or ("val" if score(self.options.seed, index) < self.options.val_fraction else "train")

    def batches(self, progress, forced):
        """Batches for encode_batch. Blank documents are left out."""
        self.documents, self.bytes, self.blank = collections.Counter(), collections.Counter(), 0
        batch, size, index, started, before = [], 0, 0, False, 0
        for path in self.options.inputs:
            for text, ends, position in self.whole_documents(self.pieces(path)):
                progress.show(before + position)
                if ends and not started and not text.strip():
                    self.blank += 1
                    continue
                split = self.split_of(index, forced)
                length = byte_length(text)
                batch.append((split, text if isinstance(text, bytes) else unpaired(text), ends) + (True,) * started)
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
            for split, (tokens, ends) in arrays.items():
                writers[split].write(tokens, ends)
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
            + ", dataset.json" + (", tokenizer.json" if self.tokenizer.json_path else ""))
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


def existing_shards(folder):
    return [path for split in ("train", "val") for path in folder.glob(f"{split}_[0-9]*.bin")]


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1], epilog=EXAMPLES,
        add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(message)

    parser.error = fail
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=".jsonl or .ndjson, .parquet; anything else is text")
    add("--tokenizer", required=True, metavar="bytes|gpt2|llama3|FILE|FOLDER",
        help="FILE: a Hugging Face tokenizer.json, Mistral's tekken.json, or a tiktoken rank file (.tiktoken, Llama 3's "
             "tokenizer.model); FOLDER: a Hugging Face model's")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add("--pattern", metavar="NAME|REGEX",
        help=f"how a rank file's encoding cuts words (default: by its size, if known): {', '.join(NAMED)}, or a regular "
             "expression of its own")
    add("--format", choices=("auto", "text", "jsonl", "parquet"), default="auto", help="of the inputs (default: by suffix)")
    add("--field", default="text", metavar="NAME", help="JSONL field or parquet column (default: text)")
    add("--document-separator", metavar="REGEX",
        help="what parts the documents of a text file: blank-lines, lines, or a regular expression, whose match is "
             "dropped (default: a file is one document)")
    add("--separator", type=int, metavar="ID",
        help="token that ends a document (default: the eos_token of a tokenizer_config.json beside the tokenizer, or its "
             "token with a known name: <|endoftext|>, </s>, ...)")
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
        partial.write_text(tokenizer.json, encoding="utf-8", newline="")
        os.replace(partial, tokenizer.json_path)


def write_dataset(run, folder, writers):
    """dataset.json: what made these shards. tokenizer_sha256 is that of tokenizer.json, null for bytes; separator the id
    that ends a document; bytes the UTF-8 bytes of text in a shard."""
    tokenizer, path = run.tokenizer, run.tokenizer.json_path
    shards = {writer.name(i).name: {"tokens": count, "bytes": length} for writer in writers.values()
              for i, (count, length) in enumerate(zip(writer.counts, writer.bytes))}
    content = {"tokenizer": path.name if path else "bytes",
               "tokenizer_sha256": hashlib.sha256(tokenizer.json.encode()).hexdigest() if path else None,
               "vocab_size": run.vocab_size, "separator": run.separator, "shards": shards}
    partial = folder / "dataset.json.tmp"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
    os.replace(partial, folder / "dataset.json")


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
        write_dataset(run, options.out, writers)
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
