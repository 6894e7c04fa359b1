"""The formats that prepare.py reads. A reader yields (text, ends_document, position): bytes or str, and how
far into its input it has read."""

import codecs
import json
import os
import re

from prepare_cuts import find_cut
from user_error import UserError

PIECE = 256 << 10        # stretch of one document tokenized at once; longer where no cut keeps the tokens
BATCH = 1 << 20          # text handed to a worker at once
MARGIN = 64 << 10        # a document separator may be this long
MAX_UNCUT = 16 << 20     # longest stretch held in memory for want of a place to cut
MAX_VALUE = 1 << 30      # characters of one JSON value
TOKEN_CUT = 20           # a number, a name or an escape cut in two is shorter than this


SEPARATOR_NAMES = {"blank-lines": r"\r?\n(?:[ \t]*\r?\n)+", "lines": r"\r?\n"}


def separator_regex(text):
    """--document-separator: a name, the text itself, or regex: and a regular expression over the input's
    bytes."""
    if text in ("", "regex:"):
        raise UserError("--document-separator: empty; give blank-lines, lines, a text, or regex:PATTERN")
    try:
        if text.startswith("regex:"):
            return re.compile(os.fsencode(text[len("regex:"):]), re.MULTILINE)
        pattern = SEPARATOR_NAMES[text].encode() if text in SEPARATOR_NAMES else re.escape(os.fsencode(text))
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UserError(f"--document-separator {text}: {error}") from None


class Uncuttable(Exception):
    """More than MAX_UNCUT bytes of a document without a place to cut: these bytes, and where they begin."""


def split_documents(read, separator, is_cut=None):
    """Pieces (bytes, ends_document, offset) of a byte stream, in constant memory; the separators are dropped.
    A separator counts only when MARGIN bytes follow it, lest more text should lengthen the match. is_cut: see
    find_cut."""
    buffer, base, start, search, done = b"", 0, 0, 0, False  # base: where in the stream the buffer begins
    tried, is_continued = 0, False  # no cut between start and tried
    while True:
        match = separator.search(buffer, search) if separator and search <= len(buffer) else None
        if match and (done or match.end() + MARGIN <= len(buffer)):
            yield buffer[start:match.start()], True, base + start
            start = tried = match.end()
            is_continued = False
            search = start + (match.start() == match.end())  # an empty match must not be found again
            continue
        if done:
            break
        end = match.start() if match else len(buffer)
        settled = min(end, len(buffer) - MARGIN)
        while settled - tried > PIECE:
            high = tried + PIECE
            cut = find_cut(buffer, start, max(tried + 1, high - MARGIN), high, end, is_continued, is_cut)
            if cut is not None:
                yield buffer[start:cut], False, base + start
                start, is_continued = cut, True
            elif high - start > MAX_UNCUT:
                raise Uncuttable(buffer[start:high], base + start)
            tried = high if cut is None else cut
        search = max(search, start)
        drop = max(0, start - 1)  # the byte before stays, for ^ and look-behind
        chunk = read(BATCH)
        done = not chunk
        buffer, base = buffer[drop:] + chunk, base + drop
        start, search, tried = start - drop, search - drop, tried - drop
    yield buffer[start:], True, base + start


def read_text(stream, source, begin, end, separator, as_str, any_byte=False, is_cut=None):
    """Bytes [begin, end) of a text, end None: all; the stream stands at begin. Decoded when the tokenizer
    wants characters. any_byte: zero bytes are text as well. is_cut: see find_cut."""
    left = float("inf") if end is None else end - begin

    def read(size):
        nonlocal left
        chunk = stream.read(min(size, left))
        left -= len(chunk)
        return chunk

    if begin == 0:
        mark = read(3)
        if mark == b"\xef\xbb\xbf":  # a byte order mark is no text
            begin, mark = 3, b""
        read_on = read

        def read(size):
            nonlocal mark
            chunk, mark = mark, b""
            return chunk + read_on(size - len(chunk))

    def checked(piece, offset):
        if not any_byte and b"\0" in piece:
            raise UserError(f"{source.name}: a zero byte at byte {begin + offset + piece.index(0):,}, so "
                            "this is no text; "
                            "convert or clean it, or give --format text to take every byte as it is")
        if not as_str:
            return piece
        try:
            return piece.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{source.name}: not UTF-8: byte {error.object[error.start]:#04x} at byte "
                            f"{begin + offset + error.start:,}, in "
                            f"{error.object[max(0, error.start - 10):error.start + 10]!r}; convert it, "
                            "or use --tokenizer bytes") from None

    try:
        for piece, ends, offset in split_documents(read, separator, is_cut):
            yield checked(piece, offset), ends, source.consumed
    except Uncuttable as error:
        piece, offset = error.args
        checked(piece[:-4], offset)
        raise UserError(f"{source.name}: {len(piece) >> 20} MiB from byte {begin + offset:,} on without a place to cut that "
                        "leaves the tokens as those of the whole text; part it with --document-separator, or use "
                        "--tokenizer bytes") from None


