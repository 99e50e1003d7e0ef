"""What audit.py prints and draws: the tables of one audit, and several audits beside each other.

Tested in tests/test_audit.py.
"""

import math
from pathlib import Path

import numpy as np

from attacks.decisions import TOGETHER, Decisions, difference
from attacks.lira import HEADLINE, THRESHOLD
from attacks.store import damaged, read_arrays
from command.errors import UserError
from command.whole_files import read_json, write_json
from curves import plots, roc
from methods.promise import epsilon_for
from report.tables import cell, rounded, say

PRINTED = 5  # exposed images in the table
LINE_COLOURS = (plots.COLOURS["smp"], plots.COLOURS["lora"], plots.SECOND, plots.OTHER)


def by_auc(attacks: dict[str, dict]) -> list[str]:
    """Names of attacks, the strongest first."""
    return sorted(attacks, key=lambda name: -attacks[name]["auc"])


# --------------------------------------------------------------------------------------------------
# One audit


def print_record(record: dict) -> None:
    """The tables of an audit, within 80 columns."""
    method, (step, last) = record["settings"]["method"], list(record["steps"].items())[-1]
    half = record["adapters"] * record["pool"] // 2
    print(
        f"\n{method}: {record['adapters']} adapters, a pool of {record['pool']} images: "
        f"{half} member and {half} non-member decisions"
    )
    print_attacks(f"step {step}", last["attacks"])
    together = cell(last["together"])
    print(f"{TOGETHER} images at once, all members or none, {HEADLINE}: {together}")
    if "canaries" in last:
        print_attacks("canaries", last["canaries"])
    if method == "dp":
        print_promise(record, last)
    print_steps({method: record})
    print("\nmost exposed images: caught at 1 % FPR by the strongest attack, and false alarms")
    for image in record["exposed"][:PRINTED]:
        name, caption = image["name"], image["caption"] + " (canary)" * image["canary"]
        counts = f"{image['caught']} of {image['of']}, {image['alarms']}"
        print(f"  {counts:12} {name:26.26}  {caption:.36}")
    often = record["often"]
    print(
        f"{often['caught']} of {record['pool']} images are caught in at least half of their "
        f"trainings, {often['alarmed']} are\nfalse alarms as often"
    )
    training, queries = record["seconds"]["training"], record["seconds"]["queries"]
    print(f"\n{training:.0f} s of training and {queries:.0f} s of queries, summed over processes")


