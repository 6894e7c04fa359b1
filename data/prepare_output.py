"""What prepare.py writes: shards, and progress on stderr; the folder's lock, its temporary files, and its
name in a configuration."""

import contextlib
import errno
import fcntl
import os
import re
import sys
import time

import numpy as np

from user_error import UserError, naming

BUFFER = 1 << 20

# ------------------------------------------------------------------------------------------ folder


@contextlib.contextmanager
def locked(folder):
    """The folder, made if need be, for this process alone. The lock is the kernel's, on the folder itself: it
    ends with the process, and leaves no file. A folder that was made here and stays empty is removed
    again."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another program is writing shards there; wait for it, or give another "
                            "--out") from None
        except OSError as error:  # NFS locks no folders
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        os.close(descriptor)


def remove_temporary(folder):
    """What this run or an earlier one that was killed left unfinished."""
    for pattern in ("train_[0-9]*.bin.tmp", "val_[0-9]*.bin.tmp", "train_[0-9]*.labels.tmp", "val_[0-9]*.labels.tmp",
                    "*.choices.tmp", "tokenizer.json.tmp", "dataset.json.tmp", "chat.json.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def ini_path(path, is_pattern=True):
    """A path as a value of the configuration, where shards are named by a glob(3) pattern. None where an INI
    value cannot hold it: a '#' or ';' after a blank begins a comment."""
    text = os.fspath(path)
    if text[:1] in tuple(" \t~\"'#;"):
        text = "./" + text
    if is_pattern:
        text = re.sub(r"[*?[]", r"[\g<0>]", text.replace("\\", "\\\\"))
        text = re.sub(r"(?<=[ \t])[#;]", r"[\g<0>]", text)
    return None if re.search(r"[ \t][#;]", text) else text


def file_range(split, count):
    return f"{split}_000000.bin" + (f" to {split}_{count - 1:06d}.bin" if count > 1 else "")


# ------------------------------------------------------------------------------------------ shards


def write_all(file, data):
    """A write to an unbuffered file: it may take several calls, and an error comes here and not at close."""
    data = memoryview(data)
    while len(data):
        data = data[file.write(data):]


HEADERS = {".bin": {2: (20240520, 1), 4: (20240801, 7)}, ".labels": {4: (20261129, 1)}}  # magic, version by bytes a token


class Writer:
    """The shards of one split, or their labels. They carry temporary names until commit() renames them."""

    def __init__(self, folder, split, dtype, shard_tokens, kind=".bin"):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.kind, self.counts, self.bytes, self.file = kind, [], [], None

    def name(self, i, suffix=""):
        return self.folder / f"{self.split}_{i:06d}{self.kind}{suffix}"

    def write(self, tokens, ends):
        """ends: see encode_batch. A text that two shards share counts in both, in proportion to its tokens
        there."""
        done = 0
        bytes_until = lambda count: round(np.interp(count, np.append(0, ends[:, 0]), np.append(0, ends[:, 1])))
        while done < len(tokens):
            if self.file is None or self.counts[-1] == self.shard_tokens:
                self.next_shard()
            part = tokens[done:done + self.shard_tokens - self.counts[-1]]
            with naming(self.name(len(self.counts) - 1)):
                write_all(self.file, part.astype(self.dtype.newbyteorder("<")).view(np.uint8))
            self.counts[-1] += len(part)
            self.bytes[-1] += bytes_until(done + len(part)) - bytes_until(done)
            done += len(part)

    def next_shard(self):
        self.close()
        self.file = open(self.name(len(self.counts), ".tmp"), "wb", buffering=0)
        with naming(self.name(len(self.counts))):
            write_all(self.file, bytes(1024))
        self.counts.append(0)
        self.bytes.append(0)

    def close(self):
        """The header, now that the count is known."""
        if self.file is None:
            return
        magic, version = HEADERS[self.kind][self.dtype.itemsize]
        with naming(self.name(len(self.counts) - 1)):
            self.file.seek(0)
            write_all(self.file, np.array([magic, version, self.counts[-1]], dtype="<i4").tobytes())
            os.fsync(self.file.fileno())
            self.file.close()
        self.file = None

    def finish(self):
        """Close; a short last shard joins the one before, since one below a sequence's length is unusable."""
        self.close()
        if len(self.counts) > 1 and self.counts[-1] < self.shard_tokens / 16:
            last = self.name(len(self.counts) - 1, ".tmp")
            before = self.name(len(self.counts) - 2, ".tmp")
            with open(last, "rb") as short, open(before, "r+b", buffering=0) as self.file:
                short.seek(1024)
                self.file.seek(0, os.SEEK_END)
                with naming(self.name(len(self.counts) - 2)):
                    while chunk := short.read(BUFFER):
                        write_all(self.file, chunk)
                self.counts[-2:] = [self.counts[-2] + self.counts[-1]]
                self.bytes[-2:] = [self.bytes[-2] + self.bytes[-1]]
                self.close()
            last.unlink()

    def commit(self):
        """The final names, which it returns. Older shards of these names are replaced at once."""
        for i in range(len(self.counts)):
            os.replace(self.name(i, ".tmp"), self.name(i))
        return {self.name(i) for i in range(len(self.counts))}

    def discard(self):
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        self.file, self.counts, self.bytes = None, [], []
        for path in self.folder.glob(f"{self.split}_*{self.kind}.tmp"):
            path.unlink()


class LabelledWriter:
    """The shards of one split and their labels. What is written at once is not cut by a shard's end."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.shards = Writer(folder, split, dtype, shard_tokens)
        self.labels = Writer(folder, split, np.int32, shard_tokens, ".labels")

    @property
    def counts(self):
        return self.shards.counts

    @property
    def bytes(self):
        return self.shards.bytes

    def name(self, i):
        return self.shards.name(i)

    def write(self, tokens, labels, size):
        for writer, values in ((self.shards, tokens), (self.labels, labels)):
            if writer.counts and writer.counts[-1] + len(values) > writer.shard_tokens:
                writer.next_shard()
            writer.write(values, np.array([[len(values), size]]))

    def finish(self):
        self.shards.finish()
        self.labels.finish()

    def commit(self):
        return self.shards.commit() | self.labels.commit()

    def discard(self):
        self.shards.discard()
        self.labels.discard()


# ---------------------------------------------------------------------------------------- progress


class Progress:
    """Bytes read, bytes per second and, where the total is known, time left on stderr: one line redrawn on a
    terminal, else one every 10 s."""

    def __init__(self, total, label=""):
        self.label = label
        self.total, self.begin, self.shown = total, time.monotonic(), time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, done, last=False):
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10) and not (last and self.terminal):
            return
        self.shown = now
        speed = done / max(now - self.begin, 1e-9)
        if self.total is None:
            line = f"{self.label}{done / 1e6:,.1f} MB  {speed / 1e6:.1f} MB/s"
            self.draw(line, last)
            return
        share = min(1, done / max(1, self.total))
        left = int((now - self.begin) * (1 - share) / max(share, 1e-9))
        bar = "#" * int(28 * share)
        line = (f"{self.label}{100 * share:3.0f}% {done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB  "
                f"{speed / 1e6:.1f} MB/s  "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        self.draw(f"[{bar:<28}] {line}" if self.terminal else line, last)

    def draw(self, line, last):
        if self.terminal:
            print(f"\r{line} \033[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
