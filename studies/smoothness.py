"""Does curvature follow the gradient?  The paper's Figure 1b and Table 3 over seeds, for the sum
and the ratio, with either proxy attacker and at the paper's own lambda.

    python -m studies.smoothness                          # 18 runs: an hour on two cores
    python -m studies.smoothness paper --seeds 5          # one setting, more seeds
    python -m studies.smoothness pooled paper --model SD15_FOLDER --data MY_IMAGES --device cuda

Each run is one of train.py with --hessian-every, in a folder of its own: a killed study goes on
where it was, and one more seed or setting costs its own runs.  At the end stand table.md,
smoothness.json and correlations.png, of all finished runs of the folder.  With another model than
the embedded one `raw` is `paper`, since the flags left out then have the paper's values.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse
from settings import Settings

# name -> flags; the name is a part of a folder's
ROWS = {
    "pooled": {"proxy": "pooled"},
    "raw": {"proxy": "raw"},
    "paper": {"proxy": "raw", "lam": 0.05, "target": "attention"},
}
METHODS = ("mp", "smp")
WHERE = "what and where"


@dataclass
class Study(Settings):
    """Flags of train.py; those that a row, its method and its seed set win over them."""

    rows: list[str] | None = option(None, "settings to measure (default: all)", group=WHERE)
    seeds: int = option(3, "runs of each method and setting, from --seed on", group=WHERE)
    jobs: int | None = option(
        None, "runs at a time, a process each (default: cores, or 1 on a GPU)", group=WHERE
    )
    steps: int | None = option(200, "outer steps of a run", group="optimisation", beats="epochs")
    hessian_every: int = option(10, "steps between Hessian norms (each costs dozens of steps)")
    samples: int = option(0, "pictures in each of a run's grids", group="saving and looking")


if __name__ == "__main__":
    SETTINGS = parse(Study, __doc__, positional="rows")
    progress.start()

import contextlib
import io

import numpy as np

from attacks import workers
from command.whole_files import read_json, write_json, write_whole
from files.bases import resolve_device
from report import plots
from run import lock
from run.folder import RunFolder, provenance
from run.resolve import resolve
from studies.correlation import Pooled, correlation, direction, higher, pooled
from studies.paper_tables import CORRELATIONS
from train import train

# --------------------------------------------------------------------------------------------------
# Runs


def study(s: Study) -> str:
    """Train what is missing; returns the table of all finished runs, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    out = Path(s.out or "runs/smoothness")
    todo = runs(s, out)
    if s.dry_run:
        print(f"dry run: {len(todo)} runs: {', '.join(Path(r.out).name for r in todo)}")
        return ""
    out.mkdir(parents=True, exist_ok=True)
    jobs = s.jobs or (os.cpu_count() if resolve_device(s.device) == "cpu" else 1)
    with lock.held(out), workers.processes(jobs) as executor:
        workers.complete(executor, one, {k: (run,) for k, run in enumerate(todo)}, lambda: None)
    found = gather(out)
    write_json(out / "smoothness.json", found)
    write_whole(out / "table.md", table(found))
    picture(found, out / "correlations.png")
    print(f"\n{table(found)}\nfiles:    {out}/table.md, smoothness.json, correlations.png")
    return table(found)


def runs(s: Study, out: Path) -> list[Settings]:
    """The settings of every run that is asked for; raises UserError for what cannot work."""
    chosen = s.rows or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        raise UserError(f"there is no row {unknown[0]}: take some of {', '.join(ROWS)}")
    if s.seeds < 1:
        raise UserError(f"--seeds must be 1 or more, not {s.seeds}")
    if s.jobs is not None and s.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {s.jobs}")
    if not s.hessian_every:
        raise UserError("--hessian-every must be 1 or more: there is nothing to correlate at 0")
    each = Settings(**{f.name: getattr(s, f.name) for f in fields(Settings)})
    each = replace(each, resume=True, dry_run=False, threads=s.threads or 1)
    todo = [
        replace(each, **ROWS[name], method=method, seed=seed, out=str(out / folder(*key)))
        for name in chosen
        for seed in range(s.seed, s.seed + s.seeds)
        for method in METHODS
        for key in [(name, method, seed)]
    ]
    for run in todo:
        resolve(run)
    return todo


