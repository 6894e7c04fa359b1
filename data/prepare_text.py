"""Text as prepare.py prepares it: documents get their split, and become tokens with the separator at their ends."""

import collections
import functools
import hashlib
import re
import shutil
import sys
import tempfile

import numpy as np

from prepare_cuts import CutCheck
from prepare_inputs import Input, is_compressed, json_layout
from prepare_output import Progress, file_range, ini_path
from prepare_readers import (BATCH, SEPARATOR_NAMES, paragraph_boundary, read_json, read_jsonl, read_parquet, read_text)
from prepare_workers import ordered_map
from user_error import UserError, naming

MAX_WARNINGS = 5  # special tokens that are named


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


class TextEncoder:
    """Batches of text to tokens, in a worker process."""

    def __init__(self, tokenizer, separator, dtype):
        self.tokenizer, self.separator, self.dtype = tokenizer, separator, dtype

    def __call__(self, batch):
        return self.encode(batch), self.count_specials(batch)

    @functools.cached_property
    def specials(self):
        return specials_regex(self.tokenizer)

    def count_specials(self, batch):
        """How often each special token stands in the texts of a batch."""
        texts = {str: [], bytes: []}
        for _, text, *_ in batch:
            texts[type(text)].append(text)
        names = self.specials[str].findall("\0".join(texts[str]))
        names += [name.decode() for name in self.specials[bytes].findall(b"\0".join(texts[bytes]))]
        return collections.Counter(names)

    def encode(self, batch):
        """A list of (split, text, ends_document), with a True behind it where the text goes on with the document
        before -> {split: (tokens, ends)}, where row i of ends says how many tokens and bytes of text there are up
        to the end of text i."""
        tokens, ends = {}, {}
        encoded = self.tokenizer.encode([text for _, text, *_ in batch],
                                        [bool(goes_on) for _, _, _, *goes_on in batch])
        for (split, text, ends_document, *_), ids in zip(batch, encoded):
            out = tokens.setdefault(split, [])
            out.append(np.asarray(ids, dtype=self.dtype))
            if ends_document:
                out.append(np.array([self.separator], dtype=self.dtype))
            ends.setdefault(split, []).append((len(ids) + ends_document, byte_length(text)))
        return {split: (np.concatenate(arrays), np.cumsum(ends[split], axis=0)) for split, arrays in tokens.items()}


def byte_length(text):
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode(errors="replace"))


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

    def useful_workers(self):
        """No more than there are batches."""
        workers = self.options.workers
        if self.total is not None and not any(is_compressed(source.path) for source in self.inputs):
            workers = max(1, min(workers, -(-self.total // BATCH)))
        return workers

    def run(self, writers, forced={}):
        if not forced:
            self.cut = self.single_text_cut()
        progress = Progress(self.total)
        self.specials = collections.Counter()
        encoder = TextEncoder(self.tokenizer, self.separator, self.dtype)
        for arrays, specials in ordered_map(self.batches(progress, forced), self.useful_workers(), encoder):
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
        self.print_configuration(splits)

    def print_configuration(self, splits):
        """What a run on these shards needs in its INI file."""
        print(f"\n[model]\nvocab_size = {self.vocab_size}\n\n[data]")
        for split in splits:
            print(f"{split} = {ini_path(self.options.out)}/{split}_*.bin")
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
