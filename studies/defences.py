"""The frontier of defences: every method and baseline audited on the same halves of one pool.

    python -m studies.defences                            # every row: days on two cores
    python -m studies.defences lora distill --adapters 8  # some; what is finished makes the table
    python -m studies.defences --seed 1 --out runs/defences-1    # another pool, other seeds

Each row is an audit (audit.py) in a folder of its own: a killed study goes on where it was, and one
more row costs that row.  At the end stand table.md and frontier.png, of all rows that are there.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from audit import Audit
from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse

# name -> flags; the name is a folder.  LoRA leaks all after 400 steps, so its kin have fewer
ROWS = {
    "lora": {"method": "lora"},
    "lora-constant": {"method": "lora", "schedule": "constant", "steps": 100},
    "lora-short": {"method": "lora", "steps": 100},
    "lora-shorter": {"method": "lora", "steps": 75},
    "lora-ema": {"method": "lora", "steps": 100, "schedule": "constant", "ema": 0.98},
    "lora-decay": {"method": "lora", "steps": 100, "weight_decay": 1.0},
    "lora-dropout": {"method": "lora", "steps": 100, "dropout": 0.3},
    "lora-flip": {"method": "lora", "steps": 100, "flip": True},
    "lora-flip-shorter": {"method": "lora", "steps": 75, "flip": True},
    "lora-captions": {"method": "lora", "steps": 100, "caption_dropout": 0.1},
    "lora-batch": {"method": "lora", "steps": 100, "accumulate": 4},
    "lora-rank4": {"method": "lora", "steps": 100, "rank": 4, "alpha": 4.0},
    "lora-attention": {"method": "lora", "steps": 100, "target": "attention"},
    "smp": {"method": "smp"},
    "smp-short": {"method": "smp", "steps": 100},
    "smp-constant": {"method": "smp", "schedule": "constant"},
    "smp-calibrated": {"method": "smp", "proxy": "calibrated"},
    "smp-calibrated-short": {"method": "smp", "proxy": "calibrated", "steps": 100},
    "smp-calibrated-less": {"method": "smp", "proxy": "calibrated", "steps": 100, "lam": 1.0},
    "mp": {"method": "mp"},
    "mp-normalised": {"method": "mp", "normalise": True},
    "distill": {"method": "distill"},
    "distill-flip": {"method": "distill", "flip": True},
    "distill-private": {"method": "distill", "public": "none"},
    "distill-private-flip": {"method": "distill", "public": "none", "flip": True},
    "distill-cosine": {"method": "distill", "schedule": "cosine", "teacher_steps": 100},
    "distill-ten": {"method": "distill", "teachers": 10},
    "subspace": {"method": "subspace", "steps": 100},
    "subspace-constant": {"method": "subspace", "steps": 100, "schedule": "constant"},
    "subspace-distill": {"method": "distill", "subspace": "public"},
    "subspace-smp": {"method": "smp", "subspace": "public", "steps": 100},
    "dp": {"method": "dp", "steps": 100},
    # noise as large as a clipped gradient
    "dp-rank4": {"method": "dp", "steps": 100, "rank": 4, "alpha": 4.0, "noise_multiplier": 0.0155},
    "subspace-dp": {
        "method": "dp",
        "steps": 100,
        "subspace": "public",
        "noise_multiplier": 0.0545,
    },
}


@dataclass
class Study(Audit):
    """Flags of audit.py; those that a row sets win over them."""

    rows: list[str] | None = option(None, "rows to audit (default: all)", group="what and where")


if __name__ == "__main__":
    SETTINGS = parse(Study, __doc__, positional="rows")
    progress.start()

import matplotlib.pyplot as plt
import numpy as np

import audit
from attacks.lira import HEADLINE, THRESHOLD
from command.whole_files import read_json, write_whole
from report.plots import COLOURS
from report.tables import cell, rounded
from settings import ATTACKED
from studies import claims

SIDES = {1: "yes", -1: "no", 0: "not told apart", None: "not measured"}
PLAIN = ("lora", "lora-constant", "lora-short", "lora-shorter")  # LoRA and nothing else
SHOWN = ("LiRA online, loss", "LiRA offline, loss", "projected prediction")


def study(s: Study) -> str:
    """Audit the rows that are asked for; returns the table of all that are finished, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    chosen, out = s.rows or list(ROWS), Path(s.out or "runs/defences")
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        raise UserError(f"there is no row {unknown[0]}: take some of {', '.join(ROWS)}")
    each = {f.name: getattr(s, f.name) for f in fields(Audit)}
    for name in chosen:
        print(f"\n{name}: {ROWS[name]}")
        audit.audit(replace(Audit(**each), **ROWS[name], out=str(out / name)))
    done = {name: out / name / "audit.json" for name in ROWS}
    records = {name: read_json(path) for name, path in done.items() if path.is_file()}
    found = f"{table(records)}\n{against_lora(records)}"
    write_whole(out / "table.md", found)
    draw(records, out / "frontier.png")
    print(f"\n{found}\nfiles:    {out}/table.md, frontier.png")
    return found


