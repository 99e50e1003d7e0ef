"""Errors of one line: what the user can mend, said in a sentence, with exit code 2."""

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator


class UserError(Exception):
    """Something that the user can mend: one sentence on what is wrong, where, and what to do."""


MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}  # failures of the file system that say where to look
NO_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


def shown(text) -> str:
    """`text` as one harmless line: newlines, escapes and whatever does not print spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@contextlib.contextmanager
def one_line_errors(again: Callable[[], str] | None = None) -> Iterator[None]:
    """What the user can mend is one line and exit code 2; other failures keep their traceback.

    `again` gives the command that goes on, for whoever has stopped this one.
    """
    try:
        yield
        sys.stdout.flush()  # so that a closed pipe is found here and not on the way out
    except BrokenPipeError:  # as of `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print(f"stopped; to go on: {again()}" if again else "stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"error: {shown(line)}", file=sys.stderr)
        raise SystemExit(2) from None


def this_command(launcher: str = "python") -> str:
    """This command, as it could be typed again."""
    return f"{launcher} {shlex.join(sys.argv)}"


def _one_line(error: Exception) -> str | None:
    """What to tell the user of `error`; None if it is a failure of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return f"cannot write or read {error.filename or 'a file'}: {error.strerror}"
    # PyTorch reports memory as a RuntimeError of its own
    out_of_memory = isinstance(error, RuntimeError) and any(s in str(error) for s in NO_MEMORY)
    if isinstance(error, MemoryError) or out_of_memory:
        return "not enough memory: ask for less, such as a smaller batch, size or rank"
    return None


def reason(error: Exception) -> str:
    """Why, without the number and the path that an OSError adds."""
    return getattr(error, "strerror", None) or str(error)
