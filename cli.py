"""What every command needs: flags from a dataclass of settings, one-line errors, whole files; imports nothing heavy."""

import argparse
import dataclasses
import errno
import json
import os
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend: one sentence naming what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------------------------------------------
# Flags


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field with the help text and choices of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line on stderr, exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def parse(settings: type, doc: str, positional: str | None = None, argv: list[str] | None = None):
    """An instance of the dataclass `settings` from the command line: field `batch_size` is the flag --batch-size.

    A field of type `X | None` takes an X; a bool is a switch; the field named `positional` takes the bare words.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings):
        kind = field.type
        if isinstance(kind, types.UnionType):
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        text = field.metadata["help"] + (
            "" if field.default in (None, False) else f" (default: {field.default})"
        )
        text = text.replace("%", "%%")
        if field.name == positional:
            parser.add_argument(field.name, nargs="*", help=text)
        elif kind is bool:
            parser.add_argument(_flag(field), action="store_true", help=text)
        else:
            choices = field.metadata["choices"]
            name = None if choices else field.name.upper()
            parser.add_argument(
                _flag(field),
                type=kind,
                default=field.default,
                choices=choices,
                metavar=name,
                help=text,
            )
    return settings(**vars(parser.parse_args(argv)))


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------------
# One-line errors


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 2; a failure of ours keeps its traceback and code 1."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EDQUOT,
            errno.EFBIG,
        ):
            raise
        print(
            f"error: cannot write or read {error.filename or 'a file'}: {error.strerror}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


# ---------------------------------------------------------------------------------------------------------------
# Files that are there whole or not at all, whatever kills the process or fills the disk


def write_whole(path: Path, content: bytes | str) -> Path:
    """Write aside, flush to the disk, rename; on failure nothing is left, and the OSError names the file."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = str(path)  # write() itself names none
        raise
    return path


def write_json(path: Path, value: dict | list) -> None:
    """JSON a person can read, written whole."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path):
    """The value in a JSON file; raises UserError naming the file if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
