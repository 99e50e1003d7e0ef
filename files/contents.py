"""What files hold, as a hash: moved, renamed above, or copied they are the same.

of(path)                 # a file, or a folder with the names in it
of_adapter(path)         # of a folder what says something about the adapter
"""

import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PEFT_CONFIG = "adapter_config.json"  # beside an adapter's weights


def of(path: str | Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names in it."""
    path = Path(path)
    return of_files(path, path.rglob("*")) if path.is_dir() else _of_file(path)


def of_adapter(path: str | Path) -> str:
    """SHA-256 of an adapter's weights and configs; its card may change."""
    path = Path(path)
    if path.is_dir():
        return of_files(path, [*path.glob("*.safetensors"), *path.glob("*.json")])
    return of_files(path.parent, [path, path.with_name(PEFT_CONFIG)], named=False)


def of_files(folder: Path, files: Iterable[Path], named: bool = True) -> str:
    """SHA-256 of those of `files` that are files, with their names in the folder unless not
    `named`.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.is_file():
            name = file.relative_to(folder).as_posix() if named else ""
            digest.update(f"{name}\0{_of_file(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    """Each file is read once by a process, unless it changes."""
    found = os.stat(path)
    return _read(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _read(path: Path, *_) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
