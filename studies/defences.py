"""The frontier of defences: every method and baseline audited on the same halves of one pool.

    python -m studies.defences                            # every row: days on two cores
    python -m studies.defences lora distill --adapters 8  # some; what is finished makes the table
    python -m studies.defences --seed 1 --out runs/defences-1    # another pool, other seeds

Each row is an audit (audit.py) in a folder of its own: a killed study goes on where it was, and one
more row costs that row.  At the end stands table.md, of all rows that are there; `python audit.py`
with the folders of some draws them.  Tested in tests/test_studies.py.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from attacks.lira import HEADLINE, THRESHOLD
from audit import Audit
from command.flags import option
from command.whole_files import write_whole
from report.tables import cell, rounded
from settings import ATTACKED
from studies import equal_loss, grid, records
from studies.records import SHADOWED

SHORT = {"method": "lora", "steps": 100}  # LoRA leaks all after 400 steps, so its kin have fewer
CALIBRATED = {"method": "smp", "proxy": "calibrated"}
DISTILL = {"method": "distill", "flip": True}
# name -> flags; the name is a folder
ROWS = {
    "lora": {"method": "lora"},
    "lora-constant": SHORT | {"schedule": "constant"},
    "lora-short": SHORT,
    "lora-shorter": SHORT | {"steps": 75},
    "lora-flip": SHORT | {"flip": True},
    "lora-flip-shorter": SHORT | {"steps": 75, "flip": True},
    "lora-flip-early": SHORT | {"steps": 75, "flip": True},  # to be asked at other steps
    "lora-flip-slow": {"method": "lora", "flip": True, "lr": 1e-4},
    "lora-crop": SHORT | {"steps": 75, "flip": True, "crop": True},
    "lora-batch": SHORT | {"accumulate": 4},
    "lora-rank4": SHORT | {"rank": 4, "alpha": 4.0},
    "lora-attention": SHORT | {"target": "attention"},
    "smp": {"method": "smp"},
    "smp-short": {"method": "smp", "steps": 100},
    "smp-constant": {"method": "smp", "schedule": "constant"},
    "smp-calibrated": CALIBRATED,
    "smp-calibrated-short": CALIBRATED | {"steps": 100},
    "smp-calibrated-less": CALIBRATED | {"steps": 100, "lam": 1.0},
    "mp": {"method": "mp"},
    "mp-normalised": {"method": "mp", "normalise": True},
    "distill-private": {"method": "distill"},  # private: without the public pictures of old rows
    "distill-private-flip": DISTILL,
    "distill-crop": DISTILL | {"crop": True},
    "distill-two": DISTILL | {"teachers": 2},
    "distill-seen": DISTILL,
    "distill-soup": DISTILL | {"steps": 1, "teacher_steps": 50},
    "lora-public-flip": SHORT | {"steps": 75, "flip": True, "init": "runs/public/adapter"},
    "dp-epsilon-1": {"method": "dp", "epsilon": 1.0},
    "dp-epsilon-3": {"method": "dp", "epsilon": 3.0},
    "dp-epsilon-8": {"method": "dp", "epsilon": 8.0},
    "dp-no-noise": {"method": "dp", "epsilon": 1000.0},
}
TRAINERS = {  # of rows that no flag makes
    "distill-seen": "studies.leaving_out.train_seen",
    "distill-soup": "studies.leaving_out.train_soup",
}

DP_DRAWS = 4  # of methods/dp.py: how often an image is in a step, in which all members are
SIDES = {1: "yes", -1: "no", 0: "not told apart", None: "not measured"}
THERE = "LoRA's at the same loss"
LESS_PLAIN = "less plain LoRA's at the same loss"
HEADS = ["method, step", "held-out loss", "Frechet, held out", THRESHOLD, HEADLINE]
HEADS += ["highest TPR at 1 % FPR", THERE, LESS_PLAIN, "less any LoRA's"]
HEADS += ["less than any LoRA?", "cost", "uses"]
PLAIN = ("lora", "lora-constant", "lora-short", "lora-shorter")  # LoRA and nothing else


@dataclass
class Study(Audit):
    """Flags of audit.py; those that a row sets win over them."""

    rows: list[str] | None = option(None, "rows to audit (default: all)", group=grid.WHERE)


def study(s: Study) -> str:
    """Audit the rows that are asked for; returns the table of all that are finished, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    import audit

    out = Path(s.out or "runs/defences")
    for name in grid.chosen(s.rows, ROWS):
        print(f"\n{name}: {ROWS[name]}")
        row = replace(flags_of_audit(s), **ROWS[name], out=str(out / name))
        audit.audit(row, trainer(name))
    if s.dry_run:
        return ""
    found = equal_loss.read_audits(out)
    text = table({name: found[name] for name in [*ROWS, *found] if name in found})
    write_whole(out / "table.md", text)
    print(f"\n{text}\nfiles:    {out}/table.md")
    return text


