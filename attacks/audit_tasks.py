"""The tasks of an audit, one per adapter: train on a part of a pool, answer the attacks' queries.

A plan (attacks/audit_plan.py) says who trains on what.  A task needs nothing of the others, so
tasks run in any order, in any process, on any machine that sees the same files.  A task writes
adapters/<index>/adapter, of the last step, and answers.npz, whole, with a key of all that the
answers depend on.  Tested in tests/test_audit.py.
"""

import contextlib
import functools
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import lora
from algorithm import Diverged
from attacks import quality, single, workers
from attacks.audit_plan import SIMA_TIMESTEP, Plan, hash_of
from attacks.store import damaged, read_arrays
from command import progress
from command.errors import UserError
from command.whole_files import write_whole
from diffusion import (
    ALL_TIMESTEPS,
    GRID_SEED,
    Base,
    Encoded,
    add_noise,
    encode_captions,
    encode_images,
    loss_grid,
    sample,
)
from files import adapters as files
from files import sdxl, text_encoder
from files.bases import load_base
from files.encode import encode
from files.images import load_images
from run import identity
from run.folder import git_commit
from run.identity import digest_of
from run.regularised import view
from settings import Settings

# (base, images, settings of one adapter) -> (step, the adapter in the base) after every step
Train = Callable[[Base, Encoded, Settings], Iterator[tuple[int, lora.Adapter]]]


# --------------------------------------------------------------------------------------------------
# One task

FACTS = ("training", "queries", "key", "commit")  # beside the answers in answers.npz
_lock = threading.Lock()  # a process has one base, and so one adapter at a time
_loaded: dict[str, tuple[Base, Encoded]] = {}  # the base and the images of one plan
_views: dict[str, list[torch.Tensor]] = {}  # of the images of one plan, see `shown`


def work(plan: Plan, index: int, train: Train) -> None:
    """Train adapter `index` of a plan with `train` and write its answers.

    Raises UserError if its numbers are no longer finite.
    """
    with _lock:
        if finished(plan, index):  # by a worker that died before it reported
            return
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        base, data = subject(plan)
        data = replace(data, roles=plan.roles[index])
        folder = plan.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        settings = replace(plan.settings, seed=plan.settings.seed + index)
        answers, due, commit = [], plan.due(), git_commit()
        began, asking = time.monotonic(), 0.0
        with _training(train, base, data, settings) as steps:
            for step, adapter in steps:
                last = step == due[-1]
                if step in due:
                    asked = time.monotonic()
                    answers.append(ask(base, data, plan, adapter, plan.drawn(index)))
                    asking += time.monotonic() - asked
                (folder / "progress").write_text(str(step))
                if last:
                    facts = {"base_model": Path(settings.model).name, "method": settings.method}
                    facts |= {"lambda": settings.lam, "seed": settings.seed}
                    facts |= {"steps": step, "git_commit": commit}
                    files.save(adapter, folder / "adapter", facts)
                    break
        arrays = {name: np.stack([a[name] for a in answers]) for name in answers[0]}
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise UserError(f"the answers of adapter {index} are not finite: lower --lr")
        arrays |= {"training": time.monotonic() - began - asking, "queries": asking}
        arrays |= {"key": plan.key(index), "commit": commit}
        write_arrays(folder / "answers.npz", arrays)


@contextlib.contextmanager
def _training(train: Train, base: Base, data: Encoded, s: Settings) -> Iterator:
    """The steps of `train`, which ends with the block; raises UserError where it diverges."""
    try:
        with contextlib.closing(train(base, data, s)) as steps:
            yield steps
    except Diverged as error:
        raise UserError(f"training with --seed {s.seed} is {error}: lower --lr") from None


