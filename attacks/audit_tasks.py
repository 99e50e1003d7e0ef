"""The parts of an audit that are done once per adapter: train on a part of a pool, answer queries.

A plan (attacks/audit_plan.py) says who trains on what.  One task is one adapter; it needs
nothing of the others, so tasks run in any order, in any process, on any machine that sees the same
files.  What it leaves is adapters/<index>/answers.npz, written whole, with a key of all that it
depends on, and the adapter of the last step.  Tested in tests/test_audit.py.
"""

import contextlib
import functools
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import lora
from attacks import quality, workers
from attacks import single as attacks
from attacks.audit_plan import DRAWS, SIMA, Plan, digest_of, hash_of
from command import progress
from command.errors import UserError
from command.whole_files import write_whole
from diffusion import (
    ALL_TIMESTEPS,
    GRID_SEED,
    TIMESTEPS,
    Base,
    Encoded,
    add_noise,
    encode_captions,
    encode_images,
    sample,
)
from diffusion import loss_grid as held_out_grid
from files import adapters as files
from files import text_encoder
from files.bases import load_base
from files.encode import encode
from files.images import Images, load_images
from run.folder import git_commit
from settings import Settings

# (base, images, settings of one adapter) -> (step, the adapter in the base) after every step
Train = Callable[[Base, Encoded, Settings], Iterator[tuple[int, lora.Adapter]]]


# --------------------------------------------------------------------------------------------------
# One task

FACTS = ("key", "commit")  # beside the answers
_lock = threading.Lock()  # a process has one base, and so one adapter at a time
_loaded: dict[str, tuple[Base, Encoded]] = {}  # the base and the images of one plan


def work(plan: Plan, index: int, train: Train) -> None:
    """Train adapter `index` of a plan with `train` and write its answers.

    Raises UserError if its numbers are no longer finite.
    """
    with _lock:
        if finished(plan, index):  # by a worker that died before it could say so
            return
        torch.set_num_threads(plan.settings.threads or 1)
        base, data = _subject(plan)
        folder = plan.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        settings = replace(plan.settings, seed=plan.settings.seed + index)
        answers, due = [], plan.due()
        began, asking = time.time(), 0.0
        data = replace(data, roles=plan.roles[index])
        with contextlib.closing(train(base, data, settings)) as steps:
            for step, adapter in steps:
                if step in due:
                    asked = time.time()
                    answers.append(
                        ask(base, data, plan, adapter, step == due[-1], plan.drawn(index))
                    )
                    asking += time.time() - asked
                (folder / "progress").write_text(str(step))
                if step == due[-1]:
                    _save(adapter, folder / "adapter", settings, step)
                    break
        arrays = {name: np.stack([a[name] for a in answers]) for name in answers[0]}
        arrays |= {f"last_{name}": a for name, a in answers[-1].items() if name not in arrays}
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise UserError(f"the answers of adapter {index} are not finite: lower --lr")
        spent = {"training": time.time() - began - asking, "queries": asking}
        made = {"key": plan.key(index), "commit": git_commit()}
        write_arrays(folder / "answers.npz", arrays | spent | made)


def _subject(plan: Plan) -> tuple[Base, Encoded]:
    """The base and the images of the plan, from the last call if it was for the same plan."""
    s = plan.settings
    key = digest_of([plan.trained, s.device, plan.images, plan.digest])
    if key not in _loaded:
        _loaded.clear()
        with contextlib.redirect_stdout(io.StringIO()):  # whoever made the plan has said it all
            base = load_base(s.model, s.device, s.dtype, s.size)
            images = load_images(s.data, base.size, s.caption, s.nonmembers)
            images = Images(plan.names, plan.captions, images.pixels[plan.images])
            if hash_of(images) != plan.digest:
                raise UserError(f"{s.data} is not what the audit was begun with: put it back")
            _loaded[key] = base, encode(base, images, {})
    return _loaded[key]


def ask(
    base: Base,
    data: Encoded,
    plan: Plan,
    adapter: lora.Adapter,
    last: bool,
    drawn: list[int] | None = None,
) -> dict:
    """What the attacks want to know of an adapter, and its held-out loss; small arrays.

    losses (P, T, K), predictions (P, T, C h w) float16, sima (P, 1 + SIMA), held_out (H,);
    features (D, F) of pictures from the captions of images `drawn`, if there are any; at the last
    step also gradient (P,), the mean log norm, which costs as much as all the others.  K is DRAWS.
    With --flip the attacker asks about every image and its mirror image, which stand side by side
    in the axis of draws, T or SIMA; of the gradient there is the mean.
    """
    data = text_encoder.seen(base, data, adapter)
    text, index = data.text[: plan.pool], plan.held_out
    ways = [data.latents[: plan.pool]]
    if plan.settings.flip:
        ways.append(encode_images(base, data.pixels[: plan.pool, :, ::-1].copy()))
    with adapter.folded():
        losses, predictions = zip(*(predict(base, z, text) for z in ways), strict=True)
        held_out = held_out_grid(base, data.latents[index], data.text[index], ALL_TIMESTEPS, 1)
        found = {
            "losses": np.concatenate(losses, axis=2),
            "predictions": np.concatenate(predictions, axis=1),
            "sima": np.concatenate([-attacks.sima(base, z, text, SIMA) for z in ways], axis=1),
            "held_out": held_out.mean((1, 2)).numpy(),
        }
        if drawn:
            found["features"] = drawn_features(base, data, drawn)
    if last:
        norms = [attacks.gradient_features(base, adapter, z, text).mean(1) for z in ways]
        found["gradient"] = np.mean(norms, axis=0)
    return found


