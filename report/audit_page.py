"""What audit.py prints and draws: the table of one audit, and several audits beside each other.

Held by tests/test_audit.py.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from attacks import roc
from attacks.decisions import Decisions, difference
from attacks.lira import HEADLINE, THRESHOLD
from command.errors import UserError
from command.whole_files import read_json, write_json
from report import plots
from report.tables import cell, rounded, say

SHOWN = 5  # exposed images in the table
SIDES = ((-4, 4), (5, -10), (-4, -10), (5, 4))  # of a label from its dot, in points
LINES = (plots.COLOURS["smp"], plots.COLOURS["lora"], plots.SECOND, plots.OTHER)


def by_auc(attacks: dict[str, dict]) -> list[str]:
    """Names of attacks, the strongest first."""
    return sorted(attacks, key=lambda name: -attacks[name]["auc"])


# --------------------------------------------------------------------------------------------------
# One audit


def print_record(record: dict) -> None:
    """The tables of an audit, within 80 columns."""
    step, last = list(record["steps"].items())[-1]
    half = record["adapters"] * record["pool"] // 2
    print(
        f"\n{record['settings']['method']}: {record['adapters']} adapters, a pool of "
        f"{record['pool']}: {half} decisions on members, {half} on others"
    )
    print_attacks(f"step {step}", last["attacks"])
    if "canaries" in last:
        print_attacks("canaries", last["canaries"])
    print_steps({record["settings"]["method"]: record})
    print("\nmost exposed, by the strongest attack at 1 % FPR")
    for image in record["exposed"][:SHOWN]:
        name, caption = image["name"], image["caption"] + " (canary)" * image["canary"]
        print(f"  {image['caught']} of {image['of']}  {name:30.30}  {caption:.38}")
    training, queries = record["seconds"]["training"], record["seconds"]["queries"]
    print(f"\n{training:.0f} s of training and {queries:.0f} s of queries, over all processes")


def print_attacks(title: str, attacks: dict[str, dict]) -> None:
    """AUC with its interval over images, its spread over adapters, TPR, epsilon: one line each."""
    print(f"\n{title:24} {'AUC':17} {'sd':>5} {'TPR 5 %':>8} {'1 %':>6} {'0.1 %':>6} {'eps >':>6}")
    for name in by_auc(attacks):
        found = attacks[name]
        rates = [found[f"tpr_at_{fpr * 100:g}_fpr"] for fpr in roc.FPRS]
        five, one, tenth = ("-" if r is None else f"{r:.2f}" for r in rates)
        print(
            f"{name:24} {cell(found):17} {found['auc_sd']:5.2f} {five:>8} {one:>6} {tenth:>6} "
            f"{found['epsilon']:6.2f}"
        )


def draw(record: dict, scores: dict[str, np.ndarray], folder: Path) -> None:
    """roc.png, log axes, of the last step; frontier.png, leakage against held-out loss."""
    step, last = list(record["steps"].items())[-1]
    names = by_auc(last["attacks"])  # the strongest two, and those named beforehand
    chosen = list(dict.fromkeys([*names[:2], HEADLINE, THRESHOLD, *names]))[: len(LINES)]
    apart = ~scores["canary"]
    decisions = Decisions(scores["member"][:, apart])
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    for name, colour in zip(chosen, LINES, strict=True):
        alarms, hits = (r[0] for r in decisions.rates(scores[f"{step}/{name}"][:, apart]))
        label = f"{name}: AUC {rounded(last['attacks'][name]['auc'])}"
        axis.plot(alarms, hits, color=colour, lw=1.8, label=label)
    low = 1 / (~decisions.member).sum()
    axis.plot([low, 1], [low, 1], "k:", lw=1, label="guessing")
    axis.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1.05))
    axis.set(xlabel="false-positive rate", ylabel="true-positive rate", title=f"step {step}")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(folder / "roc.png", dpi=110)
    plt.close(figure)
    lines = {name: (record, name) for name in chosen}
    frontier(lines, dict(zip(chosen, LINES, strict=True)), folder / "frontier.png")


def frontier(lines: dict[str, tuple[dict, str]], colours: dict[str, str], path: Path) -> None:
    """AUC against held-out loss over the steps of {label: (record, attack)}, as a PNG; of several
    lines of one audit the last one names the steps.
    """
    naming = {id(record): label for label, (record, _) in lines.items()}
    figure, axis = plt.subplots(figsize=(7.6, 5), layout="constrained")
    for k, (label, (record, attack)) in enumerate(lines.items()):
        found = [(at, step) for at, step in record["steps"].items() if attack in step["attacks"]]
        x = [step["held_out_loss"] for _, step in found]
        y = [step["attacks"][attack]["auc"] for _, step in found]
        ends = np.array([step["attacks"][attack]["auc_interval"] for _, step in found]).T
        error = np.abs(ends - y)
        axis.errorbar(x, y, error, fmt="o-", ms=4, capsize=3, color=colours[label], label=label)
        for (at, _), *place in zip(found, x, y, strict=True):
            if naming[id(record)] != label:
                break
            aside, below = SIDES[k % len(SIDES)]  # dots of several audits lie close
            text = {"textcoords": "offset points", "xytext": (aside, below), "fontsize": 7}
            text |= {"ha": "left" if aside > 0 else "right", "color": colours[label]}
            text |= {"zorder": 5, "path_effects": [withStroke(linewidth=2, foreground="white")]}
            axis.annotate(at, place, **text)
    low, high = axis.get_xlim()
    if high > 2 * low > 0:  # one that ruins the model would press the others together
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=[1, 1.2, 1.5, 2, 3, 4, 5, 7]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axis.set(xlabel="held-out loss (lower is better)", ylabel="AUC (0.5 leaks nothing)")
    axis.set_title("Numbers beside the dots are steps", fontsize=9)
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# Several audits


def compare(folders: list[str]) -> dict:
    """Table and picture of finished audits, and each against the first, paired over images.

    Differences are those of HEADLINE, an attack that no result has chosen; at the last step and at
    each audit's lowest held-out loss.  Returns {"audits": names, "differences": [...]}, also in
    comparison.json and comparison.png beside the first.  Raises UserError for a folder without an
    audit.
    """
    read = [_read(Path(folder)) for folder in folders]
    names = _names(folders)
    print_steps(dict(zip(names, (record for record, _ in read), strict=True)))
    found = {"audits": names, "differences": []}
    for name, other in zip(names[1:], read[1:], strict=True):
        if any(not np.array_equal(read[0][1][k], other[1][k]) for k in ("names", "member")):
            print(f"{name} has another pool or more adapters than {names[0]}: not paired")
            continue
        found["differences"] += differences(names[0], read[0], name, other)
    for change in found["differences"]:
        low, high = change["auc_interval"]
        say(
            f"{change['audit']} minus {change['minus']}, {change['at']} step: "
            f"AUC {change['auc']:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"held-out loss {change['held_out_loss']:+.4f}"
        )
    beside = Path(folders[0]).parent
    lines = {n: (record, HEADLINE) for n, (record, _) in zip(names, read, strict=True)}
    colours = {n: plt.get_cmap("tab10")(i % 10) for i, n in enumerate(names)}
    frontier(lines, colours, beside / "comparison.png")
    write_json(beside / "comparison.json", found)
    print(f"files:    {beside}/comparison.json, comparison.png")
    return found


def print_steps(records: dict[str, dict]) -> None:
    """Every step of every audit in one line, within 80 columns for names of up to 25 letters."""
    width = max(map(len, records))
    print(f"\n{'':{width}}  step held-out  {HEADLINE:17} TPR 1 %  strongest")
    for name, record in records.items():
        for at, step in record["steps"].items():
            named, top = step["attacks"][HEADLINE], step["attacks"][by_auc(step["attacks"])[0]]
            rate = "-" if named["tpr_at_1_fpr"] is None else f"{named['tpr_at_1_fpr']:.2f}"
            loss = f"{at:>5} {step['held_out_loss']:8.4f}"
            print(f"{name:{width}} {loss}  {cell(named):17} {rate:>7} {rounded(top['auc']):>10}")


def differences(name: str, first: tuple, other_name: str, other: tuple) -> list[dict]:
    """Of two audits (record, scores) of one pool: the second minus the first, at two steps."""
    found = []
    for at in ("last", "best"):
        steps = [_step(record, at) for record, _ in (first, other)]
        (a, b) = (
            s[f"{step}/{HEADLINE}"] for (_, s), step in zip((first, other), steps, strict=True)
        )
        apart = first[1]["canary"] | other[1]["canary"]
        decisions = Decisions(first[1]["member"][:, ~apart])
        change, interval = difference(decisions, b[:, ~apart], a[:, ~apart])
        losses = [
            r["steps"][step]["held_out_loss"]
            for (r, _), step in zip((first, other), steps, strict=True)
        ]
        found.append(
            {"audit": other_name, "minus": name, "at": at, "steps": steps[::-1], "attack": HEADLINE}
            | {"auc": change, "auc_interval": interval, "held_out_loss": losses[1] - losses[0]}
        )
    return found


def _step(record: dict, at: str) -> str:
    """The last step of an audit, or the one with the best, lowest held-out loss."""
    steps = record["steps"]
    return list(steps)[-1] if at == "last" else min(steps, key=lambda s: steps[s]["held_out_loss"])


def _names(folders: list[str]) -> list[str]:
    """What to call each audit: the last part of its path, or all of it where that names two."""
    short = [Path(folder).name for folder in folders]
    return [f if short.count(s) > 1 else s for f, s in zip(folders, short, strict=True)]


def _read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(record, scores) of a finished audit; raises UserError."""
    if not (folder / "audit.json").is_file():
        raise UserError(f"{folder} holds no finished audit: run audit.py --out {folder} first")
    try:
        with np.load(folder / "scores.npz") as scores:
            return read_json(folder / "audit.json"), dict(scores)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/scores.npz is damaged ({error}): run the audit again") from None
