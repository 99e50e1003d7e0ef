"""The settings of a run made complete: flags left out get their defaults, and what cannot work is
refused before anything is loaded.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from command.errors import UserError
from settings import (
    ABOVE_ZERO,
    DIRECTIONS,
    DP,
    FAST,
    FROM_ZERO,
    FULL_LR,
    PAPER,
    Settings,
    is_embedded,
)


def resolve(settings: Settings, begun: bool = False) -> Settings:
    """The settings with the flags left out filled in; raises UserError for what cannot work.

    Those of a run that has `begun` are complete, and what its adapter is made of stands in them.
    """
    embedded = is_embedded(settings.model)
    if settings.method == "dp" and embedded and settings.directions is None:
        settings = replace(settings, directions=DIRECTIONS)
    if not begun:
        _check_together(settings)
    if settings.hessian_every and settings.gradient_checkpointing:
        raise UserError("--hessian-every differentiates twice: leave --gradient-checkpointing out")
    defaults = _defaults(settings, embedded)
    for name in ("members", "epochs"):  # how many serve is seen when the images are there
        defaults.pop(name)
    left_out = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    out = out_folder(settings)
    settings = replace(settings, **left_out, out=str(out))
    check_numbers(settings)
    promised = (settings.epsilon, settings.delta_dp) != (Settings.epsilon, Settings.delta_dp)
    if promised and settings.method != "dp" and not begun:
        raise UserError(
            "--epsilon and --delta-dp guarantee nothing without --method dp: leave them out"
        )
    check_device(settings.device)
    _check_prompts(settings)
    if (out / "config.json").exists() and not (settings.resume or settings.dry_run):
        raise UserError(
            f"{out} already holds a run: give another --out, or --resume to continue it"
        )
    return settings


def _defaults(s: Settings, embedded: bool) -> dict:
    """Values of the flags left out: by the model, and by what the method needs."""
    defaults = dict(FAST if embedded else PAPER)
    if s.method == "distill":
        defaults = defaults | {"schedule": "constant"}
    if s.method == "dp":
        defaults = defaults | DP | {"rank": None, "alpha": None, "target": None}
    if s.target == "full":  # the weights have their scale already
        defaults = defaults | {"lr": FULL_LR[embedded], "rank": None, "alpha": None}
    return defaults


def _check_together(s: Settings) -> None:
    """Flags that cannot go together."""
    full = s.target == "full"
    names = ("rank", "alpha", "target", "init")
    shape = [f"--{name}" for name in names if getattr(s, name) is not None]
    problems = {
        "--rank and --alpha are a LoRA's: leave them out with --target full": full
        and (s.rank is not None or s.alpha is not None),
        f"--method dp trains along public directions: leave {' and '.join(shape)} out": bool(
            s.method == "dp" and shape
        ),
        "--method dp needs --directions FILE: python -m methods.directions makes one": s.method
        == "dp"
        and s.directions is None,
        "--method dp looks at every image's gradient: leave --gradient-checkpointing out": s.method
        == "dp"
        and s.gradient_checkpointing,
        "--directions goes with --method dp: leave it out": s.directions is not None
        and s.method != "dp",
        "--hessian-every measures the paper's objectives: leave it out with --method distill": bool(
            s.method == "distill" and s.hessian_every
        ),
        f"--teachers must be 2 or more, not {s.teachers}": s.teachers < 2,
    }
    _refuse(problems)


def _refuse(problems: dict[str, bool]) -> None:
    """Raise UserError for the first of the sentences that holds."""
    for problem, there in problems.items():
        if there:
            raise UserError(problem)


def check_numbers(settings: Settings) -> None:
    """Raises UserError for one out of its range."""
    for name, highest in (ABOVE_ZERO | FROM_ZERO).items():
        _check_number(settings, name, highest)


def _check_number(settings: Settings, name: str, highest: float | None) -> None:
    value, positive = getattr(settings, name), name in ABOVE_ZERO
    if value is None:
        return
    if name == "alpha" and settings.init:  # others' adapters may have one of 0 or below
        value, positive = abs(value), False
    low_enough = value < float("inf") if highest is None else value <= highest
    if not (low_enough and (value > 0 if positive else value >= 0)):
        limit = "finite" if highest is None else f"at most {highest:,}".removesuffix(".0")
        lowest = "above 0" if positive else "0 or more"
        raise UserError(f"--{name.replace('_', '-')} must be {lowest} and {limit}, not {value}")


def check_device(device: str) -> None:
    """Raises UserError for a name that no device has."""
    if not re.fullmatch(r"(auto|cpu|cuda|mps|xpu)(:[0-9]{1,3})?", device):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:1 or mps, not {device}")


def _check_prompts(settings: Settings) -> None:
    for prompt in settings.prompt or ():
        if len(prompt) > 10_000 or _lone_surrogate(prompt):
            raise UserError("--prompt must be a text of at most 10,000 characters")


def _lone_surrogate(text: str) -> bool:
    """Whether it holds what UTF-8 cannot say, as Python reads other bytes of a command line."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def out_folder(settings: Settings) -> Path:
    """--out or its default; raises UserError if there can be no folder of that name."""
    out = Path(settings.out or f"runs/{settings.method}")
    advice = "give --out the name of a folder"
    try:
        if _lone_surrogate(str(out)):
            raise UserError(f"{out} is not UTF-8, and safetensors reads no file in it: {advice}")
        lengths = [len(os.fsencode(part)) for part in out.parts]
        if max(lengths, default=0) > 255 or sum(lengths) > 3500:  # room for the files in it
            raise UserError(f"{out} is too long a name: {advice}")
        for path in (out, *out.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file: {advice}")
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link that leads nowhere: {advice}")
    except OSError as error:
        raise UserError(f"--out {out} cannot be a folder: {error.strerror}") from None
    return out
