"""The figures of the notebooks.  Each returns a closed Figure, which a notebook shows; colours and
what other commands draw are in report/plots.py.  Tested in tests/test_plots.py.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from attacks import roc
from report.plots import COLOURS, MEMBER, NONMEMBER, OTHER, SECOND, running_mean


def _panels(count: int, width: float = 4.6, height: float = 3.6, **options):
    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", **options)
    plt.close(figure)
    for axis in np.atleast_1d(axes):
        axis.grid(alpha=0.2)
    return figure, axes


def _runs(runs: dict[str, list[dict]], key: str):
    """(name, colour, line style, steps (K,), values (K,)) of each run that logged `key`.

    Controls, whose name is more than a method, are dashed.
    """
    for name, rows in runs.items():
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if found:
            method = name.split(",")[0]
            style = "-" if name == method else "--"
            yield name, COLOURS.get(method, OTHER), style, *np.array(found, float).T


def rank_study(spectra: np.ndarray, ranks, member, nonmember):
    """Singular values of B A per layer (layers, r), and both losses by the rank that is kept.

    `ranks` (K,) are the ranks kept, `member` and `nonmember` (K,) the losses at each.
    """
    figure, (left, right) = _panels(2)
    index = np.arange(1, spectra.shape[1] + 1)
    share = spectra / spectra[:, :1]
    low, middle, high = np.percentile(share, [10, 50, 90], axis=0)
    colour = COLOURS["lora"]
    left.plot(index, middle, color=colour, label="median layer")
    left.fill_between(index, low, high, color=colour, alpha=0.2, lw=0, label="10 to 90 % of layers")
    left.set(yscale="log", xlabel="index of the singular value", ylabel="share of the largest")
    left.set_title("What training made of BA")
    right.plot(ranks, member, "o-", color=MEMBER, label="members")
    right.plot(ranks, nonmember, "o-", color=NONMEMBER, label="non-members")
    right.set(xscale="symlog", xlabel="rank kept of the trained update")
    right.set_ylabel("adaptation loss (squared error)")
    right.set_xticks(ranks, [str(r) for r in ranks])
    right.set_title("What the gap between them needs")
    for axis in (left, right):
        axis.legend(frameon=False)
    return figure


def loss_by_timestep(timesteps, models: dict[str, tuple]):
    """{model: (member, nonmember)} losses (N, T): means with 95 % bands, and their gap below."""
    figure, axes = _panels(len(models), sharey=True)
    for axis, (name, sides) in zip(np.atleast_1d(axes), models.items(), strict=True):
        styles = (MEMBER, "members"), (NONMEMBER, "non-members")
        for loss, (colour, label) in zip(sides, styles, strict=True):
            mean, half = loss.mean(0), 1.96 * loss.std(0, ddof=1) / np.sqrt(len(loss))
            axis.plot(timesteps, mean, "o-", color=colour, label=label)
            axis.fill_between(timesteps, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
        axis.set(title=name, xlabel="timestep t (noisier to the right)", yscale="log")
    np.atleast_1d(axes)[0].set_ylabel("adaptation loss (squared error)")
    np.atleast_1d(axes)[0].legend(frameon=False)
    return figure


def error_maps(pictures: np.ndarray, rows: dict[str, np.ndarray], titles: list[str]):
    """Pictures (N, H, W, 3) above maps (N, h, w) of the squared error, one row per model.

    All maps share one colour scale.
    """
    n, height = len(pictures), len(rows) + 1
    size = (1.7 * n, 1.75 * height)
    figure, axes = plt.subplots(height, n, figsize=size, layout="constrained", squeeze=False)
    plt.close(figure)
    top = max(np.percentile(maps, 99) for maps in rows.values())
    for j in range(n):
        axes[0, j].imshow(pictures[j])
        axes[0, j].set_title(titles[j], fontsize=9)
        for i, maps in enumerate(rows.values(), 1):
            shown = axes[i, j].imshow(maps[j], vmin=0, vmax=top, cmap="viridis")
    for i, name in enumerate(["picture", *rows]):
        axes[i, 0].set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    label = "squared error,\nmean over channels and draws"
    figure.colorbar(shown, ax=axes[1:], shrink=0.8, label=label)
    return figure


def roc_lines(pairs: dict[str, tuple]):
    """ROC of at most six attacks {name: (member (N,), nonmember (M,))} with their AUC."""
    figure, axis = _panels(1, 5.4, 4.8)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for (name, (member, nonmember)), colour in zip(pairs.items(), colours, strict=False):
        cuts = np.sort(nonmember)[::-1]
        rates = np.r_[0, np.arange(1, len(cuts) + 1) / len(cuts)]
        found = np.r_[0, roc.hits(member, cuts)]
        label = f"{name}: AUC {roc.auc(member, nonmember):.2f}"
        axis.plot(rates, found, color=colour, lw=1.8, label=label)
    axis.plot([0, 1], [0, 1], "k:", lw=1, label="guessing")
    axis.set_xlabel("false-positive rate (non-members called members)")
    axis.set_ylabel("true-positive rate (members found)")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def leakage_over_steps(runs: dict[str, list[dict]]):
    """{method: [{step, auc, low, high, held_out}]}: what leaks (left), what is learned (right)."""
    figure, (left, right) = _panels(2)
    for name, rows in runs.items():
        colour = COLOURS.get(name.split(",")[0], OTHER)
        keys = ("step", "auc", "low", "high", "held_out")
        steps, area, low, high, loss = (np.array([row[k] for row in rows]) for k in keys)
        left.plot(steps, area, "o-", color=colour, label=name)
        left.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        right.plot(steps, loss, "o-", color=colour, label=name)
    left.axhline(0.5, color="grey", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="AUC of the averaged loss, 95 % band", title="Leakage")
    right.set(xlabel="step", ylabel="loss on non-members (squared error)", title="Held-out loss")
    left.legend(frameon=False)
    return figure


def walks(panels: dict[str, tuple]):
    """{title: (steps (K,), change (K,), slope, reach, change along a random direction (K,))}: an
    objective on both sides of a point, with the line that its gradient says.

    Where the gradient describes the objective, up to `reach`, the ground is shaded.
    """
    figure, axes = _panels(len(panels), 3.7)
    for axis, (title, found) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        steps, change, slope, reach, control = found
        axis.axvspan(-reach, reach, color=SECOND, alpha=0.15, lw=0, label="described")
        axis.plot(steps, slope * steps, "k:", lw=1, label="what the gradient says")
        axis.plot(steps, control, color=NONMEMBER, lw=1, label="a random direction")
        style = {"color": COLOURS["lora"], "ms": 2.5, "lw": 1.5, "label": "along -grad"}
        axis.plot(steps, change, "o-", **style)
        low, high = min(change.min(), control.min()), max(change.max(), control.max())
        room = 0.15 * (high - low) or 1.0
        axis.set(xlabel="step along -grad (adapter norm)", title=title)
        axis.set_ylim(low - room, high + room)
        axis.locator_params(axis="x", nbins=5)
        axis.ticklabel_format(style="sci", scilimits=(-2, 3))
    np.atleast_1d(axes)[0].set_ylabel("change")
    _one_legend(figure, axes)
    return figure


def surfaces(across, along, surface: dict[str, np.ndarray], xlabel: str, ylabel: str, arrows=()):
    """{title: (K, M)} over `across` (M,) to the right and `along` (K,) upwards, one colour scale
    each.

    `arrows` are (2,) directions from the middle, one per panel.
    """
    figure, axes = _panels(len(surface), 4.3, 3.8)
    for axis, (title, values) in zip(np.atleast_1d(axes), surface.items(), strict=True):
        shown = axis.contourf(across, along, values, 24, cmap="viridis")
        axis.contour(across, along, values, 24, colors="white", linewidths=0.3)
        axis.set(xlabel=xlabel, title=title)
        figure.colorbar(shown, ax=axis, shrink=0.9)
    for axis, arrow in zip(np.atleast_1d(axes), arrows, strict=False):
        tip = 0.6 * max(across) * np.asarray(arrow) / max(np.linalg.norm(arrow), 1e-30)
        style = {"arrowstyle": "-|>", "color": "white", "lw": 2}
        axis.annotate("", xy=tip, xytext=(0, 0), arrowprops=style)
        axis.plot(0, 0, "o", color="white", mec="black", ms=6)
    np.atleast_1d(axes)[0].set_ylabel(ylabel)
    return figure


def sheets(x, y, pairs: dict[str, tuple[np.ndarray, np.ndarray]], labels: tuple[str, str, str]):
    """{title: (norm, bound)}, each (K, M) over x (M,) and y (K,): a norm as a coloured sheet, and
    its bound as a net that must nowhere lie below it.
    """
    size = (5.2 * len(pairs), 4.6)
    shape = {"projection": "3d"}
    figure, axes = plt.subplots(1, len(pairs), figsize=size, layout="constrained", subplot_kw=shape)
    plt.close(figure)
    grid = np.meshgrid(x, y)
    for axis, (title, (norm, bound)) in zip(np.atleast_1d(axes), pairs.items(), strict=True):
        axis.plot_surface(*grid, norm, cmap="viridis", lw=0, alpha=0.9)
        axis.plot_wireframe(*grid, bound, color="black", lw=0.5, rcount=20, ccount=20)
        axis.set(xlabel=labels[0], ylabel=labels[1])
        axis.set_title(title, y=0.96)
        axis.set_zlabel(labels[2])
        axis.locator_params(nbins=5)
        axis.set_box_aspect(None, zoom=0.92)  # room for the label of the upright axis
        axis.view_init(elev=24, azim=-56)
    return figure


def lines(x, panels: dict[str, dict[str, np.ndarray]], xlabel: str, scales=()):
    """{axis label: {name: y (K,)}} over x (K,), or over an x of its own where y is (x, y).

    Names that begin with a method take its colour; `scales` are of the upright axes.
    """
    figure, axes = _panels(len(panels), 6.4 if len(panels) == 1 else 4.2)
    scales = scales or ["linear"] * len(panels)
    for axis, scale, (label, values) in zip(
        np.atleast_1d(axes), scales, panels.items(), strict=True
    ):
        others = iter((SECOND, "#CC79A7", "black", "#56B4E9"))
        for name, y in values.items():
            own, y = y if isinstance(y, tuple) else (x, y)
            colour = COLOURS.get(name.split(",")[0].lower()) or next(others)
            axis.plot(own, y, color=colour, lw=2, label=name)
        axis.set(xlabel=xlabel, title=_wrapped(label), yscale=scale)
        if scale == "log":
            _plain_numbers(axis.yaxis)
        axis.legend(frameon=False, fontsize=9)
    return figure


def runs_over_steps(runs: dict[str, list[dict]], keys: dict[str, str], scale: str = "log"):
    """One panel per key of metrics.jsonl {key: title}, one line per run.

    What is logged at every step is drawn as a running mean over a pale line of the values.
    """
    figure, axes = _panels(len(keys))
    for axis, (key, label) in zip(np.atleast_1d(axes), keys.items(), strict=True):
        for name, colour, style, steps, values in _runs(runs, key):
            if len(values) >= 60:
                axis.plot(steps, values, color=colour, lw=0.6, alpha=0.25)
                values = running_mean(values)
            axis.plot(steps, values, style, color=colour, lw=1.6, label=name)
        axis.set(xlabel="step", title=_wrapped(label), yscale=scale)
        if scale == "log":
            _plain_numbers(axis.yaxis)
    _one_legend(figure, axes)
    return figure


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 44))


def _one_legend(figure, axes) -> None:
    """Above all panels, of the first."""
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _plain_numbers(axis) -> None:
    """On an axis in logarithms: 0.2 rather than 2 x 10^-1, at 1, 2 and 5 of a decade where there
    are few.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def hessian_against_gradient(runs: dict[str, list[dict]]):
    """Figure 1b of the paper: Hessian norm (spectral) over gradient norm, one panel per run."""
    figure, axes = _panels(len(runs), 3.7, 3.6)
    logged = _runs(runs, "hessian_norm")
    for axis, (name, colour, _, steps, hessian) in zip(np.atleast_1d(axes), logged, strict=True):
        gradient = np.array([row["fixed_grad_norm"] for row in runs[name] if "hessian_norm" in row])
        shade = 0.25 + 0.75 * steps / max(steps.max(), 1)
        axis.scatter(gradient, hessian, c=colour, alpha=shade, s=28)
        axis.set(xscale="log", yscale="log", xlabel="gradient norm", title=name)
        for side in (axis.xaxis, axis.yaxis):
            _plain_numbers(side)
    np.atleast_1d(axes)[0].set_ylabel("Hessian norm (pale: early, full: late)")
    return figure


def bound_along_run(runs: dict[str, list[dict]]):
    """Proposition 2 while training: the Hessian norm and its bound L0' + L1' ||grad J||.

    The part L1' ||grad J|| is also drawn alone.
    """
    figure, axes = _panels(len(runs), sharey=True)
    for axis, (name, rows) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        rows = [row for row in rows if "hessian_norm" in row]
        keys = ("step", "hessian_norm", "hessian_bound", "bound_constant")
        step, norm, bound, constant = (np.array([row[k] for row in rows]) for k in keys)
        colour = COLOURS.get(name.split(",")[0], OTHER)
        axis.plot(step, bound, color="black", lw=1, label="bound")
        axis.plot(step, norm, "o-", color=colour, ms=3, label="Hessian norm")
        if (bound - constant).any():
            label = "part of the bound that carries ||grad J||"
            axis.plot(step, bound - constant, "--", color=SECOND, label=label)
        axis.set(xlabel="step", yscale="log", title=name)
        axis.legend(frameon=False, fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel("spectral norm")
    return figure
