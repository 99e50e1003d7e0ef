"""Files that are there whole or not at all, whatever kills the process or fills the disk."""

import os
from pathlib import Path


def write(path: Path, content: bytes | str) -> Path:
    """Write aside, flush to the disk, rename; on failure nothing is left, and the OSError names the file."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = str(path)  # write() itself names none
        raise
    return path
