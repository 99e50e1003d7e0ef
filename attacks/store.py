"""Arrays kept on disk, so that nothing is asked twice of a model or of the images.

    store = Store(folder, key)
    raw = store.get("grid", lambda: {"losses": ...})  # computed the first time

Tested in tests/test_evaluate_faults.py.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from command.errors import UserError
from command.whole_files import check_file, write_whole

DIGEST = 32  # bytes of a SHA-256


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz file, or all; raises UserError unless it is whole."""
    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in names or found.files}
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file numpy, zipfile and zlib raise anything
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    """The sentence for a file of an audit that cannot be read, or that lacks something."""
    found = f"{type(error).__name__} {error}".strip()
    return UserError(f"{path} is damaged ({found}): remove it and run the audit again")


class Store:
    """Arrays kept by name in a folder and computed once, as long as `key` stays.

    A file is an .npz with a SHA-256 of key and content behind it, which numpy overlooks.  One of
    another key, or cut, or changed, is computed again; so a kill does no harm at any moment, nor
    does another evaluation at work in the same folder.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key.encode()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], dict]) -> dict[str, np.ndarray]:
        """The named arrays that `compute` returns, from the folder if they are there."""
        path = self.folder / f"{name}.npz"
        content = self._kept(path)
        if content is None:
            buffer = io.BytesIO()
            np.savez(buffer, **compute())
            content = buffer.getvalue()
            write_whole(path, content + self._digest(content))
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    def _kept(self, path: Path) -> bytes | None:
        found = path.read_bytes() if path.is_file() else b""
        content, digest = found[:-DIGEST], found[-DIGEST:]
        return content if digest == self._digest(content) else None

    def _digest(self, content: bytes) -> bytes:
        return hashlib.sha256(self.key + content).digest()