def flags_of_audit(s: Study) -> Audit:
    """The flags of a study that are those of an audit."""
    return Audit(**{f.name: getattr(s, f.name) for f in fields(Audit)})


def trainer(name: str) -> Callable | None:
    """What trains an adapter of a row; None for the method as it is."""
    return pkgutil.resolve_name(TRAINERS[name]) if name in TRAINERS else None


# --------------------------------------------------------------------------------------------------
# The table


def table(audits: dict[str, dict], last: bool = False) -> str:
    """Every step of every audit in a line of markdown, or the last step of each."""
    lines = [HEADS]
    for name, audit in audits.items():
        steps = list(audit["steps"])[-1:] if last else audit["steps"]
        lines += [row(name, at, audit, audits) for at in steps]
    return records.markdown(lines)


def row(name: str, at: str, audit: dict, audits: dict[str, dict]) -> list[str]:
    """One step of an audit, against the audits of LoRA among `audits`.

    The goal of a defence is to leak less than LoRA on the way to the same held-out loss: than plain
    LoRA, and than LoRA with any of the other flags.  The lowest one counts.
    """
    step = audit["steps"][at]
    attacks = step["attacks"]
    rate, distance = equal_loss.highest_rate(step), step.get("frechet_held_out")
    said = [f"{name}, {at}", f"{step['held_out_loss']:.4f}".lstrip("0")]
    said.append("-" if distance is None else f"{distance:.0f}")
    said += [rounded(attacks[THRESHOLD]["auc"]), cell(attacks[HEADLINE])]
    loras = {n: a for n, a in audits.items() if a["settings"]["method"] == "lora"}
    loras = {n: a for n, a in loras.items() if not a["settings"].get("init")}  # a public start
    own = ROWS.get(name), TRAINERS.get(name)  # the row itself, perhaps asked at other steps
    same = {n for n in ROWS if (ROWS[n], TRAINERS.get(n)) == own} | {name}
    compared, others = [], []
    for names in (PLAIN, loras):
        others = [lora for n, lora in loras.items() if n in names and n not in same]
        compared.append(None if name in PLAIN else equal_loss.at_equal_loss(step, others))
    there = compared[-1]
    said += ["-" if r is None else f"{r:.2f}" for r in (rate, there and there.tpr)]
    for found in compared:
        none = "not asked" if others and name not in PLAIN else "-"
        said.append(SHADOWED.cell(found.change, signed=True) if found else none)
    side = -there.change.side() if there else None
    verdict = "-" if name in PLAIN else SIDES[side]
    return [*said, verdict, f"{cost(audit['settings'], int(at)):.1f}", uses(audit["settings"])]


def cost(s: dict, step: int) -> float:
    """Of an audit's training up to a step, in whole trainings of plain LoRA at the defaults.

    Counted in images that go through the UNet, a backward pass as two: 3 for an image of LoRA, and
    1 more where the batch is cut into parts.  An attacker sends as many members and as many others
    through it again, without gradient.  Making public directions is not counted.
    """
    batch = s["batch_size"] * s["accumulate"]
    again = 1 if s["accumulate"] > 1 else 0
    of_lora = (3 + again) * batch
    shown, before, each = batch, 0, of_lora
    if s["method"] == "distill":
        shown = 2 * batch if public(s) else batch
        each = (4 + again) * shown
        before = s["teachers"] * (s["teacher_steps"] or -(-s["steps"] // 4)) * of_lora
    elif s["method"] == "dp":
        of_old = s.get("draws")  # a flag of old records, whose batches were drawn
        each = 3 * batch * of_old if of_old else 3 * DP_DRAWS * s["pool"] // 2
    if attacked(s):
        each += 2 * batch
        if s["proxy"] == "calibrated" or s.get("calibrated"):  # all through the base as well
            each += 2 * batch + shown
    return (before + step * each) / (400 * 3 * 8)


def attacked(s: dict) -> bool:
    """Whether there is an attacker in the loop; `ratio` is a flag of old records."""
    return s["method"] in ATTACKED or bool(s.get("ratio"))


def uses(s: dict) -> str:
    """What a method needs beside the members; `subspace` is a flag of old records."""
    shown = public(s) or any(s.get(name) for name in ("subspace", "directions", "init"))
    needed = {"non-members": attacked(s), "public pictures": shown}
    return ", ".join(name for name, there in needed.items() if there) or "-"


def public(s: dict) -> bool:
    """Whether half of a student's batch were public pictures, in old records."""
    return s.get("public") not in (None, "none")


if __name__ == "__main__":
    grid.command(Study, study, __doc__, "rows")
