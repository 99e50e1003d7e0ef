"""Which image of a run plays which part: members, non-members, and how many of each.

    roles = split(images, seed=0, members=None)     # {"member_aux": [3, 17, ...], ...}
    say(roles, nonmembers=None)                     # one line, and a note if they are too few

Tested in tests/test_roles.py.
"""

import math

import numpy as np

from command.errors import UserError, shown
from files.images import ROLES, Images, deal, distinct, parts, split_as_it_comes

LEAST = 5  # members, so that every role has an image
OUTSIDE_TEST = 250  # most test non-members that are taken from --nonmembers
SCORED = 200  # test non-members that evaluate.py scores
WITHIN = 0.1  # half the width of the interval of an AUC at chance that a run should reach


def split(
    images: Images, seed: int, members: int | None, preset: str = "default", most: int = 100
) -> dict[str, list[int]]:
    """Disjoint random roles: {role: sorted indices into `images`} for every role of ROLES.

        default    half of the members are member_aux, a fifth of the rest member_val, the others
                   member_test.  nonmember_aux = member_aux, nonmember_val = 2 member_val.  A fifth
                   of the images left is fresh, the others are nonmember_test.  With `members` None
                   as many as leave no fewer test non-members than test members, at most `most`
        pokemon    the paper's sizes: aux 200, test 200 | aux 200, test 233.  A tenth of each aux
                   set is for validation; images beyond the paper's 833 are fresh

    With --nonmembers the members are of one's own images (None: all, at most `most`), and the rest
    of these are fresh.  The non-members are of the other set, at most OUTSIDE_TEST for the test.
    A folder with the paper's sub-folders keeps them; `members` and `preset` then do nothing.
    Of near-duplicates only the first gets a role (with --nonmembers one's own), so that no member
    is also a non-member; a line is printed.
    Raises UserError if there are too few images.
    """
    if images.folders:
        return split_as_it_comes(images, seed)
    kept, rng = distinct(images, list(range(len(images.names)))), np.random.default_rng(seed)
    if images.private is not None:
        own, others = ([i for i in kept if (i < images.private) == mine] for mine in (True, False))
        members = min(len(own), most) if members is None else members
        sizes = _sizes_beside(len(own), len(others), members)
        roles = deal(own, sizes[0], rng) | deal(others, sizes[1], rng)
    else:
        if members is None and preset == "default":
            members = most_members(len(kept), most)
        roles = deal(kept, _sizes(len(kept), members, preset), rng)
    return {role: roles[role] for role in ROLES}


def most_members(total: int, most: int) -> int:
    """The largest number of members of `total` distinct images that leaves no fewer test
    non-members than test members; LEAST at least and `most` at most.  About 10 of 22.
    """
    for members in range(min(most, total), LEAST, -1):
        sizes = _default_sizes(total, members)
        if sizes["nonmember_test"] >= sizes["member_test"]:
            return members
    return LEAST


def _default_sizes(total: int, members: int) -> dict[str, int]:
    """Images per role.  The last ones are negative if `total` is too small."""
    aux, val, test = parts(members)
    left = total - members - aux - 2 * val
    fresh = round(left / 5)
    return dict(zip(ROLES, (aux, val, test, aux, 2 * val, left - fresh, fresh), strict=True))


def _sizes(total: int, members: int, preset: str) -> dict[str, int]:
    """Images per role of `total` distinct images.  Raises UserError."""
    if preset == "default":
        _require_least(members)
        aux, val, _ = parts(members)
        needed, sizes = members + aux + 2 * val + 2, _default_sizes(total, members)
        others = "or take others as non-members with --nonmembers"
        remedy = f"add images, {'lower --members, ' if members > LEAST else ''}{others}"
    elif preset == "pokemon":
        needed, remedy = 833, "add images, or take the default preset and choose --members"
        sizes = dict(zip(ROLES, (180, 20, 200, 180, 20, 233, total - needed), strict=True))
    else:
        raise UserError(
            f'there is no preset "{preset}": take "default" (with --members) or "pokemon"'
        )
    if total < needed:
        raise UserError(
            f"the split needs at least {needed} distinct images, but there are {total}: {remedy}"
        )
    return sizes


