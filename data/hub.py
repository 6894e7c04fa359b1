"""Corpora from the Hugging Face Hub, for corpus.py: downloads the files of a data set through huggingface_hub, tokenizes
them while the next one downloads, stops at a given number of tokens, and leaves shards.

A file is checked by the hash that the Hub lists (SHA-256, or Git's). A connection that breaks is continued where it broke;
a run that is stopped keeps its downloads, and the same command continues. They are removed once the shards are written.
"""

import errno
import hashlib
import os
import queue
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np

from prepare_inputs import Input, json_layout
from prepare_output import file_range, ini_path, locked
from prepare_readers import read_json, read_jsonl, read_parquet, read_text
from prepare_text import TextEncoder, byte_length, score
from prepare_tokenizers import load_tokenizer
from prepare_workers import ordered_map
from user_error import UserError

DATA_FILES = r".*\.(parquet|jsonl|jsonl\.gz|jsonl\.zst|txt|txt\.gz)"
TRIES, BATCH = 8, 1 << 20
FIRST_GUESS = 0.3  # tokens in a stored byte, before a file has been counted
MISSING = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "HFValidationError")


def library():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before it is imported
    try:
        import huggingface_hub
        return huggingface_hub
    except ImportError:
        raise UserError("huggingface_hub is not installed; run: make deps") from None


