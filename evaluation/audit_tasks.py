"""The parts of an audit that are done once per adapter: train on half of a pool, answer queries.

A plan says which images are in the pool and who trains on what.  One task is one adapter; it needs
nothing of the others, so tasks run in any order, in any process, on any machine that sees the same
files.  What it leaves is adapters/<index>/answers.npz, written whole, with the key of its plan, and
the adapter of the last step.  Held by tests/test_audit.py.
"""

import contextlib
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import lora
import lora_files
from base_files import load_base
from cli import UserError, write_whole
from data import ROLES, Images, load_images, near_duplicates
from diffusion import ALL_TIMESTEPS, GRID_SEED, TIMESTEPS, Base, Encoded, add_noise, encode
from diffusion import loss_grid as held_out_grid
from evaluation import attacks
from settings import FREE, LOOKS, Settings
from training.run_folder import git_commit

DRAWS = 2  # noises per timestep; the prediction itself is kept for the first
SIMA = (100,)  # timesteps of SimA beside 0
HELD_OUT = 100  # images for the held-out loss
LEAST_POOL = 10  # images, so that every role has one

# (base, images, settings of one adapter) -> (step, the adapter in the base) after every step
Train = Callable[[Base, Encoded, Settings], Iterator[tuple[int, lora.Adapter]]]


