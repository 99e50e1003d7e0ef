"""What evaluate.py prints: the table of all runs, paired differences, and runs pooled over
seeds.
"""

from pathlib import Path

import numpy as np

from evaluation import comparisons


def cell(figures: dict | None, key: str = "auc") -> str:
    """0.71 [0.60, 0.80], or a dash."""
    if figures is None or figures.get(key) is None:
        return "-"
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.2f} [{low:.2f}, {high:.2f}]"


def titles(records: list[dict]) -> list[str]:
    """What to call each run: the last part of its path, or all of it where that names two."""
    short = [Path(r["run"]).name for r in records]
    return [r["run"] if short.count(s) > 1 else s for r, s in zip(records, short, strict=True)]


def print_table(records: list[dict]) -> None:
    """AUC per attack (rows) and model (columns), then the headline and the quality of each."""
    columns = [("base", records[0]["base"])] + [
        (title, r["adapted"]) for title, r in zip(titles(records), records, strict=True)
    ]
    width = max(20, *(len(name) + 2 for name, _ in columns))
    names = list(dict.fromkeys(a for _, c in reversed(columns) for a in c["attacks"]))

    def line(title, cells):
        print(f"{title:24}" + "".join(f"{c:>{width}}" for c in cells))

    sizes = records[0]["images"]
    print(
        f"\nAUC on {sizes['member_test']} members and {sizes['nonmember_test']} non-members, "
        "95 % intervals; 0.5 is chance"
    )
    line("", [name for name, _ in columns])
    for name in names:
        line(name, [cell(c["attacks"].get(name)) for _, c in columns])
    line("headline", [cell(c["headline"]) for _, c in columns])
    line("  by, chosen beforehand", [c["headline"]["attack"] for _, c in columns])
    line("worst case", [cell(c["worst"]) for _, c in columns])
    line("  by", [c["worst"]["attack"] for _, c in columns])
    line("  chance reaches (95 %)", [f"{c['worst']['null']:.2f}" for _, c in columns])
    worst = [c["attacks"][c["worst"]["attack"]] for _, c in columns]
    line("  its balanced ASR", [cell(w, "asr") for w in worst])
    for percent in ("5", "1", "0.1"):
        if any(w[f"tpr_at_{percent}_fpr"] is not None for w in worst):
            line(f"  its TPR at {percent} % FPR", [cell(w, f"tpr_at_{percent}_fpr") for w in worst])
    line("held-out loss", [f"{c['held_out_loss']:.4f}" for _, c in columns])
    if columns[0][1].get("quality"):
        for key, title in (
            ("frechet", "Frechet distance"),
            ("kid", "KID"),
            ("nearest", "nearest picture"),
        ):
            for real in ("members", "held_out"):
                values = [c["quality"][f"{key}_{real}"] for _, c in columns]
                line(f"{title}, {real.replace('_', ' ')}", [f"{v:.3f}" for v in values])
    print(f"blind control (no model): {cell(records[0]['blind'])}")
    for name, model in columns[1:]:
        low = [a for a, f in model["attacks"].items() if f["auc_interval"][1] < 0.5]
        if low:
            print(
                f"note: {name} is over-corrected for {', '.join(low)}: "
                "AUC below 0.5 gives members away as well"
            )


def print_differences(records: list[dict], test_scores: list[dict]) -> None:
    """Each later model against the first on the same images, at the first one's headline attack.

    That attack is chosen without the test images: at the worst one on them, the first would be
    found to leak more than it does.
    """
    names = titles(records)
    for title, record, scores in zip(names[1:], records[1:], test_scores[1:], strict=True):
        name = records[0]["adapted"]["headline"]["attack"]
        first, second = test_scores[0][name], scores[name]
        if record["seed"] != records[0]["seed"] or record["images"] != records[0]["images"]:
            continue
        change, (low, high) = comparisons.paired_difference(second, first)
        print(
            f"{title} minus {names[0]}, AUC of {name}: "
            f"{change:+.2f} [{low:+.2f}, {high:+.2f}] (paired)"
        )


def print_seeds(records: list[dict], kinds: list[str], test_scores: list[dict]) -> list[dict]:
    """What runs that differ by their seed alone say together, and each kind of run against the
    first; returns it.
    """
    groups: dict[str, dict[int, int]] = {}  # kind -> seed -> position
    called = titles(records)
    for i, (record, same) in enumerate(zip(records, kinds, strict=True)):
        groups.setdefault(same, {})[record["seed"]] = i
    groups, found, first = {k: g for k, g in groups.items() if len(g) > 1}, [], None
    for group in groups.values():
        members = [records[i] for i in group.values()]
        worst = comparisons.pooled_worst([test_scores[i] for i in group.values()])
        losses = [r["adapted"]["held_out_loss"] for r in members]
        names = [called[i] for i in group.values()]
        entry = (
            {"runs": names, "seeds": list(group)}
            | {k: members[0][k] for k in ("method", "lam")}
            | {"worst": worst}
        )
        entry |= {"held_out_loss": float(np.mean(losses)), "held_out_loss_by_seed": losses}
        qualities = [r["adapted"].get("quality") for r in members]
        if all(qualities):
            entry["quality"] = {k: float(np.mean([q[k] for q in qualities])) for k in qualities[0]}
        text = f"{', '.join(names)}: worst case {cell(worst)} by {worst['attack']}, "
        text += f"held-out loss {np.mean(losses):.4f}"
        for real in ("members", "held_out") if "quality" in entry else ():
            distance = entry["quality"][f"frechet_{real}"]
            text += f", Frechet distance {distance:.0f} ({real.replace('_', ' ')})"
        print(f"{text} (worst case of each: {', '.join(f'{a:.2f}' for a in worst['auc_by_seed'])})")
        if first is None:
            # named by one seed's known images, so not by the figures it is compared at
            first, name = group, members[0]["adapted"]["headline"]["attack"]
        elif shared := [seed for seed in group if seed in first]:
            pairs = [
                (test_scores[group[seed]][name], test_scores[first[seed]][name]) for seed in shared
            ]
            change, (low, high) = comparisons.pooled_difference(pairs)
            entry["difference"] = {
                "attack": name,
                "auc": change,
                "interval": [low, high],
                "seeds": shared,
            }
            print(
                f"    minus the first, AUC of {name}: "
                f"{change:+.2f} [{low:+.2f}, {high:+.2f}] (paired, {len(shared)} seeds)"
            )
        found.append(entry)
    return found
