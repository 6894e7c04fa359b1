"""What the scripts in data/ share about errors and about printing file names."""

import codecs
import os
import sys


class UserError(Exception):
    """What the user gave is wrong; the message is the one line they see, the exit code 2."""


def describe(error):
    """An OSError as `file: cause`."""
    if error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def one_line(text):
    """A message with its line breaks and other control characters escaped: a file or a field may be named with them."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


def encode_name(error):
    """For characters that a stream's encoding lacks: file names as their own bytes, anything else escaped."""
    text = error.object[error.start:error.end]
    try:
        return os.fsencode(text), error.end
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace"), error.end


def allow_any_file_name():
    """Let print() write every file name, whatever encoding the terminal claims to have."""
    codecs.register_error("file_name", encode_name)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="file_name")
