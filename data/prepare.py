#!/usr/bin/env python3
"""Text to token shards that train_iha reads (llm.c's format).

Reads text, JSON and parquet as a stream, from files or pipes, compressed or not; tokenizes in --workers
processes; and writes OUT/train_000000.bin, ..., OUT/val_000000.bin, dataset.json (see write_dataset) and, for
every tokenizer but `bytes`, the tokenizer.json that sampling and `train_iha generate` need. The same input,
tokenizer and seed give the same files, whatever the number of workers. Nothing appears under its final name
before everything is written.

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
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit("prepare.py: numpy is not installed; run: make deps, then .venv/bin/python data/prepare.py ...")

from prepare_cuts import CutCheck
from prepare_inputs import Input, format_by_name, is_compressed, json_layout
from prepare_output import Progress, Writer, ini_path, locked, remove_temporary
from prepare_readers import (BATCH, SEPARATOR_NAMES, paragraph_boundary, read_json, read_jsonl, read_parquet, read_text,
                             separator_regex)
from prepare_tokenizers import NAMED, load_tokenizer
from user_error import UserError, allow_any_file_name, describe, naming, one_line

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers is the one knob

MAX_WARNINGS = 5  # special tokens that are named

EXAMPLES = """\
examples:
  data/corpus.py bible
  data/prepare.py --tokenizer bytes --document-separator blank-lines --out data/bible data/corpus/bible.txt
  data/prepare.py --tokenizer gpt2 --field content --workers 8 --out data/web web-*.jsonl
  data/prepare.py --tokenizer tokenizer.model --pattern llama3 --out data/wiki wiki-*.parquet
  data/prepare.py --tokenizer my/tokenizer.json --out data/books books/*.txt.gz
  data/prepare.py --tokenizer bytes --document-separator '<|endoftext|>' --out data/stories stories.txt
  curl -s https://host/web.jsonl.zst | data/prepare.py --tokenizer gpt2 --out data/web -
"""

# -------------------------------------------------------------------------------------- tokenizing

_tokenizer = _separator = _dtype = _specials = None  # a worker's own


def start_worker(*state):
    global _tokenizer, _separator, _dtype, _specials
    _tokenizer, _separator, _dtype = state
    _specials = specials_regex(_tokenizer)


def special_names(tokenizer):
    """The special tokens of a tokenizer as text; of bytes, which has none, the name that most data sets
    use."""
    if hasattr(tokenizer, "encoding"):
        return sorted(tokenizer.encoding._special_tokens)
    if hasattr(tokenizer, "tokenizer"):
        added = tokenizer.tokenizer.get_added_tokens_decoder().values()
        return sorted(token.content for token in added if token.special and token.content)
    return ["<|endoftext|>"]


def specials_regex(tokenizer):
    """Finds special tokens in a text, given as str and as bytes; longest first, as one may begin another."""
    names = sorted(special_names(tokenizer), key=len, reverse=True)
    pattern = "|".join(map(re.escape, names)) or "(?!)"
    return {str: re.compile(pattern), bytes: re.compile(pattern.encode())}


def count_specials(batch):
    """How often each special token stands in the texts of a batch."""
    texts = {str: [], bytes: []}
    for _, text, *_ in batch:
        texts[type(text)].append(text)
    names = _specials[str].findall("\0".join(texts[str]))
    names += [name.decode() for name in _specials[bytes].findall(b"\0".join(texts[bytes]))]
    return collections.Counter(names)


def process_batch(batch):
    return encode_batch(batch), count_specials(batch)


def encode_batch(batch):
    """A list of (split, text, ends_document), with a True behind it where the text goes on with the document
    before -> {split: (tokens, ends)}, where row i of ends says how many tokens and bytes of text there are up
    to the end of text i."""
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
                result = process_batch(pipe.recv())
            except EOFError:
                raise
            except Exception as error:
                result = error
            pipe.send(result)


def ordered_map(batches, workers, state):
    """process_batch over the batches, in order. Worker k has batches k, k + workers, ...: one in progress each,
    so memory stays bounded, and pipes without threads, so that nothing can hang when a worker dies or Ctrl-C
    comes."""
    if workers == 1:
        start_worker(*state)
        yield from map(process_batch, batches)
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
            raise UserError(f"{options.tokenizer}: no end-of-text token known in its vocabulary; say which "
                            "id ends a document: --separator ID")
        self.vocab_size = max(tokenizer.vocab_size, separator + 1)
        self.separator = separator
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        self.inputs = [Input(path, options.out) for path in options.inputs]
        sizes = [source.size for source in self.inputs]
        self.total = None if None in sizes else sum(sizes)  # bytes as stored
        self.cut, self.texts, self.text_documents = None, 0, 0
        anywhere = not tokenizer.wants_str or tokenizer.whole_documents  # bytes; or pieces are put together again
        self.is_cut = None if anywhere else CutCheck(tokenizer)
        self.is_split = options.val_fraction == 0  # has each split its document?

    def single_text_cut(self):
        """(position, boundary, size) for one whole text, which has no second document to validate on."""
        options, source = self.options, self.inputs[0]
        if len(self.inputs) > 1 or options.document_separator or options.val_fraction == 0:
            return None
        source.open().close()
        if source.format(options.format) != "text":
            return None
        size = source.content_size(Progress(source.size, "measuring: ").show)
        if size < 2:
            raise UserError(f"{source.name}: too short to cut a validation part from; use --val-fraction 0")
        return *paragraph_boundary(source, size, options.val_fraction), size

    def pieces(self, source):
        options = self.options
        source.keep = source.keep and not self.is_split
        with source.open() as stream:
            kind = source.format(options.format)
            if kind == "jsonl":
                read = read_jsonl if json_layout(source.head) == "lines" else read_json
                yield from read(stream, source, options.field)
            elif kind == "parquet":
                with self.seekable(stream, source) as file:
                    yield from read_parquet(file, source, options.field)
            else:
                parts = [(0, self.cut[0]), (self.cut[0], self.cut[2])] if self.cut else [(0, None)]
                self.texts += 1
                for begin, end in parts:
                    for piece in read_text(stream, source, begin, end, options.document_separator,
                                           self.tokenizer.wants_str, any_byte=options.format == "text",
                                           is_cut=self.is_cut):
                        self.text_documents += piece[1]
                        yield piece

    def seekable(self, stream, source):
        """A parquet file, whose index is at its end, as a file one can seek in."""
        if not source.read_once:
            return open(source.path, "rb")
        file = tempfile.TemporaryFile(dir=self.options.out)
        with naming(self.options.out):
            shutil.copyfileobj(stream, file, BATCH)
            file.seek(0)
        return file

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
        self.texts, self.text_documents = 0, 0
        batch, size, index, started, before = [], 0, 0, False, 0
        for source in self.inputs:
            for text, ends, position in self.whole_documents(self.pieces(source)):
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
                    if len(self.documents) == 2 and not self.is_split and not self.cut:
                        self.is_split = True  # so nothing is read again
                        source.forget()
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
            before += source.consumed if source.size is None else source.size
        if batch:
            yield batch
        progress.show(before, last=True)

    def run(self, writers, forced={}):
        if not forced:
            self.cut = self.single_text_cut()
        progress = Progress(self.total)
        self.specials = collections.Counter()
        state = (self.tokenizer, self.separator, self.dtype)
        workers = self.options.workers
        if self.total is not None and not any(is_compressed(source.path) for source in self.inputs):
            workers = max(1, min(workers, -(-self.total // BATCH)))
        for arrays, specials in ordered_map(self.batches(progress, forced), workers, state):
            self.specials += specials
            for split, (tokens, ends) in arrays.items():
                writers[split].write(tokens, ends)
        self.check_split(writers, forced)

    def check_split(self, writers, forced):
        """Few documents may all fall on one side; then the lowest score moves to val, or the highest to
        train."""
        count = sum(self.documents.values())
        if count == 0:
            raise UserError(f"{self.inputs[0].name}: no text"
                            + (" in any input" if len(self.inputs) > 1 else ""))
        if self.options.val_fraction == 0 or len(self.documents) == 2:
            return
        if count == 1 or self.cut:
            raise UserError(self.only_one_document())
        missing = "train" if "val" in self.documents else "val"
        scores = [score(self.options.seed, index) for index in range(count)]
        index = scores.index(max(scores) if missing == "train" else min(scores))
        for writer in writers.values():
            writer.discard()
        self.run(writers, {index: missing})

    def only_one_document(self):
        left = "none is left to validate on; use --val-fraction 0"
        if self.separator_is_missing():
            return f"{self.missing_separator()}, so there is one document and {left}, or another separator"
        if self.cut or self.options.separator_text is not None or not self.texts:
            return f"only one document that is not blank, so {left}"
        return f"only one document, so {left}, or cut it up with --document-separator"

    def separator_is_missing(self):
        return self.options.separator_text is not None and self.texts and self.text_documents == self.texts

    def missing_separator(self):
        separator = self.options.separator_text
        literal = separator not in SEPARATOR_NAMES and not separator.startswith("regex:")
        return f"--document-separator '{separator}' stands in no text input" + (
            "; it is taken literally (regex:PATTERN is a regular expression)" if literal else "")

    def report(self, writers):
        options, folder = self.options, self.options.out
        counts = {split: sum(writer.counts) for split, writer in writers.items()}
        splits = [split for split in writers if counts[split]]

        def row(label, values):
            print(f"{label:<16}" + "   ".join(f"{split} {values[split]}" for split in splits))

        row("documents", {split: f"{self.documents[split]:,}" for split in splits})
        if self.cut:
            print(f"                (one text, cut after a {self.cut[1]} at byte {self.cut[0]:,}: "
                  f"the last {100 - 100 * self.cut[0] / self.cut[2]:.2f}% is val)")
        if self.blank:
            print(f"                ({self.blank:,} blank ones left out)")
        row("tokens", {split: f"{counts[split]:,}" for split in splits})
        row("bytes per token", {split: f"{self.bytes[split] / counts[split]:.4f}" for split in splits})
        print(f"files           {folder}/: " + ", ".join(
            file_range(split, len(writers[split].counts)) for split in splits) + f" ({np.dtype(self.dtype).name})"
            + ", dataset.json" + (", tokenizer.json" if self.tokenizer.json_path else ""))
        print(f"\n[model]\nvocab_size = {self.vocab_size}\n\n[data]")
        for split in splits:
            print(f"{split} = {ini_path(folder)}/{split}_*.bin")
        path = ini_path(self.tokenizer.json_path, is_pattern=False) if self.tokenizer.json_path else "bytes"
        print(f"tokenizer = {path}" if path else
              "# tokenizer: the folder's name has a blank and then '#' or ';', where an INI value ends; rename the "
              "folder, or give data.tokenizer=FILE on the command line")

    def warn(self):
        """What the user may have meant otherwise."""
        def warning(text):
            print(f"prepare.py: warning: {text}", file=sys.stderr)

        most = self.specials.most_common(MAX_WARNINGS)
        for name, count in most:
            times = f"{count:,} time" + "s" * (count != 1)
            advice = f"; --document-separator '{name}' ends documents there" if self.texts else ""
            warning(f"{name} stands in the text {times} and was encoded as ordinary text, not as a special token"
                    + advice)
        if len(self.specials) > len(most):
            warning(f"so do {len(self.specials) - len(most)} other special tokens, less often")
        if self.separator_is_missing():
            warning(self.missing_separator())


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
    add("inputs", nargs="+", metavar="INPUT",
        help="text, JSON (an object per line, an array, or objects one after another) or parquet; a pipe, or - "
             "for standard input; text and JSON also compressed by gzip, zstd, bzip2 or xz")
    add("--tokenizer", required=True, metavar="bytes|gpt2|llama3|FILE|FOLDER",
        help="FILE: a Hugging Face tokenizer.json, Mistral's tekken.json, or a tiktoken rank file (.tiktoken, "
             "Llama 3's tokenizer.model); FOLDER: a Hugging Face model's")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add("--pattern", metavar="NAME|REGEX",
        help=f"how a rank file's encoding cuts words (default: by its size, if known): {', '.join(NAMED)}, or "
             "a regular expression of its own")
    add("--format", choices=("auto", "text", "jsonl", "parquet"), default="auto",
        help="of the inputs (default: by their first bytes and their names); jsonl: any of the JSON layouts; "
             "text: every byte as it is")
    add("--field", default="text", metavar="NAME",
        help="JSON field or parquet column (default: text). It must be there and hold strings; null is a blank "
             "document, and blank documents are left out")
    add("--document-separator", metavar="TEXT",
        help="what parts the documents of a text, and is dropped: blank-lines, lines, a text taken literally, "
             "or regex:PATTERN (default: an input is one document)")
    add("--separator", type=int, metavar="ID",
        help="token that ends a document (default: the eos_token of a tokenizer_config.json beside the "
             "tokenizer, or its token with a known name: <|endoftext|>, </s>, ...)")
    add("--val-fraction", type=float, default=0.05, metavar="X",
        help="share of the documents for validation, chosen by a hash of seed and index; of a single whole "
             "text, its last part; 0: none (default: 0.05)")
    add("--seed", type=int, default=1, metavar="N", help="of the split (default: 1)")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N",
        help="tokens in a file (default: 100,000,000)")
    add("--workers", type=int, metavar="N", help="tokenizing processes (default: one per core; bytes: 1)")
    add("--overwrite", action="store_true", help="replace the shards that FOLDER holds")
    add("--help", action="help", help="show this and stop")
    options = parser.parse_args(arguments)
    check(options)
    return options


def check_input(path):
    if path == "-":
        return
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give its files, for example {path.rstrip('/')}/*.txt")
    if Input(path).size == 0:
        raise UserError(f"{path}: empty")


def may_be_text(path, asked):
    source = Input(path)
    if source.read_once:  # it must not be opened yet
        return (format_by_name(path) if asked == "auto" else asked) in (None, "text")
    source.open().close()
    return source.format(asked) == "text"


def check(options):
    for name, value in vars(options).items():
        if value == []:  # what argparse makes of the value "--"
            raise UserError(f"--{name.replace('_', '-')}: '--' cannot be given as a value; a separator may be written regex:--")
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
    if re.search("[\0-\x1f\x7f]", str(options.out)):
        raise UserError(f"--out {options.out}: a line break or control character in the name, which no "
                        "configuration can hold")
    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise UserError(f"--out {options.out}: is no folder")
    if options.inputs.count("-") > 1:
        raise UserError("-: standard input can only be read once")
    for path in options.inputs:
        check_input(path)
    options.separator_text = options.document_separator
    if options.document_separator is not None:
        if not any(may_be_text(path, options.format) for path in options.inputs):
            raise UserError("--document-separator is for text files; a JSON object or parquet row is a "
                            "document")
        options.document_separator = separator_regex(options.document_separator)
    check_no_shards(options)


def copy_end_ids(path, folder):
    """generation_config.json from beside the tokenizer, whose end ids generation stops at; without one there is none."""
    source, target = Path(path).parent / "generation_config.json", folder / "generation_config.json"
    if os.path.isfile(path) and source.exists():  # a name such as gpt2 is no path
        if source.resolve() != target.resolve():
            target.write_bytes(source.read_bytes())
    else:
        target.unlink(missing_ok=True)


def write_tokenizer(tokenizer, folder):
    tokenizer.json_path = None
    if tokenizer.json is not None:
        tokenizer.json_path = folder / "tokenizer.json"
        partial = folder / "tokenizer.json.tmp"
        partial.write_text(tokenizer.json, encoding="utf-8", newline="")
        os.replace(partial, tokenizer.json_path)
        copy_end_ids(tokenizer.path, folder)


def write_dataset(run, folder, writers):
    """dataset.json: what made these shards. tokenizer_sha256 is that of tokenizer.json, null for bytes;
    separator the id that ends a document; bytes the UTF-8 bytes of text in a shard."""
    tokenizer, path = run.tokenizer, run.tokenizer.json_path
    shards = {writer.name(i).name: {"tokens": count, "bytes": length} for writer in writers.values()
              for i, (count, length) in enumerate(zip(writer.counts, writer.bytes))}
    content = {"tokenizer": path.name if path else "bytes",
               "tokenizer_sha256": hashlib.sha256(tokenizer.json.encode()).hexdigest() if path else None,
               "vocab_size": run.vocab_size, "separator": run.separator, "shards": shards}
    partial = folder / "dataset.json.tmp"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
    os.replace(partial, folder / "dataset.json")


def check_no_shards(options):
    if not options.overwrite and existing_shards(options.out):
        raise UserError(f"{options.out}: already holds shards; give another --out, or --overwrite")


def prepare(arguments):
    options = parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer, options.pattern)
    run = Preparation(options, tokenizer)
    with locked(options.out):
        check_no_shards(options)  # another run may just have ended
        return run, write(run, tokenizer, options.out)


def write(run, tokenizer, folder):
    remove_temporary(folder)
    writers = {split: Writer(folder, split, run.dtype, run.options.shard_tokens)
               for split in ("train", "val")}
    try:
        run.run(writers)
        for writer in writers.values():
            writer.finish()
        # dataset.json is away while shards are replaced: old ones are never beside the description of new ones.
        (folder / "dataset.json").unlink(missing_ok=True)
        written = set().union(*(writer.commit() for writer in writers.values()))
        for old in existing_shards(folder):
            if old not in written:
                old.unlink()
        with naming(folder / "tokenizer.json"):
            write_tokenizer(tokenizer, folder)
        with naming(folder / "dataset.json"):
            write_dataset(run, folder, writers)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        remove_temporary(folder)
        raise
    return writers


def report(run, writers):
    """The summary; the shards are there whatever becomes of it."""
    if sys.stdout is not None:
        try:
            run.report(writers)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again
            why = f"{error.strerror}; the shards are written"
            raise OSError(error.errno, why, "standard output") from None
    run.warn()


def main():
    if sys.stderr is None:  # closed by the shell
        sys.stderr = open(os.devnull, "w")
    allow_any_file_name()
    try:
        report(*prepare(sys.argv[1:]))
    except UserError as error:
        print(f"prepare.py: {one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the summary has closed the pipe; the shards are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"prepare.py: {one_line(describe(error))}", file=sys.stderr)
        return 1
    except MemoryError:
        print("prepare.py: out of memory; try fewer --workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def terminate(number, frame):
    """SIGTERM and SIGHUP remove the temporary files as well."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, terminate)
    sys.exit(main())
