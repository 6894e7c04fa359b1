"""Opening the inputs of prepare.py: files, pipes and standard input, compressed or not. What an input holds
is decided by its first bytes, and by its name where these leave it open."""

import bz2
import io
import lzma
import os
import re
import select
import stat
import sys
import tempfile
import zlib
from pathlib import Path

from prepare_readers import parse_line_of_json
from user_error import UserError

HEAD = 64 << 10         # bytes looked at to decide the format
CHUNK = 64 << 10        # compressed bytes decompressed at once
BUFFER = 1 << 20
MAX_COMPRESSIONS = 4    # compressed files inside compressed files
IN_MEMORY = 4 << 20     # a copy of a pipe above this size goes to a temporary file

COMPRESSED_SUFFIXES = {".gz", ".gzip", ".bgz", ".z", ".zst", ".zstd", ".bz2", ".xz", ".lzma"}
FORMATS = {suffix: kind for kind, suffixes in (
    ("jsonl", ".jsonl .ndjson .jsonlines .json"), ("parquet", ".parquet .pq"),
    ("text", ".txt .text .md .rst .tex .html .xml .csv .tsv")) for suffix in suffixes.split()}
MAGIC = [(rb"\x1f\x8b\x08", "gzip"), (rb"[\x28\x22-\x27]\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd"),
         (rb"BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)", "bzip2"), (rb"\xfd7zXZ\0", "xz"),
         (rb"\x5d\0\0[\0-\xff]{2}(?:\xff{8}|[\0-\xff]{4}\0{4})", "lzma")]
REFUSED = [(rb"PK\x03\x04|PK\x05\x06", "a zip archive"), (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
           (rb"Rar!\x1a\x07", "a rar archive"), (rb"\x04\x22\x4d\x18", "lz4 data"),
           (rb"\x1f[\x9d\xa0]", "compress(1) data"), (rb"\xff\x06\0\0sNaPpY", "snappy data"),
           (rb"[\0-\xff]{257}ustar[\0 ]", "a tar archive"), (rb"PARE[\0-\x08\x15]", "encrypted parquet"),
           (rb"ARROW1\0\0", "an Arrow file"), (rb"ORC[\0-\x08]", "an ORC file"), (rb"Obj\x01", "an Avro file"),
           (rb"\x89HDF\r\n", "an HDF5 file"), (rb"SQLite format 3\0", "an SQLite database"),
           (rb"%PDF-\d", "a PDF file"), (rb"\x93NUMPY", "a NumPy array"), (rb"\x7fELF", "a program")]
UTF_MARKS = [(b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"),
             (b"\xfe\xff", "UTF-16")]


# ---------------------------------------------------------------------------------------- compression


def compression(head):
    """gzip, zstd, bzip2, xz or lzma; None for anything else."""
    return next((kind for magic, kind in MAGIC if re.match(magic, head)), None)


class Zlib:
    """gzip, with the interface of the bz2 and lzma modules."""

    def __init__(self):
        self.engine = zlib.decompressobj(31)

    def decompress(self, data, size):
        return self.engine.decompress(self.engine.unconsumed_tail + data, size)

    @property
    def needs_input(self):
        return not self.engine.unconsumed_tail

    @property
    def eof(self):
        return self.engine.eof

    @property
    def unused_data(self):
        return self.engine.unused_data


class Zstandard:
    """The zstandard package, with the interface of the bz2 and lzma modules."""
    needs_input = True

    def __init__(self):
        import zstandard
        self.engine = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def decompress(self, data, size):
        return self.engine.decompress(data)

    @property
    def eof(self):
        return self.engine.eof

    @property
    def unused_data(self):
        return self.engine.unused_data


def zstd():
    try:
        from compression.zstd import DecompressionParameter, ZstdDecompressor  # Python 3.14
    except ImportError:
        return Zstandard()
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: 31})


DECOMPRESSORS = {"gzip": Zlib, "zstd": zstd, "bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor,
                 "lzma": lzma.LZMADecompressor}


