"""The inputs of prepare.py. A reader yields (text, ends_document, position): bytes or str, and how far into its file
it has read."""

import json
import os
import re
from pathlib import Path

from user_error import UserError

PIECE = 256 << 10   # longest stretch of one document tokenized at once
BATCH = 1 << 20     # text handed to a worker at once
MARGIN = 64 << 10   # a document separator may be this long


def file_format(path, asked):
    if asked != "auto":
        return asked
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(Path(path).suffix.lower(), "text")


def separator_regex(text):
    """--document-separator: a name, or a regular expression over the file's bytes."""
    names = {"blank-lines": r"\r?\n(?:[ \t]*\r?\n)+", "lines": r"\r?\n"}
    try:
        return re.compile(names.get(text, text).encode(), re.MULTILINE)
    except re.error as error:
        raise UserError(f"--document-separator {text}: {error}") from None


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
