"""Training state on disk, so that a run killed at any moment goes on to the same numbers, bit for
bit.

    save(folder, step, tensors, facts, keep=2)     # folder/step-000120.safetensors
    step, tensors, facts = load(folder)            # the newest that is whole, or None

One safetensors file per step: tensors by name, everything else as JSON in its header; no pickle is
written or read. The file is written aside, flushed to the disk and renamed, so a file of that name
is always whole. Held by tests/test_checkpoint.py, which kills a run twenty times.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from command.errors import UserError
from command.whole_files import check_file, write_whole

LACKING = (KeyError, ValueError, TypeError, RuntimeError)  # what a wrong state makes its reader do


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict, keep: int) -> Path:
    """Write the state of `step` whole, then delete all but the newest `keep` up to it; returns the
    file.  Later ones were passed over as damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    facts = {"step": step} | facts
    facts |= {"checksum": checksum(tensors, facts)}
    content = serialize(tensors, {"format": "pt", "state": json.dumps(facts)})
    path = write_whole(folder / f"step-{step:06d}.safetensors", content)
    there = files(folder)
    end = there.index(path) + 1
    for other in [*there[: max(0, end - keep)], *there[end:]]:
        other.unlink(missing_ok=True)
    return path


def checksum(tensors: dict[str, torch.Tensor], facts: dict) -> str:
    """SHA-256 over facts, names and bytes: a disk that flips a bit does not change a run."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def files(folder: Path) -> list[Path]:
    """The state files of a folder, oldest first; raises UserError if it is a file itself."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file where training states go: remove it")
    found = (path for path in folder.glob("step-*.safetensors") if path.stem[5:].isdecimal())
    return sorted(found, key=lambda path: int(path.stem[5:]))


def load(
    folder: Path, take: Callable[[dict[str, torch.Tensor], dict], object] = lambda *_: None
) -> tuple[int, dict[str, torch.Tensor], dict] | None:
    """(step, tensors, facts) of the newest state that is whole, None if there is no state at all.

    `take(tensors, facts)` takes it up and raises one of LACKING if it lacks something.  A damaged
    state is skipped with a note, and the one before it is used.  Raises UserError if none is left.
    """
    for path in reversed(files(folder)):
        try:
            step, tensors, facts = _read(path)
            take(tensors, facts)
            return step, tensors, facts
        except (SafetensorError, UserError, *LACKING, OSError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            print(f"note: {path} is damaged ({reason}); trying the state before it")
    if files(folder):
        raise UserError(f"no training state in {folder} is whole: begin again in another folder")
    return None


def _read(path: Path) -> tuple[int, dict[str, torch.Tensor], dict]:
    check_file(path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["state"])
        tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    if not isinstance(facts, dict):
        raise ValueError("its facts are not an object")
    if facts.pop("checksum", None) != checksum(tensors, facts):
        raise ValueError("its checksum does not fit")
    step = facts.pop("step")
    if type(step) is not int:
        raise ValueError(f"its step is {step!r}")
    return step, tensors, facts


def clear(folder: Path) -> None:
    """Delete the state of a finished run, its teachers', and what a killed one left aside."""
    for path in folder.glob("teacher-*"):
        clear(path)
    for path in [*files(folder), *folder.glob("step-*.tmp")]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
