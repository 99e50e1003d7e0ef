"""A dataclass of settings from the command line and from files of settings.  Imports nothing heavy.

@dataclass
class Settings:
    batch_size: int = option(8, "images of a step", group="optimisation")

settings = parse(Settings, __doc__)      # --batch-size 16, or --config FILE
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from command.errors import UserError, printable, reason, shown
from command.whole_files import MOST_BYTES, read_json, read_text

GROUPS = (
    "what and where",
    "audit",
    "an adapter trained elsewhere",
    "method",
    "adapter",
    "optimisation",
    "saving and looking",
    "regularisation",
    "distillation",
    "differential privacy",
    "advanced",
)  # in the order of --help
# what diffusers' and kohya's trainers call a flag, where the words are not near
ELSEWHERE = {
    "pretrained_model_name_or_path": "--model",
    "train_data_dir": "--data",
    "instance_data_dir": "--data",
    "instance_prompt": "--caption",
    "output_dir": "--out",
    "max_train_steps": "--steps",
    "learning_rate": "--lr",
    "lr_scheduler": "--schedule",
    "mixed_precision": "--dtype",
    "network_dim": "--rank",
    "network_alpha": "--alpha",
    "gradient_accumulation_steps": "--accumulate",
    "checkpointing_steps": "--save-every",
    "resume_from_checkpoint": "--resume",
    "report_to": "--track",
    "validation_prompt": "--prompt",
    "random_flip": "--flip",
    "random_crop": "--crop",
}


def option(
    default,
    help: str,
    choices: tuple | None = None,
    group: str = "advanced",
    aliases: tuple[str, ...] = (),
    tables: dict[str, dict] | None = None,
    beats: str | None = None,
    shows: str | None = None,
):
    """A dataclass field that is a flag, with its help text, choices, group in --help and aliases.

    `tables` {"kind of model": {field: default}} is for a default of None that depends on the model.
    --help shows the default of each kind.
    `beats` names a field that has no effect while this one is set.  That field on the command line
    drops this one from a --config file.
    `shows` replaces the default's value in --help.
    """
    metadata = {"help": help, "choices": choices, "group": group, "aliases": aliases}
    metadata |= {"tables": tables or {}, "beats": beats, "shows": shows}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr with exit code 2."""

    retired: typing.ClassVar[dict] = {}  # of the settings, see `checked`

    def error(self, message: str) -> typing.NoReturn:
        """Print the line, with the nearest flag or choice if the message is of an unknown one."""
        flags = self._option_string_actions
        unknown = re.match(r"unrecognized arguments:.*?(--[^\s=]+)", message)
        choice = re.match(r"argument (?:.*/)?(--[\w-]+): invalid choice: '(.*?)'", message)
        if unknown and (name := _name(unknown[1])) in self.retired:
            message = _gone(unknown[1], self.retired[name])
        elif unknown:
            same = ELSEWHERE.get(name)
            near = _did_you_mean(_flag(name), flags)
            message += f"; it is {same} here" if same in flags else near
        elif choice:
            message += _did_you_mean(choice[2], flags[choice[1]].choices)
        print(f"error: {shown(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" with the word of `known` nearest to this one, "" if none is near."""
    nearest = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _gone(flag: str, retired: tuple) -> str:
    return f"{flag} is no longer a flag; commit {retired[0]} was the last that had it"


def parse(
    settings: type, doc: str | None, positional: str | None = None, argv: list[str] | None = None
):
    """An instance of the dataclass `settings` from the command line: `batch_size` is --batch-size.

    A field of type `X | None` takes an X.  A bool is a switch.  A list takes one word each time its
    flag is given.  The field named `positional` takes the words without a flag.
    --config names a file of flags.  Flags on the command line override it.
    """
    printable()
    parser = Parser(
        usage=f"%(prog)s {f'[{positional} ...] ' if positional else ''}[flags]",
        description=_opening(doc),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.retired = getattr(settings, "RETIRED", {})
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    fields = dataclasses.fields(settings)
    for field in sorted(fields, key=lambda field: field.name != positional):
        _add(groups, field, field.name == positional)
    first = groups[GROUPS[0]]
    text = "take flags from a run's config.json (all but --out and --resume) or from a TOML file; "
    text += "flags on the command line override it (--no-X turns its switch X off)"
    first.add_argument("--config", metavar="FILE", help=text)
    first.add_argument("-h", "--help", action="help", help="show this and stop")
    given = vars(parser.parse_args(argv))
    if sys.flags.optimize > 1:
        parser.error("transformers cannot be imported without docstrings: leave -OO out")
    try:
        config = _read_config(settings, Path(given.pop("config"))) if "config" in given else {}
    except UserError as error:
        parser.error(str(error))
    for field in fields:
        if field.metadata["beats"] in given:
            config.pop(field.name, None)
    return settings(**config | given)


def _add(groups: dict, field: dataclasses.Field, positional: bool) -> None:
    kind, text = _kind(field), (field.metadata["help"] + _default(field)).replace("%", "%%")
    if positional:
        groups[GROUPS[0]].add_argument(field.name, nargs="*", help=text)
        return
    group = groups[field.metadata["group"]]
    flags = [_flag(name) for name in (field.name, *field.metadata["aliases"])]
    choices = field.metadata["choices"]
    if kind is bool:
        group.add_argument(*flags, dest=field.name, action="store_true", help=text)
        no, hidden = ["--no-" + flag.removeprefix("--") for flag in flags], argparse.SUPPRESS
        group.add_argument(*no, dest=field.name, action="store_false", help=hidden)
    elif choices:
        group.add_argument(*flags, dest=field.name, type=kind, choices=choices, help=text)
    else:
        several = typing.get_origin(kind) is list
        how = {"action": "append"} if several else {"type": kind}
        name = {int: "N", float: "X"}.get(kind, field.name.upper())
        group.add_argument(*flags, dest=field.name, metavar=name, help=text, **how)


def _opening(doc: str | None) -> str:
    """The part of a script's docstring that --help shows: all up to the examples."""
    paragraphs = (doc or "").strip().split("\n\n")
    examples = [i for i, text in enumerate(paragraphs) if text.startswith("    ")]
    return "\n\n".join(paragraphs[: examples[-1] + 1] if examples else paragraphs)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _kind(field: dataclasses.Field) -> type:
    """The type of a field without None: int for `int` and for `int | None`."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else [field.type]
    return next(kind for kind in kinds if kind is not type(None))


def _default(field: dataclasses.Field) -> str:
    """The default in --help, such as " (default: 0.001 embedded, 0.0001 Stable Diffusion)"."""
    if field.metadata["shows"]:
        return f" (default: {field.metadata['shows']})"
    tables = {name: table[field.name] for name, table in field.metadata["tables"].items()}
    if len(set(tables.values())) > 1:
        return f" (default: {', '.join(f'{_short(v)} {name}' for name, v in tables.items())})"
    default = next(iter(tables.values()), field.default)
    return "" if default is None or default is False else f" (default: {_short(default)})"


def _short(value) -> str:
    """A number as --help shows it: 4.0 is 4."""
    return f"{value:g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------
# Flags from a file


def _read_config(settings: type, path: Path) -> dict:
    """{field: value} of a run's config.json or of a TOML file."""
    if path.suffix == ".toml":
        try:
            return checked(settings, tomllib.loads(read_text(path, MOST_BYTES)), path)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from None
    config = read_json(path)
    found = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not the config.json of a run: it holds no settings")
    kept = {key: value for key, value in found.items() if key not in ("out", "resume")}
    return checked(settings, kept, path)


def checked(settings: type, values: dict, path: Path) -> dict:
    """`values`, read from `path`, as {field of the dataclass: value of its type}.

    A key may be written as the flag is, or as an alias.  Raises UserError naming file and key.
    The class attribute RETIRED holds the flags of earlier versions, {name: (the last commit that
    had it, the values at which it changed nothing ...)}.  Such a key is dropped if it has one of
    these values, and is an error otherwise.
    """
    if hasattr(settings, "adopted"):  # a static method: the settings of another command, translated
        values = settings.adopted(values, path)
    fields = {f.name: f for f in dataclasses.fields(settings)}
    names = {alias: f.name for f in fields.values() for alias in (f.name, *f.metadata["aliases"])}
    retired, found = getattr(settings, "RETIRED", {}), {}
    for key, value in values.items():
        name = _name(key)
        if name in names:
            field = fields[names[name]]
            if field.name in found:
                raise UserError(f"{path}: {field.name} is given twice, again as {key}")
            found[field.name] = _checked_value(field, value, f"{path}: {key}")
        elif name not in retired:
            raise UserError(f"{path}: there is no flag {key}{_did_you_mean(name, names)}")
        elif ... not in retired[name] and value not in retired[name][1:]:
            raise UserError(f"{path}: {_gone(f'{_flag(name)} {value}', retired[name])}")
    return found


def _checked_value(field: dataclasses.Field, value, where: str):
    kind, choices = _kind(field), field.metadata["choices"]
    if value is None and field.default is None:
        return None
    if choices and value not in choices:
        hint = _did_you_mean(str(value), choices)
        raise UserError(f"{where} must be one of {', '.join(choices)}, not {value!r}{hint}")
    if typing.get_origin(kind) is list:
        if isinstance(value, list) and all(_is_text(word) for word in value):
            return value
        raise UserError(f"{where} must be a list of words, not {value!r}")
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{where} is too large a number")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is str and not _is_text(value)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{where} must be {names[kind]}, not {value!r}")
    return value


def _is_text(value) -> bool:
    """Whether it could be given on the command line.  Other text cannot name a file."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False
