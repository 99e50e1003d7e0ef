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

from command.errors import UserError, one_line_errors
from command.flags import option, parse

WHERE = "what and where"


@dataclass
class Verdicts:
    """Flags of the command."""

    folders: list[str] | None = option(None, "folders with results", group=WHERE)
    out: str = option("runs/verdicts.md", "file of the table", group=WHERE)


if __name__ == "__main__":
    SETTINGS = parse(Verdicts, __doc__, positional="folders")

from command.errors import shown
from command.whole_files import read_json, write_whole
from run.folder import RunFolder
from settings import FREE, LOOKS
from studies import claims, seeds
from studies.claims import Results

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
        names = [f"seed-*/{name}/eval.json" for name in (*ROLES, "mp-matched")]
        inside = [path.parent for name in names for path in sorted(folder.glob(name))]
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
    sums = [at for at in [_add(found, run) for run in runs] if at]
    for at in sums:
        _place(found, _mp_or_matched(found, at), at)
    for role, records in found.runs.items():
        _require_alike(role, records)
    return found


def _add(found: Results, run: Path) -> dict | None:
    """A run goes under its method, LoRA at its best step under lora-best; that of MP is returned:
    what it is shows when SMP's lambda is known.
    """
    method = RunFolder(run).config()["settings"].get("method")
    if method not in ROLES:
        return None
    last, best = seeds.record(run), seeds.record(run, "at-best")
    if last is None and best is None:
        raise UserError(f"{shown(run)} has not been evaluated: python evaluate.py {shown(run)}")
    for record in (last, best):
        if record:
            record["run"] = str(run)
    if method == "mp":
        return last
    if last:
        _place(found, method, last)
    if best and method == "lora":
        _place(found, "lora-best", best)
    return None


def _place(found: Results, role: str, record: dict) -> None:
    """Raises UserError for a second run of a role and a seed."""
    there, seed = found.runs.setdefault(role, {}), record["seed"]
    if seed in there:
        raise UserError(
            f"{shown(record['run'])} and {shown(there[seed]['run'])} are both {role} of seed "
            f"{seed}: give one of them"
        )
    there[seed] = record


def _mp_or_matched(found: Results, record: dict) -> str:
    """MP at SMP's lambda is MP, at SMP's mean lambda J, of its seed or of all, the matched one."""
    smp, lam = found.of("smp"), record["settings"]["lam"]
    own = {r["settings"]["lam"] for r in smp.values()}
    if not own or lam in own:
        return "mp"
    finished = {seed: r["summary"] for seed, r in smp.items() if r["summary"]}
    each = {seed: summary["lambda_effective_mean"] for seed, summary in finished.items()}
    weight = each.get(record["seed"], sum(each.values()) / max(len(each), 1))
    if weight / MATCHED < lam < weight * MATCHED:
        return "mp-matched"
    raise UserError(
        f"{shown(record['run'])} is MP with lambda {lam:g}, neither that of SMP, "
        f"{', '.join(f'{x:g}' for x in own)}, nor near its mean weight, {weight:.3g}"
    )


def _require_alike(role: str, records: seeds.Records) -> None:
    """Raises UserError unless the runs of a role differ by their seed alone."""
    first, *others = records.values()
    for other in others:
        for key, value in first["settings"].items():
            if (
                key not in (*SEED_ALONE, *(["lam"] if role == "mp-matched" else ()))
                and other["settings"].get(key) != value
            ):
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
