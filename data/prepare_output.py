"""The folder that prepare.py writes: its lock, its temporary files, its name in a configuration."""

import contextlib
import errno
import fcntl
import os
import re

from user_error import UserError


@contextlib.contextmanager
def locked(folder):
    """The folder, made if need be, for this process alone. The lock is the kernel's, on the folder itself: it ends with
    the process, and leaves no file. A folder that was made here and stays empty is removed again."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another prepare.py is writing there; wait for it, or give another --out") from None
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
    for pattern in ("train_[0-9]*.bin.tmp", "val_[0-9]*.bin.tmp", "tokenizer.json.tmp", "dataset.json.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def ini_path(path, is_pattern=True):
    """A path as a value of the configuration, where shards are named by a glob(3) pattern. None where an INI value cannot
    hold it: a '#' or ';' after a blank begins a comment."""
    text = os.fspath(path)
    if text[:1] in tuple(" \t~\"'#;"):
        text = "./" + text
    if is_pattern:
        text = re.sub(r"[*?[]", r"[\g<0>]", text.replace("\\", "\\\\"))
        text = re.sub(r"(?<=[ \t])[#;]", r"[\g<0>]", text)
    return None if re.search(r"[ \t][#;]", text) else text
