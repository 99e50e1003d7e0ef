"""Which images an audit is about, and which of its adapters trains on what.

    plan = deal(images, settings, adapters, pool, canaries, out)   # complementary random halves

audit.py deals halves of a pool; attacks/shadows.py makes a plan of its own.  Tested in
tests/test_audit.py.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from command.errors import UserError
from diffusion import GRID_SEED, TIMESTEPS
from files.copies import near_duplicates
from files.images import PARTS, ROLES, Images, parts
from run.identity import decided, digest_of
from settings import Settings

NOISES = 2  # per timestep of the losses, with --flip one of them for the mirror image
CROPPED = 8  # with --crop: the image and seven crops of it
THOROUGH = tuple(range(50, 401, 50)), 8  # timesteps and noises of --thorough
SIMA_TIMESTEP = 100
ASKED = [SIMA_TIMESTEP, GRID_SEED, 2]  # the last rises with any other change of audit_tasks.ask
HELD_OUT_IMAGES = 100  # for the held-out loss
NONMEMBER_SETS = (
    4  # times as many non-members as one adapter's attacker takes, if there are so many
)


@dataclass
class Plan:
    """Which images an audit is about, and how its adapters are trained."""

    settings: Settings  # complete, with `steps`; an adapter adds its index to the seed
    out: str
    images: list[int]  # positions in the data: first the pool, then those outside
    pool: int
    roles: list[dict[str, list[int]]]  # per adapter: role -> positions in `images`
    held_out: list[int]  # positions in `images` of those that the held-out loss is measured on
    canaries: list[int]  # positions in the pool
    names: list[str]  # of `images`
    captions: list[str]  # of `images`; those of canaries permuted
    digest: str  # of the images as loaded
    steps: list[int] | None = None  # at which an adapter is asked; None: see `due`
    pictures: int = 0  # drawn of each adapter at each of these steps
    timesteps: tuple[int, ...] = TIMESTEPS  # of the losses
    noises: int = 0  # per timestep; 0: NOISES, or CROPPED
    trainer: str = ""  # what trains an adapter, where that is not the method itself
    identity: dict = field(default_factory=dict)  # base, files and settings, see run/identity.py

    def __post_init__(self):
        self.noises = self.noises or (CROPPED if self.settings.crop else NOISES)

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def ways(self) -> int:
        """To show an image to an adapter: as it is, mirrored with --flip, as crops with --crop."""
        return self.noises if self.settings.crop else 1 + self.settings.flip

    def key(self, index: int) -> str:
        """All that the answers of an adapter depend on, as a hash."""
        asked = [self.asked(), self.due(), self.drawn(index), self.trainer]
        facts = [self.identity, decided(self.settings), asked, self.digest]
        facts += [self.pool, self.held_out, self.canaries]
        return digest_of([*facts, index, self.roles[index]])

    def asked(self) -> list:
        """What audits that are compared should have asked alike."""
        return [list(self.timesteps), self.noises, ASKED]

    def drawn(self, index: int) -> list[int]:
        """Positions of the held-out images from whose captions an adapter draws its pictures: the
        next ones for the next adapter.
        """
        first = index * self.pictures
        return [self.held_out[i % len(self.held_out)] for i in range(first, first + self.pictures)]

    def members(self) -> np.ndarray:
        """(N, pool): which adapter trains on which image."""
        member = np.zeros((len(self), len(self.images)), bool)
        for row, roles in zip(member, self.roles, strict=True):
            for part in PARTS:
                row[roles[f"member_{part}"]] = True
        return member[:, : self.pool]

    def folder(self, index: int) -> Path:
        """Where an adapter and its answers are."""
        return Path(self.out) / "adapters" / f"{index:02d}"

    def due(self) -> list[int]:
        """The steps at which an adapter is asked; training ends at the last of them.

        `steps`, or every --save-every and the last.  Without the flag an eighth, a quarter, half
        and all: leakage grows early, and asking should not cost more than training.
        """
        if self.steps:
            return self.steps
        steps, every = self.settings.steps, self.settings.save_every
        if every:
            return sorted({*range(every, steps + 1, every), steps})
        return sorted({max(1, steps // part) for part in (8, 4, 2, 1)})


def deal(
    images: Images, settings: Settings, adapters: int, pool: int, canaries: int, out: str
) -> Plan:
    """A pool, non-members for the method's attacker and held-out images, all at random.

    Adapter 2k + 1 trains on the half of the pool that 2k does not.  Each adapter's attacker gets
    other non-members: one set for all would be harder or easier than the pool by chance, and a
    defence that trains against it would learn that.  Copies of other images are left out.
    `canaries` images of the pool exchange their captions.  Raises UserError for too few images.
    """
    first = near_duplicates(images.pixels)
    kept = [i for i, f in enumerate(first) if i == f]
    aux, val, _ = parts(pool // 2)
    taken = aux + 2 * val
    needed = pool + taken
    if len(kept) < needed + 2:
        fits = [p for p in range(10, pool, 2) if least(p) <= len(kept)]
        raise UserError(
            f"a pool of {pool} needs at least {least(pool)} distinct images, but there are "
            f"{len(kept)}: {f'use --pool {fits[-1]} or ' if fits else ''}add images"
        )
    rng = np.random.default_rng(settings.seed)
    most = needed + HELD_OUT_IMAGES + (NONMEMBER_SETS - 1) * taken
    chosen = rng.permutation(kept)[:most].tolist()
    held_out = list(range(needed, min(needed + HELD_OUT_IMAGES, len(chosen))))
    outside = [*range(pool, needed), *range(needed + len(held_out), len(chosen))]
    wrong = sorted(rng.permutation(pool)[:canaries].tolist())
    captions = [images.captions[i] for i in chosen]
    for here, there in zip(wrong, np.roll(wrong, 1), strict=True):
        captions[here] = images.captions[chosen[there]]
    names = [images.names[i] for i in chosen]
    digest = hash_of(Images(names, captions, images.pixels[chosen]))
    roles = []
    for index in range(adapters):
        # in random order; 2k + 1 has what 2k has not
        order = np.random.default_rng([settings.seed, index // 2]).permutation(pool).tolist()
        members = order[pool // 2 :] if index % 2 else order[: pool // 2]
        others = np.random.default_rng([settings.seed, index, 1]).permutation(outside).tolist()
        dealt = {
            "member_aux": members[:aux],
            "member_val": members[aux : aux + val],
            "member_test": members[aux + val :],
            "nonmember_aux": others[:aux],
            "nonmember_val": others[aux:taken],
            "nonmember_test": held_out,
        }
        roles.append({role: sorted(dealt.get(role, [])) for role in ROLES})
    return Plan(settings, out, chosen, pool, roles, held_out, wrong, names, captions, digest)


def least(pool: int) -> int:
    """Distinct images that a pool of this size needs, with the attacker's non-members."""
    aux, val, _ = parts(pool // 2)
    return pool + aux + 2 * val + 2


def hash_of(images: Images) -> str:
    """SHA-256 of pictures and captions."""
    return hashlib.sha256("".join(images.hashes()).encode()).hexdigest()
