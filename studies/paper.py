"""The paper's tables, one command each, with our figures beside the paper's and what holds.

    python -m studies.paper lambda                      # SMP over lambda, three seeds
    python -m studies.paper lambda rank --dry-run       # which runs, and how long
    python -m studies.paper datasets --model SD15_FOLDER --data Pokemon,CelebA_Small --device cuda

Tables: datasets (data sets and methods), attackers (black-box and white-box),
lambda, lr, rank, full (fine-tuning of all weights), captions (DreamBooth), and
clipping (MP with clipped and normalised gradients); all of them if none is
named.  Three seeds of 400 steps on the embedded model, 100 pictures and 100 test
non-members take from 15 minutes (attackers) to an hour (lambda, rank) on two cores.

    --out DIR/lambda.md      the table; DIR/SET/seed-S/RUN are the runs

Tables share runs: what one has trained and evaluated, another finds.  A killed study goes on where
it was.  Lambda, learning rate and rank are multiples of the model's own default, as the paper's are
of .05, 1e-4 and 64.  Tested in tests/test_paper_tables.py.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse
from run.resolve import resolve
from settings import PAPER, Settings
from studies import settings
from studies.paper_tables import DATA, RUNS, TABLES, Claim, Table


@dataclass
class Study(settings.Study):
    """Flags of train.py; those that a row sets win over them."""

    tables: list[str] | None = option(
        None, f"some of {', '.join(TABLES)} (default: all)", group=settings.WHERE
    )
    data: str = option(
        "twemoji",
        "twemoji or a folder of captioned images; several with commas between",
        group=settings.WHERE,
    )
    out: str | None = option(
        None, "folder of tables and runs (default: runs/paper)", group=settings.WHERE
    )
    token: str | None = option(
        None,
        "captions: the caption of every image (default: sks emoji; of a folder, a picture of sks)",
        group=settings.WHERE,
    )
    test_nonmembers: int = option(
        100, "test non-members to score; 0 takes all", group=settings.WHERE
    )


if __name__ == "__main__":
    SETTINGS = parse(Study, __doc__, positional="tables")
    progress.start()

import evaluate
from command.whole_files import write_whole
from studies import runs, seeds
from studies.captions import one_caption
from studies.seeds import ASR, COMBINED, LOSS, PICTURES, Estimate, Figure, Records
from train import train

FIGURES = {
    "asr": ASR,
    "combined": COMBINED,
    "pictures": PICTURES,
    "black-box": Figure("black-box attack, balanced ASR", "asr", "black-box"),
    "GSA1": Figure("GSA1, balanced ASR", "asr", "GSA1"),
}
# which of the paper's figures each is held against; the first that both runs have
AGAINST = {"asr": ["asr"], "combined": ["asr"], "pictures": ["fid", "kid"]}
AGAINST |= {"black-box": ["black-box"], "GSA1": ["GSA1"]}
NAMES = {"fid": "FID", "kid": "KID", "asr": "ASR", "folded": "folded AUC"}
MULTIPLES = {"lam": "lambda", "lr": "learning rate", "rank": "rank"}


def study(s: Study) -> str:
    """Train and evaluate what is missing; returns the tables, in markdown.

    Raises UserError for a table or a set that there is not, before anything is trained.
    """
    chosen, out = s.tables or list(TABLES), Path(s.out or "runs/paper")
    if unknown := [name for name in chosen if name not in TABLES]:
        raise UserError(f"there is no table {unknown[0]}: take some of {', '.join(TABLES)}")
    runs.check(s)
    names = list(dict.fromkeys(row for name in chosen for row in TABLES[name].rows))
    places = {out / Path(data).name: data for data in sets(s.data)}
    asked = [
        run_of(s, name, seed, data, place)
        for place, data in places.items()
        for seed in runs.seeds(s)
        for name in names
    ]
    if s.dry_run:
        print(runs.announced(s, asked))
        return ""
    runs.complete(s, asked, train, evaluate.evaluate, evaluate.Settings)
    found = {place: {name: seeds.read(place, name) for name in names} for place in places}
    texts = {name: page(s, TABLES[name], found) for name in chosen}
    for name, text in texts.items():
        write_whole(out / f"{name}.md", text)
    files = ", ".join(f"{out}/{name}.md" for name in texts)
    print("\n".join(["", *texts.values(), f"files:    {files}"]))
    return "\n".join(texts.values())


def sets(flag: str) -> list[str]:
    """The sets of --data; raises UserError for two whose runs would lie in one folder."""
    found = [flag] if os.path.exists(flag) else [name for name in flag.split(",") if name]
    names = [Path(data).name for data in found]
    if len(set(names)) < len(names) or not found:
        raise UserError("--data must name sets, each with a last part of its own")
    return found


def run_of(s: Study, name: str, seed: int, data: str, place: Path) -> Settings:
    """The settings of one run of RUNS."""
    run = RUNS[name]
    flags = {"data": data} | run.flags
    if run.times:
        own = resolve(runs.settings_of(s, place, **flags))
        scaled = {k: factor * getattr(own, k) for k, factor in run.times.items()}
        if "rank" in scaled:
            scaled["rank"] = max(1, round(scaled["rank"]))
        flags |= scaled
    if run.one_caption:
        if s.nonmembers:
            raise UserError("the table captions has all images in --data: leave --nonmembers out")
        if not s.dry_run:
            of = runs.settings_of(s, place, data=data)
            flags["data"] = str(one_caption(of, s.token, place))
    return runs.settings_of(s, place / f"seed-{seed}" / name, seed=seed, **flags)


# --------------------------------------------------------------------------------------------------
# The page of a table


def page(s: Study, table: Table, found: dict[Path, dict[str, Records]]) -> str:
    """Our figures beside the paper's, and the claims, in markdown."""
    attacks = [
        Figure(f"{attack}, {key.upper()}", key, attack)
        for attack in table.attacks
        for key in (["auc"] if attack == "combined" else ["asr", "auc"])
    ]
    figures = [*attacks, PICTURES, LOSS]
    lines = [["images", "run", "steps", "seeds", *(f.title for f in figures), "the paper"]]
    verdicts = [["images", "claim", "figure", "the paper", "here", "seeds", "verdict"]]
    for place, rows in found.items():
        for name in table.rows:
            cells = [f.cell(seeds.mean(rows[name], f)) for f in figures]
            steps = sorted({r["settings"]["steps"] for r in rows[name].values()})
            said = [", ".join(map(str, steps)), str(len(rows[name]))]
            lines.append([place.name, label(s, name), *said, *cells, of_paper(table, place, name)])
        verdicts += [[place.name, *judged(table, place, claim, rows)] for claim in table.claims]
    there = [found[place][name].values() for place in found for name in table.rows]
    made = seeds.provenance([record for records in there for record in records])
    known = "The proxy attack is the paper's, raw with one draw. Brackets are 95 % intervals. "
    known += "Differences are taken seed by seed."
    parts = [f"### {table.title}", seeds.markdown(lines), seeds.markdown(verdicts)]
    notes = " ".join(filter(None, [known, table.note, made]))
    return "\n\n".join([*(p.rstrip() for p in parts), notes]) + "\n"


