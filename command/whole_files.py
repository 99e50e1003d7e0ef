"""Files that are there whole or not at all, whatever kills the process or fills the disk."""

import contextlib
import json
import os
import secrets
from pathlib import Path

from command.errors import UserError, reason


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write aside, flush to the disk, rename; a failure leaves nothing, its OSError names the file.

    Aside is `<name>.<random>.tmp` in the same folder: two writers at once do not meet, the later
    one wins.  Only a killed process leaves it behind.
    """
    content = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(aside, "xb") as file:  # with the permissions that any new file has
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # write() itself names none
        raise
    return path


def write_json(path: Path, value: dict | list) -> None:
    """JSON a person can read, written whole."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path):
    """The value in a JSON file; a UserError names the file if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