@dataclass
class Plan:
    """Which images an audit is about, and how its adapters are trained."""

    settings: Settings  # complete, with `steps`; an adapter adds its index to the seed
    out: str
    images: list[int]  # positions in the data: first the pool, then those outside
    pool: int
    outside: dict[str, list[int]]  # positions in `images` per role of non-members
    canaries: list[int]  # positions in the pool
    names: list[str]  # of `images`
    captions: list[str]  # of `images`; those of canaries permuted
    digest: str  # of the images as loaded

    @property
    def key(self) -> str:
        """All that an adapter's answers depend on, but for its index, as a hash."""
        looks = {*FREE, *LOOKS}
        trained = {k: v for k, v in asdict(self.settings).items() if k not in looks}
        asked = [TIMESTEPS, DRAWS, SIMA, GRID_SEED]
        facts = [trained, asked, self.digest, self.pool, self.outside, self.canaries]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def half(self, index: int) -> list[int]:
        """Positions of the members of an adapter, in random order; 2k + 1 has what 2k has not."""
        rng = np.random.default_rng([self.settings.seed, index // 2])
        order = rng.permutation(self.pool).tolist()
        middle = self.pool // 2
        return order[:middle] if index % 2 == 0 else order[middle:]

    def roles(self, index: int) -> dict[str, list[int]]:
        """The roles of the images for an adapter: its half cut up as data.split does."""
        half, (aux, val) = self.half(index), parts(self.pool // 2)
        cut = {"member_aux": half[:aux], "member_val": half[aux : aux + val]}
        dealt = cut | {"member_test": half[aux + val :]} | self.outside
        return {role: sorted(dealt.get(role, [])) for role in ROLES}

    def members(self, count: int) -> np.ndarray:
        """(count, pool): which adapter trains on which image."""
        member = np.zeros((count, self.pool), bool)
        for index in range(count):
            member[index, self.half(index)] = True
        return member

    def folder(self, index: int) -> Path:
        """Where an adapter and its answers are."""
        return Path(self.out) / "adapters" / f"{index:02d}"

    def due(self) -> list[int]:
        """The steps at which an adapter is asked: every --save-every, and the last.

        Without the flag an eighth, a quarter, half and the whole: leakage grows early, and asking
        should not cost more than training.
        """
        steps, every = self.settings.steps, self.settings.save_every
        if every:
            return sorted({*range(every, steps + 1, every), steps})
        return sorted({max(1, steps // part) for part in (8, 4, 2, 1)})


def parts(members: int) -> tuple[int, int]:
    """(auxiliary, validation) members out of `members`, as data.split has them."""
    aux = members // 2
    return aux, round((members - aux) / 5)


def deal(images: Images, settings: Settings, pool: int, canaries: int, out: str) -> Plan:
    """A pool, non-members for the method's attacker and held-out images, all at random.

    Copies of other images are left out.  Raises UserError if there are too few images.
    """
    first = near_duplicates(images.pixels)
    kept = [i for i, f in enumerate(first) if i == f]
    aux, val = parts(pool // 2)
    needed = pool + aux + 2 * val
    if len(kept) < needed + 2:
        raise UserError(
            f"a pool of {pool} needs at least {needed + 2} distinct images and there are "
            f"{len(kept)}: lower --pool or add images"
        )
    rng = np.random.default_rng(settings.seed)
    chosen = rng.permutation(kept)[: needed + HELD_OUT].tolist()
    cuts = pool + aux, needed, len(chosen)
    outside = {
        "nonmember_aux": list(range(pool, cuts[0])),
        "nonmember_val": list(range(cuts[0], cuts[1])),
        "nonmember_test": list(range(cuts[1], cuts[2])),
    }
    wrong = sorted(rng.permutation(pool)[:canaries].tolist())
    captions = [images.captions[i] for i in chosen]
    for here, there in zip(wrong, np.roll(wrong, 1), strict=True):
        captions[here] = images.captions[chosen[there]]
    names = [images.names[i] for i in chosen]
    digest = _digest(Images(names, captions, images.pixels[chosen]))
    return Plan(settings, out, chosen, pool, outside, wrong, names, captions, digest)


def _digest(images: Images) -> str:
    return hashlib.sha256("".join(images.hashes()).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# One task

_lock = threading.Lock()  # a process has one base, and so one adapter at a time
_loaded: dict[str, tuple[Base, Encoded]] = {}  # the base and the images of one plan, by its key


def work(plan: Plan, index: int, train: Train) -> None:
    """Train adapter `index` of a plan with `train` and write its answers.

    Raises UserError if its numbers are no longer finite.
    """
    with _lock:
        torch.set_num_threads(plan.settings.threads or 1)
        base, data = _subject(plan)
        folder = plan.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        settings = replace(plan.settings, seed=plan.settings.seed + index)
        answers, due = [], plan.due()
        began, asking = time.time(), 0.0
        roles = plan.roles(index)
        with contextlib.closing(train(base, replace(data, roles=roles), settings)) as steps:
            for step, adapter in steps:
                if step in due:
                    asked = time.time()
                    answers.append(ask(base, data, plan, adapter, step == due[-1]))
                    asking += time.time() - asked
                (folder / "progress").write_text(str(step))
                if step == due[-1]:
                    _save(adapter, folder / "adapter", settings)
        arrays = {name: np.stack([a[name] for a in answers]) for name in answers[0]}
        arrays |= {f"last_{name}": a for name, a in answers[-1].items() if name not in arrays}
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise UserError(f"the answers of adapter {index} are not finite: lower --lr")
        spent = {"training": time.time() - began - asking, "queries": asking}
        write_arrays(folder / "answers.npz", arrays | spent | {"key": plan.key})


def _subject(plan: Plan) -> tuple[Base, Encoded]:
    """The base and the images of the plan, from the last call if it was for the same plan."""
    s = plan.settings
    if plan.key not in _loaded:
        _loaded.clear()
        with contextlib.redirect_stdout(io.StringIO()):  # whoever made the plan has said it all
            base = load_base(s.model, s.device, s.dtype, s.size)
            images = load_images(s.data, base.size, s.caption)
            images = Images(plan.names, plan.captions, images.pixels[plan.images])
            if _digest(images) != plan.digest:
                raise UserError(f"{s.data} is not what the audit was begun with: put it back")
            if s.gradient_checkpointing:
                base.unet.enable_gradient_checkpointing()
            _loaded[plan.key] = base, encode(base, images, {})
    return _loaded[plan.key]


def ask(base: Base, data: Encoded, plan: Plan, adapter: lora.Adapter, last: bool) -> dict:
    """What the attacks want to know of an adapter, and its held-out loss; small arrays.

    losses (P, T, DRAWS), predictions (P, T, C h w) float16, sima (P, 1 + SIMA), held_out (H,); at
    the last step also gradient (P,), the mean log norm, which costs as much as all the others.
    """
    latents, text = data.latents[: plan.pool], data.text[: plan.pool]
    index = plan.outside["nonmember_test"]
    with merged(adapter):
        losses, predictions = predict(base, latents, text)
        held_out = held_out_grid(base, data.latents[index], data.text[index], ALL_TIMESTEPS, 1)
        found = {
            "losses": losses,
            "predictions": predictions,
            "sima": -attacks.sima(base, latents, text, SIMA),
            "held_out": held_out.mean((1, 2)).numpy(),
        }
    if last:
        found["gradient"] = attacks.gradient_features(base, adapter, latents, text).mean(1)
    return found


def predict(base: Base, latents, text) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N, T, DRAWS) of the predicted noise, with the noise of diffusion.error_maps, and the
    predictions of the first draws (N, T, C h w) as float16: one forward gives both."""
    losses = np.empty((len(latents), len(TIMESTEPS), DRAWS), np.float32)
    kept = np.empty((len(latents), len(TIMESTEPS), latents[0].numel()), np.float16)
    for j, t in enumerate(TIMESTEPS):
        generator = torch.Generator().manual_seed(GRID_SEED + t)
        noise = torch.randn((DRAWS, *base.latent_shape), generator=generator).to(base.device)
        at = torch.full((len(latents),), t, device=base.device)
        for k in range(DRAWS):
            noisy_latents = add_noise(latents, noise[k], at, base.abar)
            noise_pred = attacks.predict_noise(base, noisy_latents, t, text)
            losses[:, j, k] = (noise_pred - noise[k]).square().mean((1, 2, 3)).cpu().numpy()
            if k == 0:
                kept[:, j] = noise_pred.flatten(1).cpu().numpy()
    return losses, kept


@contextlib.contextmanager
def merged(adapter: lora.Adapter) -> Iterator[None]:
    """Inside, the adapter is in the base weights; after it they have the same bits as before."""
    before = [layer.base.weight.clone() for layer in adapter.layers.values()]
    adapter.merge()
    try:
        yield
    finally:
        for layer, weight in zip(adapter.layers.values(), before, strict=True):
            with torch.no_grad():
                layer.base.weight.copy_(weight)
            layer.merged = False


def _save(adapter: lora.Adapter, folder: Path, s: Settings) -> None:
    facts = {"base_model": Path(s.model).name, "method": s.method, "lambda": s.lam}
    facts |= {"seed": s.seed, "steps": s.steps, "git_commit": git_commit()}
    lora_files.save(adapter, folder, facts)


def write_arrays(path: Path, arrays: dict) -> None:
    """Named arrays as an .npz file, which is there whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


# --------------------------------------------------------------------------------------------------
# What tasks have left


def finished(plan: Plan, index: int) -> bool:
    """Whether the answers of an adapter are there; raises UserError if they are another plan's."""
    path = plan.folder(index) / "answers.npz"
    if not path.is_file():
        return False
    try:
        with np.load(path) as found:
            key = str(found["key"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from None
    if key != plan.key:
        raise UserError(
            f"{plan.out} holds an audit with other settings or images: give another --out"
        )
    return True


def progress(plan: Plan, index: int) -> int:
    """Steps that an adapter has behind it, as far as its process has said."""
    if (plan.folder(index) / "answers.npz").is_file():
        return plan.settings.steps
    try:
        return int((plan.folder(index) / "progress").read_text() or 0)
    except (OSError, ValueError):
        return 0


def collect(plan: Plan, count: int) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """Per asked step the answers of all adapters (N, ...), and seconds of all of them."""
    every = []
    for index in range(count):
        with np.load(plan.folder(index) / "answers.npz") as found:
            every.append({name: found[name] for name in found.files if name != "key"})
    seconds = {k: float(sum(a.pop(k) for a in every)) for k in ("training", "queries")}
    last = {n: np.stack([a.pop(n) for a in every]) for n in list(every[0]) if n[:5] == "last_"}
    steps = [
        {name: np.stack([a[name][i] for a in every]) for name in every[0]}
        for i in range(len(plan.due()))
    ]
    steps[-1] |= {name.removeprefix("last_"): array for name, array in last.items()}
    return steps, seconds
