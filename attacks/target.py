"""What is evaluated: adapters, and where the images lie that they are judged on.

A target comes from a run folder of train.py, or from flags for an adapter trained elsewhere.
`targets` refuses whatever flags, paths and small files show to be wrong; nothing heavy is imported
for that.  Held by tests/test_evaluate.py and tests/test_evaluate_faults.py.
"""

import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from command.errors import UserError, shown
from command.flags import checked
from files import EMBEDDED_SETS
from run.folder import RunFolder, read_splits
from run.resolve import check_device, check_numbers
from settings import FREE, LOOKS, Settings

NEEDED = ("method", "model", "data", "caption", "dtype", "seed")  # of the settings of a run
NUMBERS = {  # lowest and highest
    "test_nonmembers": (0, 10**7),
    "pictures": (0, 10**5),
    "sampling_steps": (1, 999),  # schedules have at least 1,000, some begin at 1
    "shadow": (0, 1000),
}


@dataclass
class Target:
    """One adapter to evaluate."""

    name: str
    run: Path  # the run folder; what several runs share lies beside it
    folder: Path  # where the results go: the run folder, or one in it
    adapter: Path
    step: int | None
    at: str
    config: dict  # settings: model, data, caption, dtype, method, seed, and for runs the others
    splits: dict[str, list[str]] | None  # file names per role; None: the data folder comes split
    images: dict[str, str] | None = None  # file name -> hash; None: nothing says what they were
    identity: dict = field(default_factory=dict)  # as in run/identity.py
    promise: str | None = None  # what --method dp promised when it trained it


# --------------------------------------------------------------------------------------------------
# From the flags of evaluate.py


def targets(s) -> list[Target]:
    """What the flags name; raises UserError for flags, paths and run folders that cannot work."""
    check_flags(s)
    now = {"model": s.model, "data": s.data, "nonmembers": s.nonmembers, "dtype": s.dtype}
    found = [read_run(folder, s.at, **now) for folder in s.runs or ()] or [read_adapter(s)]
    for target in found:
        check_places(target.config)
    return found


def refuse(holds, sentence: str) -> None:
    """Raises UserError where something `holds` that cannot be."""
    if holds:
        raise UserError(sentence)


def check_flags(s) -> None:
    """Values out of their range, and flags that do not go together."""
    for name, (low, high) in NUMBERS.items():
        flag, value = "--" + name.replace("_", "-"), getattr(s, name)
        refuse(not low <= value <= high, f"{flag} must be {low:,} to {high:,}, not {value}")
    odd = s.shadow % 2 or s.shadow == 2
    refuse(odd, f"--shadow must be 0, or an even number of 4 or more, not {s.shadow}")
    refuse(s.jobs is not None and s.jobs < 1, f"--jobs must be 1 or more, not {s.jobs}")
    refuse(s.pictures == 1, "--pictures must be 0 or at least 2: the Frechet distance needs two")
    at = re.fullmatch(r"last|best|[0-9]{1,18}", s.at)
    refuse(not at, f"--at must be last, best or a step, not {s.at}")
    check_device(s.device)
    if s.runs:
        for flag in ("adapter", "members", "splits", "caption", "out", "trained_with"):
            own = "is for an adapter without a run folder: remove it"
            refuse(getattr(s, flag) is not None, f"--{flag.replace('_', '-')} {own}")
        return
    if s.trained_with:
        return check_search(s)
    why = "--members and --nonmembers go together: give both folders"
    refuse((s.members is None) != (s.nonmembers is None), why)
    why = "--members and --nonmembers name all images: remove --data and --splits"
    refuse(s.members is not None and (s.data or s.splits), why)
    refuse(s.at != "last", "--at needs a run folder: --adapter is one adapter, without steps")
    refuse(s.shadow, "--shadow needs to know how --adapter was trained: name a --trained-with FILE")


def check_search(s) -> None:
    """The flags of a search for members."""
    for flag in ("adapter", "model", "data", "nonmembers"):
        needs = "--trained-with needs --adapter, --model, --data and --nonmembers"
        refuse(getattr(s, flag) is None, f"{needs}: --{flag} is missing")
    for flag in ("members", "splits"):
        refuse(getattr(s, flag) is not None, f"--trained-with finds the members: remove --{flag}")
    refuse(not s.shadow, "--trained-with is for shadows: give their number with --shadow")
    refuse(not os.path.exists(s.adapter), f"there is no adapter {s.adapter}")
    check_places({name: getattr(s, name) for name in ("model", "data", "nonmembers", "caption")})


