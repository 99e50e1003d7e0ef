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

from command.whole_files import write_whole

DIGEST = 32  # bytes of a SHA-256


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