def print_promise(record: dict, last: dict) -> None:
    """What was promised, and what the attack chosen beforehand shows of it.

    In an audit another image stands where one is left out.  These are two changes, so mu is half of
    what the attack shows.
    """
    s, groups = record["settings"], {"attacks": "the pool", "canaries": "the canaries"}
    delta = s["delta_dp"] or 0.1 / (record["pool"] // 2)
    bounds = {groups[name]: last[name][HEADLINE]["mu_bound"] for name in groups if name in last}
    shown = ", ".join(f"{epsilon_for(mu / 2, delta):.2g} on {name}" for name, mu in bounds.items())
    print(
        f"\nguaranteed: epsilon at most {s['epsilon']:g} at delta {delta:.3g}\n"
        f"attacked:   epsilon at least {shown} ({HEADLINE}, 95 % bound)"
    )


def print_attacks(title: str, attacks: dict[str, dict]) -> None:
    """One line per attack: AUC with its interval over images, its spread over adapters, TPRs."""
    print(f"\n{title:24} {'AUC':17} {'sd':>5} {'TPR 5 %':>8} {'1 %':>6} {'0.1 %':>6}")
    for name in by_auc(attacks):
        found = attacks[name]
        rates = [found[f"tpr_at_{fpr * 100:g}_fpr"] for fpr in roc.FPRS]
        five, one, tenth = ("-" if r is None else f"{r:.2f}" for r in rates)
        print(f"{name:24} {cell(found):17} {found['auc_sd']:5.2f} {five:>8} {one:>6} {tenth:>6}")


def draw(record: dict, scores: dict[str, np.ndarray], folder: Path) -> None:
    """roc.png, log axes, of the last step; frontier.png, leakage against held-out loss."""
    step, last = list(record["steps"].items())[-1]
    names = by_auc(last["attacks"])  # the strongest two, and those named beforehand
    chosen = list(dict.fromkeys([*names[:2], HEADLINE, THRESHOLD, *names]))[: len(LINE_COLOURS)]
    colours = dict(zip(chosen, LINE_COLOURS, strict=True))
    figure, (axis,) = plots.panels(width=5.6, height=5)
    plain = ~scores["canary"]
    member = scores["member"][:, plain]
    for name, colour in colours.items():
        score = scores[f"{step}/{name}"][:, plain]
        rates = plots.roc_curve(score[member], score[~member])
        label = f"{name}: AUC {rounded(last['attacks'][name]['auc'])}"
        axis.plot(*rates, color=colour, lw=1.8, label=label)
    plots.roc_axes(axis, member.sum(), (~member).sum())
    axis.set_title(f"step {step}")
    plots.write(figure, folder / "roc.png")
    frontier({name: (record, name) for name in chosen}, colours, folder / "frontier.png")


def draw_exposed(record: dict, pixels: np.ndarray, folder: Path) -> None:
    """exposed.png: the twentieth of the pool that is given away most, the worst first; `pixels`
    (N, H, W, 3) are all images of the data.
    """
    worst = record["exposed"][: max(1, record["pool"] // 20)]
    rows = {"": [pixels[image["image"]] for image in worst]}
    counts = [f"{i['caught']} of {i['of']}, false {i['alarms']}" for i in worst]
    captions = [image["caption"] for image in worst]
    plots.write(plots.picture_rows(rows, captions, {"": counts}), folder / "exposed.png")


def frontier(lines: dict[str, tuple[dict, str]], colours: dict, path: Path) -> None:
    """AUC against held-out loss over the steps of {label: (record, attack)}, as a PNG."""
    figure, (axis,) = plots.panels(width=7.6, height=5)
    for k, (label, (record, attack)) in enumerate(lines.items()):
        look = {"color": colours[label], "fontsize": 7, "textcoords": "offset points"}
        left = k // 2 % 2  # dots of several audits lie close
        look |= {"xytext": ((5, -5)[left], (4, -10)[k % 2]), "ha": ("left", "right")[left]}
        steps = {at: s for at, s in record["steps"].items() if attack in s["attacks"]}
        x = np.array([step["held_out_loss"] for step in steps.values()])
        y = np.array([step["attacks"][attack]["auc"] for step in steps.values()])
        ends = [step["attacks"][attack]["auc_interval"] for step in steps.values()]
        marker = "os^v"[k // 10 % 4]  # after ten the colours begin again
        plots.intervals(axis, x, y, ends, f"{marker}-", ms=4, color=colours[label], label=label)
        for at, *place in zip(steps, x, y, strict=True):
            axis.annotate(at, place, **look)
    low, high = axis.get_xlim()
    if high > 2 * low > 0:  # an audit that ruins the model would press the others together
        axis.set_xscale("log")
        plots.plain_numbers(axis.xaxis)
    plots.chance_line(axis)
    axis.set(xlabel="held-out loss (lower is better)", ylabel="AUC (0.5 leaks nothing)")
    axis.set_title("Numbers beside the dots are steps", fontsize=9)
    plots.legend(axis, fontsize=8)
    plots.write(figure, path)


# --------------------------------------------------------------------------------------------------
# Several audits


def compare(folders: list[str]) -> dict:
    """Table and picture of finished audits, and each against the first, paired over images.

    Differences are those of HEADLINE, an attack that no result has chosen; at the last step and at
    each audit's lowest held-out loss.  Returns {"audits": names, "differences": [...]}, also in
    comparison.json and comparison.png beside the first.  Raises UserError for a folder without an
    audit.
    """
    short = [Path(folder).name for folder in folders]
    names = [f if short.count(s) > 1 else s for f, s in zip(folders, short, strict=True)]
    audits = {name: _read(Path(folder)) for name, folder in zip(names, folders, strict=True)}
    records = {name: record for name, (record, _) in audits.items()}
    print_steps(records)
    if len({str(record.get("asked")) for record in records.values()}) > 1:
        say(
            "note: these audits asked other things, by --thorough, --crop or another version of "
            "this code: AUC may differ a little for that alone"
        )
    found = {"audits": names, "differences": []}
    for name in names[1:]:
        found["differences"] += differences(audits, names[0], name)
    beside = Path(folders[0]).parent
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    lines = {name: (record, HEADLINE) for name, record in records.items()}
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
            figures, top = step["attacks"][HEADLINE], step["attacks"][by_auc(step["attacks"])[0]]
            rate = "-" if figures["tpr_at_1_fpr"] is None else f"{figures['tpr_at_1_fpr']:.2f}"
            loss = f"{at:>5} {step['held_out_loss']:8.4f}"
            print(f"{name:{width}} {loss}  {cell(figures):17} {rate:>7} {rounded(top['auc']):>10}")


def differences(audits: dict[str, tuple], first: str, other: str) -> list[dict]:
    """Audit `other` minus audit `first` of {name: (record, scores)}, at two steps; also printed.

    Empty for audits of other images or halves, and for a record without scores.
    """
    (record, scores), (other_record, other_scores) = audits[first], audits[other]
    if not scores or not other_scores:
        print(f"{first} or {other} has no scores.npz: not compared")
        return []
    if any(not np.array_equal(scores[k], other_scores[k]) for k in ("names", "member")):
        print(f"{other} and {first} differ in pool or adapters: not compared")
        return []
    plain, found = ~(scores["canary"] | other_scores["canary"]), []
    decisions = Decisions(scores["member"][:, plain])
    for at in ("last", "best"):
        step, other_step = _step(record, at), _step(other_record, at)
        before = scores[f"{step}/{HEADLINE}"][:, plain]
        change, interval = difference(
            decisions, other_scores[f"{other_step}/{HEADLINE}"][:, plain], before
        )
        loss = other_record["steps"][other_step]["held_out_loss"]
        loss -= record["steps"][step]["held_out_loss"]
        say(
            f"{other} minus {first}, {at} step: AUC {change:+.2f} "
            f"[{interval[0]:+.2f}, {interval[1]:+.2f}], held-out loss {loss:+.4f}"
        )
        named = {"audit": other, "minus": first, "at": at, "steps": [other_step, step]}
        named |= {"attack": HEADLINE, "auc": change, "auc_interval": interval}
        found.append(named | {"held_out_loss": loss})
    return found


def _step(record: dict, at: str) -> str:
    """The last step of an audit, or the one with the best, lowest held-out loss."""
    steps = record["steps"]
    return list(steps)[-1] if at == "last" else min(steps, key=lambda s: steps[s]["held_out_loss"])


def _read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(record, scores) of a finished audit, of which docs/records/ has only the record; raises
    UserError.
    """
    path = folder / "audit.json"
    if not path.exists():
        raise UserError(f"{folder} holds no finished audit: run audit.py --out {folder} first")
    record, scores = read_json(path), {}
    try:
        _require_record(record)
        if (path := folder / "scores.npz").exists():
            scores = read_arrays(path)
            _require_scores(scores, {_step(record, at) for at in ("last", "best")})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from None
    return record, scores


def _require_record(record: dict) -> None:
    """Touch what a comparison reads: whatever is missing or of another type raises an error."""
    _step(record, "last")
    for step in record["steps"].values():
        for figures in (step["attacks"][HEADLINE], *step["attacks"].values()):
            low, high = figures["auc_interval"]
            for number in (step["held_out_loss"], figures["auc"], low, high):
                math.isfinite(number)
            math.isfinite(figures["tpr_at_1_fpr"] or 0)


def _require_scores(scores: dict[str, np.ndarray], steps: set[str]) -> None:
    """The same for scores.npz, of these steps."""
    plain, member = ~scores["canary"], scores["member"]  # (P,), (N, P)
    found = [scores[f"{step}/{HEADLINE}"].shape for step in steps]
    if {*found, (len(member), len(plain))} != {member.shape} or len(scores["names"]) != len(plain):
        raise ValueError("its arrays are of different sizes")