def check_places(config: dict) -> None:
    """Base, images and captions must be there; a hub name is only known by its form."""
    from files import images

    model, data, others = config["model"], config["data"], config.get("nonmembers")
    there = re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", model) or os.path.exists(model)
    refuse(not there, f"there is no base model {model}: give its path with --model")
    refuse(
        data not in EMBEDDED_SETS and not os.path.isdir(data),
        f"there is no folder {data}: give the folder of the images with --data",
    )
    refuse(
        others not in (None, *EMBEDDED_SETS) and not os.path.isdir(others),
        f"there is no folder {others} of non-members: give its path with --nonmembers",
    )
    for folder in (data, others):
        if folder:
            images.check(folder, config.get("caption"))


def read_run(folder: str, at: str = "last", **instead: str | None) -> Target:
    """The adapter of a run folder `at` last, best or a saved step; raises UserError.

    `instead` of what the run says: model and images where they lie now, another dtype.
    """
    run = RunFolder(folder)
    whole, path = run.config(), run.path / "config.json"
    config, promise = whole["settings"], (whole.get("summary") or {}).get("promise")
    for name in NEEDED:
        refuse(name not in config, f"{path} is damaged: its settings lack {name}")
    stated = {name: config.get(name) for name in (*NEEDED, "nonmembers", "size", "lam")}
    known = Settings(**checked(Settings, stated, path))
    try:
        check_numbers(known)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    without = config.get("nonmembers") is None and instead.get("nonmembers") is not None
    refuse(without, f"{folder} was trained without --nonmembers: leave it out")
    config |= {name: value for name, value in instead.items() if value is not None}
    adapter, step = run.adapter(at)
    splits, images, _ = held = run.splits(), run.images(), run.identity()
    for name in (name for names in splits.values() for name in names if images is not None):
        damaged = f"the images.json of {run} is damaged: it has no hash of {shown(name)}"
        refuse(not isinstance(images.get(name), str), damaged)
    results = run.path if at == "last" else run.path / f"at-{at}"
    return Target(f"{run} @{step}", run.path, results, adapter, step, at, config, *held, promise)


def read_adapter(s) -> Target:
    """An adapter trained elsewhere; raises UserError unless it, its base and images are named."""
    either = "give a run folder (runs/smp), or --adapter with --model, --members and --nonmembers"
    for flag in ("adapter", "model", "members"):
        there = getattr(s, flag) or (flag == "members" and s.data)
        refuse(not there, f"{either}: --{flag} is missing")
    missing = not os.path.exists(s.adapter)
    refuse(missing, f"there is no adapter {s.adapter}: --adapter takes a file or a folder")
    folder = Path(s.out or "runs/evaluation")
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    refuse(not there.is_dir(), f"{there} is not a folder: give --out the name of one")
    config = {name: getattr(s, name) for name in ("model", "nonmembers", "caption")}
    config["data"] = s.members or s.data
    config |= {"method": "adapter", "seed": 0, "dtype": s.dtype or "float32"}
    splits = read_splits(Path(s.splits)) if s.splits else None
    return Target(s.adapter, folder, folder, Path(s.adapter), None, "file", config, splits)


# --------------------------------------------------------------------------------------------------
# Which targets belong together


def sources(target: Target) -> str:
    """Where images and base of a target come from: targets that agree share an examination."""
    names = ("model", "data", "nonmembers", "caption", "dtype", "seed", "size")
    held = target.splits, target.images, target.identity.get("model")
    return json.dumps([[target.config.get(k) for k in names], *held])


def models(targets: list[Target], shadows: bool) -> int:
    """How many models are asked: every adapter, and the base once for targets in a row of the same
    sources; with shadows it is asked with those of each adapter.
    """
    places = [sources(target) for target in targets]
    new = sum(here != before for here, before in zip(places, [None, *places], strict=False))
    return len(targets) + (len(targets) if shadows else new)


def kind(target: Target) -> str:
    """All that was decided about an adapter but its seed; what is only looked at on the way decides
    nothing, nor does a flag that a run does not know, at the value it has left out.
    """
    flags = {f.name: f.default for f in fields(Settings)}
    chosen = flags | target.config
    for name in ("seed", *FREE, *LOOKS):
        chosen.pop(name, None)
    for name, (_, *neutral) in Settings.RETIRED.items():
        if neutral == [...] or chosen.get(name) in neutral:
            chosen.pop(name, None)
    best = target.at == "best" or (target.at == "last" and chosen["stop"] == "best")
    return json.dumps([chosen, "best" if best else target.step], sort_keys=True)
