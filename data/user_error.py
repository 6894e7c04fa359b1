"""What the scripts in data/ share about errors and about printing file names."""

import codecs
import contextlib
import os
import re
import sys


class UserError(Exception):
    """What the user gave is wrong; the message is the one line they see, the exit code 2."""


def describe(error):
    """An OSError as `file: cause`."""
    if error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def naming(path):
    """Errors of writing an open file get that file's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), error.filename or os.fspath(path)) from None


def one_line(text):
    """A message with its line breaks and other control characters escaped, as the name of a file or field may
    have."""
    escape = lambda match: match[0].encode("unicode_escape").decode()
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029]", escape, text)


def encode_rest(error):
    """Characters that the encoding of file names lacks: bytes that os.fsdecode() could not decode, or else
    escapes."""
    text = error.object[error.start:error.end]
    try:
        return os.fsencode(text), error.end
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace"), error.end


def allow_any_file_name():
    """Let print() write file names as their own bytes, whatever encoding the terminal claims to have."""
    codecs.register_error("file_name", encode_rest)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=sys.getfilesystemencoding(), errors="file_name")
