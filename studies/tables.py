"""The tables of the documents, written from docs/records/ and never by hand.

    python -m studies.tables            # writes every table
    python -m studies.tables --check    # says which are out of date, with exit code 1

In docs/*.md a table stands between `<!-- table: NAME -->` and `<!-- /table -->`, each on a line of
its own.  Long tables are files in docs/records/.  tests/test_studies.py holds both to the records.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from attacks.lira import THRESHOLD
from command.errors import UserError
from command.flags import option
from command.whole_files import read_json, write_whole
from methods import dp
from methods.promise import mu_for
from report.tables import cell, rounded
from settings import DP
from studies import as_released, defences, grid, paper, records, smoothness, verdicts
from studies.equal_loss import read_audits
from studies.paper_tables import TABLES as PAPER
from studies.records import COMBINED, HEADLINE, HELD_OUT, LOSS, PICTURES, PROXY, Figure, Records

DOCS = Path(__file__).parent.parent / "docs"
KEPT = DOCS / "records"
TWEMOJI = KEPT / "paper" / "twemoji"
MARK = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- /table -->$", re.DOTALL | re.MULTILINE)

CLAIMED = (TWEMOJI, KEPT / "audit-early", KEPT / "audit-lora", KEPT / "audit-smp")
CLAIMED += (KEPT / "defences" / "lora-shorter",)
SIXTEEN = {"lora": "audit-lora", "lora-constant": "audit-early", "smp": "audit-smp"}
SIXTEEN |= {"mp": "audit-mp"}  # audits of sixteen adapters that are not in records/defences
SCREENED = {  # audits of six adapters that are not in records/screen
    "smp-short": "smp",
    "smp-calibrated": "calibrated-400",
    "smp-calibrated-short": "calibrated",
    "smp-calibrated-less": "calibrated-lam1",
    "distill + ratio": "ratio",
    "distill + ratio + calibrated": "ratio-calibrated",
}
FRONTIER = (  # (row, step, what the table calls it)
    ("lora", "50", "LoRA, 50 of 400 steps"),
    ("lora", "400", "LoRA"),
    ("lora-shorter", "37", "LoRA, 37 of 75 steps"),
    ("lora-shorter", "75", "LoRA, 75 steps"),
    ("lora-flip-early", "20", "LoRA `--flip`, 20 of 75 steps"),
    ("lora-flip-shorter", "38", "LoRA `--flip`, 38 of 75 steps"),
    ("lora-flip-shorter", "75", "LoRA `--flip`, 75 steps"),
    ("lora-crop", "38", "LoRA `--flip --crop`, 38 of 75 steps"),
    ("lora-crop", "75", "LoRA `--flip --crop`, 75 steps"),
    ("smp", "50", "SMP, 50 of 400 steps"),
    ("smp", "400", "SMP"),
    ("mp", "400", "MP"),
    ("lora-public-flip", "19", "LoRA `--flip` from a public LoRA, 19 of 75 steps"),
    ("distill-private", "200", "distill"),
    ("distill-private-flip", "200", "distill `--flip`"),
    ("distill-crop", "200", "distill `--flip --crop`"),
    ("distill-two", "200", "distill `--flip --teachers 2`"),
    ("distill-seen", "200", "distill `--flip` by teachers that have seen the image"),
    ("distill-soup", "1", "no student: the mean of its teachers"),
    ("dp-no-noise", "6", "dp without noise"),
    ("dp-epsilon-8", "6", "dp `--epsilon 8`"),
    ("dp-epsilon-3", "6", "dp `--epsilon 3`"),
    ("dp-epsilon-1", "6", "dp `--epsilon 1`"),
)
EPSILONS = (1, 3, 8)
MODELS = {  # what a table calls the runs of a row, and the folder of the evaluation
    "LoRA": ("lora", ""),
    "SMP": ("smp", ""),
    "MP at SMP's mean weight": ("mp-matched", ""),
    "MP": ("mp", ""),
    "LoRA at its best held-out loss": ("lora", "at-best"),
}


@dataclass
class Tables:
    """Flags of the command."""

    check: bool = option(False, "write nothing; fail if a table is out of date", group=grid.WHERE)


def tables(s: Tables) -> list[Path]:
    """Write what is out of date, or say so; returns these files.

    Raises UserError for marks that cannot be filled, and with `check` for files out of date.
    """
    old = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    names = ", ".join(str(path.relative_to(DOCS.parent)) for path in old)
    if s.check and old:
        raise UserError(f"out of date: {names}; python -m studies.tables writes them")
    for path in old:
        write_whole(path, pages()[path])
    print(f"wrote {names}" if old else "every table is up to date")
    return old


def pages() -> dict[Path, str]:
    """{file: what it should hold} of every document with tables and of every long table."""
    found = {path: filled(path.read_text(), path.name) for path in sorted(DOCS.glob("*.md"))}
    for folder, audits in (
        ("screen", screen()),
        ("defences", sixteen()),
        ("defences-1", second_pool()),
    ):
        text = f"{defences.table(audits)}\n{shadow_attacks(audits)}"
        found[KEPT / folder / "table.md"] = text
    whole = [paper.page(name, TWEMOJI) for name in PAPER]
    found[KEPT / "smoothness" / "table.md"] = smoothness.table(smoothness.read(KEPT / "smoothness"))
    found[KEPT / "as-released" / "table.md"] = as_released.table(KEPT / "as-released")
    found[KEPT / "paper" / "table.md"] = "\n".join([*whole, attacks()])
    return found


def filled(page: str, name: str) -> str:
    """A page with the tables between its marks; raises UserError for marks that are wrong."""
    if page.count("<!-- table: ") != len(MARK.findall(page)) or "<!-- table: " in "".join(
        inside for _, inside in MARK.findall(page)
    ):
        raise UserError(f"{name} has a table mark without its <!-- /table --> on a line of its own")

    def table(mark: re.Match) -> str:
        if mark[1] not in MADE:
            raise UserError(f"{name} asks for the table {mark[1]}: there are {', '.join(MADE)}")
        return f"<!-- table: {mark[1]} -->\n{MADE[mark[1]]()}<!-- /table -->"

    return MARK.sub(table, page)


# --------------------------------------------------------------------------------------------------
# Audits


def screen() -> dict[str, dict]:
    """Every row of six adapters."""
    found = read_audits(KEPT / "screen")
    for name, folder in SCREENED.items():
        found[name] = read_json(KEPT / "pilot" / folder / "audit.json")
    order = [*defences.ROWS, *sorted(found)]
    return {name: found[name] for name in order if name in found}


def sixteen() -> dict[str, dict]:
    """Every row of sixteen adapters on the first pool."""
    found = {n: read_json(KEPT / folder / "audit.json") for n, folder in SIXTEEN.items()}
    found |= read_audits(KEPT / "defences")
    return {name: found[name] for name in [*defences.ROWS, *sorted(found)] if name in found}


def second_pool() -> dict[str, dict]:
    """Every row of sixteen adapters on other images, with other seeds."""
    return read_audits(KEPT / "defences-1")


def shadow_attacks(audits: dict[str, dict]) -> str:
    """The AUC of every attack at every step."""
    steps = {f"{name}, {at}": a["steps"][at] for name, a in audits.items() for at in a["steps"]}
    names = list(dict.fromkeys(name for step in steps.values() for name in step["attacks"]))
    lines = [["AUC: method, step", *names]]
    for title, step in steps.items():
        found = [step["attacks"].get(name) for name in names]
        lines.append([title, *(rounded(attack["auc"]) if attack else "-" for attack in found)])
    return records.markdown(lines)


def frontier() -> str:
    """The rows that matter, and what the attack reads on the second pool."""
    first, second = sixteen(), second_pool()
    lines = [[*defences.HEADS, "AUC on a second pool"]]
    for name, at, title in FRONTIER:
        line = defences.row(name, at, first[name], first)
        again = second[name]["steps"].get(at) if name in second else None
        lines.append([title, *line[1:], cell(again["attacks"][HEADLINE]) if again else "-"])
    return records.markdown(lines)


def six_alone() -> str:
    """The last step of the rows that have six adapters, not sixteen, and whose flags are there."""
    rows = defences.ROWS.keys() - sixteen().keys()
    heads, rule, *lines = defences.table(screen(), last=True).splitlines()
    kept = [line for line in lines if line.strip("| ").split(",")[0] in rows]
    return "\n".join([heads, rule, *kept])


ATTENTION_LAYERS = 128  # of Stable Diffusion v1.5


def noise() -> str:
    """How long the noise of a step of --method dp is, in clips: sigma sqrt(d) / N."""
    numbers = ATTENTION_LAYERS * dp.CORE**2
    lines = [["members", *(f"epsilon {epsilon}" for epsilon in EPSILONS)]]
    for members in (100, 400, 1000, 4000):
        mus = [mu_for(epsilon, 0.1 / members) for epsilon in EPSILONS]
        sigmas = [math.sqrt(DP["steps"]) / mu for mu in mus]
        found = [sigma * math.sqrt(numbers) / members for sigma in sigmas]
        lines.append([f"{members:,}", *(f"{length:.2f}" for length in found)])
    return records.markdown(lines)


# --------------------------------------------------------------------------------------------------
# Runs over seeds


def models() -> dict[str, Records]:
    """{what a table calls it: its runs by seed}, the base first."""
    found = {title: records.read(TWEMOJI, row, at) for title, (row, at) in MODELS.items()}
    base = {seed: {"adapted": record["base"]} for seed, record in found["LoRA"].items()}
    return {"base": base} | found


def seeds() -> str:
    """What each model leaks and how good it is, mean of three seeds."""
    rate = Figure("its TPR at 5 % FPR", "tpr_at_5_fpr", "combined")
    figures = (PROXY, COMBINED, rate, LOSS, PICTURES, HELD_OUT)
    lines = [["mean of three seeds", *(figure.title for figure in figures)]]
    for title, by_seed in models().items():
        lines.append([title, *(f.cell(records.mean(by_seed, f)) for f in figures)])
    return records.markdown(lines)


def attacks() -> str:
    """The AUC of every attack on every model, mean of three seeds."""
    there = models()
    names = list(next(iter(there["LoRA"].values()))["adapted"]["attacks"])
    lines = [["AUC, mean of three seeds", *there]]
    for name in names:
        figure = Figure(name, "auc", name)
        found = [records.mean(by_seed, figure) for by_seed in there.values()]
        lines.append([name, *(figure.cell(at) for at in found)])
    return f"### Every attack: twemoji\n\n{records.markdown(lines)}"


def changes() -> str:
    """Every change in the paper's tables beside ours."""
    lines = [line for name in PAPER for line in paper.changes(name, TWEMOJI)]
    return f"{records.markdown([paper.HEADS, *lines])}\n{paper.NOTE}\n"


