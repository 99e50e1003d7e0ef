"""The paper's claims C1 to C7 and what finished results say of them: one table, nothing by hand.

Each word is a folder: of a study with seed-S/RUN, an audit, or what studies.smoothness has written.
What is not given is not measured.  The runs that are read are lora (also evaluated with --at best),
mp, smp and mp-matched, the control for the weight: MP with the mean lambda J of SMP's runs as its
lambda.  Writes --out and prints it.

    python -m studies.verdicts runs/paper/twemoji runs/audit-lora runs/audit-smp runs/smoothness

What a claim needs is in studies/claims.py.  Tested in tests/test_verdicts.py.
"""

from dataclasses import dataclass
from pathlib import Path

from command.errors import UserError, shown
from command.flags import option
from command.whole_files import read_json, write_whole
from settings import FREE, LOOKS
from studies import claims, grid, records
from studies.claims import Results
from studies.records import Records

ROLES = ("lora", "mp", "smp", "mp-matched")
MATCHED = 2.0  # MP's lambda is within this factor of SMP's mean lambda J, or is no control for it

MAY_DIFFER = ("seed", "model", "data", "nonmembers", *FREE, *LOOKS)  # may lie elsewhere by now


@dataclass
class Verdicts:
    """Flags of the command."""

    folders: list[str] | None = option(None, "folders with results", group=grid.WHERE)
    out: str = option("runs/verdicts.md", "file of the table", group=grid.WHERE)


def verdicts(s: Verdicts) -> str:
    """The table of all claims, in markdown; raises UserError for folders that hold no results."""
    found = table(gather([Path(folder) for folder in s.folders or ()]))
    Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(s.out), found)
    print(f"\n{found}\nfiles:    {s.out}")
    return found


def gather(folders: list[Path]) -> Results:
    """What the folders hold; raises UserError for one without results, for a seed that is there
    twice, and for MP whose lambda makes it no control.
    """
    found = Results()
    for folder in folders:
        if (folder / "audit.json").is_file():
            audit = read_json(folder / "audit.json")
            found.audits.setdefault(audit["settings"]["method"], []).append(audit)
        elif (folder / "smoothness.json").is_file():
            found.smoothness += read_json(folder / "smoothness.json")["groups"]
        else:
            _add_study(found, folder)
    for role, by_seed in found.runs.items():
        _require_alike(role, by_seed)
    _require_matched(found)
    return found


def _add_study(found: Results, folder: Path) -> None:
    there = {role: records.read(folder, role) for role in ROLES}
    there["lora-best"] = records.read(folder, "lora", "at-best")
    if not any(there.values()):
        raise UserError(
            f"{shown(folder)} holds no results: give audits, or folders of a study with evaluated "
            "runs in seed-S/RUN"
        )
    for role, by_seed in there.items():
        twice = sorted(set(by_seed) & set(found.of(role)))
        if twice:
            raise UserError(
                f"{shown(folder)} has {role} of seed {twice[0]} once more: leave it out"
            )
        if by_seed:
            found.runs[role] = found.of(role) | by_seed


def _require_alike(role: str, by_seed: Records) -> None:
    """Raises UserError unless the runs of a role differ by their seed alone."""
    may_differ = (*MAY_DIFFER, "lam") if role == "mp-matched" else MAY_DIFFER
    first, *others = by_seed.values()
    for other in others:
        for key, value in first["settings"].items():
            if key not in may_differ and other["settings"].get(key) != value:
                raise UserError(
                    f"{role} of seed {first['seed']} and of seed {other['seed']} differ in "
                    f"--{key.replace('_', '-')}: give runs that differ by their seed alone"
                )


def _require_matched(found: Results) -> None:
    """Raises UserError unless MP has SMP's lambda, and the matched MP SMP's mean weight."""
    smp = [r for r in found.of("smp").values() if r["summary"]]
    for record in found.of("mp").values():
        lam = record["settings"]["lam"]
        if smp and lam != smp[0]["settings"]["lam"]:
            raise UserError(f"mp has lambda {lam:g}, not that of smp: is it mp-matched?")
    weights = {r["seed"]: r["summary"]["lambda_effective_mean"] for r in smp}
    for seed, record in found.of("mp-matched").items():
        lam = record["settings"]["lam"]
        weight = weights.get(seed, sum(weights.values()) / max(len(weights), 1))
        if smp and not weight / MATCHED < lam < weight * MATCHED:
            raise UserError(
                f"mp-matched of seed {seed} has lambda {lam:g}, not near smp's mean weight, "
                f"{weight:.3g}: it is no control for it"
            )


def table(found: Results) -> str:
    """Each claim in bold with its verdict, and below it what was measured of it."""
    lines = [["", "claim, and what was measured", "the paper", "here", "over", "verdict"]]
    for claim in claims.claims(found):
        name, says, verdict = (f"**{words}**" for words in (claim.name, claim.says, claim.verdict))
        lines.append([name, says, claim.paper, "", "", verdict])
        for part in claim.parts:
            lines.append(["", part.says, "", part.here, part.over, claims.WORDS[part.side]])
    low, high = claims.CHANCE
    note = "Brackets are 95 % intervals. An interval that does not leave the threshold out tells "
    note += f"nothing apart. At chance is an AUC within {low:g} and {high:g}. "
    note += "The proxy of the paper is its raw one with one draw."
    return f"{records.markdown(lines)}\n{note}\n"


if __name__ == "__main__":
    grid.command(Verdicts, verdicts, __doc__, "folders")