def table(records: dict[str, dict]) -> str:
    """Every step of every audit in a line of markdown."""
    heads = ["method", "step", "held-out loss", THRESHOLD, *SHOWN, HEADLINE]
    heads += ["its TPR at 1 % FPR", "Frechet, held out", "cost", "uses"]
    lines = [heads, ["---"] * len(heads)]
    for name, record in records.items():
        s = record["settings"]
        for at, step in record["steps"].items():
            attacks = step["attacks"]
            rate = attacks[HEADLINE]["tpr_at_1_fpr"]
            areas = [
                rounded(attacks[a]["auc"]) if a in attacks else "-" for a in (THRESHOLD, *SHOWN)
            ]
            row = [name, at, f"{step['held_out_loss']:.4f}".lstrip("0"), *areas]
            row += [cell(attacks[HEADLINE]), "-" if rate is None else f"{rate:.2f}"]
            row += [f"{step['frechet_held_out']:.0f}" if "frechet_held_out" in step else "-"]
            lines.append([*row, f"{cost(s, int(at)):.1f}", uses(s)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def against_lora(records: dict[str, dict]) -> str:
    """Of every step of the audits that are not plain LoRA, whether it leaks less than LoRA on the
    way to the same held-out loss, the goal of a defence: less than plain LoRA, and less than any
    other row of LoRA too.  The lowest row counts.
    """
    loras = {n: record for n, record in records.items() if record["settings"]["method"] == "lora"}
    plain = [record for name, record in loras.items() if name in PLAIN]
    heads = ["method", "step", "AUC, less plain LoRA's at the same held-out loss"]
    lines = [[*heads, "less any LoRA's", "over", "less?"]]
    lines.append(["---"] * len(lines[0]))
    for name, record in records.items():
        others = [other for n, other in loras.items() if n != name]
        for at in record["steps"] if name not in PLAIN else ():
            first, found = (
                claims.at_equal_loss({"lora": which, name: [record]}, name, at)
                for which in (plain, others)
            )
            lines.append([name, at, first.here, found.here, found.over, SIDES[found.side]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(records: dict[str, dict], path: Path) -> None:
    """AUC and TPR at 1 % FPR against held-out loss and Frechet distance, as a PNG: a line per row,
    from its first step on, in the colour of its method.
    """
    figure, axes = plt.subplots(
        2, 2, figsize=(10, 7.4), sharex="col", sharey="row", layout="constrained"
    )
    shapes = {name: "os^Dv<>PX*hd"[k % 12] for name, k in _within(records).items()}
    for name, record in records.items():
        colour, plain = COLOURS[record["settings"]["method"]], name in PLAIN
        line = {"color": colour, "marker": shapes[name], "ms": 4, "lw": 2.4 if plain else 1}
        line |= {"alpha": 1 if plain or record["settings"]["method"] != "lora" else 0.6}
        for row, key in zip(axes, ("auc", "tpr_at_1_fpr"), strict=True):
            for axis, quality in zip(row, ("held_out_loss", "frechet_held_out"), strict=True):
                points = [
                    (s.get(quality), s["attacks"][HEADLINE]) for s in record["steps"].values()
                ]
                points = [(x, a) for x, a in points if x is not None and a[key] is not None]
                if points:
                    x, y = zip(*((x, a[key]) for x, a in points), strict=True)
                    ends = np.array([a[f"{key}_interval"] for _, a in points]).T
                    axis.errorbar(x, y, np.abs(ends - y), elinewidth=0.6, label=name, **line)
                axis.grid(alpha=0.2)
    for axis, words in zip(axes[1], ("held-out loss", "Frechet distance, held out"), strict=True):
        axis.set_xlabel(f"{words} (lower is better)")
    axes[0, 0].set_ylabel(f"AUC, {HEADLINE} (0.5 is chance)")
    axes[1, 0].set_ylabel("its TPR at 1 % FPR")
    handles = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _within(records: dict[str, dict]) -> dict[str, int]:
    """The place of each row among those of its method."""
    methods = [record["settings"]["method"] for record in records.values()]
    return {
        name: methods[:k].count(m) for k, (name, m) in enumerate(zip(records, methods, strict=True))
    }


def cost(s: dict, step: int) -> float:
    """Of a training up to a step, in whole trainings of plain LoRA at the default settings.

    Counted in images that go through the UNet, a backward pass as two: 3 for an image of LoRA, and
    1 more where the batch is cut into parts.  An attacker sends as many members and as many others
    through it again, without gradient.  Making public directions is not counted.
    """
    batch, parted = s["batch_size"] * s["accumulate"], s["accumulate"] > 1
    own, before = (3 + parted) * batch, 0
    per_step = own
    if s["method"] in ATTACKED:  # calibrated, all of them through the base as well
        per_step += 2 * batch + 3 * batch * (s["proxy"] == "calibrated")
    elif s["method"] == "distill":
        seen = batch * (1 if s["public"] == "none" else 2)
        per_step = (4 + parted) * seen
        before = s["teachers"] * (s["teacher_steps"] or -(-s["steps"] // 4)) * own
    elif s["method"] == "dp":
        per_step = 3 * batch * s["draws"]
    return (before + step * per_step) / (400 * 3 * 8)


def uses(s: dict) -> str:
    """What a method needs beside the members."""
    public = s.get("public") not in (None, "none") or s.get("subspace")
    needed = {"non-members": s["method"] in ATTACKED, "public pictures": public}
    return ", ".join(name for name, there in needed.items() if there) or "-"


if __name__ == "__main__":
    with one_line_errors():
        study(SETTINGS)