def folder(row: str, method: str, seed: int) -> str:
    """The name of a run's folder: pooled-smp-0."""
    return f"{row}-{method}-{seed}"


def one(s: Settings) -> None:
    """One run, in a process of its own, with a line when it is finished."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        summary = train(s)
    print(f"{Path(s.out).name}: {summary['seconds']:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------
# What they say


def gather(out: Path) -> dict:
    """Every finished run in a folder: its settings, its points, its correlations; and for each
    setting and method those of all seeds together.
    """
    names = sorted(path.parent.name for path in out.glob("*/config.json"))
    keys = [(row, method) for row in ROWS for method in METHODS]
    found = {"commit": provenance().get("git_commit"), "runs": [], "groups": []}
    for key in keys:
        own = [n for n in names if n.rsplit("-", 1)[0] == "-".join(key)]
        records = [record(*key, out / n) for n in own if RunFolder(out / n).config().get("summary")]
        found["runs"] += records
        if records:
            found["groups"].append(group(*key, records))
    return found


KEYS = ("hessian_norm", "fixed_grad_norm", "hessian_bound", "bound_constant", "gradient_scale")
KEYS += ("fixed_denominator", "fixed_loss_over_denominator_squared", "hessian_converged")


def record(row: str, method: str, path: Path) -> dict:
    """One run: where it is from, and the columns of metrics.jsonl at the points with a Hessian."""
    s = RunFolder(path).config()["settings"]
    points = [r for r in RunFolder(path).rows() if "hessian_norm" in r]
    flags = {k: s[k] for k in ("model", "data", "proxy", "lam", "target", "rank", "lr", "steps")}
    columns = {key: [r[key] for r in points] for key in ("step", *KEYS)}
    return {"row": row, "method": method, "seed": s["seed"], "flags": flags, "columns": columns}


def series(run: dict) -> dict[str, tuple]:
    """What is correlated: Hessian and gradient norms, their logarithms, and the changes of these
    from point to point, which a trend that both share does not enter.
    """
    pair = [np.array(run["columns"][k]) for k in ("hessian_norm", "fixed_grad_norm")]
    logs = [np.log(np.maximum(v, 1e-30)) for v in pair]
    return {"norms": pair, "logarithms": logs, "changes": [np.diff(v) for v in logs]}


def group(row: str, method: str, records: list[dict]) -> dict:
    """All seeds of one method in one setting."""
    column = {k: np.concatenate([r["columns"][k] for r in records]) for k in KEYS}
    slope = column["hessian_bound"] - column["bound_constant"]
    held = column["hessian_norm"] <= column["hessian_bound"] * (1 + 1e-4)
    each = {kind: [correlation(*series(r)[kind]) for r in records] for kind in series(records[0])}
    return {
        "row": row,
        "method": method,
        "seeds": [r["seed"] for r in records],
        "r": [c.r for c in each["norms"]],
        "p": [c.p for c in each["norms"]],
        "points": sum(c.points for c in each["norms"]),
        **{kind: asdict(pooled(found)) for kind, found in each.items()},
        "mean": {k: float(v.mean()) for k, v in column.items()},
        "inverse_denominator": _range(1 / column["fixed_denominator"]),
        "loss_over_denominator_squared": _range(column["fixed_loss_over_denominator_squared"]),
        "slope_share": float(np.median(slope / column["hessian_bound"])),
        "tightness": float(np.median(column["hessian_bound"] / column["hessian_norm"])),
        "held": [int(held.sum()), len(held)],
        "converged": int(column["hessian_converged"].sum()),
    }


def _range(values: np.ndarray) -> list[float]:
    """[lowest, mean, highest]."""
    return [float(values.min()), float(values.mean()), float(values.max())]


def verdicts(found: dict) -> list[str]:
    """One sentence for each setting: what the data say of the paper's contrast."""
    said = []
    for row in ROWS:
        both = {g["method"]: g for g in found["groups"] if g["row"] == row}
        if len(both) < len(METHODS):
            continue
        r = {m: Pooled(**g["norms"]) for m, g in both.items()}
        parts = {m: f"{m.upper()} {_cell(r[m])}, {direction(r[m])}" for m in METHODS}
        contrast = {
            1: "SMP's correlation is higher, the paper's direction",
            -1: "MP's correlation is higher, the other direction",
            0: "the two are not told apart",
        }[higher(r["smp"], r["mp"])]
        said.append(f"{row}: {parts['mp']}; {parts['smp']}; {contrast} (paper: MP .04, SMP .76)")
    return said


