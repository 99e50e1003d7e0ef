"""Public directions for `train.py --method dp`: where the base moves when it is adapted to public
pictures.

    python -m methods.directions openmoji --out directions.safetensors
    python -m methods.directions STYLE_1 STYLE_2 --model SD15_FOLDER --out FILE --device cuda

Each public set, a folder in one of the forms that train.py takes, gets a plain LoRA of its own; the
directions are the leading singular vectors of all their updates together.  --dry-run says hours and
memory.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse
from files import EMBEDDED_SETS
from run.resolve import resolve
from settings import EMBEDDED, TABLES, Settings

WHERE = "what and where"


@dataclass
class Flags:
    """Flags of this command."""

    data: list[str] | None = option(None, "public sets: folders, or openmoji", group=WHERE)
    out: str = option("directions.safetensors", "the file to write", group=WHERE)
    model: str = option(EMBEDDED, "as in train.py", group=WHERE)
    device: str = option("auto", "as in train.py", group=WHERE)
    directions: int = option(4, "directions of every layer, k", group="adapter")
    target: str | None = option(
        None,
        "which layers",
        ("attention", "transformer", "all"),
        group="adapter",
        tables=TABLES,
    )
    steps: int = option(240, "steps on each set", group="optimisation")
    batch_size: int = option(16, "pictures of a step", group="optimisation")
    lr: float | None = option(None, "learning rate", group="optimisation", tables=TABLES)
    seed: int = option(0, "of the trainings", group="optimisation")
    size: int | None = option(None, "as in train.py")
    caption: str | None = option(None, "as in train.py")
    dry_run: bool = option(False, "say what it would cost, from two steps, and stop")


def make(flags: Flags) -> dict:
    """Train on each set and write the file; returns {layer: (U, V)}.  Raises UserError."""
    from algorithm import algorithm_1
    from files.bases import load_base
    from files.devices import resolve_dtype
    from files.encode import encode
    from files.images import ROLES, load_images
    from lora import remove
    from methods import subspace
    from methods.assembly import assemble
    from methods.dp import CORE
    from run import cost
    from run.folder import git_commit
    from run.processes import Processes

    sets = flags.data or []
    if not sets:
        raise UserError("no public set is given: name openmoji, or folders of pictures")
    for name in sets:
        if name not in EMBEDDED_SETS and not Path(name).exists():
            raise UserError(f"there is no folder {name}: give folders of public pictures")
    if not 1 <= flags.directions <= CORE:
        raise UserError(f"--directions must be 1 to {CORE}, as many as --method dp trains")
    names = ("model", "device", "target", "steps", "batch_size", "lr", "seed", "size", "caption")
    given = {name: getattr(flags, name) for name in names}
    s = resolve(Settings(method="lora", out="/nowhere", norms_every=10**9, **given))
    s = replace(s, dtype=resolve_dtype(s.dtype, s.device))
    base, updates, seconds = load_base(s.model, s.device, s.dtype, s.size), [], 0.0
    for name in sets:
        images = load_images(name, base.size, s.caption)
        roles = {role: [] for role in ROLES} | {"member_aux": list(range(len(images.names)))}
        data = encode(base, images, roles, few=flags.dry_run)
        run = assemble(s, base, data, Processes(str(base.device)))
        if flags.dry_run:
            step = cost.second_step(algorithm_1, run)
            print(f"{name}: {len(images.names)} pictures, {s.steps} steps at {step:.2g} s")
            seconds += s.steps * step
            remove(base.unet, run.adapter)
            continue
        with progress.stage(f"{name}, {len(images.names)} pictures", s.steps) as bar:
            for _ in algorithm_1(run, range(1, s.steps + 1)):
                bar.advance()
        layers = run.adapter.layers.items()
        updates.append({k: layer.delta().detach().cpu() for k, layer in layers})
        remove(base.unet, run.adapter)
    if flags.dry_run:
        print(f"time:     about {cost.duration(seconds)}, memory {cost.peak_memory(base.device)}")
        print(f"dry run: {flags.out} was not written")
        return {}
    try:
        found = subspace.directions_of(updates, flags.directions)
    except ValueError as error:
        raise UserError(f"--directions {flags.directions} is too many: {error}") from None
    facts = {"base_model": Path(s.model).name, "sets": " ".join(sets), "seed": s.seed}
    facts |= {"steps": s.steps, "git_commit": git_commit()}
    subspace.save(found, s.target, Path(flags.out), facts)
    numbers = f"{flags.directions**2 * len(found):,} numbers to train"
    print(f"files:    {flags.out}, {flags.directions} directions of {len(found)} layers, {numbers}")
    return found


def main() -> None:
    """The command."""
    flags = parse(Flags, __doc__, positional="data")
    progress.start()
    with one_line_errors():
        make(flags)


if __name__ == "__main__":
    main()
