"""Errors that a user can correct: one line on stderr, exit code 2, no traceback."""

import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator


class UserError(Exception):
    """An error that a user can correct: one sentence says what is wrong, where, and what to do."""


PASSING = {errno.EIO, errno.ETIMEDOUT, getattr(errno, "ESTALE", errno.EIO)}  # of a disk or drive
CORRECTABLE = {
    *PASSING,
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}  # failures of the file system that name a file or its disk
NO_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


def shown(text) -> str:
    """`text` as one line, with newlines and all else that does not print spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def printable() -> None:
    """Spell out what the console cannot show: no caption and no name of a file stops a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


class Terminated(KeyboardInterrupt):
    """The system, or `kill`, asks the process to end."""


def terminated(*_) -> typing.NoReturn:
    """What SIGTERM does in a command: it ends it as an interrupt does, with a word."""
    raise Terminated


@contextlib.contextmanager
def one_line_errors(again: Callable[[], str] | None = None) -> Iterator[None]:
    """Errors that the user can correct become one line and exit code 2.  Others keep their
    traceback.

    `again` gives the command that continues a stopped one, by an interrupt or SIGTERM.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminated)
    try:
        yield
        sys.stdout.flush()  # finds a closed pipe here, not at the end of the process
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt as stop:
        print(f"stopped; to continue: {again()}" if again else "stopped", file=sys.stderr)
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"error: {shown(line)}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if main and signal.getsignal(signal.SIGTERM) is terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def this_command(launcher: str = "python") -> str:
    """This command, as it could be typed again."""
    return f"{launcher} {shlex.join(sys.argv)}"


def _one_line(error: Exception) -> str | None:
    """The line for `error`; None if it is a fault of this program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in CORRECTABLE:
        return f"cannot write or read {error.filename or 'a file'}: {error.strerror}"
    # PyTorch raises a RuntimeError where there is no memory
    out_of_memory = isinstance(error, RuntimeError) and any(s in str(error) for s in NO_MEMORY)
    if isinstance(error, MemoryError) or out_of_memory:
        return "not enough memory: use a smaller batch, size or rank"
    return None


def reason(error: Exception) -> str:
    """The text of an error, without the number and the path of an OSError."""
    return getattr(error, "strerror", None) or str(error)