# ---------------------------------------------------------------------------------------------- JSON


def document_text(row, field, where):
    """The string in `field` of a JSON object; null is a blank document."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    if field not in row:
        names = ", ".join(row) or "none"
        raise UserError(f"{where}: no field \"{field}\"; it has "
                        f"{names if len(names) < 300 else names[:300] + '...'} "
                        "(--field NAME)")
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: field \"{field}\" is not a string")
    return text or ""


MAX_NESTED = 100  # brackets, once the parser's own limit is passed
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^"\[\]{}]+|"', re.DOTALL)


def without_deep_values(text):
    """JSON in which what is nested more than MAX_NESTED deep is null. Of that only the brackets are checked."""
    kept, open_brackets = [], []
    for token in JSON_TOKEN.findall(text):
        if token in ("[", "{"):
            open_brackets.append(token)
            if len(open_brackets) == MAX_NESTED + 1:
                kept.append("null")
        is_deep = len(open_brackets) > MAX_NESTED
        if token in ("]", "}") and (not open_brackets or open_brackets.pop() + token not in ("[]", "{}")):
            raise ValueError(f"'{token}' closes nothing")
        if not is_deep:
            kept.append(token)
    if open_brackets:
        raise ValueError(f"'{open_brackets[-1]}' is not closed")
    return "".join(kept)


def whole_number(text):
    """Python's int() refuses those of many thousand digits."""
    return int(text) if len(text) < 1000 else float(text)


def parse_line_of_json(text):
    """A line's value; numbers may be of any length, brackets nested however deep."""
    try:
        return json.loads(text, parse_int=whole_number)
    except RecursionError:
        return json.loads(without_deep_values(text), parse_int=whole_number)


