"""What evaluate.py prints: a verdict, tables within 80 columns, paired differences, and runs pooled
over seeds.  Tested in tests/test_tables.py.
"""

import textwrap
from pathlib import Path

import numpy as np

from attacks import comparisons

ALARMS = {
    "5": "one false alarm in twenty",
    "1": "one false alarm in a hundred",
    "0.1": "one false alarm in a thousand",
}  # FPRs of eval.json in per cent


def cell(figures: dict | None, key: str = "auc") -> str:
    """0.71 [0.60, 0.80], near one .997 [.985, 1.00], or a dash; at most 17 letters."""
    if figures is None or figures.get(key) is None:
        return "-"
    low, high = figures[f"{key}_interval"]
    return f"{rounded(figures[key])} [{rounded(low)}, {rounded(high)}]"


def rounded(share: float) -> str:
    """Two digits, above .985 three: 0.71, .997, and 1.00 from .9995 on."""
    return f"{share:.2f}" if share < 0.985 or share >= 0.9995 else f"{share:.3f}"[1:]


def percent(share: float) -> int:
    """Whole per cent, of the two digits that a table shows."""
    return round(100 * round(share, 2))


def titles(records: list[dict]) -> list[str]:
    """What to call each run: the last part of its path, or all of it where that names two."""
    short = [Path(r["run"]).name for r in records]
    return [r["run"] if short.count(s) > 1 else s for r, s in zip(records, short, strict=True)]


def print_tables(records: list[dict]) -> None:
    """Every run's attacks beside the base's, then all runs with their quality; 80 columns."""
    for title, record in zip(titles(records), records, strict=True):
        print_attacks(title, record)
    print_models(records)
    print(f"blind control (no model): {cell(records[0]['blind'])}")
    if differ_in_kind(records[0]["blind"]):
        say(
            "warning: the test members and non-members differ in kind: a classifier tells them "
            "apart without any model. Attacks do so too, even on the base. Compare with the last "
            "column, or use --shadow N, which compares each image with itself"
        )


def print_attacks(title: str, record: dict) -> None:
    """One line per attack: AUC, TPR at the lowest FPR that there are non-members for, the base."""
    adapted, base, sizes = record["adapted"], record["base"], record["images"]
    print(
        f"\n{shortened(title, 78)}\n{sizes['member_test']} members, {sizes['nonmember_test']} "
        "non-members, 95 % intervals; 0.5 is chance"
    )
    any_attack = next(iter(adapted["attacks"].values()))
    rates = [p for p in ALARMS if any_attack[f"tpr_at_{p}_fpr"] is not None][-1:]
    heads = "".join(f"{f'TPR at {p} % FPR':19}" for p in rates)
    print(f"{'':24}{'AUC':19}{heads}AUC on the base")
    for name, found in adapted["attacks"].items():
        cells = [cell(found), *(cell(found, f"tpr_at_{p}_fpr") for p in rates)]
        line = "".join(f"{c:19}" for c in cells)
        print(f"{name:24}{line}{cell(base['attacks'].get(name))}")
    head = adapted["headline"]
    print(f"{'headline':24}{cell(head):17}  {head['attack']}, chosen on known images")
    null = f"the best attack reaches {adapted['null']:.2f} in 5 % of permutations"
    print(f"{'  without any leak':24}{null}")
    low = [n for n, f in adapted["attacks"].items() if f["auc_interval"][1] < 0.5]
    if low:
        say(f"note: AUC below 0.5 for {', '.join(low)}: over-corrected, which leaks members too")


def print_models(records: list[dict]) -> None:
    """One line per model: what it leaks and how good its pictures are."""
    models = {"base": records[0]["base"]}
    models |= {t: r["adapted"] for t, r in zip(titles(records), records, strict=True)}
    quality = all(model.get("quality") for model in models.values())
    distances = ("members", "held_out") if quality else ()
    print(f"\n{'':22}{'headline AUC':17}{'held-out':>11}", end="")
    print(f"{'Frechet distance to':>24}" if quality else "")
    print(f"{'':39}{'loss':>11}" + "".join(f"{k.replace('_', '-'):>12}" for k in distances))
    for name, model in models.items():
        line = f"{shortened(name, 21):22}{cell(model['headline']):17}{model['held_out_loss']:11.4f}"
        print(line + "".join(f"{model['quality'][f'frechet_{k}']:12.0f}" for k in distances))


def say(text: str) -> None:
    """Print a sentence within 80 columns."""
    print(textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False))


def shortened(name: str, width: int) -> str:
    """A name cut at its front to `width` letters."""
    return name if len(name) <= width else f"...{name[3 - width :]}"