class Decompressed:
    """The content of compressed data, which may be several compressed streams one after another."""

    def __init__(self, read, kind, source):
        self.read_compressed, self.kind, self.source = read, kind, source
        try:
            self.decompressor = DECOMPRESSORS[kind]()
        except ImportError as error:
            raise UserError(f"{source.name}: reading {kind} needs {error.name}: pip install "
                            f"{error.name}") from None

    def damaged(self, why):
        raise UserError(f"{self.source.name}: damaged {self.kind} data, near byte {self.source.consumed:,} "
                        "of the input: "
                        f"{why}") from None

    def next_stream(self):
        """The beginning of the next compressed stream; b"" at the end. Zero bytes between streams are
        padding."""
        data = self.decompressor.unused_data.lstrip(b"\0")
        while len(data) < 16:
            more = self.read_compressed(CHUNK)
            if not more:
                break
            data = (data + more).lstrip(b"\0")
        if data and compression(data) != self.kind:
            self.damaged("something else follows it")
        return data

    def read(self, size):
        """1 to about `size` bytes; b"" at the end."""
        while True:
            if self.decompressor.eof:
                data = self.next_stream()
                if not data:
                    return b""
                self.decompressor = DECOMPRESSORS[self.kind]()
            elif self.decompressor.needs_input:
                data = self.read_compressed(CHUNK)
                if not data:
                    self.damaged("it ends too early")
            else:
                data = b""
            try:
                content = self.decompressor.decompress(data, size)
            except MemoryError:
                raise
            except Exception as error:  # each library has its own
                self.damaged(error)
            if content:
                return content


class Stream(io.RawIOBase):
    """A read(size) function, and bytes that come before what it returns, as a raw stream. close() closes
    `file` too."""

    def __init__(self, head, read, file=None):
        self.head, self.read_some, self.file = head, read, file

    def close(self):
        if self.file:
            self.file.close()
        super().close()

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.head:
            chunk, self.head = self.head[:len(buffer)], self.head[len(buffer):]
        else:
            chunk = self.read_some(len(buffer))
            if len(chunk) > len(buffer):
                chunk, self.head = chunk[:len(buffer)], chunk[len(buffer):]
        buffer[:len(chunk)] = chunk
        return len(chunk)


def read_head(stream):
    """Up to HEAD bytes, fewer only at the end."""
    head = b""
    while len(head) < HEAD:
        chunk = stream.readinto(buffer := bytearray(HEAD - len(head)))
        if not chunk:
            break
        head += buffer[:chunk]
    return head


# --------------------------------------------------------------------------------------------- format


def is_compressed(path):
    """By its name."""
    return Path(path).suffix.lower() in COMPRESSED_SUFFIXES


def format_by_name(path):
    """text, jsonl or parquet; None when the name does not say."""
    path = Path(path)
    while path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix.lower())


