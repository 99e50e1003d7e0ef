"""The pictures of a run: what the adapter draws at its start, at every save and at the end, and the
curves.

Columns are captions of members, of held-out images, and prompts of one's own; rows are the image
itself, what the base draws, and what the adapter draws from the same noise.  No stream of the
training is touched: tests/test_pictures.py holds a run with pictures to one without, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from algorithm import Run
from command import progress
from diffusion import encode_captions, sample
from report import plots

FEW, FEW_STEPS = 2, 10  # on the way: columns of either kind, DDIM steps
STEPS = 25  # DDIM steps of the last grid


@dataclass
class Columns:
    """What a grid shows, a column each: members, held-out images, prompts without an image."""

    members: list[int]  # positions among the run's images
    held_out: list[int]
    prompts: list[str]
    noise: torch.Tensor  # (K, C, h, w) on the CPU

    @property
    def index(self) -> list[int]:
        """All images, members first."""
        return self.members + self.held_out


def columns(run: Run, count: int) -> Columns:
    """The first `count` columns of either kind, and all prompts; a column has the same caption and
    noise in every grid of a run.
    """
    s, kept = run.settings, {}
    rng = np.random.default_rng(s.seed)
    for role in ("member_test", "nonmember_test"):
        kept[role] = rng.permutation(run.data.roles[role])[:count].tolist()
    streams = [torch.Generator().manual_seed(s.seed * 3 + kind) for kind in range(3)]
    prompts = s.prompt or []
    sizes = (*map(len, kept.values()), len(prompts))
    noise = [
        torch.randn((size, *run.base.latent_shape), generator=stream)
        for size, stream in zip(sizes, streams, strict=True)
    ]
    return Columns(*kept.values(), prompts, torch.cat(noise))


def on_the_way(run: Run, step: int) -> None:
    """A small grid while training goes on, which a failing picture does not stop."""
    try:
        sample_grid(run, step, FEW)
    except Exception as error:
        print(f"note: no pictures of step {step} ({type(error).__name__}: {error})")


def sample_grid(run: Run, step: int, few: int | None = None) -> None:
    """samples/step-NNNNNN.png: the grid with all its columns, or on the way with `few` of either
    kind in fewer steps of the sampler.  Before the first step there is no row of the adapter,
    unless it is one of --init.
    """
    s = run.settings
    if not s.samples:
        return
    shown, steps = columns(run, min(few or s.samples, s.samples)), FEW_STEPS if few else STEPS
    with progress.stage(f"pictures of step {step}"):
        if steps not in run.drawn:
            with run.adapter.disabled():
                run.drawn[steps] = draw(run, shown, steps)
        rows = {"image": [*run.data.pixels[shown.index], *[None] * len(shown.prompts)]}
        rows["base"] = run.drawn[steps]
        if step or s.init:
            rows[s.method] = draw(run, shown, steps)
    groups = {
        "members: trained on": len(shown.members),
        "held out: never seen": len(shown.held_out),
        "prompts": len(shown.prompts),
    }
    above = [run.data.captions[i] for i in shown.index] + shown.prompts
    title = (
        f"{s.method}, step {step} of {s.steps}" if step else f"Before the first step of {s.method}"
    )
    figure = plots.picture_rows(rows, above, groups=groups, title=title)
    plots.write(figure, run.folder.path / "samples" / f"step-{step:06d}.png")


def draw(run: Run, shown: Columns, steps: int) -> np.ndarray:
    """Pictures uint8 (K, H, W, 3) of the model as it stands."""
    captions = [run.data.captions[i] for i in shown.index] + shown.prompts
    text, empty = encode_captions(run.base, captions), encode_captions(run.base, [""])
    noise = shown.noise.to(run.base.device)
    with progress.stage("pictures", len(text)) as bar, run.adapter.folded():
        return sample(run.base, text, empty, noise, steps, done=bar.advance)


def training_curves(metrics: list[dict], method: str, path: Path) -> None:
    """Losses, the attacker, gradient norms and the effective lambda of one run, as a PNG.

    `metrics` are the rows of metrics.jsonl, `method` one of plots.COLOURS.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    colour = plots.COLOURS[method]

    def line(axis, key, label, colour, smooth=False, **style):
        rows = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if rows:
            steps, values = np.array(rows, dtype=float).T
            if smooth and len(values) >= 20:
                axis.plot(steps, values, color=colour, alpha=0.15, lw=0.8)
                values = plots.running_mean(values)
            axis.plot(steps, values, color=colour, label=label, **style)

    loss, attack, gradient, weight = axes.flat
    line(loss, "adaptation_loss", "training batch", colour, smooth=True)
    line(loss, "member_val_loss", "validation members", plots.SECOND, marker="o", ms=3)
    line(loss, "nonmember_val_loss", "validation non-members (held out)", "black", marker="o", ms=3)
    loss.set(ylabel="adaptation loss (squared error)", title="Fit: the gap between the dots leaks")
    line(attack, "attacker_accuracy", "accuracy of the proxy attacker", colour, smooth=True)
    attack.axhline(0.5, color="grey", lw=0.8, ls=":")
    attack.set(ylim=(0, 1), ylabel="accuracy", title="Attacker in the loop (0.5 is guessing)")
    line(gradient, "grad_norm", "objective, before clipping", colour, smooth=True)
    line(gradient, "grad_norm_loss", "adaptation loss L alone", "black", lw=0.8)
    line(gradient, "grad_norm_gain", "MI gain G alone", plots.SECOND, lw=0.8)
    gradient.set(yscale="log", ylabel="L2 norm over A and B", title="Gradient norms")
    line(weight, "lambda_effective", "weight of grad G", colour, smooth=True)
    weight.set(ylabel="effective lambda (lambda J for SMP)", title="How hard privacy pulls")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.2)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{method.upper()}")
    plots.write(figure, path)