def jsonl_rows(stream, source):
    """(where, value) of each line that is not blank."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = parse_line_of_json(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{source.name}:{number}: not UTF-8: byte {error.object[error.start]:#04x} at "
                            f"byte {error.start:,} "
                            "of the line") from None
        except ValueError as error:
            raise UserError(f"{source.name}:{number}: not JSON: {error}") from None
        yield f"{source.name}:{number}", row


def read_jsonl(stream, source, field):
    """A document per line: the string in `field`."""
    for where, row in jsonl_rows(stream, source):
        yield document_text(row, field, where), True, source.consumed


class JsonScanner:
    """JSON values out of a stream, whatever lines they lie on."""
    blanks = re.compile(r"[ \t\r\n]*")

    def __init__(self, stream, name):
        self.stream, self.name, self.decode_value = stream, name, json.JSONDecoder(parse_int=whole_number).raw_decode
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.bytes_read, self.done = "", 0, 1, 0, False

    def where(self, position=None):
        position = self.at if position is None else position
        return f"{self.name}:{self.line + self.text.count(chr(10), self.at, position)}"

    def advance(self, end):
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def more(self):
        """Read on; a long value takes ever larger steps."""
        chunk = self.stream.read(max(BATCH, len(self.text) - self.at))
        self.done = not chunk
        self.bytes_read += len(chunk)
        try:
            text = self.decoder.decode(chunk, final=self.done)
        except UnicodeDecodeError as error:
            offset = self.bytes_read - len(error.object) + error.start
            raise UserError(f"{self.name}: not UTF-8: byte {error.object[error.start]:#04x} at byte "
                            f"{offset:,}") from None
        self.text, self.at = self.text[self.at:] + text, 0

    def peek(self):
        """The next character that is no blank; "" at the end."""
        while True:
            self.advance(self.blanks.match(self.text, self.at).end())
            if self.at < len(self.text):
                return self.text[self.at]
            if self.done:
                return ""
            self.more()

    def deep_value(self):
        """A value nested too deeply for the parser, and where it ends; None when not all of it has been read."""
        depth = 0
        for token in JSON_TOKEN.finditer(self.text, self.at):
            depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
            if token[0] == '"':  # a string that is cut
                break
            if depth <= 0:
                kept = without_deep_values(self.text[self.at:token.end()])
                try:
                    return json.loads(kept, parse_int=whole_number), token.end()
                except json.JSONDecodeError as error:  # its position is one in `kept`
                    raise ValueError(error.msg) from None
        if self.done:
            raise ValueError("a bracket or a quote is not closed")
        return None

    def value(self):
        while True:
            try:
                try:
                    found = self.decode_value(self.text, self.at)
                except RecursionError:
                    found = self.deep_value()
                if found:
                    self.advance(found[1])
                    return found[0]
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - TOKEN_CUT or error.msg.startswith("Unterminated string")
                if self.done or not cut:
                    raise UserError(f"{self.where(error.pos)}: not JSON: {error.msg}") from None
            except ValueError as error:
                raise UserError(f"{self.where()}: not JSON: {error}") from None
            if len(self.text) - self.at > MAX_VALUE:
                raise UserError(f"{self.where()}: a JSON value of more than {MAX_VALUE:,} characters; is a "
                                "quote missing?")
            self.more()


def json_rows(stream, source):
    """(where, value, whether it is an array's element) of each value, in arrays or one after another."""
    scanner = JsonScanner(stream, source.name)
    in_array = False
    while character := scanner.peek():
        if character == "[" and not in_array:
            in_array = True
            scanner.advance(scanner.at + 1)
            if scanner.peek() == "]":
                in_array = False
                scanner.advance(scanner.at + 1)
            continue
        where = scanner.where()
        yield where, scanner.value(), in_array
        if in_array:
            mark = scanner.peek()
            if mark not in (",", "]"):
                raise UserError(f"{scanner.where()}: not JSON: " + ("the array is not closed" if not mark else
                                                                    "expected ',' or ']' after an element"))
            in_array = mark == ","
            scanner.advance(scanner.at + 1)
    if in_array:
        raise UserError(f"{scanner.where()}: not JSON: the array is not closed")


def read_json(stream, source, field):
    """A document per JSON object, in an array or one after another; in an array also per string."""
    for where, row, in_array in json_rows(stream, source):
        is_text = in_array and (row is None or isinstance(row, str))
        yield (row or "") if is_text else document_text(row, field, where), True, source.consumed


# ------------------------------------------------------------------------------------------- parquet


def is_string(types, kind):
    kind = getattr(kind, "storage_type", kind)  # of an extension type
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_view = getattr(types, "is_string_view", lambda kind: False)
    return types.is_string(kind) or types.is_large_string(kind) or is_view(kind) or types.is_null(kind)


def read_parquet(file, source, field):
    """A document per row: the string in column `field`; a null is a blank document. file: seekable, from its
    beginning."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source.name}: reading parquet needs pyarrow: pip install pyarrow") from None

    def damaged(what, error):
        if isinstance(error, OSError) and error.errno:
            raise error
        return UserError(f"{source.name}: {what}: {(str(error) or repr(error)).splitlines()[0]}")

    failures = (pyarrow.ArrowException, OSError, ValueError)
    try:
        parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        schema = parquet.schema_arrow
    except failures as error:
        raise damaged("not a parquet file", error) from None
    if field not in schema.names:
        raise UserError(f"{source.name}: no column \"{field}\"; it has {', '.join(schema.names) or 'none'} "
                        "(--field NAME)")
    kind = schema.field(schema.names.index(field)).type
    if not is_string(pyarrow.types, kind):
        raise UserError(f"{source.name}: column \"{field}\" holds {kind}, not strings")
    size, rows, done = source.size or source.consumed, parquet.metadata.num_rows, 0
    for group in range(parquet.num_row_groups):
        batches = parquet.iter_batches(row_groups=[group], columns=[field], batch_size=256)
        while True:
            try:
                batch = next(batches, None)
                texts = batch.column(0).to_pylist() if batch is not None else None
            except failures as error:
                raise damaged(f"row group {group}, column \"{field}\": damaged", error) from None
            if texts is None:
                break
            for text in texts:
                done += 1
                yield text or "", True, size * done // max(1, rows)


# --------------------------------------------------------------------------------------- one whole text


def paragraph_boundary(source, size, fraction):
    """Where a single text is cut in two: (position, what it follows). The best kind of boundary that lies
    near enough to leave the last part between half and one and a half of `fraction`."""
    target = min(max(1, int(size * (1 - fraction))), size - 1)
    begin = max(0, target - BATCH)
    with source.open(begin) as stream:
        text = stream.read(target + BATCH - begin)

    def nearest(places):
        return min((place for place in places if 0 < begin + place < size),
                   key=lambda place: abs(begin + place - target), default=None)

    for pattern, name in ((rb"\n[ \t\r]*\n\s*", "paragraph"), (rb"\n\s*", "line"), (rb"\s+", "word")):
        place = nearest(match.end() for match in re.finditer(pattern, text))
        if place is not None and abs(begin + place - target) <= size * fraction / 2:
            return begin + place, name
    place = nearest(i for i, byte in enumerate(text) if byte & 0xC0 != 0x80)
    return (target if place is None else begin + place), "character"