def first_line(head):
    """The first line of JSON, None when it is not all in the head."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, newline, _ = text.partition(b"\n")
    return line if newline or len(head) < HEAD else None


def json_layout(head):
    """How JSON lies in a file: "lines", a value on each line; or "values", an array or values over several
    lines."""
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return "values"
    line = first_line(head)
    if line is None:
        return "lines"
    try:
        parse_line_of_json(line.decode())
    except ValueError:
        return "values"
    return "lines"


def looks_like_json(head):
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb'\[\s*(?:\{\s*"|null\s*,|"(?:[^"\\]|\\.)*"\s*[,\]])', text, re.DOTALL):
        return True
    if not re.match(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:', text, re.DOTALL):
        return False
    line = first_line(head)
    if line is None or json_layout(head) == "lines":
        return True
    return not line.strip(b"{ \t\r")  # pretty-printed: only the bracket stands on the first line


# --------------------------------------------------------------------------------------------- inputs


class Input:
    """One input. open() starts at its beginning, a second time too: of what can be read only once a copy is
    kept until forget(). After open(): head, the first bytes; compressions, the kinds in the order they were
    taken off."""

    def __init__(self, path, temporary_folder=None):
        self.path, self.temporary_folder = path, temporary_folder
        self.name = "standard input" if path == "-" else path
        self.file, self.copy, self.replaying, self.consumed, self.warned = None, None, False, 0, False
        self.keep = True
        if path == "-" and sys.stdin is None:
            raise UserError("standard input is closed")
        status = os.fstat(0) if path == "-" else os.stat(path)
        is_file = stat.S_ISREG(status.st_mode)
        self.read_once = path == "-" or not is_file
        self.size = None  # in bytes, as stored; None: not known before the end
        if is_file:
            self.size = max(0, status.st_size - (os.lseek(0, 0, os.SEEK_CUR) if path == "-" else 0))
            if self.size == 0 and path != "-":
                with open(path, "rb") as file:  # files of /proc have content and no size
                    self.size = None if file.read(1) else 0

    def read(self, size):
        """Up to `size` bytes as they are stored; b"" at the end."""
        if self.replaying:
            chunk = self.copy.read(size)
            if chunk:
                self.consumed += len(chunk)
                return chunk
            self.replaying = False
        try:
            while (chunk := self.file.read(size)) is None:  # a pipe that another program made non-blocking
                select.select([self.file], [], [])
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None
        self.consumed += len(chunk)
        if self.copy:
            if not self.keep:
                self.copy.close()
                self.copy = None
            else:
                try:
                    self.copy.write(chunk)
                except OSError as error:
                    folder = os.fspath(self.temporary_folder or tempfile.gettempdir())
                    raise OSError(error.errno, f"{error.strerror} (a copy of {self.name} is kept there until "
                                               "both splits have "
                                  "a document; or use --val-fraction 0)", folder) from None
        return chunk

    def rewind(self, offset=0):
        self.consumed = offset
        if not self.read_once:
            if self.file:
                self.file.close()
            self.file = open(self.path, "rb", buffering=0)
            self.file.seek(offset)
        elif self.file is None:
            is_stdin = self.path == "-"
            self.file = open(0 if is_stdin else self.path, "rb", buffering=0, closefd=not is_stdin)
            if self.keep:
                self.copy = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=self.temporary_folder)
        elif self.copy is None:
            raise OSError(f"{self.name}: it can only be read once")
        else:
            self.copy.seek(0)
            self.replaying = True

    def forget(self):
        """It will not be opened again."""
        self.keep = False

    def open(self, offset=0):
        """A buffered stream of the decompressed bytes from `offset` on."""
        self.rewind()
        to_close = None if self.read_once else self.file
        try:
            stream = self.decompressed(Stream(b"", self.read))
        except BaseException:
            if to_close:
                to_close.close()
            raise
        if offset and not self.compressions and not self.read_once:
            self.rewind(offset)
            return io.BufferedReader(Stream(b"", self.read, self.file), BUFFER)
        stream.file = to_close
        buffered = io.BufferedReader(stream, BUFFER)
        while offset > 0:
            chunk = buffered.read(min(offset, BUFFER))
            if not chunk:
                break
            offset -= len(chunk)
        return buffered

    def decompressed(self, stream):
        self.compressions = []
        while True:
            self.head = read_head(stream)
            stream.head = self.head + stream.head
            kind = compression(self.head)
            if kind is None:
                break
            if len(self.compressions) == MAX_COMPRESSIONS:
                raise UserError(f"{self.name}: compressed more than {MAX_COMPRESSIONS} times over")
            self.compressions.append(kind)
            stream = Stream(b"", Decompressed(io.BufferedReader(stream, BUFFER).read1, kind, self).read)
        if not self.head:
            raise UserError(f"{self.name}: empty" + (" once decompressed" if self.compressions else ""))
        return stream

    def content_size(self, show=None):
        """Bytes once decompressed; this reads all of an input that is compressed or a pipe."""
        with self.open() as stream:
            if self.size is not None and not self.compressions and not self.read_once:
                return self.size
            size = 0
            while chunk := stream.read(BUFFER):
                size += len(chunk)
                if show:
                    show(self.consumed)
            return size

    def format(self, asked):
        """text, jsonl or parquet, of an opened input; what is none of these is refused."""
        if asked == "text":
            return "text"
        by_name = format_by_name(self.path)
        is_parquet = by_name == "parquet" or self.head.startswith(b"PAR1")
        if asked == "parquet" or asked == "auto" and is_parquet:
            if self.compressions:
                raise UserError(f"{self.name}: a parquet file inside {self.compressions[-1]}; decompress it "
                                "first (parquet is "
                                "compressed in itself)")
            return "parquet"
        for mark, encoding in UTF_MARKS:
            if self.head.startswith(mark):
                raise UserError(f"{self.name}: {encoding}, not UTF-8; convert it: iconv -f {encoding} -t "
                                "UTF-8")
        if asked != "auto":
            return asked
        for magic, kind in REFUSED:
            if re.match(magic, self.head):
                inside = f"{kind} inside {self.compressions[-1]}" if self.compressions else kind
                raise UserError(f"{self.name}: {inside}, neither text nor JSON nor parquet; unpack or "
                                "convert it first")
        if by_name == "jsonl":
            return by_name
        if looks_like_json(self.head):
            if by_name is None:
                return "jsonl"
            if not self.warned:
                print(f"prepare.py: warning: {self.name}: looks like JSON and is read as text, as its name "
                      "says; "
                      "--format jsonl reads its documents", file=sys.stderr)
                self.warned = True
        return "text"
