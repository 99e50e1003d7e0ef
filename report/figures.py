"""The figures of one evaluated adapter: ROC, scores, and leakage over the timestep; and which
pictures are shown, `spread` and `closest`.  Tested in tests/test_report.py.
"""

from pathlib import Path

import numpy as np
import torch

from attacks import quality
from curves import plots


def evaluation(examination, found, control, method: str, folder: Path) -> None:
    """The three figures of one evaluated adapter, from its images (`examination`) and from what was
    measured of it (`found`) and of the base model (`control`).
    """
    data, colour = examination.data, plots.COLOURS.get(method, plots.OTHER)
    headline = found.record["headline"]["attack"]
    pairs = {name: data.pair(score, "test") for name, score in found.scores.items()}
    plots.write(roc_curves(pairs, headline, colour), folder / "roc.png")
    name = headline if headline in control.scores else "loss"
    models = {"base model": data.pair(control.scores[name], "test"), "adapted": pairs[name]}
    plots.write(score_histograms(models, name), folder / "scores.png")
    areas = [model.record["auc_by_timestep"] for model in (control, found)]
    plots.write(leakage_by_timestep(*areas, colour), folder / "timesteps.png")


def roc_curves(pairs: dict[str, tuple], headline: str, colour: str):
    """ROC of every attack {name: (member, nonmember)} on log axes, that of the headline with its
    95 % band.
    """
    figure, (axis,) = plots.panels(1, 5.6, 5)
    others = {"color": "grey", "lw": 0.8, "alpha": 0.6}
    for name, pair in pairs.items():
        if name != headline:
            axis.plot(*plots.roc_curve(*pair), **others)
    member, nonmember = pairs[headline]
    label = f"{headline} (headline)"
    rates, hits = plots.roc_curve(member, nonmember)
    axis.plot(rates, hits, color=colour, lw=2.2, zorder=3, label=label)
    again = np.random.default_rng(0).choice(member, (1000, len(member)))
    curves = [plots.roc_curve(m, nonmember)[1] for m in again]
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    plots.band(axis, rates, low, high, colour, "its 95 % band over members")
    axis.plot([], [], **others, label="the other attacks")
    plots.roc_axes(axis, len(member), len(nonmember))
    return figure


def score_histograms(pairs: dict[str, tuple], attack: str):
    """Scores of test members against non-members, one panel per model: {name: (member,
    nonmember)}.
    """
    figure, axes = plots.panels(len(pairs), 4.6, 3.4)
    styles = {
        "members": {"histtype": "step", "lw": 2, "color": plots.MEMBER},
        "non-members": {"alpha": 0.5, "color": plots.NONMEMBER},
    }
    for axis, (name, pair) in zip(axes, pairs.items(), strict=True):
        axis.grid(False)
        low, high = np.percentile(np.r_[pair], [1, 99])
        bins = np.linspace(low, high, 24)
        for score, (side, style) in zip(pair, styles.items(), strict=True):
            axis.hist(np.clip(score, low, high), bins, density=True, label=side, **style)
        axis.set(title=name, xlabel=f"score of the {attack} attack (higher = member)")
        axis.set_ylabel("density")
        plots.legend(axis)
    return figure


def leakage_by_timestep(base: dict[str, float], adapted: dict[str, float], colour: str):
    """AUC of the loss at one timestep and one draw, over the timestep: {timestep: AUC}."""
    figure, (axis,) = plots.panels(1, 5.6, 3.4)
    lines = {
        "base model": (base, "o--", plots.COLOURS["base"]),
        "adapted": (adapted, "o-", colour),
    }
    for name, (areas, style, line_colour) in lines.items():
        timesteps = [int(t) for t in areas]
        axis.plot(timesteps, list(areas.values()), style, color=line_colour, label=name)
    plots.chance_line(axis)
    axis.set(xlabel="timestep t (noisier to the right)", ylabel="AUC of the loss, one draw")
    plots.legend(axis)
    return figure


def closest(real: dict, made: torch.Tensor, count: int = 10) -> tuple[np.ndarray, dict]:
    """The `count` made pictures closest to a member, the closest first: (their positions (K,),
    {"members": (distance (K,), index (K,)), "held_out": ...} of the nearest picture of each set).

    `real` {"members": (N, F), "held_out": (M, F)} and `made` (P, F) are features; distances are
    cosine distances in [0, 2], see quality.nearest.
    """
    near = {name: quality.nearest(features, made) for name, features in real.items()}
    order = np.argsort(near["members"][0], kind="stable")[:count]
    return order, {name: (far[order].clip(0), at[order]) for name, (far, at) in near.items()}


def spread(members: list[int], count: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `columns` of `count` generated pictures, spread over distinct members: (their
    positions (K,), the images (K,) whose captions they were drawn from).

    Picture i was drawn from the caption of np.resize(members, count)[i].
    """
    distinct = min(count, len(members))
    chosen = np.linspace(0, distinct - 1, min(columns, distinct)).round().astype(int)
    return chosen, np.resize(members, count)[chosen]


def side_by_side(examination, runs: dict[str, np.ndarray], path: Path, columns: int = 8) -> None:
    """Rows of pictures from the same captions and noise: private images, base, and each run {name:
    (P, H, W, 3)}.

    Captions stand above.  Images are spread over the members, the same for every call.
    """
    data, drawn = examination.data, {"base": examination.control.pictures} | runs
    chosen, members = spread(data.members(), len(drawn["base"]), columns)
    rows = {"private image": list(data.pixels[members])}
    rows |= {name: list(pictures[chosen]) for name, pictures in drawn.items()}
    plots.write(plots.picture_rows(rows, [data.captions[i] for i in members]), path)
