"""What a METHOD leaks: adapters on random halves of a pool, each in turn the
target of an attacker who has all the others.

    python audit.py --method lora                   # 8 adapters, 200 images
    python audit.py --method smp --adapters 16      # finished ones are kept
    python audit.py runs/audit-lora runs/audit-smp  # compare finished audits

Every image of the pool is a member of half of the adapters.  An attacker with shadows knows how
hard an image is, and so sees leaks that no attack on one model shows: Carlini et al. 2022; Aerni,
Zhang & Tramer 2024.  Every adapter is trained by the whole method, with its own seed, and asked at
several steps: the audit gives leakage against held-out loss.  A killed audit goes on where it was.
The images are dealt anew: --split and sub-folders say nothing here, --members is half of --pool.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path

from command import progress
from command.errors import UserError, one_line_errors, this_command
from command.flags import option, parse
from run.resolve import resolve
from settings import Settings

WHERE, OWN = "what and where", "audit"  # groups of --help


@dataclass
class Audit(Settings):
    """Flags of audit.py: those of train.py, which decide the method, and these."""

    audits: list[str] | None = option(None, "finished audits to compare", group=WHERE)
    out: str | None = option(None, "folder (default: runs/audit-<method>)", group=WHERE)
    adapters: int = option(8, "adapters to train, an even number of 4 or more", group=OWN)
    pool: int | None = option(
        None, "images, half of them members of an adapter (default: 200)", group=OWN
    )
    pictures: int = option(
        0,
        "pictures of each adapter and step, for the Frechet distance of all together",
        group=OWN,
    )
    canaries: int = option(0, "images of the pool that get the caption of another", group=OWN)
    jobs: int | None = option(
        None, "adapters at a time, a process each (default: cores, or 1 on a GPU)", group=OWN
    )
    cluster: str | None = option(
        None, "address of a Dask scheduler whose workers train, in place of --jobs", group=OWN
    )


if __name__ == "__main__":
    # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Audit, __doc__, positional="audits")
    progress.start()
    with one_line_errors(this_command), progress.stage("loading the libraries"):
        import_module("attacks.audit_tasks")

import numpy as np
import torch

from attacks import audit_plan, audit_tasks, lira, quality, workers
from attacks.decisions import Decisions
from command.whole_files import write_json
from files.bases import load_base, resolve_device, resolve_dtype
from files.images import load_images
from report import audit_page as audit_report
from run import lock
from run.folder import provenance
from train import train_adapter

EXPOSED = 20  # images listed


# --------------------------------------------------------------------------------------------------
# From flags to a plan


def complete(s: Audit) -> Audit:
    """The flags left out filled in; raises UserError for what cannot work."""
    pool = s.pool or 2 * (s.members or 100)
    if s.adapters < 4 or s.adapters % 2:
        raise UserError(f"--adapters must be an even number of 4 or more, not {s.adapters}")
    if pool < audit_plan.LEAST_POOL or pool % 2:
        least = audit_plan.LEAST_POOL
        raise UserError(f"--pool must be an even number of {least} or more, not {pool}")
    if s.members not in (None, pool // 2):
        raise UserError(f"--members is half of --pool, {pool // 2}, not {s.members}: leave one out")
    if not 0 <= s.canaries <= pool or s.canaries == 1:
        raise UserError(f"--canaries must be 0, or 2 to {pool}: captions change places")
    if s.jobs is not None and s.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {s.jobs}")
    if s.pictures < 0:
        raise UserError(f"--pictures must be 0 or more, not {s.pictures}")
    if s.split != "default":
        raise UserError("--split says nothing in an audit, which deals the images itself")
    if s.nonmembers is not None:
        raise UserError(
            "--nonmembers says nothing in an audit, where every image is a member of half of the "
            "adapters: leave it out"
        )
    if s.stop != "last":
        raise UserError("--stop says nothing in an audit, which asks adapters at several steps")
    s = replace(s, device=resolve_device(s.device))
    jobs = s.jobs or (os.cpu_count() if s.device == "cpu" else 1)
    out = s.out or f"runs/audit-{s.method}"
    s = resolve(replace(s, pool=pool, members=pool // 2, jobs=jobs, out=out))
    steps = s.steps or -(-s.epochs * s.members // (s.batch_size * s.accumulate))
    return replace(s, steps=steps, dtype=resolve_dtype(s.dtype, s.device))


def make_plan(s: Audit) -> audit_plan.Plan:
    """Who trains on what; raises UserError for images or a base that cannot be used."""
    each = Settings(**{f.name: getattr(s, f.name) for f in fields(Settings)})
    each = replace(each, norms_every=10**9, hessian_every=0)  # looked at by nobody
    size = load_base(s.model, "cpu", s.dtype, s.size).size
    images = load_images(s.data, size, s.caption)
    plan = audit_plan.deal(images, each, s.adapters, s.pool, s.canaries, s.out)
    return replace(plan, pictures=s.pictures)


# --------------------------------------------------------------------------------------------------
# The audit


def audit(s: Audit) -> dict:
    """Train what is missing, attack, write audit.json and the figures; returns the record.

    With `audits` compares those and returns the comparison.  Raises UserError.
    """
    if s.audits:
        return audit_report.compare(s.audits)
    s = complete(s)
    plan = make_plan(s)
    if s.dry_run:
        todo = len(audit_tasks.missing(plan))
        print(f"dry run: {todo} of {s.adapters} adapters of {s.steps} steps are to train")
        return {}
    executor = workers.cluster(s.cluster) if s.cluster else workers.processes(s.jobs)
    with lock.held(Path(s.out)):
        audit_tasks.train_all(plan, train_adapter, executor, s.method)
    record, scores = measure(s, plan)
    folder = Path(s.out)
    audit_tasks.write_arrays(folder / "scores.npz", scores)
    write_json(folder / "audit.json", record)
    audit_report.print_record(record)
    audit_report.draw(record, scores, folder)
    print(f"files:    {folder}/audit.json, roc.png, frontier.png, adapters/")
    return record


def measure(s: Audit, plan: audit_plan.Plan) -> tuple[dict, dict[str, np.ndarray]]:
    """The record of an audit, and its scores (N, P) as "<step>/<attack>" beside names and member.

    Canaries are kept apart from the other images.
    """
    answers, seconds = audit_tasks.collect(plan)
    member, apart = plan.members(), np.isin(np.arange(plan.pool), plan.canaries)
    groups = {"attacks": ~apart} | ({"canaries": apart} if plan.canaries else {})
    decisions = {name: Decisions(member[:, g], s.seed) for name, g in groups.items()}
    real = real_features(s, plan)
    steps, kept = (
        {},
        {"names": np.array(plan.names[: plan.pool]), "member": member, "canary": apart},
    )
    for step, answer in progress.over([*zip(plan.due(), answers, strict=True)], "attacks"):
        scores = lira.attacks(answer, member)
        kept |= {f"{step}/{name}": score for name, score in scores.items()}
        steps[str(step)] = quality_of(answer, real) | {
            name: {attack: decisions[name].figures(x[:, g]) for attack, x in scores.items()}
            for name, g in groups.items()
        }
    made = provenance() | {"trained_at": audit_tasks.commits(plan)}
    made["measured"] = made.pop("started")
    record = {
        "settings": asdict(s),
        "provenance": made,
        "adapters": s.adapters,
        "pool": plan.pool,
        "steps": steps,
        "exposed": exposed(plan, member, scores[strongest(steps[str(step)])]),
        "seconds": seconds,
    }
    return record, kept


def quality_of(answer: dict[str, np.ndarray], real: dict[str, torch.Tensor]) -> dict:
    """How well the adapters do at a step: held-out losses, and the Frechet distance of all their
    pictures to each set of `real` features.
    """
    losses = answer["held_out"].mean(1)
    found = {
        "held_out_loss": float(losses.mean()),
        "held_out_loss_by_adapter": losses.tolist(),
    }
    for name, features in real.items():
        drawn = torch.from_numpy(np.concatenate(answer["features"]))
        found[f"frechet_{name}"] = quality.frechet_distance(features, drawn)
    return found


def real_features(s: Audit, plan: audit_plan.Plan) -> dict[str, torch.Tensor]:
    """Features of the held-out images and of the pool; nothing without --pictures."""
    if not plan.pictures:
        return {}
    images = load_images(s.data, load_base(s.model, "cpu", s.dtype, s.size).size, s.caption)
    places = {"held_out": plan.held_out, "pool": range(plan.pool)}
    pixels = {name: images.pixels[[plan.images[i] for i in at]] for name, at in places.items()}
    return {name: quality.features(audit_tasks.network(), x) for name, x in pixels.items()}


def strongest(step: dict) -> str:
    """The attack with the highest AUC at a step: chosen on the images that it is judged on."""
    return max(step["attacks"], key=lambda name: step["attacks"][name]["auc"])


def exposed(plan: audit_plan.Plan, member: np.ndarray, score: np.ndarray) -> list[dict]:
    """The images that a score gives away most, caught at 1 % FPR; the count is of memberships."""
    caught = Decisions(member).caught(score)
    gap = np.where(member, score, 0).sum(0) - np.where(member, 0, score).sum(0)
    order = np.lexsort([-gap, -caught])[:EXPOSED]
    return [
        {
            "name": plan.names[i],
            "caption": plan.captions[i],
            "caught": int(caught[i]),
            "of": len(member) // 2,
            "canary": int(i) in plan.canaries,
        }
        for i in order
    ]


if __name__ == "__main__":
    with one_line_errors(this_command):
        audit(SETTINGS)
