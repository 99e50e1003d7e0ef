"""Does curvature follow the gradient?  The paper's Figure 1b and Table 3 over seeds, for the sum
and the ratio, with either proxy attacker and at the paper's own lambda.

    python -m studies.smoothness                          # 18 runs: an hour on two cores
    python -m studies.smoothness paper --seeds 5          # one setting, more seeds
    python -m studies.smoothness pooled paper --model SD15_FOLDER --data MY_IMAGES --device cuda

Each run is one of train.py with --hessian-every, in seed-S/SETTING-METHOD: a killed study goes on
where it was, and one more seed or setting costs its own runs.  At the end stand table.md,
smoothness.json and correlations.png, of all finished runs of the folder.  With another model than
the embedded one `raw` is `paper`, since the flags left out then have the paper's values.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from command.errors import UserError
from command.flags import option
from command.whole_files import read_json, write_json, write_whole
from studies import grid
from studies.correlation import Pooled, correlation, pooled
from studies.grid import Row
from studies.paper_tables import CORRELATIONS
from studies.records import markdown

SETTINGS = {
    "pooled": {"proxy": "pooled"},
    "raw": {"proxy": "raw"},
    "paper": {"proxy": "raw", "lam": 0.05, "target": "attention"},
}
METHODS = ("mp", "smp")
# of metrics.jsonl, in steps with a Hessian norm
SPREAD = (np.min, np.mean, np.max)
KEYS = ("hessian_norm", "fixed_grad_norm", "hessian_bound", "bound_constant", "fixed_denominator")


@dataclass
class Study(grid.Study):
    """Flags of train.py; those that a setting, its method and its seed set win over them."""

    rows: list[str] | None = option(None, "settings to measure (default: all)", group=grid.WHERE)
    steps: int | None = option(200, "outer steps of a run", group="optimisation", beats="epochs")
    hessian_every: int = option(10, "steps between Hessian norms (each costs dozens of steps)")
    samples: int = option(0, "pictures in each of a run's grids", group="saving and looking")


def study(s: Study) -> str:
    """Train what is missing; returns the table of all finished runs, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    if not s.hessian_every:
        raise UserError("--hessian-every must be 1 or more: there is nothing to correlate at 0")
    out = Path(s.out or "runs/smoothness")
    runs = []
    for name in grid.chosen(s.rows, SETTINGS):
        for seed in grid.seeds(s):
            for method in METHODS:
                row = Row(name, SETTINGS[name] | {"method": method})
                folder = out / f"seed-{seed}" / f"{name}-{method}"
                runs.append(grid.run_of(s, row, folder, seed))
    if s.dry_run:
        grid.announce(s, runs)
        return ""
    grid.complete(s, runs)
    found = gather(out)
    write_json(out / "smoothness.json", found)
    write_whole(out / "table.md", table(found))
    picture(found, out / "correlations.png")
    print(f"\n{table(found)}\nfiles:    {out}/table.md, smoothness.json, correlations.png")
    return table(found)


# --------------------------------------------------------------------------------------------------
# What the runs say


def gather(out: Path) -> dict:
    """Every finished run in a folder: its settings, its points, its correlations; and for each
    setting and method those of all seeds together.
    """
    from run.folder import provenance

    found = {"commit": provenance().get("git_commit"), "runs": [], "groups": []}
    for row in SETTINGS:
        for method in METHODS:
            runs = [record(row, method, p) for p in sorted(out.glob(f"seed-*/{row}-{method}"))]
            finished = [run for run in runs if run]
            found["runs"] += finished
            if finished:
                found["groups"].append(group(row, method, finished))
    return found


def record(row: str, method: str, path: Path) -> dict | None:
    """One run: where it is from, and the columns of metrics.jsonl at the points with a Hessian.
    None where it is not finished.
    """
    from run.folder import RunFolder

    config = RunFolder(path).config()
    if not config.get("summary"):
        return None
    s = config["settings"]
    points = [r for r in RunFolder(path).rows() if "hessian_norm" in r]
    flags = {k: s[k] for k in ("model", "data", "proxy", "lam", "target", "rank", "lr", "steps")}
    columns = {key: [r[key] for r in points] for key in ("step", *KEYS)}
    return {"row": row, "method": method, "seed": s["seed"], "flags": flags, "columns": columns}