def _sizes_beside(own: int, others: int, members: int) -> tuple[dict, dict]:
    """With --nonmembers, images per role of `own` distinct images and of `others`."""
    if members > own or own < LEAST:
        lower = " or lower --members" if own >= LEAST else ""
        raise UserError(
            f"{max(members, LEAST)} members need as many distinct images, but there are {own}: "
            f"add images{lower}"
        )
    _require_least(members)
    aux, val, test = parts(members)
    left = others - aux - 2 * val
    if left < 2:
        raise UserError(
            f"{members} members need at least {aux + 2 * val + 2} non-members, but --nonmembers "
            f"holds {others} distinct images that are not in --data: add some or lower --members"
        )
    mine = {"member_aux": aux, "member_val": val, "member_test": test, "fresh": 0}
    taken = min(left, OUTSIDE_TEST)
    theirs = {"nonmember_aux": aux, "nonmember_val": 2 * val, "nonmember_test": taken, "": 0}
    return mine, theirs


def _require_least(members: int) -> None:
    if members < LEAST:
        raise UserError(
            f"--members must be at least {LEAST}, so that every role has an image, not {members}"
        )


def only_dealt(images: Images, roles: dict[str, list[int]]) -> tuple[Images, dict]:
    """The images and roles without the images of --nonmembers that have no role: these need not be
    encoded.
    """
    dealt = {i for index in roles.values() for i in index}
    kept = [i for i in range(len(images.names)) if i < images.private or i in dealt]
    position = {i: k for k, i in enumerate(kept)}
    dealt_roles = {role: [position[i] for i in index] for role, index in roles.items()}
    return images.take(kept), dealt_roles


# --------------------------------------------------------------------------------------------------
# What a run prints about them


def say(roles: dict[str, list[int]], nonmembers: str | None, own: bool = False) -> None:
    """Print how many images play which part, and what limits the evaluation.

    `own` says that the images are a person's own, who may want all of them to be learned.
    """
    counts = []
    for side, name in (("member", "members"), ("nonmember", "non-members")):
        sizes = {part: len(roles[f"{side}_{part}"]) for part in ("aux", "val", "test")}
        each = ", ".join(f"{size} {part}" for part, size in sizes.items())
        counts.append(f"{sum(sizes.values())} {name} ({each})")
    print(f"images:   {', '.join(counts)}, {len(roles['fresh'])} fresh", flush=True)
    members = sum(len(roles[f"member_{part}"]) for part in ("aux", "val", "test"))
    total = sum(map(len, roles.values()))
    if own and not nonmembers and members < total:
        print(
            f"note: the adapter trains on {members} of {total} images; the others test it. With "
            "--nonmembers FOLDER (or openmoji) it trains on all of them"
        )
    if nonmembers:
        print(
            f"note: the non-members come from {shown(nonmembers)}. If they differ in kind from the "
            "members, attacks detect the kind, not membership; evaluate.py warns if so"
        )
    if note := shortage(roles):
        print(note)


def half_width(members: int, nonmembers: int) -> float:
    """Half the width of the 95 % interval of an AUC of so many test images, at chance.

    1.96 times the deviation of the rank sum statistic, sqrt((m + n + 1) / (12 m n)).
    """
    return 1.96 * math.sqrt((members + nonmembers + 1) / (12 * members * nonmembers))


def missing(members: int, nonmembers: int) -> tuple[int, int]:
    """How many more test (members, non-members) bring the half width below WITHIN, the smaller side
    first.
    """
    m, n = members, nonmembers
    while half_width(m, n) > WITHIN:
        m, n = m + (m <= n), n + (n <= m)
    return m - members, n - nonmembers


def shortage(roles: dict[str, list[int]]) -> str | None:
    """A note if the test images are too few for a half width of WITHIN, else None."""
    m, n = (len(roles[f"{side}_test"]) for side in ("member", "nonmember"))
    more, others = missing(m, min(n, SCORED))
    if not more and not others:
        return None
    width = half_width(m, min(n, SCORED))
    lacking = [f"{k} test {name}" for k, name in ((more, "members"), (others, "non-members")) if k]
    return (
        f"note: too few images: {m} test members and {n} test non-members give an AUC to within "
        f"{width:.2f}. For {WITHIN:g} add {' and '.join(lacking)}"
    )
