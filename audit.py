"""What a METHOD leaks: adapters on random halves of a pool, each in turn the
target of an attacker who has all the others.

    python audit.py --method lora                   # 8 adapters, 200 images
    python audit.py --method smp --adapters 16      # finished ones are kept
    python audit.py --method smp --dry-run          # hours, gigabytes, memory
    python audit.py runs/audit-lora runs/audit-smp  # compare finished audits

Every image of the pool is a member of half of the adapters.  An attacker with shadows knows how
hard an image is, and so sees leaks that no attack on one model shows: Carlini et al. 2022; Aerni,
Zhang & Tramer 2024.  Every adapter is trained by the whole method, with its own seed, and asked at
several steps: the audit gives leakage against held-out loss.  A killed audit goes on where it was.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import ClassVar

from command import progress
from command.errors import UserError, one_line_errors, this_command
from command.flags import option, parse
from run.resolve import resolve
from settings import LOOKS, Settings

WHERE, OWN = "what and where", "audit"  # groups of --help
POOL, MIN_POOL = 200, 10  # images; every role of a run has one
# Flags of train.py that an audit does not have: they change nothing in it, or say what it decides
# itself, at these values.
WITHOUT_EFFECT = (*LOOKS, "state_every", "track", "resume")
DECIDED = {"nonmembers": None, "stop": "last"}


def _flags_of_the_method() -> list[tuple]:
    """(name, type, field) of the flags of train.py that decide what an adapter becomes."""
    without = (*WITHOUT_EFFECT, *DECIDED, "members", "out")
    kept = [f for f in fields(Settings) if f.name not in without]
    return [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in kept]


Method = make_dataclass("Method", _flags_of_the_method())


@dataclass
class Audit(Method):
    """Flags of audit.py: those of train.py that decide the method, and these."""

    audits: list[str] | None = option(None, "finished audits to compare", group=WHERE)
    out: str | None = option(None, "folder (default: runs/audit-<method>)", group=WHERE)
    device: str = option("auto", "as in train.py", group=WHERE)
    adapters: int = option(8, "adapters to train, an even number of 4 or more", group=OWN)
    pool: int = option(POOL, "images; each adapter trains on half of them", group=OWN)
    save_every: int | None = option(
        None,
        "steps between measurements of an adapter (default: after an eighth, a quarter, half and "
        "all steps)",
        group=OWN,
    )
    at: list[str] | None = option(
        None,
        "step at which adapters are measured, in place of --save-every; repeat the flag for more",
        group=OWN,
    )
    pictures: int = option(
        0,
        "pictures to draw per adapter and step, for one Frechet distance over all adapters",
        group=OWN,
    )
    thorough: bool = option(
        False,
        "ask at 8 timesteps with 8 draws of noise, in place of 4 with 2 (with --crop 8)",
        group=OWN,
    )
    canaries: int = option(0, "images of the pool that swap captions", group=OWN)
    jobs: int | None = option(
        None,
        "adapters in parallel, a process each (default: cores, or 1 on a GPU)",
        group=OWN,
    )
    cluster: str | None = option(
        None,
        "train on the workers of this Dask scheduler, in place of --jobs",
        group=OWN,
    )

    RETIRED: ClassVar[dict] = Settings.RETIRED

    @staticmethod
    def adopted(values: dict, path: Path) -> dict:
        """The settings of a run of train.py as flags of an audit: --members N is --pool 2N.

        Raises UserError for a setting that an audit decides in another way.
        """
        values = Settings.adopted(values, path)
        values = {name.replace("-", "_"): value for name, value in values.items()}
        for name, neutral in DECIDED.items():
            if values.get(name, neutral) != neutral:
                raise UserError(f"{path}: an audit has no {name}, here {values[name]}: remove it")
        members = values.get("members")
        found = {} if members is None else {"pool": 2 * members}
        dropped = (*WITHOUT_EFFECT, *DECIDED, "members")
        return found | {k: v for k, v in values.items() if k not in dropped}


# --------------------------------------------------------------------------------------------------
# From flags to a plan


def complete(s: Audit) -> Audit:
    """The flags left out filled in; raises UserError for what cannot work, before heavy imports."""
    if s.adapters < 4 or s.adapters % 2:
        raise UserError(f"--adapters must be an even number of 4 or more, not {s.adapters}")
    if s.pool < MIN_POOL or s.pool % 2:
        raise UserError(f"--pool must be an even number of {MIN_POOL} or more, not {s.pool}")
    if not 0 <= s.canaries <= s.pool or s.canaries == 1:
        raise UserError(f"--canaries must be 0, or 2 to {s.pool}, since captions are swapped")
    if s.jobs is not None and s.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {s.jobs}")
    if s.pictures < 0:
        raise UserError(f"--pictures must be 0 or more, not {s.pictures}")
    s = replace(s, out=s.out or f"runs/audit-{s.method}")
    from files import images  # numpy and Pillow: not for --help

    found = resolve(settings_of_one(s))
    count = images.check(s.data, s.caption)
    if count is not None and s.pool > count:
        raise UserError(f"--pool {s.pool} is more than the {count} images in {s.data}: lower it")
    steps = found.steps or -(-found.epochs * found.members // (found.batch_size * found.accumulate))
    for at in s.at or ():
        if not (at.isdecimal() and 1 <= int(at) <= steps):
            raise UserError(f"--at takes steps from 1 to {steps}, not {at}")
    flags = {f.name: getattr(found, f.name) for f in fields(Method)}
    return replace(s, **flags | {"steps": steps})


def settings_of_one(s: Audit) -> Settings:
    """The settings of train.py for one adapter; nobody looks at its gradient norms."""
    flags = {f.name: getattr(s, f.name) for f in fields(Method)}
    return Settings(**flags, out=s.out, members=s.pool // 2, norms_every=10**9)


def make_plan(s: Audit):
    """The attacks.audit_plan.Plan: who trains on what.

    Raises UserError for images or a base that cannot be used.
    """
    from attacks import audit_plan
    from files.bases import load_base
    from files.devices import require_device, resolve_device, resolve_dtype
    from files.images import load_images
    from run import identity

    device = resolve_device(s.device)
    require_device(device)
    each = replace(settings_of_one(s), device=device, dtype=resolve_dtype(s.dtype, device))
    base = load_base(s.model, "cpu", each.dtype, s.size)
    each = replace(each, size=base.size)
    images = load_images(s.data, each.size, s.caption)
    plan = audit_plan.deal(images, each, s.adapters, s.pool, s.canaries, s.out)
    steps = sorted({int(at) for at in s.at}) if s.at else None
    plan = replace(plan, steps=steps, pictures=s.pictures, identity=identity.of(each, base))
    if s.thorough:
        timesteps, noises = audit_plan.THOROUGH
        plan = replace(plan, timesteps=timesteps, noises=noises)
    return plan


# --------------------------------------------------------------------------------------------------
# The audit


def audit(s: Audit, train: Callable | None = None, change: Callable | None = None) -> dict:
    """Train what is missing, attack, write audit.json and the figures; returns the record.

    With `audits` compares those and returns the comparison.  For studies: `train` is an
    audit_tasks.Train in place of the method's own, `change` makes another plan of the plan.  Raises
    UserError.
    """
    if s.audits:
        from report.audit_page import compare

        return compare(s.audits)
    s = complete(s)
    from attacks import workers

    if s.cluster and not s.dry_run:
        workers.require_scheduler(s.cluster)
    with progress.stage("loading the libraries"):
        from attacks import audit_record, audit_tasks
        from command.whole_files import write_json
        from report import audit_page
        from run import lock
        from train import train_adapter
    plan = change(make_plan(s)) if change else make_plan(s)
    if train:
        plan = replace(plan, trainer=f"{train.__module__}.{train.__qualname__}")
    s = replace(s, device=plan.settings.device, dtype=plan.settings.dtype)
    s = replace(s, jobs=s.jobs or (os.cpu_count() if s.device == "cpu" else 1))
    if s.dry_run:
        return dry_run(s, plan)
    executor = workers.cluster(s.cluster) if s.cluster else workers.processes(s.jobs)
    folder = Path(s.out)
    with lock.held(folder):
        audit_tasks.train_all(plan, train or train_adapter, executor, s.method)
    pixels = audit_record.pixels_of(plan)
    record, scores = audit_record.measure(plan, asdict(s), pixels)
    audit_tasks.write_arrays(folder / "scores.npz", scores)
    write_json(folder / "audit.json", record)
    audit_page.print_record(record)
    audit_page.draw(record, scores, folder)
    audit_page.draw_exposed(record, pixels, folder)
    print(f"files:    {folder}/audit.json, roc.png, frontier.png, exposed.png, adapters/")
    return record


def dry_run(s: Audit, plan) -> dict[str, float]:
    """Print what an audit would do and cost, from two steps of an adapter and one round of queries;
    nothing is written.  Returns the costs of one adapter, see audit_tasks.cost.
    """
    import torch

    from attacks import audit_tasks
    from run.cost import duration, peak_memory
    from train import train_adapter

    todo, jobs = len(audit_tasks.missing(plan)), 1 if s.cluster else s.jobs
    found = audit_tasks.cost(plan, train_adapter)
    training, queries = (-(-todo // jobs) * found[name] for name in ("training", "queries"))
    memory = peak_memory(torch.device(s.device))
    print(
        f"adapters: {todo} of {s.adapters} to train, {s.steps} steps each, {jobs} in parallel\n"
        f"time:     about {duration(training + queries)}: {duration(training)} of training, "
        f"{duration(queries)} of queries\n"
        f"disk:     {todo * found['bytes'] / 1e9:.2g} GB\n"
        f"memory:   {memory} in each of {jobs} processes\n"
        f"dry run: nothing was written to {s.out}"
    )
    return found


def main() -> None:
    """The command."""
    settings = parse(Audit, __doc__, positional="audits")
    with one_line_errors(this_command):
        progress.start()
        audit(settings)


if __name__ == "__main__":
    main()