def in_short(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def failure(name, text):
    error = OSError(5, text)
    error.filename = name
    return error


class DataSet:
    """The files of a data set on the Hub, in name order."""

    def __init__(self, repo, revision, pattern, folder):
        self.hub, self.repo, self.folder = library(), repo, folder
        api = self.hub.HfApi()
        try:
            self.revision = api.dataset_info(repo, revision=revision).sha
            tree = list(api.list_repo_tree(repo, repo_type="dataset", revision=self.revision, recursive=True))
        except Exception as error:  # its own, httpx's, sockets'
            if type(error).__name__ in MISSING:
                raise UserError(f"{repo}: no such data set on the Hub, or it needs a login "
                                f"({type(error).__name__})") from None
            raise failure(repo, f"cannot ask the Hub about it: {in_short(error)}") from None
        files = [f for f in tree if getattr(f, "size", None) and re.fullmatch(pattern, f.path)]
        train = [f for f in files if "train" in f.path]
        self.files = sorted(train if pattern == DATA_FILES and train else files, key=lambda f: f.path)
        if not self.files:
            raise UserError(f"{repo}: no file matches {pattern}; name them: --files REGEX")

    def fetch(self, file):
        """The path of a whole file with the Hub's hash."""
        for attempt in range(TRIES):
            try:
                path = Path(self.hub.hf_hub_download(self.repo, file.path, repo_type="dataset", revision=self.revision,
                                                     local_dir=self.folder))
                break
            except Exception as error:
                if attempt == TRIES - 1 or is_final(error):
                    raise failure(file.path, f"the download fails: {in_short(error)}; the same command continues it") from None
                time.sleep(float(os.environ.get("CORPUS_RETRY_SECONDS", "1")) * 2 ** attempt)
        lfs = file.lfs
        digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with open(path, "rb") as stream:
            while chunk := stream.read(BATCH):
                digest.update(chunk)
        wanted = lfs["sha256"] if lfs else file.blob_id
        if digest.hexdigest() != wanted:
            path.unlink()
            raise failure(file.path, f"its hash is {digest.hexdigest()[:12]}, and the Hub lists {wanted[:12]}; the file was "
                                     "removed; run the same command again")
        return path


def is_final(error):
    """Whether trying again is of no use: refused or not found by the server, or the disk is full."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    return refused or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


class Ahead:
    """A file that downloads in a thread. The program may end before it does."""

    def __init__(self, data, file):
        self.result = queue.Queue()
        threading.Thread(target=self.run, args=(data, file), daemon=True).start()

    def run(self, data, file):
        try:
            self.result.put((data.fetch(file), None))
        except BaseException as error:
            self.result.put((None, error))

    def path(self):
        path, error = self.result.get()
        if error:
            raise error
        return path


def documents(path, field, as_str):
    source = Input(str(path))
    with source.open() as stream:
        kind = source.format("auto")
        if kind == "parquet":
            with open(path, "rb") as file:
                yield from (text for text, *_ in read_parquet(file, source, field))
            return
        if kind == "jsonl":
            pieces = (read_jsonl if json_layout(source.head) == "lines" else read_json)(stream, source, field)
            yield from (text for text, *_ in pieces)
            return
        part = [text for text, *_ in read_text(stream, source, 0, None, None, as_str)]
        yield ("" if as_str else b"").join(part)


class HubPreparation:
    """One run, as prepare.write() takes it."""
    chat = False  # an option that prepare.write() asks for

    def __init__(self, options, repo, revision, pattern):
        self.options, self.repo, self.limit = self, repo, options.tokens
        self.out, self.field, self.val_fraction, self.seed = options.out, options.field, options.val_fraction, 1
        self.shard_tokens, self.workers = options.shard_tokens, options.workers
        self.tokenizer = load_tokenizer(options.tokenizer, None)
        self.separator = self.tokenizer.end_of_text
        if self.separator is None:
            raise UserError(f"{options.tokenizer}: no end-of-text token known in its vocabulary")
        self.vocab_size = max(self.tokenizer.vocab_size, self.separator + 1)
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        self.downloads = self.out / "downloads"
        self.data = DataSet(repo, revision, options.files or pattern, self.downloads)
        self.total, self.counts, self.used = 0, {"train": 0, "val": 0}, 0
        self.rate, self.begin, self.shown = FIRST_GUESS, time.monotonic(), 0.0

    def check_disk(self):
        shards = self.limit * np.dtype(self.dtype).itemsize
        sizes = np.cumsum([file.size for file in self.data.files])
        enough = int(np.searchsorted(sizes * self.rate, self.limit))
        need = shards + int(sizes[min(enough, len(sizes) - 1)])
        free = shutil.disk_usage(self.out).free
        print(f"{self.repo} at {self.data.revision[:12]}: {len(self.data.files)} files, {sizes[-1] / 1e9:.2f} GB; "
              f"{self.limit:,} tokens need about {need / 1e9:.2f} GB of disk, {free / 1e9:.1f} GB are free", file=sys.stderr)
        if need > free:
            raise UserError(f"{self.out}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; lower --tokens, "
                            "or give another --out")

    def batches(self):
        batch, size, index, ahead = [], 0, 0, None
        for i, file in enumerate(self.data.files):
            path = (ahead or Ahead(self.data, file)).path()
            before, ahead, self.used = self.total, None, i + 1
            if i + 1 < len(self.data.files) and self.total + self.rate * file.size < 1.05 * self.limit:
                ahead = Ahead(self.data, self.data.files[i + 1])
            for text in documents(path, self.field, self.tokenizer.wants_str):
                if not text.strip():
                    continue
                split = "val" if score(self.seed, index) < self.val_fraction else "train"
                batch.append((split, text, True))
                size, index = size + byte_length(text), index + 1
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
                    if self.total >= self.limit:
                        return
            if batch:
                yield batch
                batch, size = [], 0
            if self.total > before:
                self.rate = (self.total - before) / file.size

    def run(self, writers):
        self.check_disk()
        encoder = TextEncoder(self.tokenizer, self.separator, self.dtype)
        for encoded, _ in ordered_map(self.batches(), self.workers, encoder):
            for split in writers:
                if split in encoded and self.total < self.limit:
                    tokens, ends = encoded[split]
                    tokens = tokens[:self.limit - self.total]
                    writers[split].write(tokens, ends)
                    self.total += len(tokens)
                    self.counts[split] += len(tokens)
            self.show()
            if self.total >= self.limit:
                break
        self.show(last=True)
        if self.total == 0:
            raise UserError(f"{self.repo}: its files have no text in the field {self.field}; give another --field")

    def show(self, last=False):
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not last and now - self.shown < (0.2 if terminal else 10):
            return
        self.shown = now
        speed = self.total / max(now - self.begin, 1e-9)
        left = int((self.limit - self.total) / max(speed, 1e-9))
        line = (f"{100 * self.total / self.limit:3.0f}%  {self.total / 1e6:,.1f} of {self.limit / 1e6:,.1f} M tokens  "
                f"file {self.used} of {len(self.data.files)}  {speed / 1e3:,.0f}k tokens/s  {left // 60}:{left % 60:02d} left")
        print(f"\r{line}\033[K" if terminal else line, end="\n" if last or not terminal else "", file=sys.stderr, flush=True)

    def report(self, writers):
        splits = [split for split in writers if self.counts[split]]
        if self.total < self.limit:
            print(f"the data set has {self.total:,} tokens in all, fewer than {self.limit:,}")
        print("tokens          " + "   ".join(f"{split} {self.counts[split]:,}" for split in splits))
        print(f"files           {self.out}/: " + ", ".join(file_range(split, len(writers[split].counts)) for split in splits))
        print("\n[model]\nvocab_size = " + str(self.vocab_size) + "\n\n[data]")
        for split in splits:
            print(f"{split} = {ini_path(self.out) or self.out}/{split}_*.bin")
        print(f"tokenizer = {self.tokenizer.json_path or 'bytes'}")


def prepare_from_hub(options, repo, revision=None, pattern=DATA_FILES):
    """pattern: of the paths of the files to use, unless options.files says."""
    import prepare  # which imports much
    if prepare.existing_shards(options.out) and not options.overwrite:
        raise UserError(f"{options.out}: already holds shards; give another --out, or --overwrite")
    with locked(options.out):
        run = HubPreparation(options, repo, revision, pattern)
        writers = prepare.write(run, options.out)
        if not options.keep_downloads:
            shutil.rmtree(run.downloads, ignore_errors=True)
    run.report(writers)