# --------------------------------------------------------------------------------------------------
# What stands in the pages


def narrow(table: str, *without: str) -> str:
    """A table as a page shows it, which is shorter than the one in docs/records/.

    It has neither the columns in `without` nor the note below, and says .97 for 0.97.  Raises
    ValueError for an unknown column.
    """
    rows = [row[1:-1].split("|") for row in table.splitlines() if row.startswith("|")]
    lines = [[cell.strip() for cell in row] for row in rows]
    out = {lines[0].index(head) for head in without}
    kept = [[cell for at, cell in enumerate(line) if at not in out] for line in lines]
    return re.sub(r"(?<![\d.])0(?=\.\d)", "", records.markdown([kept[0], *kept[2:]]))


SIDE = "less than any LoRA?"  # of the interval beside it
MADE = {
    "verdicts": lambda: narrow(
        verdicts.table(verdicts.gather([*CLAIMED, KEPT / "smoothness"])), "over"
    ),
    "frontier": lambda: narrow(frontier(), THRESHOLD, defences.LESS_PLAIN, SIDE),
    "defences": lambda: narrow(
        six_alone(),
        *("Frechet, held out", THRESHOLD, defences.THERE, SIDE, "cost", "uses"),
    ),
    "noise": lambda: narrow(noise()),
    "paper": lambda: narrow(changes(), "table"),
    "seeds": lambda: narrow(seeds()),
    "smoothness": lambda: narrow(
        smoothness.table(smoothness.read(KEPT / "smoothness")),
        *("count for", "1/D", "bound / norm", "L1 part of bound"),
    ),
    "released": lambda: narrow(as_released.table(KEPT / "as-released"), "seeds", PROXY.title),
}


if __name__ == "__main__":
    grid.command(Tables, tables, __doc__)