def series(run: dict) -> dict[str, tuple]:
    """What is correlated: Hessian and gradient norms, their logarithms, and the changes of these
    from point to point, which a trend that both share does not enter.
    """
    norms = [np.array(run["columns"][k]) for k in ("hessian_norm", "fixed_grad_norm")]
    logs = [np.log(np.maximum(v, 1e-30)) for v in norms]
    return {"norms": norms, "logarithms": logs, "changes": [np.diff(v) for v in logs]}


def group(row: str, method: str, runs: list[dict]) -> dict:
    """All seeds of one method in one setting."""
    column = {key: np.concatenate([r["columns"][key] for r in runs]) for key in KEYS}
    norm, bound = column["hessian_norm"], column["hessian_bound"]
    slope = bound - column["bound_constant"]
    held = norm <= bound * (1 + 1e-4)
    each = {kind: [correlation(*series(r)[kind]) for r in runs] for kind in series(runs[0])}
    return {
        "row": row,
        "method": method,
        "seeds": [r["seed"] for r in runs],
        "r": [c.r for c in each["norms"]],
        "points": sum(c.points for c in each["norms"]),
        **{kind: asdict(pooled(found)) for kind, found in each.items()},
        "mean": {key: float(values.mean()) for key, values in column.items()},
        "inverse_denominator": [float(f(1 / column["fixed_denominator"])) for f in SPREAD],
        "slope_share": float(np.median(slope / bound)),
        "tightness": float(np.median(bound / norm)),
        "held": [int(held.sum()), len(held)],
    }


def read(folder: str | Path) -> dict | None:
    """What a study has written in a folder; None where there is nothing."""
    path = Path(folder) / "smoothness.json"
    return read_json(path) if path.is_file() else None


# --------------------------------------------------------------------------------------------------
# Table and picture


def table(found: dict) -> str:
    """Every setting and method in a line of markdown."""
    heads = ["setting", "method", "r of each seed", "r, all seeds", "count for", "r of changes"]
    heads += ["gradient norm", "Hessian norm", "1/D", "bound / norm", "L1 part of bound"]
    lines = [[*heads, "bound held"]]
    for g in found["groups"]:
        r = Pooled(**g["norms"])
        held, points = g["held"]
        low, middle, high = g["inverse_denominator"]
        line = [g["row"], g["method"], ", ".join(_short(x) for x in g["r"]), _cell(r)]
        line.append(f"{r.effective_points:.0f} of {g['points']}")
        line.append(_cell(Pooled(**g["changes"])))
        line += [f"{g['mean'][key]:.3g}" for key in ("fixed_grad_norm", "hessian_norm")]
        line.append(f"{low:.3g} to {high:.3g}, mean {middle:.3g}")
        line += [f"{g['tightness']:.2f}", f"{100 * g['slope_share']:.1f} %"]
        lines.append([*line, f"{held} of {points}"])
    return markdown(lines)


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

    from curves import plots

    groups = found["groups"]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.42 * len(groups)), layout="constrained")
    for y, g in enumerate(groups):
        r, colour = Pooled(**g["norms"]), plots.COLOURS[g["method"]]
        axis.scatter(g["r"], [y] * len(g["r"]), s=18, color=colour, alpha=0.4)
        if r.runs:
            low, high = r.interval
            ends = [[r.r - low], [high - r.r]]
            axis.errorbar(r.r, y, xerr=ends, fmt="o", color=colour, capsize=3)
        label = None if y else "paper"
        axis.scatter(CORRELATIONS[g["method"]], y, marker="x", color="black", label=label)
    axis.set_yticks(range(len(groups)), [f"{g['row']}, {g['method']}" for g in groups])
    axis.axvline(0, color="grey", lw=0.8, ls=":")
    axis.set(xlim=(-1.05, 1.05), xlabel="correlation of Hessian norm and gradient norm")
    axis.set_ylim(len(groups) - 0.5, -0.5)  # the first on top
    axis.grid(alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False)
    return plots.kept(figure, path)


if __name__ == "__main__":
    grid.command(Study, study, __doc__, "rows")
