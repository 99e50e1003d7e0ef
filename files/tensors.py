"""Reading safetensors of strangers: a bounded header, finite numbers, and errors of one line.

    with opened(path) as file:               # a safetensors file, as safe_open gives it
        weight = finite(path, "weight", file)

Only safetensors are read: a pickle can run code.  Tested in tests/test_lora_files.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from command.errors import UserError, shown
from command.whole_files import check_file

MOST_HEADER = 16 * 2**20  # bytes; that of Stable Diffusion 1.5 has 0.2 MB, kohya's tag lists more
MOST_TENSORS = 20_000  # twice those of SDXL with both text encoders
LONGEST_NAME = 500
LARGEST = 1e30  # larger numbers overflow float32 a few products later


def refusal(path: Path, what: str) -> UserError:
    """The error that says in one line what is wrong with a file."""
    return UserError(shown(f"{path} {what}"))


@contextmanager
def opened(path: Path) -> Iterator:
    """The open file.  Its header is bounded before it is parsed.  Raises UserError."""
    try:
        check_file(path)
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MOST_HEADER < header < path.stat().st_size:
            raise refusal(path, f"has a header of {header} bytes; {MOST_HEADER} at most are read")
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            if len(keys) > MOST_TENSORS:
                raise refusal(path, f"holds {len(keys)} tensors; {MOST_TENSORS} at most are read")
            longest = max(map(len, keys), default=0)
            if longest > LONGEST_NAME:
                raise refusal(path, f"has a tensor name of {longest} characters")
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:400]
        what = f"is not a readable safetensors file ({reason}); pickles are not read"
        raise refusal(path, what) from None


def finite(path: Path, key: str, file) -> torch.Tensor:
    """A tensor of the file.  Raises UserError for numbers that no training can start from."""
    tensor = file.get_tensor(key)
    if tensor.numel() and not tensor.float().abs().max() < LARGEST:  # NaN is not below either
        raise refusal(path, f"is damaged: {key} holds NaN, infinite or absurdly large numbers")
    return tensor
