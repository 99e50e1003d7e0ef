"""One writer per run folder: a lock that the system takes back when its process ends, however it
does.

    with lock.held(Path("runs/smp")):      # UserError at once where another process is inside

Held by tests/test_faults.py.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from command.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

NAME = ".lock"  # beside config.json while a process trains; without meaning after a kill


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process is; the folder is made, and gone again if nothing was written."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _take(folder / NAME)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            (folder / NAME).unlink()
            for path in made:
                path.rmdir()
        file.close()


def require_free(folder: Path) -> None:
    """Raise UserError if a process holds `folder` now; changes nothing."""
    if (folder / NAME).exists():
        with open(folder / NAME, "ab") as file:
            _lock(file)


def _take(path: Path) -> BinaryIO:
    """The lock file, open and locked; raises UserError if another process has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open(path, "ab"))
            _lock(file)
            # the one who held it may have deleted it between the two lines above
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                opened.pop_all()
                return file


def _lock(file: BinaryIO) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        folder = Path(file.name).parent
        raise UserError(
            f"another process is writing into {folder}: wait until it ends, or give another --out"
        ) from None
    except OSError as error:  # some network file systems cannot lock
        print(f"note: {file.name} cannot be locked ({error}): train into it only once at a time")
