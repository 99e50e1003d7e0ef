"""The pictures of a run: what the adapter draws at its start, at every save and at the end, and the
curves.

Columns are captions of members, of held-out images, and prompts of one's own; rows are the image
itself, what the base draws, and what the adapter draws from the same noise.  No random stream of
the training is used: tests/test_pictures.py holds a run with pictures to one without, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from command import progress
from curves import plots
from diffusion import encode_captions, sample
from run.folder import RunFolder

FEW, FEW_STEPS = 2, 10  # on the way: columns of either kind, DDIM steps
STEPS = 25  # DDIM steps of the last grid


@dataclass
class Columns:
    """What a grid shows, a column each: members, held-out images, prompts without an image."""

    members: list[int]  # positions among the run's images
    held_out: list[int]
    prompts: list[str]
    captions: list[str]  # (K,) of all columns
    noise: torch.Tensor  # (K, C, h, w) on the CPU


def columns(run, count: int) -> Columns:
    """The first `count` columns of either kind, and all prompts; a column has the same caption and
    noise in every grid of a run.
    """
    s, rng = run.settings, np.random.default_rng(run.settings.seed)
    members, held_out = (
        rng.permutation(run.data.roles[role])[:count].tolist()
        for role in ("member_test", "nonmember_test")
    )
    prompts, noise = s.prompt or [], []
    for kind, columns_of_it in enumerate((members, held_out, prompts)):
        stream = torch.Generator().manual_seed(s.seed * 3 + kind)
        shape = (len(columns_of_it), *run.base.latent_shape)
        noise.append(torch.randn(shape, generator=stream))
    captions = [run.data.captions[i] for i in members + held_out] + prompts
    return Columns(members, held_out, prompts, captions, torch.cat(noise))


def on_the_way(run, step: int) -> None:
    """A small grid while training goes on; a failure of it is a note and does not stop the run."""
    try:
        sample_grid(run, step, FEW)
    except Exception as error:
        print(f"note: no pictures of step {step} ({type(error).__name__}: {error})")


def sample_grid(run, step: int, few: int | None = None) -> None:
    """samples/step-NNNNNN.png: the grid with all its columns, or on the way with `few` of either
    kind in fewer steps of the sampler.  Before the first step there is no row of the adapter,
    unless it is one of --init.
    """
    s = run.settings
    if not s.samples:
        return
    shown, steps = columns(run, min(few or s.samples, s.samples)), FEW_STEPS if few else STEPS
    # the base draws the same in every grid: its pictures stay with the run, by steps of the sampler
    of_base = vars(run).setdefault("drawn", {})
    with progress.stage(f"pictures of step {step}"):
        if steps not in of_base:
            with run.adapter.disabled():
                of_base[steps] = draw(run, shown, steps)
        images = run.data.pixels[shown.members + shown.held_out]
        rows = {"image": [*images, *[None] * len(shown.prompts)], "base": of_base[steps]}
        if step or s.init:
            rows[s.method] = draw(run, shown, steps)
    groups = {
        "members: trained on": len(shown.members),
        "held out: never seen": len(shown.held_out),
        "prompts": len(shown.prompts),
    }
    start = f"Before the first step of {s.method}"
    title = f"{s.method}, step {step} of {s.steps}" if step else start
    figure = plots.picture_rows(rows, shown.captions, groups=groups, title=title)
    plots.write(figure, RunFolder(s.out).path / "samples" / f"step-{step:06d}.png")


def draw(run, shown: Columns, steps: int) -> np.ndarray:
    """Pictures uint8 (K, H, W, 3) of the model as it stands."""
    text, empty = encode_captions(run.base, shown.captions), encode_captions(run.base, [""])
    noise = shown.noise.to(run.base.device)
    with progress.stage("pictures", len(text)) as bar, run.adapter.folded():
        return sample(run.base, text, empty, noise, steps, done=bar.advance)


def training_curves(metrics: list[dict], method: str, path: Path) -> None:
    """Losses, the attacker, gradient norms and the effective lambda of one run, as a PNG.

    `metrics` are the rows of metrics.jsonl, `method` one of plots.COLOURS.
    """
    figure, axes = plots.panels(2, 5, 3.25, rows=2)
    loss, attack, gradient, weight = axes
    noisy = {"color": plots.COLOURS[method], "smooth": True}
    dots, thin = {"marker": "o", "ms": 3}, {"lw": 0.8}

    def line(axis, key: str, label: str, **style) -> None:
        rows = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if rows:
            plots.curve(axis, *np.array(rows, dtype=float).T, label=label, **style)

    line(loss, "adaptation_loss", "training batch", **noisy)
    line(loss, "member_val_loss", "validation members", color=plots.SECOND, **dots)
    line(loss, "nonmember_val_loss", "validation non-members (held out)", color="black", **dots)
    loss.set(ylabel="adaptation loss (squared error)", title="Fit: the gap between the dots leaks")
    line(attack, "attacker_accuracy", "accuracy of the proxy attacker", **noisy)
    plots.chance_line(attack)
    attack.set(ylim=(0, 1), ylabel="accuracy", title="Attacker in the loop (0.5 is guessing)")
    line(gradient, "grad_norm", "objective, before clipping", **noisy)
    line(gradient, "grad_norm_loss", "adaptation loss L alone", color="black", **thin)
    line(gradient, "grad_norm_gain", "MI gain G alone", color=plots.SECOND, **thin)
    gradient.set(yscale="log", ylabel="L2 norm over A and B", title="Gradient norms")
    line(weight, "lambda_effective", "weight of grad G", **noisy)
    weight.set(ylabel="effective lambda (lambda J for SMP)", title="How hard privacy pulls")
    for axis in axes:
        axis.set_xlabel("step")
        plots.legend(axis, 8)
    figure.suptitle(method.upper())
    plots.write(figure, path)
