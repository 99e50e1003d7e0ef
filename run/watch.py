"""What a run shows of itself: held-out losses, verdict, pictures, Hessian norms, the end."""

import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import lora
import smoothness
from attacks import roc
from command import progress
from command.errors import UserError
from diffusion import ALL_TIMESTEPS, draw_noise, loss_grid
from files import adapters as files
from files.images import Images
from objectives import Terms, adaptation_loss, mi_gain, objective
from run import card, pictures
from run.folder import MetricsLog, git_commit, provenance, tensorboard
from run.learner import Batches, Learner
from run.precheck import going_on
from run.prepare import Batch, Run
from settings import Settings

HESSIAN_SEED = 20251  # of the batch that --hessian-every looks at; unrelated to any training seed

# --------------------------------------------------------------------------------------------------
# Every step


def metrics(terms: Terms, grad_norm: float) -> dict[str, float | None]:
    """The values of an outer step, for its row of metrics.jsonl."""
    return {
        "grad_norm": grad_norm,
        "adaptation_loss": terms.loss.item(),
        "mi_gain": None if terms.gain is None else terms.gain.item(),
        "objective": terms.total.item(),
        "denominator": terms.denominator,
        "lambda_effective": terms.lambda_effective,
    }


def require_finite(row: dict, s: Settings) -> None:
    """Raise UserError if the objective or its gradient has blown up; no weight has moved by it
    yet.
    """
    if finite(row["objective"], row["grad_norm"]):
        return
    start = f"the objective or its gradient is no longer finite at step {row['step']}"
    if finite(row["adaptation_loss"]) and not finite(row["mi_gain"] or 0.0):
        raise UserError(f"{start}, by the attacker's gain: lower --attacker-lr")
    if row["step"] == 1:
        raise UserError(
            "the objective or its gradient is not finite at the first step, before any weight has "
            "moved, so that --lr is not the cause: the images, "
            f"{s.model}{f' and {s.init}' if s.init else ''} gave finite held-out losses; "
            f"--dtype {s.dtype} may overflow, or the base model may be damaged"
        )
    raise UserError(
        f"{start}: lower --lr{' or --lam' if s.method != 'lora' else ''}; "
        f"adapters saved before it are in {s.out}/checkpoints"
    )


def finite(*values: float) -> bool:
    """Whether no value is infinite or NaN."""
    return all(map(math.isfinite, values))


def log(run: Run) -> MetricsLog:
    """The log of the run's rows; only the main process writes."""
    if not run.processes.main:
        return MetricsLog(None)
    return MetricsLog(run.folder, tensorboard(run.folder) if run.settings.track else None)


def show(bar: progress.Stage, row: dict) -> None:
    """A step is done: the main values of its row behind the bar."""
    names = {"loss": "adaptation_loss", "attacker": "attacker_accuracy"}
    shown = {k: row[name] for k, name in names.items() if row.get(name) is not None}
    bar.note = ", ".join(f"{k} {value:.3f}" for k, value in shown.items())
    bar.advance()


# --------------------------------------------------------------------------------------------------
# On the way


def held_out(run: Run) -> dict[str, float]:
    """Adaptation loss of validation members and non-members on a fixed grid of (t, noise).

    The non-members' is the held-out loss: what early stopping goes by.
    """
    loss, data = {}, run.seen_data()
    with progress.stage("held-out losses"), run.folded():
        for side in ("member", "nonmember"):
            index = data.roles[f"{side}_val"]
            latents, text = data.latents[index], data.text[index]
            grid = loss_grid(run.base, latents, text, ALL_TIMESTEPS, draws=1)
            loss[f"{side}_val_loss"] = grid.mean().item()
    return loss


def local_smoothness(run: Run, attacker: torch.nn.Module, step: int) -> dict[str, float]:
    """Hessian norm, its parts and its bound at the adapter as it is, on a batch of members that
    never changes.

    Nothing in steps that --hessian-every leaves out.
    """
    s, members = run.settings, run.data.members()
    if not s.hessian_every or (step % s.hessian_every and step != 1):
        return {}
    generator = torch.Generator().manual_seed(HESSIAN_SEED)  # no stream of the run's own
    index = Batches(members, min(s.batch_size, len(members)), generator).draw()
    batch = Batch(index, *draw_noise(run.base, len(index), generator))

    def terms() -> Terms:
        error = run.errors(batch)
        gain = mi_gain(attacker, run.shown(batch, error), batch.timesteps) if s.attacked else None
        return objective(s.objective, adaptation_loss(error), gain, s.weight, s.delta)

    return smoothness.measure(s.objective, terms, run.adapter.parameters(), s.weight)


def save_adapter(run: Run, folder: Path, step: int, kohya: bool = False) -> None:
    """The adapter as it is, with the facts that say where it is from."""
    s = run.settings
    facts = {
        "base_model": Path(s.model).name,
        "method": s.method,
        "lambda": s.lam,
        "seed": s.seed,
        "steps": step,
        "git_commit": git_commit(),
    }
    files.save(run.adapter, folder, facts, kohya)


# --------------------------------------------------------------------------------------------------
# Before and after


def base_row(run: Run) -> dict[str, float]:
    """Row 0 of metrics.jsonl: the held-out losses before the first step.

    Raises UserError that names what makes them infinite or NaN: nothing has been trained, so that
    it is an image, the adapter in --init or the base model.
    """
    s, data = run.settings, run.data
    for kind, encoded in (("picture", data.latents), ("caption", data.text)):
        bad = (~encoded.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"the {kind} of {data.names[bad[0]]} and {len(bad) - 1} others of "
                f"{len(data.names)} are not finite numbers as {s.model} encodes them with --dtype "
                f"{s.dtype}: take float32, another image or another model"
            )
    losses = held_out(run)
    if not finite(*losses.values()):
        with run.adapter.disabled():
            sound = s.init and finite(*held_out(run).values())
        cause = f"the adapter {s.init}" if sound else f"the base model {s.model}"
        raise UserError(
            f"the held-out loss is not finite before the first step, and {cause} is the cause: its "
            f"weights are not finite or too large for --dtype {s.dtype}"
        )
    return {"step": 0, **losses}