def subject(plan: Plan) -> tuple[Base, Encoded]:
    """The base and the images of the plan, from the last call if it was for the same plan."""
    s = plan.settings
    key = digest_of([asdict(s), plan.images, plan.digest, plan.identity])
    if key not in _loaded:
        _loaded.clear()
        with contextlib.redirect_stdout(io.StringIO()):  # printed when the plan was made
            base = load_base(s.model, s.device, s.dtype, s.size)
            images = load_images(s.data, base.size, s.caption, s.nonmembers)
            dealt = {"names": plan.names, "captions": plan.captions}
            images = replace(images.take(plan.images), **dealt)
            what = "the audit was started with"
            identity.require(plan.identity, identity.of(s, base), s, what)
            if hash_of(images) != plan.digest:
                raise UserError(f"{s.data} is not what the audit was started with: put it back")
            _loaded[key] = base, encode(base, images, {})
    return _loaded[key]


def ask(
    base: Base,
    data: Encoded,
    plan: Plan,
    adapter: lora.Adapter,
    drawn: list[int] | None = None,
) -> dict[str, np.ndarray]:
    """What the attacks want to know of an adapter, and its held-out loss.

    losses (P, T, noises), predictions (P, T, C h w) float16, sima (P, 1), held_out (H,); features
    (D, F) of pictures from the captions of images `drawn`, if there are any.

    With --flip or --crop the attacker asks about every image in so many ways as `plan.ways` says,
    which share the noises: the second axis of sima is so many times as long, that of predictions
    twice.
    """
    data = text_encoder.seen(base, data, adapter)
    text, index = data.text[: plan.pool], plan.held_out
    ways = shown(base, data, plan)
    draws = np.array_split(range(plan.noises), len(ways))
    with adapter.folded():
        asked = [
            predict(base, z, text, plan.timesteps, plan.noises, own)
            for z, own in zip(ways, draws, strict=True)
        ]
        losses, predictions = zip(*asked, strict=True)
        sima = [single.l4(single.predict_noise(base, z, SIMA_TIMESTEP, text)) for z in ways]
        held_out = loss_grid(base, data.latents[index], data.text[index], ALL_TIMESTEPS, 1)
        found = {
            "losses": np.concatenate(losses, axis=2),
            "predictions": np.concatenate(predictions[:2], axis=1),
            "sima": np.stack(sima, axis=1),
            "held_out": held_out.mean((1, 2)).numpy(),
        }
        if drawn:
            found["features"] = drawn_features(base, data, drawn)
    return found


def shown(base: Base, data: Encoded, plan: Plan) -> list[torch.Tensor]:
    """Latents (P, C, h, w) of the pool's images, and of `plan.ways` - 1 views of each, which are
    encoded once for a plan.
    """
    s, pixels = plan.settings, data.pixels[: plan.pool]
    key = digest_of([plan.digest, plan.pool, plan.identity, plan.ways, s.flip])
    if key not in _views:
        _views.clear()
        views = ([view(x, k, s.flip, s.crop) for x in pixels] for k in range(plan.ways - 1))
        _views[key] = [encode_images(base, np.stack(of)) for of in views]
    return [data.latents[: plan.pool], *_views[key]]


def drawn_features(base: Base, data: Encoded, index: list[int]) -> np.ndarray:
    """Features (D, F) of a picture from each caption; noise of its own for each image."""
    shape, device = base.latent_shape, base.device
    streams = [torch.Generator().manual_seed(GRID_SEED + i) for i in index]
    noise = torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)
    empty = encode_captions(base, [""])
    pictures = sample(base, sdxl.framed_as(base, data.text[index], empty), empty, noise)
    return quality.features(feature_network(), pictures).numpy()


@functools.cache
def feature_network() -> torch.nn.Module:
    """The network of picture quality, once per process."""
    return quality.load_network("embedded")