# --------------------------------------------------------------------------------------------------
# Table and picture


def table(found: dict) -> str:
    """Every setting and method in a line of markdown, and the verdicts below."""
    heads = ["setting", "method", "r of each seed", "r, all seeds", "count for", "verdict"]
    heads += ["r of logarithms", "r of changes", "gradient norm", "Hessian norm", "1/D", "L/D^2"]
    heads += ["bound / norm", "L1 part of bound", "bound held", "converged"]
    lines = [heads, ["---"] * len(heads)]
    for g in found["groups"]:
        r, mean = Pooled(**g["norms"]), g["mean"]
        line = [g["row"], g["method"], ", ".join(_short(x) for x in g["r"]), _cell(r)]
        line += [f"{r.effective_points:.0f} of {g['points']}", direction(r)]
        line += [_cell(Pooled(**g[kind])) for kind in ("logarithms", "changes")]
        line += [f"{mean[k]:.3g}" for k in ("fixed_grad_norm", "hessian_norm")]
        for key in ("inverse_denominator", "loss_over_denominator_squared"):
            low, middle, high = g[key]
            line.append(f"{low:.3g} to {high:.3g}, mean {middle:.3g}")
        line += [f"{g['tightness']:.2f}", f"{100 * g['slope_share']:.1f} %"]
        line += [f"{g['held'][0]} of {g['held'][1]}", f"{g['converged']} of {g['held'][1]}"]
        lines.append(line)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([text, "", *(f"- {said}" for said in verdicts(found)), ""])


def _short(r: float) -> str:
    """.79, -.12, or a dash."""
    return "-" if np.isnan(r) else f"{r:.2f}".replace("0.", ".")


def _cell(found: Pooled) -> str:
    """.79 [.30, .95]"""
    if not found.runs:
        return "-"
    low, high = found.interval
    return f"{_short(found.r)} [{_short(low)}, {_short(high)}]"


def picture(found: dict, path: Path | None = None):
    """The correlations of each setting: a pale dot for a seed, the interval of all seeds, a cross
    for the paper's.  Returns the closed Figure, and writes it if `path` is given.
    """
    import matplotlib.pyplot as plt

    groups = found["groups"]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.42 * len(groups)), layout="constrained")
    for y, g in enumerate(groups):
        r, colour = Pooled(**g["norms"]), plots.COLOURS[g["method"]]
        axis.scatter(g["r"], [y] * len(g["r"]), s=18, color=colour, alpha=0.4)
        if r.runs:
            low, high = r.interval
            ends = [[r.r - low], [high - r.r]]
            axis.errorbar(r.r, y, xerr=ends, fmt="o", color=colour, capsize=3)
        axis.scatter(
            CORRELATIONS[g["method"]],
            y,
            marker="x",
            color="black",
            label="paper" if not y else None,
        )
    axis.set_yticks(range(len(groups)), [f"{g['row']}, {g['method']}" for g in groups])
    axis.axvline(0, color="grey", lw=0.8, ls=":")
    axis.set(xlim=(-1.05, 1.05), xlabel="correlation of Hessian norm and gradient norm")
    axis.set_ylim(len(groups) - 0.5, -0.5)  # the first on top
    axis.grid(alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False)
    return plots.kept(figure, path)


def read(folder: str | Path) -> dict | None:
    """What a study has written in a folder; None where there is nothing."""
    path = Path(folder) / "smoothness.json"
    return read_json(path) if path.is_file() else None


if __name__ == "__main__":
    with one_line_errors():
        study(SETTINGS)
