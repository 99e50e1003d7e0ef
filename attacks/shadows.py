"""The adaptive adversary: it trains adapters of its own, as the run was trained, and asks how the
run differs from them.

    python evaluate.py runs/smp --shadow 8      # eight shadows, kept in runs/shadows-<hash>

The candidates are all images whose membership is in question, members of the run or not.  Every
shadow has the run's settings and another seed, and trains on as many random candidates as the run
has members, up to the step of the adapter that is attacked; each candidate is in for as many
shadows as any other, give or take one.  So the attacks of an audit (attacks/lira.py) work on one
run, which is the last of N + 1 adapters.  The draw knows nothing of who is a member of the run.
Tested in tests/test_shadow.py.
"""

from dataclasses import replace

import numpy as np

from attacks import audit_plan, audit_tasks, lira
from attacks.examination import Examination
from attacks.target import Target
from command.errors import UserError
from command.flags import checked
from diffusion import Encoded
from files.images import ROLES, Images
from run import identity
from run.folder import RunFolder
from settings import Settings

SEED = 1001  # added to the run's own
# what a run shows on its way, and nobody looks at here
UNSEEN = {"samples": 0, "prompt": None, "hessian_every": 0, "norms_every": 10**9, "track": None}
UNSEEN |= {"save_every": None, "stop": "last", "dry_run": False, "resume": False}
LEAST = 2  # shadows with and shadows without it that every image needs


def plan(target: Target, examination: Examination, count: int, device: str) -> audit_plan.Plan:
    """Who of `count` shadows of a run, an even number, trains on which candidates.

    Raises UserError, before anything is trained, where that cannot be.
    """
    s, data = as_trained(target), examination.data
    sizes = {role: len(index) for role, index in data.roles.items()}
    images, members = len(data.names), len(data.members())
    s = replace(s, seed=s.seed + SEED, members=members, device=device)
    roles = [shadow_roles(sizes, inside) for inside in blocks(images, members, count, s.seed)]
    times = np.bincount([i for r in roles for i in members_of(r)], minlength=images)
    if min(times.min(), count - times.max()) < LEAST:
        raise UserError(
            f"--shadow {count} is too few for {images} images, {members} of them members: every "
            f"image must be in {LEAST} shadows and out of {LEAST}. "
            f"Use --shadow {fewest(images, members)} or fewer --test-nonmembers"
        )
    digest = audit_plan.hash_of(Images(data.names, data.captions, data.pixels))
    known = identity.of(s, examination.base)
    facts = [known, digest, roles, target.step]
    facts += [audit_plan.TIMESTEPS, audit_plan.NOISES, audit_plan.ASKED]
    out = str(target.run.parent / f"shadows-{identity.digest_of(facts)[:8]}")
    pool = examination.positions, images, roles, [], [], data.names, data.captions, digest
    return audit_plan.Plan(s, out, *pool, steps=[target.step], identity=known)


def fewest(images: int, members: int) -> int:
    """The least shadows of a run of so many images with a role, of which so many are members."""
    needed = -(-LEAST * images // min(members, images - members))
    return needed + needed % 2


def advised(record: dict) -> int:
    """Shadows to advise for an evaluated adapter, by its record: 8, or as many as it needs."""
    sizes = record["images"]
    members = sum(size for role, size in sizes.items() if role.startswith("member"))
    return max(8, fewest(sum(sizes.values()), members))


def as_trained(target: Target) -> Settings:
    """The settings of a run, without what was only looked at on the way; model and images from
    where they lie now.
    """
    config = RunFolder(target.run).config()
    s = Settings(**checked(Settings, config["settings"], target.run / "config.json"))
    now = {name: target.config.get(name) for name in ("model", "data", "nonmembers")}
    whole = s.accumulate * config.get("processes", 1)  # the same whole batch in one process
    return replace(s, **now, **UNSEEN, accumulate=whole, dtype=target.config["dtype"])


def blocks(images: int, members: int, count: int, seed: int) -> list[list[int]]:
    """For each of `count` shadows all candidates in an order whose first `members` it trains on.

    One random order of all after the other is dealt out, so no image is in for two shadows more
    than another.
    """
    rng, orders, left = np.random.default_rng([seed, images]), [], []
    for _ in range(count):
        inside, left = left[:members], left[members:]
        if len(inside) < members:  # the next turn: those of this shadow come last in it
            others = [i for i in rng.permutation(images).tolist() if i not in inside]
            turn, more = others + inside, members - len(inside)
            inside, left = inside + turn[:more], turn[more:]
        rest = sorted(set(range(images)) - set(inside))
        orders.append(rng.permutation(inside).tolist() + rng.permutation(rest).tolist())
    return orders


def shadow_roles(sizes: dict[str, int], order: list[int]) -> dict[str, list[int]]:
    """Candidates in the given order cut into roles of the run's sizes, members first."""
    ends = np.cumsum([sizes.get(role, 0) for role in ROLES]).tolist()
    return {
        role: sorted(order[end - sizes.get(role, 0) : end])
        for role, end in zip(ROLES, ends, strict=True)
    }


def members_of(roles: dict[str, list[int]]) -> list[int]:
    """Positions that an adapter trains on."""
    return [i for role, index in roles.items() if role.startswith("member_") for i in index]


def scores(
    data: Encoded, shadows: audit_plan.Plan, answers: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The attacks with shadows on the model that gave `answers`: {attack: (P,)}."""
    (asked,), _ = audit_tasks.collect(shadows)
    every = {name: np.concatenate([asked[name], answers[name][None]]) for name in asked}
    # the labels of the target go unread
    member = np.concatenate([shadows.members(), np.zeros((1, len(data.names)), bool)])
    found = lira.attacks(every, member, targets=[len(shadows)])
    return {name: score[0] for name, score in found.items() if name != lira.THRESHOLD}
