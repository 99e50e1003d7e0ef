"""The paper's claims C1 to C7 and what finished results say of them: one table, nothing by hand.

Each word is a folder: a run that has been evaluated (LoRA also with --at best),
an audit, what studies.smoothness has written, or a study with seed-*/RUN.  What
is not given is not measured.  MP with a smaller lambda than SMP's is the control
for the weight: take the mean lambda J of SMP's runs.  Writes --out and prints it.

    python -m studies.verdicts runs/lora-? runs/smp-? runs/mp-? runs/matched-? \\
        runs/audit-lora runs/audit-smp runs/smoothness
    python -m studies.verdicts runs/paper/twemoji       # the runs of studies.paper

What a claim needs is in studies/claims.py.  Tested in tests/test_verdicts.py.
"""

from dataclasses import dataclass
from pathlib import Path

from cli import UserError, one_line_errors, option, parse

WHERE = "what and where"


@dataclass
class Verdicts:
    """Flags of the command."""

    folders: list[str] | None = option(None, "folders with results", group=WHERE)
    out: str = option("runs/verdicts.md", "file of the table", group=WHERE)


if __name__ == "__main__":
    SETTINGS = parse(Verdicts, __doc__, positional="folders")

from cli import read_json, shown, write_whole
from settings import FREE, LOOKS
from studies import claims, seeds
from studies.claims import Results
from training.run_folder import RunFolder

ROLES = ("lora", "mp", "smp", "smp-detached")
MATCHED = 2.0  # MP's lambda is within this factor of SMP's mean lambda J, or is no control for it
SEED_ALONE = ("seed", "model", "data", "nonmembers", *FREE, *LOOKS)  # may lie elsewhere by now


def verdicts(s: Verdicts) -> str:
    """The table of all claims, in markdown; raises UserError for folders that hold no results."""
    found = table(gather([Path(folder) for folder in s.folders or ()]))
    Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(s.out), found)
    print(f"\n{found}\nfiles:    {s.out}")
    return found


# --------------------------------------------------------------------------------------------------
# What there is


def gather(folders: list[Path]) -> Results:
    """What the folders hold, by what it is."""
    found, runs = Results(), []
    for folder in folders:
        inside = [f for name in ROLES for f in sorted(folder.glob(f"seed-*/{name}"))]
        if (folder / "config.json").is_file():
            runs.append(folder)
        elif (folder / "audit.json").is_file():
            record = read_json(folder / "audit.json")
            found.audits.setdefault(record["settings"]["method"], []).append(record)
        elif (folder / "smoothness.json").is_file():
            found.smoothness += read_json(folder / "smoothness.json")["groups"]
        elif inside:
            runs += inside
        else:
            raise UserError(
                f"{shown(folder)} holds no results: give run folders, audits, or those of a study"
            )
    for run in runs:
        _add(found, run)
    _match(found)
    for role, records in found.runs.items():
        _require_alike(role, records)
    return found


def _add(found: Results, run: Path) -> None:
    """A run under the role that its method has, and LoRA at its best step too."""
    method = RunFolder(run).config()["settings"].get("method")
    if method not in ROLES:
        return
    record, best = seeds.record(run), seeds.record(run, "at-best")
    if record is None and best is None:
        raise UserError(f"{shown(run)} has not been evaluated: python evaluate.py {shown(run)}")
    role = method
    if method == "mp":  # which of the two it is shows when SMP's lambda is known
        role = f"mp {record['settings']['lam']:g}" if record else "mp"
    for name, at in ((role, record), ("lora-best" if method == "lora" else None, best)):
        if name and at:
            there = found.runs.setdefault(name, {})
            if at["seed"] in there:
                raise UserError(
                    f"{shown(run)} is the second {name} of seed {at['seed']}: give one of them"
                )
            there[at["seed"]] = at | {"run": str(run)}


def _match(found: Results) -> None:
    """MP at SMP's lambda is MP, at SMP's mean lambda J it is the matched one."""
    smp = list(found.of("smp").values())
    lam = smp[0]["settings"]["lam"] if smp else None
    for role in [r for r in found.runs if r.startswith("mp ")]:
        records = found.runs.pop(role)
        own = next(iter(records.values()))["settings"]["lam"]
        weights = [r["summary"]["lambda_effective_mean"] for r in smp if r["summary"]]
        if lam is None or own == lam:
            found.runs["mp"] = records
        elif weights and 1 / MATCHED < own * len(weights) / sum(weights) < MATCHED:
            found.runs["mp-matched"] = records
        else:
            mean = f", whose mean weight is {sum(weights) / len(weights):.3g}" if weights else ""
            raise UserError(
                f"{next(iter(records.values()))['run']} is MP with lambda {own:g}: neither that of "
                f"SMP, {lam:g}{mean}"
            )


def _require_alike(role: str, records: seeds.Records) -> None:
    """Raises UserError unless the runs of a role differ by their seed alone."""
    first, *others = records.values()
    for other in others:
        for key, value in first["settings"].items():
            if key not in SEED_ALONE and other["settings"].get(key) != value:
                raise UserError(
                    f"{first['run']} and {other['run']} are both {role} and differ in "
                    f"--{key.replace('_', '-')}: give runs that differ by their seed alone"
                )


# --------------------------------------------------------------------------------------------------
# The table


def table(found: Results) -> str:
    """Each claim in bold with its verdict, and below it what was measured of it."""
    lines = [["", "claim, and what was measured", "the paper", "here", "over", "verdict"]]
    for claim in claims.claims(found):
        lines.append([f"**{x}**" for x in (claim.name, claim.says)])
        lines[-1] += [claim.paper, "", "", f"**{claim.verdict}**"]
        for part in claim.parts:
            lines.append(["", part.says, "", part.here, part.over, claims.WORDS[part.side]])
    low, high = claims.CHANCE
    note = "Brackets are 95 % intervals. An interval that does not leave the threshold out tells "
    note += f"nothing apart. At chance is an AUC within {low:g} and {high:g}. "
    note += "The proxy of the paper is its raw one with one draw."
    return f"{seeds.markdown(lines)}\n{note}\n"


if __name__ == "__main__":
    with one_line_errors():
        verdicts(SETTINGS)