def verdict(record: dict) -> str:
    """One sentence for a person: what the attacker's own choice of attack finds in the adapter."""
    head = record["adapted"]["headline"]
    figures = record["adapted"]["attacks"][head["attack"]]
    (low, high), area = head["auc_interval"], head["auc"]
    without = max(record["blind"]["auc_interval"][1], record["base"]["headline"]["auc_interval"][1])
    apart = differ_in_kind(record["blind"]) and 0.5 < low <= without
    attack = f"the {head['attack']} attack"
    ranks = f"ranks a member above a non-member {percent(area)} % of the time"
    found = f"{attack} {ranks} [{percent(low)}, {percent(high)}]"
    names = [p for p in ALARMS if figures[f"tpr_at_{p}_fpr"] is not None]
    if names:
        share = percent(figures[f"tpr_at_{names[-1]}_fpr"])
        found += f"; at {ALARMS[names[-1]]} it finds {share} % of the members"
    if apart:
        begins = (
            "Members and non-members differ in kind, which shows without any model (blind AUC "
            f"{rounded(record['blind']['auc'])}), so this says little about what the adapter leaks"
        )
    elif low <= 0.5 <= high:
        begins = "The attacks tried here do not find the training images"
    elif high < 0.5:
        begins = "This adapter leaks which images it was trained on, with the sign reversed"
    elif area < 0.65:
        begins = "This adapter leaks a little about which images it was trained on"
    else:
        begins = "This adapter leaks which images it was trained on"
    return f"{begins}: {found}."


def differ_in_kind(blind: dict) -> bool:
    """Whether members and non-members can be told apart without any model; of sets that were dealt
    at random it is said once in forty times.
    """
    return blind["auc_interval"][0] > 0.5


def print_differences(records: list[dict], test_scores: list[dict]) -> None:
    """Each later model against the first on the same images, by the first one's headline attack.

    That attack was chosen without the test images: at its highest AUC on them, the first would be
    found to leak more than it does.
    """
    names, first = titles(records), records[0]
    attack = first["adapted"]["headline"]["attack"]
    for title, record, scores in zip(names[1:], records[1:], test_scores[1:], strict=True):
        if record["seed"] == first["seed"] and record["images"] == first["images"]:
            change = comparisons.paired_difference(scores[attack], test_scores[0][attack])
            say(f"{title} minus {names[0]}, AUC of {attack}: {signed(*change)} (paired)")


def signed(change: float, interval: list[float]) -> str:
    """A difference with its interval: +0.07 [-0.02, +0.16]."""
    return f"{change:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def print_seeds(records: list[dict], kinds: list[str], test_scores: list[dict]) -> list[dict]:
    """What runs that differ by their seed alone say together, and each kind of run against the
    first; returns it, a dictionary per kind.
    """
    by_kind: dict[str, dict[int, int]] = {}  # kind -> seed -> position
    for i, (record, kind) in enumerate(zip(records, kinds, strict=True)):
        by_kind.setdefault(kind, {})[record["seed"]] = i
    groups = [seeds for seeds in by_kind.values() if len(seeds) > 1]
    called, found = titles(records), []
    for seeds in groups:
        members, scores = ([given[i] for i in seeds.values()] for given in (records, test_scores))
        entry = {"runs": [called[i] for i in seeds.values()], "seeds": list(seeds)}
        entry |= {key: members[0][key] for key in ("method", "lam")} | pooled(members, scores)
        print_pooled(entry)
        shared = [seed for seed in seeds if seed in groups[0]]
        if seeds is not groups[0] and shared:
            # the attack is named by the known images of one seed, so not by the figures compared
            attack = records[min(groups[0].values())]["adapted"]["headline"]["attack"]
            pairs = [[test_scores[of[s]][attack] for of in (seeds, groups[0])] for s in shared]
            change, interval = comparisons.pooled_difference(pairs)
            entry["difference"] = {"attack": attack, "auc": change, "interval": interval}
            entry["difference"]["seeds"] = shared
            text = f"    minus the first, AUC of {attack}: {signed(change, interval)}"
            say(f"{text} (paired, {len(shared)} seeds)")
        found.append(entry)
    return found


def pooled(records: list[dict], test_scores: list[dict]) -> dict:
    """Means over the seeds of one kind of run: AUC of each one's headline attack, held-out loss and
    the quality of pictures.
    """
    chosen = [r["adapted"]["headline"]["attack"] for r in records]
    pairs = [scores[attack] for scores, attack in zip(test_scores, chosen, strict=True)]
    losses = [r["adapted"]["held_out_loss"] for r in records]
    found = {"headline": {"attacks": chosen} | comparisons.pooled(pairs)}
    found |= {"held_out_loss": float(np.mean(losses)), "held_out_loss_by_seed": losses}
    qualities = [r["adapted"].get("quality") for r in records]
    if all(qualities):
        found["quality"] = {k: float(np.mean([q[k] for q in qualities])) for k in qualities[0]}
    return found


def print_pooled(entry: dict) -> None:
    """One kind of run in a sentence."""
    headline, runs = entry["headline"], ", ".join(entry["runs"])
    text = f"{runs}: headline {cell(headline)}, held-out loss {entry['held_out_loss']:.4f}"
    for real in ("members", "held_out") if "quality" in entry else ():
        distance = entry["quality"][f"frechet_{real}"]
        text += f", Frechet distance {distance:.0f} ({real.replace('_', ' ')})"
    say(f"{text} (headline of each: {', '.join(f'{a:.2f}' for a in headline['auc_by_seed'])})")