def predict(
    base: Base, latents, text, timesteps: tuple[int, ...], noises: int, draws: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N, T, draws) of the predicted noise at some draws of the `noises` of a loss grid
    (diffusion.loss_grid), and the predictions at the first of them (N, T, C h w) as float16: one
    forward gives both.
    """
    losses = np.empty((len(latents), len(timesteps), len(draws)), np.float32)
    predictions = np.empty((len(latents), len(timesteps), latents[0].numel()), np.float16)
    for j, t in enumerate(progress.over(timesteps, "losses")):
        generator = torch.Generator().manual_seed(GRID_SEED + t)
        noise = torch.randn((noises, *base.latent_shape), generator=generator).to(base.device)
        at = torch.full((len(latents),), t, device=base.device)
        for k, eps in enumerate(noise[draws]):
            noisy_latents = add_noise(latents, eps, at, base.abar)
            noise_pred = single.predict_noise(base, noisy_latents, t, text)
            losses[:, j, k] = (noise_pred - eps).square().mean((1, 2, 3)).cpu().numpy()
            if k == 0:
                predictions[:, j] = noise_pred.flatten(1).cpu().numpy()
    return losses, predictions


def write_arrays(path: Path, arrays: dict) -> None:
    """Named arrays as an .npz file, which is there whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


# --------------------------------------------------------------------------------------------------
# All tasks


def train_all(plan: Plan, train: Train, executor: AbstractContextManager, title: str) -> None:
    """Train every adapter that is missing, by an executor, with a bar over their steps.

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


def cost(plan: Plan, train: Train) -> dict[str, float]:
    """Of one adapter: seconds of "training" and "queries", and "bytes" that it leaves on disk.

    Measured in this process on the second of two steps and on one round of queries.
    """
    s = replace(plan.settings, steps=max(2, plan.settings.steps), teacher_steps=1)
    base, data = subject(plan)
    data = replace(data, roles=plan.roles[0])
    found, rounds = {"training": 0.0}, len(plan.due())
    counts = {s.method: plan.due()[-1]}
    if s.method == "distill":  # a step of a teacher is one of LoRA
        counts["lora"] = s.teachers * (plan.settings.teacher_steps or -(-s.steps // 4))
    for method, count in counts.items():
        with _training(train, base, data, replace(s, method=method)) as steps:
            next(steps)
            began = time.monotonic()
            _, adapter = next(steps)
            found["training"] += count * (time.monotonic() - began)
            if method == s.method:
                began = time.monotonic()
                answers = ask(base, data, plan, adapter, plan.drawn(0))
                found["queries"] = rounds * (time.monotonic() - began)
                found["bytes"] = sum(p.nbytes for p in adapter.state_dict().values())
                found["bytes"] += rounds * sum(a.nbytes for a in answers.values())
    return found


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
    if str(read_arrays(path, "key")["key"]) != plan.key(index):
        raise UserError(
            f"{plan.out} holds an audit with other settings, images, base model or files, with "
            "another --at, --pictures or --thorough, or of another version of this code: give "
            "another --out"
        )
    return True


def steps_done(plan: Plan, index: int) -> int:
    """Steps of an adapter that are done, by its file `progress`."""
    if (plan.folder(index) / "answers.npz").is_file():
        return plan.due()[-1]
    try:
        return int((plan.folder(index) / "progress").read_text() or 0)
    except (OSError, ValueError):
        return 0


def collect(plan: Plan) -> tuple[list[dict[str, np.ndarray]], dict]:
    """Per asked step the answers of all adapters (N, ...), and of all of them together "seconds"
    and "commits", those of the code that trained them.
    """
    paths = [plan.folder(index) / "answers.npz" for index in range(len(plan))]
    every = [read_arrays(path) for path in paths]
    for path, answers in zip(paths, every, strict=True):
        for name in (*FACTS, *every[0]):
            if name not in answers or answers[name].shape != every[0][name].shape:
                raise damaged(path, KeyError(name))
    facts = {name: [a.pop(name).item() for a in every] for name in FACTS}
    steps = [
        {name: np.stack([a[name][i] for a in every]) for name in every[0]}
        for i in range(len(plan.due()))
    ]
    seconds = {name: sum(facts[name]) for name in ("training", "queries")}
    return steps, {"seconds": seconds, "commits": sorted(set(facts["commit"]))}