def begin(run: Run) -> None:
    """Make the run folder."""
    row = base_row(run)
    s, roles = run.settings, run.data.roles
    config = {
        "settings": asdict(s) | {"resume": False},
        "processes": run.processes.count,
        "roles": {role: len(index) for role, index in roles.items()},
        "trainable_parameters": sum(p.numel() for p in run.adapter.parameters()),
    }
    splits = {role: [run.data.names[i] for i in index] for role, index in roles.items()}
    run.folder.begin(config | provenance(), splits, hashes(run), row)


def hashes(run: Run) -> dict[str, str]:
    """What each picture and its caption are, by file name."""
    data = run.data
    found = Images(data.names, data.captions, data.pixels).hashes()
    return dict(zip(data.names, found, strict=True))


def require_same(run: Run) -> None:
    """Before going on: the images must be those that the run was begun with, by content and by
    role; raises UserError.
    """
    now, before, s = hashes(run), run.folder.images() or {}, run.settings
    sets = f"{s.data} or {s.nonmembers}" if s.nonmembers else s.data
    changed = [name for name, known in before.items() if now.get(name, known) != known]
    if changed:
        raise UserError(
            f"{changed[0]} in {sets}, or its caption, is not what {run.folder} was "
            "begun with: put it back, or take another --out"
        )
    roles = run.data.roles
    dealt = {role: [run.data.names[i] for i in index] for role, index in roles.items()}
    if run.folder.splits() != dealt:
        raise UserError(
            f"{sets} no longer holds the images that {run.folder} was begun with: put them back"
        )


def verdict(run: Run) -> tuple[float, tuple[float, float]]:
    """AUC of the loss attack and its 95 % interval on auxiliary and validation images.

    The test images are left to evaluate.py.
    """
    data, scores = run.seen_data(), {}
    with progress.stage("verdict"), run.folded():
        for side in ("member", "nonmember"):
            index = data.roles[f"{side}_aux"] + data.roles[f"{side}_val"]
            grid = loss_grid(run.base, data.latents[index], data.text[index])
            scores[side] = -grid.mean((1, 2)).numpy()
    pair = scores["member"], scores["nonmember"]
    return roc.auc(*pair), tuple(roc.auc_interval(*pair))


def finish(run: Run, learner: Learner, seconds: float, promised=None) -> dict:
    """Adapter, attacker, samples, curves and the three-line verdict; returns the summary, also in
    config.json.  `promised` is a guarantee (methods/dp.py), if there is one.

    The adapter is first.  Raises UserError if what follows it fails; --resume then does only that.
    """
    run, step = stopped(run)
    s, folder = run.settings, run.folder
    save_adapter(run, folder.path / "adapter", step)
    if s.format == "kohya":
        save_adapter(run, folder.path / "kohya", step, kohya=True)
    if s.attacked:
        folder.save_attacker(learner.attacker, s.proxy)
    try:
        pictures.sample_grid(run, step)
        rows = folder.rows()
        with progress.stage("curves"):
            pictures.training_curves(rows, s.method, folder.path / "curves.png")
        summary = {"seconds": round(seconds, 1), **summarise(run, rows)}
        summary |= promised.facts() if promised else {}
        card.write(run, step, summary, promised)
        folder.finish(summary)
    except Exception as error:
        raise UserError(
            f"the training is done and its adapter is in {folder}/adapter, but not all pictures, "
            f"curves and numbers ({describe(error)}): {going_on(s)} makes them"
        ) from error
    auc, interval = summary["validation_auc"], summary["validation_auc_interval"]
    after, before = summary["held_out_loss"], summary["held_out_loss_base"]
    early = f" at step {step} of {s.steps}" if step < s.steps else ""
    print(f"quality:  held-out loss {after:.4f}{early}, {before:.4f} before")
    print(
        f"leakage:  loss-attack AUC {auc:.2f} [{interval[0]:.2f}, {interval[1]:.2f}] on auxiliary "
        "and validation images; 0.5 is none"
    )
    if promised:
        print(f"promise:  {promised}")
    if sentence := card.audited(s):
        print(f"audited:  {sentence}")
    following = shlex.join(["python", "evaluate.py", str(folder)])
    print(f"files:    {folder}/  ({seconds:.0f} s); next: {following}")
    return summary


def stopped(run: Run) -> tuple[Run, int]:
    """The run with the adapter that --stop chooses among those saved, and its step."""
    if run.settings.stop == "last":
        return run, run.settings.steps
    path, step = run.folder.adapter("best")
    lora.remove(run.base.unet, run.adapter)
    adapter, _ = files.load(run.base, path)
    return replace(run, adapter=adapter), step


def summarise(run: Run, rows: list[dict]) -> dict[str, float | list[float]]:
    """The verdict and the held-out losses before and after."""
    auc, interval = verdict(run)
    weights = [r["lambda_effective"] for r in rows if "lambda_effective" in r]
    held = [r["nonmember_val_loss"] for r in rows if "nonmember_val_loss" in r]
    best = run.settings.stop == "best"
    return {
        "held_out_loss": min(held[1:]) if best else held[-1],
        "held_out_loss_base": held[0],
        "validation_auc": auc,
        "validation_auc_interval": list(interval),
        "lambda_effective_mean": float(np.mean(weights)),
    }


def describe(error: Exception) -> str:
    """What failed, for one line."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
