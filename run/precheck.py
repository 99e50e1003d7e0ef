"""What a glance at names and numbers can refuse, before anything heavy is imported or loaded."""

import os
import re
import shlex
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from command.errors import UserError, shown, this_command
from command.flags import checked
from command.whole_files import read_json
from files import EMBEDDED_SETS
from run.folder import RunFolder
from run.resolve import out_folder, resolve
from settings import FREE, PLACES, Settings

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # owner/name; anything else is a path
ALONE = {"WORLD_SIZE": "1", "RANK": "0"}  # what the environment says without a launcher


def precheck(settings: Settings) -> tuple[Settings, dict | None]:
    """The settings complete, with --resume those of the run, and the summary of a finished run.

    Raises UserError as `resolve` and `stored` do, for a model, images or adapter that are not
    there, and for a run that another number of processes has begun.
    """
    summary = None
    if settings.resume:
        settings, summary = stored(settings)
    begun = settings.resume and (out_folder(settings) / "config.json").exists()
    settings = resolve(settings, begun)
    if summary is None:
        _require_paths(settings)
        if settings.resume:
            _require_processes(Path(settings.out) / "config.json")
    return settings, summary


def writes(settings: Settings) -> bool:
    """Whether this process is the one that writes the run folder."""
    return launched()[1] == 0 and not settings.dry_run


def launched() -> tuple[int, int]:
    """(number of processes, rank of this one) as a launcher says in the environment, or (1, 0).

    Raises UserError where it does not say numbers.
    """
    named = {name: os.environ.get(name, default) for name, default in ALONE.items()}
    for name, value in named.items():
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{name} in the environment is {value!r}, not a number: unset it")
    return int(named["WORLD_SIZE"]), int(named["RANK"])


def _require_paths(s: Settings) -> None:
    if s.track and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
        raise UserError(f"--track {s.track} needs a package that is missing: pip install {s.track}")
    path = not HUB_NAME.fullmatch(s.model) or s.model.endswith((".safetensors", ".ckpt"))
    if path and not os.path.exists(s.model):
        raise UserError(
            f"there is no base model {shown(s.model)}: give a StableDiffusion(XL)Pipeline "
            "folder, a .safetensors checkpoint or a hub name"
        )
    if s.data not in EMBEDDED_SETS and not os.path.exists(s.data):
        raise UserError(
            f"there is no folder {shown(s.data)}: give a folder of images, or twemoji for the "
            "embedded set"
        )
    if s.nonmembers not in (None, *EMBEDDED_SETS) and not os.path.exists(s.nonmembers):
        raise UserError(
            f"there is no folder {shown(s.nonmembers)}: give --nonmembers a folder of images that "
            "are not among the private ones, or openmoji"
        )
    for name in ("data", "nonmembers"):
        place = getattr(s, name)
        if place not in (None, *EMBEDDED_SETS) and os.path.realpath(place) == os.path.realpath(
            out_folder(s)
        ):
            raise UserError(f"--out {shown(place)} is the folder of --{name}: give another")
    if s.directions and not os.path.isfile(s.directions):
        raise UserError(
            f"there is no file {shown(s.directions)}: python -m methods.directions makes directions"
        )
    if s.init and not os.path.exists(s.init):
        raise UserError(f"there is no adapter file {shown(s.init)}: --init names one to start from")
    from files import images  # numpy and Pillow, once all names are right

    for folder in filter(None, (s.data, s.nonmembers)):
        images.check(folder, s.caption)


def _require_processes(config: Path) -> None:
    """The data order of a run is that of its whole batch, which grows with the processes."""
    if not config.exists():
        return
    begun, now = read_json(config).get("processes", 1), launched()[0]
    if begun != now:
        raise UserError(
            f"{config.parent} was started by {begun} processes and cannot be continued by {now}: "
            f"start {begun} (accelerate launch --num_processes {begun}), or take another --out"
        )


# --------------------------------------------------------------------------------------------------
# The settings of a run that goes on


def stored(settings: Settings) -> tuple[Settings, dict | None]:
    """For --resume: the settings of the run in --out, and its summary if it is finished.

    A flag given that says something else is refused, save those in FREE, and those in PLACES whose
    content the run folder knows: it is compared later.  Raises UserError.
    """
    out = out_folder(settings)
    if not (out / "config.json").exists():
        return settings, None
    known, summary, compared = _read_run(RunFolder(out))
    taken = {name: getattr(settings, name) for name in FREE} | {"out": str(out)}
    for f in fields(Settings):
        given = getattr(settings, f.name)
        if f.name not in known or f.name in FREE or given in (f.default, known[f.name]):
            continue
        if known[f.name] is None or f.name not in compared:
            flag = "--" + f.name.replace("_", "-")
            line = f"{out} was started with {flag} {known[f.name]}, not {given}: remove {flag}"
            trained = known.get("method") not in ("dp", "distill") and (out / "adapter").is_dir()
            if f.name == "steps" and trained:  # the schedule depends on their number
                line += f", or train on in a new run: {trained_on(out, known[f.name], given)}"
            raise UserError(line)
        taken[f.name] = given
    return replace(Settings(**known), **taken), summary


def trained_on(out: Path, before: int, steps: int) -> str:
    """The command of a new run that goes on from the adapter of a finished one."""
    words = ["train.py", "--config", f"{out}/config.json", "--init", f"{out}/adapter"]
    words += ["--steps", str(max(steps - before, 1)), "--out", f"{out}-more"]
    return f"python {shlex.join(words)}"


def _read_run(run: RunFolder) -> tuple[dict, dict | None, list[str]]:
    """(settings, summary, those of PLACES whose content is known) of a run; raises UserError if its
    config.json is not a whole one.
    """
    path = run.path / "config.json"
    try:
        config = run.config()
        summary, contents = config.get("summary"), config.get("identity")
        if not (isinstance(summary, dict | None) and isinstance(contents, dict | None)):
            raise UserError("its summary or its identity is not an object")
        compared = [name for name in PLACES if (contents or {}).get(name)]
        compared += ["data", "nonmembers"] if (run.path / "images.json").exists() else []
        return checked(Settings, config["settings"], path), summary, compared
    except UserError as error:
        raise UserError(
            f"{path} is not a run's config ({error}): it cannot be continued, take another --out"
        ) from None


def going_on(settings: Settings) -> str:
    """The command that goes on with a run: --resume with the flags that its folder does not keep,
    or the same command again where there is no folder yet.
    """
    out, count = out_folder(settings), launched()[0]
    launcher = f"accelerate launch --num_processes {count}" if count > 1 else "python"
    if settings.dry_run or not (out / "config.json").exists():
        return this_command(launcher)
    words = ["train.py", "--out", str(out)]
    for f in fields(Settings):
        value = getattr(settings, f.name)
        if f.name in FREE and f.name not in ("out", "resume", "dry_run") and value != f.default:
            words += ["--" + f.name.replace("_", "-"), str(value)]
    return f"{launcher} {shlex.join([*words, '--resume'])}"
