"""Files that are written whole or not at all, and files that are read with bounds."""

import contextlib
import errno
import json
import os
import secrets
import stat
from pathlib import Path

from command.errors import UserError, reason, shown

MOST_BYTES = 100_000_000  # of a JSON or TOML file


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write a temporary file, flush it to the disk, rename it; returns `path`.

    The temporary file is `<name>.<random>.tmp` in the same folder, so that two writers do not meet;
    the later one wins.  Only a killed process leaves it behind.  An OSError names `path`.
    """
    if isinstance(content, str):  # a file's name may be no UTF-8
        content = content.encode("utf-8", "backslashreplace")
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(aside, "xb") as file:  # with the permissions that any new file has
            file.write(content)
            to_disk(file)
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # write() names no file
        raise
    return path


def to_disk(file) -> None:
    """Flush an open file to the disk, as far as its file system can: some network drives cannot."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def write_json(path: Path, value: dict | list) -> None:
    """Write indented JSON."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def check_file(path: Path, limit: float = float("inf")) -> None:
    """Raises UserError unless `path` leads to a regular file of at most `limit` bytes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise UserError(f"cannot read {shown(path)}: it is {kind}, not a file")
    if status.st_size > limit:
        size = f"{status.st_size:,} bytes; {limit:,} at most"
        raise UserError(f"cannot read {shown(path)}: it is too large ({size})")


def read_text(path: Path, limit: int) -> str:
    """The text of a file of at most `limit` bytes, with its lines ended by newlines alone.

    Raises UserError for a file that is none, is too large or is not UTF-8; OSError if the system
    refuses it.
    """
    check_file(path, limit)
    with open(path, "rb") as file:
        content = file.read(limit)  # files in /proc state no size and may have no end
    try:
        text = content.decode("utf-8-sig")  # -sig: without the byte order mark of Windows editors
    except UnicodeDecodeError as error:
        where = f"byte {error.start}"
        raise UserError(f"cannot read {shown(path)}: it is not UTF-8 ({where})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path):
    """The value in a JSON file.  A UserError names the file if it is missing or damaged."""
    try:
        return json.loads(read_text(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