def label(s: Study, name: str) -> str:
    """`SMP, lambda 80 (the paper: 1)`."""
    run = RUNS[name]
    own = run_of(s, name, s.seed, sets(s.data)[0], Path("runs")) if run.times else None
    said = [
        f", {MULTIPLES[k]} {getattr(own, k):g} (the paper: {PAPER[k] * factor:g})"
        for k, factor in run.times.items()
        if k in MULTIPLES
    ]
    return "".join([run.says, *said])


def figures_of(table: Table, place: Path) -> tuple[str, dict]:
    """The paper's figures {run: {figure: value}} of a set, by its name, or of Pokemon."""
    name = place.name.casefold()
    return (name, table.paper[name]) if name in table.paper else (DATA, table.paper[DATA])


def of_paper(table: Table, place: Path, name: str) -> str:
    """`pokemon: FID 0.2, ASR 82.3 %`."""
    own, figures = figures_of(table, place)
    said = [
        f"{NAMES.get(k, k)} {v:g}"
        if k in ("fid", "kid", "folded")
        else f"{NAMES.get(k, k)} {v:.1%}"
        for k, v in figures.get(name, {}).items()
    ]
    return f"{own}: {', '.join(said).replace('%', ' %')}" if said else "-"


def judged(table: Table, place: Path, claim: Claim, rows: dict[str, Records]) -> list[str]:
    """A claim's line: claim, figure, the paper's difference, ours, its seeds, the verdict."""
    figure = FIGURES[claim.figure]
    other = FIGURES[claim.other] if claim.other else None
    ours = seeds.difference(rows[claim.first], rows[claim.second], figure, other)
    paper, said = paper_difference(figures_of(table, place)[1], claim)
    title = figure.title if other is None else f"{figure.title}, less that of {other.title}"
    count = str(len(ours.seeds)) if ours else "0"
    return [claim.says, title, said, figure.cell(ours, signed=True), count, verdict(ours, paper)]


def paper_difference(figures: dict, claim: Claim) -> tuple[float | None, str]:
    """First minus second in the paper, and in words; None where the paper has not both."""
    first, second = (figures.get(name, {}) for name in (claim.first, claim.second))
    if claim.other:
        pairs = [(claim.figure, claim.other)]
    else:
        pairs = [(key, key) for key in AGAINST[claim.figure]]
    for a, b in pairs:
        if a in first and b in second:
            change = first[a] - second[b]
            return change, f"{NAMES.get(a, a)} {change:+.3g}"
    return None, "-"


def verdict(ours: Estimate | None, paper: float | None) -> str:
    """Whether our difference has the direction of the paper's; told apart means that its 95 %
    interval leaves out zero.
    """
    if ours is None:
        return "not measured"
    if not paper:
        return "the paper has none"
    if not ours.side():
        return "not told apart" + (" (one seed)" if ours.interval is None else "")
    return "same direction" if ours.side() == (paper > 0) - (paper < 0) else "other direction"


if __name__ == "__main__":
    with one_line_errors():
        study(SETTINGS)
