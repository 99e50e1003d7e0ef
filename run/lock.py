"""One writer per run folder, by a lock that the system releases when its process dies.

    with lock.held(Path("runs/smp")):      # UserError at once if another process holds it

Tested in tests/test_faults.py.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from command.errors import UserError

NAME = ".lock"  # beside config.json while a process trains; one that a killed process left is free


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder.  It is made if it is missing, and removed again if nothing was written.

    Raises UserError if another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquired(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            (folder / NAME).unlink()
            for path in made:
                path.rmdir()
        lock.release()


def _acquired(folder: Path) -> FileLock:
    # filelock's own fallback, a file that says who holds it, would stay after a kill
    lock = FileLock(folder / NAME, timeout=0, fallback_to_soft=False)
    try:
        return lock.acquire().lock
    except Timeout:
        raise UserError(
            f"another process is writing into {folder}: wait until it ends, or give another --out"
        ) from None
    except OSError as error:
        if error.filename:  # the file could not be opened
            raise
        # some network file systems have no locks
        print(f"note: {folder / NAME} cannot be locked ({error}): start one training only in it")
        return lock
