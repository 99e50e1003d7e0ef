"""What a run says of itself: held-out losses, local smoothness, the verdict and the end."""

import math
import shlex
from pathlib import Path

import numpy as np
import torch

import smoothness
from algorithm import Diverged, Run, Shuffled
from command import progress
from command.errors import UserError
from curves import roc
from diffusion import ALL_TIMESTEPS, DRAWS, TIMESTEPS, loss_grid
from files import adapters
from objectives import Terms, adaptation_loss, mi_gain, objective
from run import card, pictures
from run.folder import RunFolder, git_commit
from run.precheck import going_on
from settings import Settings

TOO_FAR = 1.5  # held-out loss before the first step; the noise, or v, itself has about 1
HESSIAN_SEED = 20251  # of the batch that --hessian-every looks at; unrelated to any training seed

# --------------------------------------------------------------------------------------------------
# On the way


def held_out(run: Run) -> dict[str, float]:
    """Adaptation loss of validation members and non-members on a fixed grid of (t, noise).

    The non-members' is the held-out loss: what early stopping goes by.
    """
    loss, data = {}, run.data
    sides = dict(zip(("member", "nonmember"), data.sides("val"), strict=True))
    forwards = len(ALL_TIMESTEPS) * sum(map(len, sides.values()))
    with progress.stage("held-out losses", forwards) as bar, run.adapter.folded():
        for side, index in sides.items():
            latents, text = data.latents[index], data.text[index]
            grid = loss_grid(run.base, latents, text, ALL_TIMESTEPS, 1, bar.advance)
            loss[f"{side}_val_loss"] = grid.mean().item()
    return loss


class Curved(Run):
    """--hessian-every: a run that measures its local smoothness on a batch that never changes."""

    curvature: dict[str, float]  # of the last step, empty where it was not measured

    def descend(self, g: list[torch.Tensor], step: int) -> None:
        """Hessian norm, its parts and its bound at the weights before they move."""
        s, self.curvature = self.settings, {}
        if step == 1 or step % s.hessian_every == 0:
            self.curvature = smoothness.measure(s.objective, self.terms, self.parameters, s.lam)
        super().descend(g, step)

    def terms(self) -> Terms:
        """The objective on the fixed batch, with its graph."""
        s, members = self.settings, self.data.members()
        generator = torch.Generator().manual_seed(HESSIAN_SEED)  # no stream of the run's own
        size = min(s.batch_size, len(members))
        b = super().batch(Shuffled(members, size, generator))
        e = Run.error(self, b)
        gain = mi_gain(self.log_h(e, b)) if s.attacked else None
        return objective(s.objective, adaptation_loss(e), gain, s.lam)


def explained(diverged: Diverged, s: Settings) -> UserError:
    """What to do about numbers that are no longer finite."""
    row = diverged.row
    start = f"the objective or its gradient is no longer finite at step {row['step']}"
    if finite(row["adaptation_loss"]) and not finite(row["mi_gain"] or 0.0):
        return UserError(f"{start}, because of the attacker's gain: lower --attacker-lr")
    if row["step"] == 1:
        return UserError(
            "the objective or its gradient is not finite at the first step, before any weight has "
            "moved, so --lr is not the cause. The held-out losses of "
            f"{s.model}{f' with {s.init}' if s.init else ''} were finite: --dtype {s.dtype} may "
            "overflow, or the base model may be damaged"
        )
    return UserError(
        f"{start}: lower --lr{' or --lam' if s.method != 'lora' else ''}; "
        f"adapters saved before it are in {s.out}/checkpoints"
    )


def finite(*values: float) -> bool:
    """Whether no value is infinite or NaN."""
    return all(map(math.isfinite, values))


def save_adapter(run: Run, folder: Path, step: int) -> None:
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
    if s.method == "dp":  # it deals the members: who has all images could deal them again
        del facts["seed"]
    adapters.save(run.adapter, folder, facts)


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
                f"{s.model} with --dtype {s.dtype} encodes the {kind} of {data.names[bad[0]]} to "
                f"numbers that are not finite ({len(bad)} of {len(data.names)} images): use "
                "float32, another image or another model"
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
    if not s.init and losses["nonmember_val_loss"] > TOO_FAR:
        print(
            f"note: the held-out loss of {s.model} is {losses['nonmember_val_loss']:.2f} before the"
            " first step; a model that predicts nothing has 1. Check its prediction type (now "
            f"{run.base.prediction}) and the size of the pictures"
        )
    return {"step": 0, **losses}


def verdict(run: Run) -> tuple[float, tuple[float, float]]:
    """AUC of the loss attack and its 95 % interval on auxiliary and validation images.

    The test images are left to evaluate.py.
    """
    data, scores = run.data, []
    sides = data.sides("aux", "val")
    forwards = len(TIMESTEPS) * DRAWS * sum(map(len, sides))
    with progress.stage("verdict", forwards) as bar, run.adapter.folded():
        for index in sides:
            latents, text = data.latents[index], data.text[index]
            grid = loss_grid(run.base, latents, text, done=bar.advance)
            scores.append(-grid.mean((1, 2)).numpy())
    return roc.auc(*scores), tuple(roc.auc_interval(*scores))


def finish(run: Run, folder: RunFolder, step: int, seconds: float, promise=None) -> dict:
    """Adapter, attacker, samples, curves and the three-line verdict; returns the summary, also in
    config.json.  `step` is that of the adapter, `promise` a guarantee (methods/dp.py) if there is
    one.

    The adapter is written first.  Raises UserError if what follows it fails; --resume then does
    only that.
    """
    s = run.settings
    save_adapter(run, folder.path / "adapter", step)
    if s.attacked:
        folder.save_attacker(run.h, s.proxy)
    try:
        pictures.sample_grid(run, step)
        rows = folder.rows()
        with progress.stage("curves"):
            pictures.training_curves(rows, s.method, folder.path / "curves.png")
        summary = {"seconds": round(seconds, 1), **summarise(run, rows)}
        summary |= promise.facts() if promise else {}
        card.write(run, step, summary, promise)
        folder.finish(summary)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"training is finished and its adapter is in {folder}/adapter, but pictures, curves or "
            f"numbers are missing ({why}): {going_on(s)} makes them"
        ) from error
    say(run, folder, step, summary, promise)
    return summary


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


def say(run: Run, folder: RunFolder, step: int, summary: dict, promise) -> None:
    """Print what was learned, what leaks and what comes next."""
    s, (low, high) = run.settings, summary["validation_auc_interval"]
    after, before = summary["held_out_loss"], summary["held_out_loss_base"]
    early = f" at step {step} of {s.steps}" if step < s.steps else ""
    print(f"quality:  held-out loss {after:.4f}{early}, {before:.4f} before training")
    print(
        f"leakage:  loss-attack AUC {summary['validation_auc']:.2f} [{low:.2f}, {high:.2f}] on "
        "auxiliary and validation images; 0.5 is chance"
    )
    if promise:
        print(f"guarantee: {promise}")
    if sentence := card.audited(s):
        print(f"audited:  {sentence}")
    following = shlex.join(["python", "evaluate.py", str(folder)])
    print(f"files:    {folder}/  ({summary['seconds']:.0f} s); next: {following}")
