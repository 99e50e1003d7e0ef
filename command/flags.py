"""Flags from a dataclass, from the command line and from files of settings; nothing heavy."""

import argparse
import dataclasses
import os
import sys
import tomllib
import types
import typing
from pathlib import Path

from command.errors import UserError, reason, shown
from command.whole_files import read_json

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
)  # as --help shows them


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
    """A dataclass field that is a flag: its help text, choices, group in --help and other names.

    `tables` {"kind of model": {field: default}} is for a default of None that depends on the model:
    the help shows the default of each.  `beats` names the field that counts only where this one is
    not set: given on the command line, that field drops this one from a --config file.  `shows` is
    what the help says of the default where that is not its value.
    """
    metadata = {"help": help, "choices": choices, "group": group, "aliases": aliases}
    metadata |= {"tables": tables or {}, "beats": beats, "shows": shows}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line on stderr, exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"error: {shown(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def parse(settings: type, doc: str, positional: str | None = None, argv: list[str] | None = None):
    """An instance of the dataclass `settings` from the command line: `batch_size` is --batch-size.

    A field of type `X | None` takes an X; a bool is a switch; a list takes a word each time its
    flag is given; the field named `positional` takes the bare words.  --config names a file of
    flags; those on the command line win over it.
    """
    parser = Parser(
        usage=f"%(prog)s {f'[{positional} ...] ' if positional else ''}[flags]",
        description=_opening(doc),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    fields = dataclasses.fields(settings)
    for field in sorted(fields, key=lambda field: field.name != positional):
        _add(groups, field, field.name == positional)
    first = groups[GROUPS[0]]
    text = "take flags from a run's config.json (but --out and --resume) or from a TOML file; "
    text += "flags given here win (--no-X unsets its switch X)"
    first.add_argument("--config", metavar="FILE", help=text)
    first.add_argument("-h", "--help", action="help", help="show this and stop")
    given = vars(parser.parse_args(argv))
    file, config = given.pop("config", None), {}
    if file is not None:
        try:
            config = _read_config(settings, Path(file))
        except UserError as error:
            parser.error(str(error))
    for field in dataclasses.fields(settings):
        if field.metadata["beats"] in given:
            config.pop(field.name, None)
    return settings(**config | given)


def _add(groups: dict, field: dataclasses.Field, positional: bool) -> None:
    kind, text = _kind(field), (field.metadata["help"] + _default(field)).replace("%", "%%")
    group = groups[field.metadata["group"]]
    if positional:
        groups[GROUPS[0]].add_argument(field.name, nargs="*", help=text)
        return
    flags = [_flag(name) for name in (field.name, *field.metadata["aliases"])]
    if kind is bool:
        group.add_argument(*flags, dest=field.name, action="store_true", help=text)
        no, hidden = ["--no-" + flag.removeprefix("--") for flag in flags], argparse.SUPPRESS
        group.add_argument(*no, dest=field.name, action="store_false", help=hidden)
        return
    choices = field.metadata["choices"]
    name = None if choices else {int: "N", float: "X"}.get(kind, field.name.upper())
    if typing.get_origin(kind) is list:  # given again, one more
        group.add_argument(*flags, dest=field.name, action="append", metavar=name, help=text)
        return
    group.add_argument(*flags, dest=field.name, type=kind, choices=choices, metavar=name, help=text)


def _opening(doc: str) -> str:
    """Of a script's docstring what --help shows: down to the examples; the rest is for those who
    read the code.
    """
    paragraphs = doc.strip().split("\n\n")
    examples = [i for i, text in enumerate(paragraphs) if text.startswith("    ")]
    return "\n\n".join(paragraphs[: examples[-1] + 1] if examples else paragraphs)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(field: dataclasses.Field) -> type:
    """int of a field of type `int` or `int | None`."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else [field.type]
    return next(kind for kind in kinds if kind is not type(None))


def _default(field: dataclasses.Field) -> str:
    """What --help says of a default: " (default: 1e-3 embedded, 1e-4 Stable Diffusion)"."""
    if field.metadata["shows"]:
        return f" (default: {field.metadata['shows']})"
    tables = {name: table[field.name] for name, table in field.metadata["tables"].items()}
    if len(set(tables.values())) > 1:
        return f" (default: {', '.join(f'{_typed(v)} {name}' for name, v in tables.items())})"
    default = next(iter(tables.values()), field.default)
    return "" if default is None or default is False else f" (default: {_typed(default)})"


def _typed(value) -> str:
    """A default as a person would type it: 0.001 is 1e-3, 4.0 is 4."""
    if not isinstance(value, float):
        return str(value)
    digits, exponent = f"{value:e}".split("e")
    short = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    small = 0 < abs(value) < 0.01 and float(short) == value
    return short if small else repr(value).removesuffix(".0")


# --------------------------------------------------------------------------------------------------
# Flags from a file


def _read_config(settings: type, path: Path) -> dict:
    """{field: value} of a run's config.json or of a TOML file; UserError names file and key."""
    try:
        if path.exists() and not path.is_file():  # a pipe or device may never end
            raise UserError(f"cannot read {path}: it is not a file")
        if path.suffix == ".toml":
            return checked(settings, tomllib.loads(path.read_text(encoding="utf-8")), path)
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

    A key may be written as the flag is, or as one of its aliases.  The class attribute RETIRED
    {key: value} holds flags there once were; such a key is dropped if it has that value, which
    changed nothing.  Raises UserError naming the file and the key.
    """
    if hasattr(settings, "adopted"):  # a static method: the settings of another command, translated
        values = settings.adopted(values, path)
    fields = {f.name: f for f in dataclasses.fields(settings)}
    names = {alias: f.name for f in fields.values() for alias in (f.name, *f.metadata["aliases"])}
    retired, found = getattr(settings, "RETIRED", {}), {}
    for key, value in values.items():
        name = names.get(key.replace("-", "_"))
        if name is not None:
            if name in found:
                raise UserError(f"{path}: {name} is there twice, again as {key}")
            found[name] = _checked_value(fields[name], value, f"{path}: {key}")
        elif key not in retired:
            raise UserError(f"{path}: there is no flag {key}")
        elif value != retired[key]:
            raise UserError(f"{path}: {key} {value} is of an older version; there is no such flag")
    return found


def _checked_value(field: dataclasses.Field, value, where: str):
    kind, choices = _kind(field), field.metadata["choices"]
    if value is None and field.default is None:
        return None
    if choices and value not in choices:
        raise UserError(f"{where} must be one of {', '.join(choices)}, not {value!r}")
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
    """Whether it could be a word on the command line: no other text can name a file."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False