def drawn_features(base: Base, data: Encoded, index: list[int]) -> np.ndarray:
    """Features (D, F) of a picture from each caption; noise of its own for each image."""
    shape, device = base.latent_shape, base.device
    streams = [torch.Generator().manual_seed(GRID_SEED + i) for i in index]
    noise = torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)
    pictures = sample(base, data.text[index], encode_captions(base, [""]), noise)
    return quality.features(network(), pictures).numpy()


@functools.cache
def network() -> torch.nn.Module:
    """The network of picture quality, once per process."""
    return quality.load_network("embedded")


def predict(base: Base, latents, text) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N, T, DRAWS) of the predicted noise, with the noise of diffusion.residuals, and the
    predictions of the first draws (N, T, C h w) as float16: one forward gives both."""
    losses = np.empty((len(latents), len(TIMESTEPS), DRAWS), np.float32)
    kept = np.empty((len(latents), len(TIMESTEPS), latents[0].numel()), np.float16)
    for j, t in enumerate(progress.over(TIMESTEPS, "losses")):
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


def _save(adapter: lora.Adapter, folder: Path, s: Settings, step: int) -> None:
    facts = {"base_model": Path(s.model).name, "method": s.method, "lambda": s.lam}
    facts |= {"seed": s.seed, "steps": step, "git_commit": git_commit()}
    files.save(adapter, folder, facts)


def write_arrays(path: Path, arrays: dict) -> None:
    """Named arrays as an .npz file, which is there whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


# --------------------------------------------------------------------------------------------------
# All tasks


def train_all(plan: Plan, train: Train, executor: AbstractContextManager, title: str) -> None:
    """Every adapter that is not there yet, by an executor, with a bar over their steps.

    `train` must be a function that other processes can import.
    """
    todo = missing(plan)
    if not todo:
        return
    for index in todo:
        (plan.folder(index) / "progress").unlink(missing_ok=True)
    steps = len(todo) * plan.due()[-1]
    with executor as pool, progress.stage(title, steps) as bar:

        def show() -> None:
            done = sum((plan.folder(index) / "answers.npz").is_file() for index in todo)
            bar.note = f"{done} of {len(todo)} adapters"
            bar.advance(sum(steps_done(plan, index) for index in todo) - bar.done)

        workers.complete(pool, work, {index: (plan, index, train) for index in todo}, show)


# --------------------------------------------------------------------------------------------------
# What tasks have left


def missing(plan: Plan) -> list[int]:
    """The adapters whose answers are not there; raises UserError if some are another plan's."""
    return [index for index in range(len(plan)) if not finished(plan, index)]


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
    if key != plan.key(index):
        raise UserError(
            f"{plan.out} holds an audit with other settings or images: give another --out"
        )
    return True


def steps_done(plan: Plan, index: int) -> int:
    """Steps that an adapter has behind it, as far as its process has said."""
    if (plan.folder(index) / "answers.npz").is_file():
        return plan.due()[-1]
    try:
        return int((plan.folder(index) / "progress").read_text() or 0)
    except (OSError, ValueError):
        return 0


def commits(plan: Plan) -> list[str]:
    """The commits of the code that trained the adapters; "" for those that do not say it."""
    every = set()
    for index in range(len(plan)):
        with np.load(plan.folder(index) / "answers.npz") as found:
            every.add(str(found["commit"]) if "commit" in found.files else "")
    return sorted(every)


def collect(plan: Plan) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """Per asked step the answers of all adapters (N, ...), and seconds of all of them."""
    every = []
    for index in range(len(plan)):
        with np.load(plan.folder(index) / "answers.npz") as found:
            every.append({name: found[name] for name in found.files if name not in FACTS})
    seconds = {k: float(sum(a.pop(k) for a in every)) for k in ("training", "queries")}
    last = {n: np.stack([a.pop(n) for a in every]) for n in list(every[0]) if n[:5] == "last_"}
    steps = [
        {name: np.stack([a[name][i] for a in every]) for name in every[0]}
        for i in range(len(plan.due()))
    ]
    steps[-1] |= {name.removeprefix("last_"): array for name, array in last.items()}
    return steps, seconds
