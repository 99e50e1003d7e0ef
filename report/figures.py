"""The figures of one evaluated adapter: ROC, scores, leakage over the timestep, and what it
copied.  What two of them choose to show, `spread` and `closest`, is tested in tests/test_report.py.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from attacks import quality, roc
from report import plots


def evaluation(examination, found, control, method: str, folder: Path) -> None:
    """The four figures of one evaluated adapter, from the `Examination` of its images, its
    `Model` and that of the base, see attacks/model.py.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subject = examination
    colour = plots.COLOURS.get(method, plots.OTHER)
    headline = found.record["headline"]["attack"]
    roc_curves(subject, found, folder / "roc.png", colour)
    name = headline if headline in control.scores else "loss"
    pairs = {
        n: subject.data.pair(m.scores[name], "test")
        for n, m in (("base model", control), ("adapted", found))
    }
    score_histograms(pairs, name, folder / "scores.png")
    leakage_by_timestep(
        control.record["auc_by_timestep"],
        found.record["auc_by_timestep"],
        folder / "timesteps.png",
        colour,
    )
    if found.pictures is not None:
        nearest_pictures(examination, found, folder / "nearest.png")


def roc_curves(subject, found, path: Path, colour: str) -> None:
    """ROC of every attack on log axes, that of the headline with its 95 % band."""
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    headline = found.record["headline"]["attack"]
    for name, score in found.scores.items():
        member, nonmember = subject.data.pair(score, "test")
        rates = np.arange(1, len(nonmember) + 1) / len(nonmember)
        cuts = np.sort(nonmember)[::-1]  # just below the i-th highest non-member: FPR i / N
        if name != headline:
            axis.plot(rates, roc.hits(member, cuts), color="grey", lw=0.8, alpha=0.6)
            continue
        axis.plot(
            rates,
            roc.hits(member, cuts),
            color=colour,
            lw=2.2,
            zorder=3,
            label=f"{name} (headline)",
        )
        drawn = np.random.default_rng(0).choice(member, (1000, len(member)))
        low, high = np.percentile([roc.hits(m, cuts) for m in drawn], [2.5, 97.5], axis=0)
        axis.fill_between(
            rates, low, high, color=colour, alpha=0.15, lw=0, label="its 95 % band over members"
        )
    axis.plot([], [], color="grey", lw=0.8, label="the other attacks")
    axis.plot([1e-4, 1], [1e-4, 1], "k:", lw=1, label="guessing")
    axis.set(
        xscale="log", yscale="log", xlim=(1 / len(nonmember), 1), ylim=(0.5 / len(member), 1.05)
    )
    axis.set(
        xlabel="false-positive rate (non-members called members)",
        ylabel="true-positive rate (members found)",
    )
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.grid(alpha=0.2, which="both")
    plots.write(figure, path)


def score_histograms(pairs: dict[str, tuple], attack: str, path: Path) -> None:
    """Scores of test members against non-members, one panel per model: {name: (member,
    nonmember)}.
    """
    figure, axes = plt.subplots(
        1, len(pairs), figsize=(4.6 * len(pairs), 3.4), layout="constrained"
    )
    for axis, (name, (member, nonmember)) in zip(np.atleast_1d(axes), pairs.items(), strict=True):
        low, high = np.percentile(np.r_[member, nonmember], [1, 99])
        bins = np.linspace(low, high, 24)
        axis.hist(
            np.clip(nonmember, low, high),
            bins,
            density=True,
            color=plots.NONMEMBER,
            alpha=0.5,
            label="non-members",
        )
        axis.hist(
            np.clip(member, low, high),
            bins,
            density=True,
            histtype="step",
            lw=2,
            color=plots.MEMBER,
            label="members",
        )
        axis.set(
            title=name, xlabel=f"score of the {attack} attack (higher = member)", ylabel="density"
        )
        axis.legend(frameon=False, fontsize=9)
    plots.write(figure, path)


def leakage_by_timestep(
    base: dict[str, float], adapted: dict[str, float], path: Path, colour: str
) -> None:
    """AUC of the loss at one timestep and one draw, over the timestep."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axis.plot(
        [int(t) for t in base],
        list(base.values()),
        "o--",
        color=plots.COLOURS["base"],
        label="base model",
    )
    axis.plot(
        [int(t) for t in adapted], list(adapted.values()), "o-", color=colour, label="adapted"
    )
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axis.set(xlabel="timestep t (noisier to the right)", ylabel="AUC of the loss, one draw")
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)
    plots.write(figure, path)


def closest(real: dict, made: torch.Tensor, count: int = 10) -> tuple[np.ndarray, dict]:
    """The `count` made pictures closest to a member, the closest first: (their positions (K,),
    {"members": (distance (K,), index (K,)), "held_out": ...} of the nearest picture of each set).

    `real` {"members": (N, F), "held_out": (M, F)} and `made` (P, F) are features; distances are
    cosine distances in [0, 2], see quality.nearest.
    """
    near = {name: quality.nearest(features, made) for name, features in real.items()}
    order = np.argsort(near["members"][0], kind="stable")[:count]
    return order, {name: (far[order].clip(0), at[order]) for name, (far, at) in near.items()}


def nearest_pictures(examination, found, path: Path, columns: int = 10) -> None:
    """The generated pictures closest to a member by their features, under the captions that they
    were drawn from, above that member and above the nearest held-out picture; under both the
    distance and the picture's own caption.
    """
    order, near = closest(examination.real, found.features, columns)
    subject, data = examination, examination.data
    members = data.members()
    drawn_from = np.resize(members, len(found.pictures))[order]
    nearest = [members[i] for i in near["members"][1]]
    rows = {
        "drawn": list(found.pictures[order]),
        "nearest member": list(data.pixels[nearest]),
        "nearest held out": list(subject.held_out[near["held_out"][1]]),
    }
    captions = {
        "members": [data.captions[i] for i in nearest],
        "held_out": [subject.held_out_captions[i] for i in near["held_out"][1]],
    }
    labels = {
        kind: [f"{d:.3f}  {text}" for d, text in zip(near[kind][0], texts, strict=True)]
        for kind, texts in captions.items()
    }
    below = {"nearest member": labels["members"], "nearest held out": labels["held_out"]}
    title = "The pictures closest to a member: cosine distance of features, 0 is a copy"
    above = [data.captions[i] for i in drawn_from]
    plots.write(plots.picture_rows(rows, above, below, title=title), path)


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
    data = examination.data
    chosen, members = spread(data.members(), len(next(iter(runs.values()))), columns)
    rows = {"private image": data.pixels[members]}
    rows |= {n: p[chosen] for n, p in ({"base": examination.control.pictures} | runs).items()}
    figure = plots.picture_rows(
        {name: list(pictures) for name, pictures in rows.items()},
        [data.captions[i] for i in members],
    )
    plots.write(figure, path)
