"""The settings of a run made complete: flags left out get their defaults, and what cannot work is
refused before anything is loaded.
"""

import os
from dataclasses import replace
from pathlib import Path

from command.errors import UserError
from run import released
from settings import ABOVE_ZERO, FAST, FROM_ZERO, FULL_LR, PAPER, Settings, is_embedded


def resolve(settings: Settings) -> Settings:
    """The settings with the flags left out filled in; raises UserError for what cannot work."""
    embedded = is_embedded(settings.model)
    if settings.method == "subspace" and embedded and settings.subspace is None:
        settings = replace(settings, subspace="public")
    _check_together(settings)
    defaults = _defaults(settings, embedded)
    defaults.pop("members")  # how many serve is seen when the images are there: most_members
    left_out = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    out = out_folder(settings)
    settings = replace(settings, **left_out, out=str(out))
    for name, highest in (ABOVE_ZERO | FROM_ZERO).items():
        _check_number(settings, name, highest)
    _refuse(released.problems(settings))
    _check_prompts(settings)
    if (out / "config.json").exists() and not (settings.resume or settings.dry_run):
        raise UserError(
            f"{out} already holds a run: give another --out, or --resume to continue it"
        )
    return settings


def _defaults(s: Settings, embedded: bool) -> dict:
    """Values of the flags left out: by the model, and by what the method needs."""
    defaults = dict(FAST if embedded else PAPER)
    if s.method == "distill":  # a step of the student costs more, and its teachers stop early
        public = "openmoji" if embedded else "none"
        epochs = -(-defaults["epochs"] // 2)
        defaults = defaults | {"epochs": epochs, "public": public, "schedule": "constant"}
    if s.released("lambda"):
        defaults = defaults | {"lam": 1.0}
    if s.target == "full":  # the weights have their scale already
        defaults = defaults | {"lr": FULL_LR[embedded], "rank": None, "alpha": None}
    if s.subspace:  # a core has few numbers, and moves far
        defaults = defaults | {"lr": 5 * defaults["lr"]}
    return defaults


def _check_together(s: Settings) -> None:
    """Flags that cannot go together."""
    full = s.target == "full"
    problems = {
        "--nonmembers and --split pokemon both say who is no member: leave one out": s.nonmembers
        and s.split == "pokemon",
        "--rank and --alpha are a LoRA's: leave them out with --target full": full
        and (s.rank is not None or s.alpha is not None),
        "--target full trains no LoRA: leave --subspace, --dropout and --format kohya out": full
        and (s.subspace or s.dropout or s.format == "kohya"),
        "--method dp cannot clip the gradients of norms and biases: leave --target full out": full
        and s.method == "dp",
        "--public goes with --method distill: leave it out": s.public is not None
        and s.method != "distill",
        f"--teachers must be 2 or more, not {s.teachers}": s.teachers < 2,
        "--method subspace needs --subspace FILE: python -m methods.directions makes one": s.method
        == "subspace"
        and s.subspace is None,
        "--init and --subspace both say what the adapter is: leave one out": s.init and s.subspace,
        "--gradient-checkpointing computes again with other masks: leave --dropout out": s.dropout
        and s.gradient_checkpointing,
    }
    _refuse(problems)


def _refuse(problems: dict[str, bool]) -> None:
    """Raise UserError for the first of the sentences that holds."""
    for problem, there in problems.items():
        if there:
            raise UserError(problem)


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


def _check_prompts(settings: Settings) -> None:
    for prompt in settings.prompt or ():
        if len(prompt) > 10_000 or any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError("--prompt must be a text of at most 10,000 characters")


def out_folder(settings: Settings) -> Path:
    """--out or its default; raises UserError if there can be no folder of that name."""
    out = Path(settings.out or f"runs/{settings.method}")
    advice = "give --out the name of a folder"
    try:
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
