"""An adapter of a run into kohya's form, for ComfyUI and A1111.

python -m files.convert runs/smp           # runs/smp/kohya/kohya_lora_weights.safetensors
python -m files.convert adapter.safetensors --model SD15_FOLDER --out FOLDER
"""

from dataclasses import dataclass
from pathlib import Path

from command.errors import UserError, one_line_errors
from command.flags import option, parse
from command.whole_files import read_json

WHERE = "what and where"


@dataclass
class Flags:
    """Flags of this command."""

    adapters: list[str] | None = option(None, "a run folder, or an adapter", group=WHERE)
    model: str | None = option(None, "its base model (default: that of the run)", group=WHERE)
    out: str | None = option(None, "folder (default: kohya, beside the adapter)", group=WHERE)


def convert(flags: Flags) -> Path:
    """Write the file; returns it.  Raises UserError."""
    if len(flags.adapters or []) != 1:
        raise UserError("name one run folder or adapter")
    given = Path(flags.adapters[0])
    run = (given / "config.json").is_file()
    if not run and flags.model is None:
        raise UserError(f"{given} is not a run folder: name its base with --model")
    model = flags.model or read_json(given / "config.json")["settings"]["model"]

    from files import adapters
    from files.bases import load_base

    base = load_base(model, "cpu", "bfloat16")  # its layers' names are read alone
    adapter, _ = adapters.load(base, given / "adapter" if run else given)
    if not adapter.layers:
        raise UserError(f"{given} is a whole UNet: kohya's form is for LoRA")
    beside = given if run else given.parent
    return adapters.save(adapter, Path(flags.out or beside / "kohya"), {}, kohya=True)


def main() -> None:
    """The command."""
    flags = parse(Flags, __doc__, positional="adapters")
    with one_line_errors():
        print(f"files:    {convert(flags)}")


if __name__ == "__main__":
    main()
