"""What a glance at flags, paths and small files can refuse before an evaluation, without anything
heavy imported or loaded.
"""

import json
import os
import re
from pathlib import Path

import settings
from command.errors import UserError
from command.flags import checked
from command.whole_files import read_json
from files import EMBEDDED_SETS

NUMBERS = {  # lowest and highest
    "test_nonmembers": (0, 10**7),
    "pictures": (0, 10**5),
    "sampling_steps": (1, 999),  # schedules have at least 1,000, some begin at 1
    "guidance": (0, 1000),
    "bootstrap": (1, 10**5),
    "shadow": (0, 1000),
    "threads": (0, 4096),
}
ASKED = ("method", "model", "data", "caption", "dtype", "seed")  # of the settings of a run


def check(s) -> None:
    """Raises UserError for flags of evaluate.py, paths and run folders that cannot work."""
    check_numbers(s)
    if not re.fullmatch(r"(last|best|[0-9]{1,18})", s.at):
        raise UserError(f"--at must be last, best or a step, not {s.at}")
    if not re.fullmatch(r"(auto|cpu|cuda|mps|xpu)(:[0-9]{1,3})?", s.device):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:1 or mps, not {s.device}")
    if not s.runs and s.nonmembers is not None:
        raise UserError("--nonmembers is for runs that were given one: leave it out")
    if not s.runs:
        check_elsewhere(s)
    for flag in ("adapter", "splits", "caption", "out") if s.runs else ():
        if getattr(s, flag) is not None:
            raise UserError(
                f"--{flag} is for an adapter without a run folder; a run has its own: leave it out"
            )
    for folder in s.runs or ():
        check_run(Path(folder), s)


def check_numbers(s) -> None:
    """Raises UserError for a number out of its range."""
    for name, (low, high) in NUMBERS.items():
        if not low <= getattr(s, name) <= high:  # NaN is not
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {low:,} to {high:,}, not {getattr(s, name)}")
    if s.shadow % 2 or s.shadow == 2:
        raise UserError(f"--shadow must be 0, or an even number of 4 or more, not {s.shadow}")
    if s.jobs is not None and s.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {s.jobs}")
    if s.pictures == 1:
        raise UserError("--pictures must be 0 or at least 2: the Frechet distance needs two")


def check_elsewhere(s) -> None:
    """Raises UserError unless an adapter trained elsewhere, its base and images are named."""
    for flag in ("model", "adapter", "data"):
        if getattr(s, flag) is None:
            raise UserError(
                "name run folders, such as runs/smp, or --model, --adapter and --data: "
                f"--{flag} is missing"
            )
    if s.at != "last":
        raise UserError("--at needs a run folder: --adapter is one adapter, without steps")
    if s.shadow:
        raise UserError(
            f"--shadow needs a run of train.py: nothing says how {s.adapter} was trained"
        )
    if not os.path.exists(s.adapter):
        raise UserError(f"there is no adapter {s.adapter}: --adapter takes a file or a folder")
    check_places(s.model, s.data)
    if s.splits is not None:
        check_splits(Path(s.splits))
    out = Path(s.out or "runs/evaluation")
    there = next(path for path in (out, *out.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise UserError(f"{there} is not a folder: give --out the name of one")


def check_places(model: str, data: str) -> None:
    """Raises UserError unless base and images are there; a hub name is only known by its form."""
    hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", model)
    if not hub and not os.path.exists(model):
        raise UserError(
            f"there is no base model {model}: name it, or where it lies now, with --model"
        )
    if data not in EMBEDDED_SETS and not os.path.isdir(data):
        raise UserError(
            f"there is no folder {data}: name that of the images, or where it lies now, with --data"
        )


def check_run(folder: Path, s) -> None:
    """Raises UserError unless `folder` is a run that can be evaluated; RunFolder, which is heavy to
    import, knows more.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.json (train.py writes one)"
        )
    config = read_json(path)
    found = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a run's config: no settings in it")
    if lacking := [name for name in ASKED if name not in found]:
        raise UserError(f"{path} is damaged: its settings lack {lacking[0]}")
    asked = {name: found.get(name) for name in (*ASKED, "nonmembers")}
    known = checked(settings.Settings, asked, path)
    if s.at == "last" and not (folder / "adapter").is_dir():
        raise UserError(f"{folder} has no adapter yet: its training did not finish")
    check_splits(folder / "splits.json")
    path = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is not a complete run: cannot read {path}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is damaged: not every line is an object")
    check_places(s.model or known["model"], s.data or known["data"])
    others = s.nonmembers or known["nonmembers"]
    if s.nonmembers is not None and known["nonmembers"] is None:
        raise UserError(f"{folder} was trained without --nonmembers: leave it out")
    if others not in (None, *EMBEDDED_SETS) and not os.path.isdir(others):
        raise UserError(
            f"there is no folder {others} of the non-members: name where it lies now with "
            "--nonmembers"
        )


def check_splits(path: Path) -> None:
    """Raises UserError unless a file gives every role its images, and no image two roles."""
    from files.images import ROLES  # with numpy, which --help need not wait for

    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: it is not a file")  # a pipe may never end
    splits = read_json(path)
    lists = splits.values() if isinstance(splits, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v in lists):
        raise UserError(f"{path} is not an object of role -> list of file names")
    if unknown := [role for role in splits if role not in ROLES]:
        raise UserError(f"{path} has an unknown role {unknown[0]}: take {', '.join(ROLES)}")
    if bare := [role for role in ROLES if role != "fresh" and not splits.get(role)]:
        raise UserError(f"{path} has no images for the role {bare[0]}")
    seen = set()
    for name in (name for names in splits.values() for name in names):
        if name in seen:
            raise UserError(f"{path} names {name} twice: an image has one role")
        seen.add(name)
