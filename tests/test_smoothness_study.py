"""The study of curvature on the tiny model, and what a correlation of autocorrelated series is
worth.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr

import train
from command.errors import UserError
from run.resolve import resolve
from settings import Settings
from studies import smoothness
from studies.correlation import Correlation, correlation, higher, pooled
from studies.smoothness import SETTINGS, Study

# ---- correlation ----


def test_correlation():
    """r and p are scipy's; independent points count fully, a drift counts for few; too few are
    warned of.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = 0.6 * x + 0.8 * rng.normal(size=200)
    found = correlation(x, y)
    assert found.r == pytest.approx(np.corrcoef(x, y)[0, 1]) and found.p < 1e-6
    assert found.effective_points > 150 and found.warning is None
    assert found.interval[0] < 0.6 < found.interval[1]
    drift = correlation(np.cumsum(x), np.cumsum(rng.normal(size=200)))
    assert drift.effective_points < 20 and "20" in drift.warning[:3]
    assert (
        correlation(x[:10], y[:10]).warning
        and correlation([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).warning
    )
    assert correlation(x[:4], y[:4]).interval[0] <= -0.5


def runs_of(r, count, points, drift, rng):
    """Correlations of `count` simulated runs: two AR(1) series whose innovations correlate by r."""
    found = []
    for _ in range(count):
        e = rng.normal(size=(points + 50, 2))
        e[:, 1] = r * e[:, 0] + np.sqrt(1 - r * r) * e[:, 1]
        for t in range(1, len(e)):
            e[t] += drift * e[t - 1]
        found.append(correlation(*e[50:].T))
    return found


@pytest.mark.parametrize(("r", "drift"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.5)])
def test_intervals_cover(r, drift):
    """The interval of one run and that of three together hold the truth in nine of ten
    simulations at least; plain Fisher with all points would do so in far fewer.
    """
    rng, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        found = runs_of(r, 3, 40, drift, rng)
        intervals = found[0].interval, pooled(found).interval
        held += [low <= r <= high for low, high in intervals]
    assert (held / 300 > 0.89).all() and (held / 300 < 0.995).all()


def made(r, effective):
    return Correlation(r, 0.0, 50, effective, (-1, 1), None)


def test_pooled_by_hand():
    """Runs that agree: Fisher's z weighed by points less 3.  Runs that do not: as wide as the runs
    lie apart, by DerSimonian and Laird written as loops.
    """
    same = pooled([made(0.5, 13), made(0.5, 23)])
    assert (same.r, same.runs, same.effective_points) == (pytest.approx(0.5), 2, 36)
    assert same.error == pytest.approx((10 + 20) ** -0.5)
    runs = [made(0.9, 13), made(-0.2, 23), made(0.1, 33)]
    z, w = [np.arctanh(c.r) for c in runs], [10, 20, 30]
    mean = sum(a * b for a, b in zip(w, z, strict=True)) / 60
    q = sum(a * (b - mean) ** 2 for a, b in zip(w, z, strict=True))
    between = (q - 2) / (60 - sum(a * a for a in w) / 60)
    v = [1 / (1 / a + between) for a in w]
    found = pooled(runs)
    assert between > 0 and found.error == pytest.approx(sum(v) ** -0.5) and found.error > 60**-0.5
    assert found.z == pytest.approx(sum(a * b for a, b in zip(v, z, strict=True)) / sum(v))
    nothing = pooled([made(0.9, 3.0), made(np.nan, 0.0)])
    assert nothing.runs == 0 and nothing.error == np.inf


def test_sides():
    """An interval above, below and across 0; a difference that is told and one that is not."""
    up, down, wide = (pooled([made(*pair)]) for pair in ((0.7, 40), (-0.7, 40), (0.3, 10)))
    assert [x.side for x in (up, down, wide, pooled([]))] == [1, -1, 0, 0]
    assert (higher(up, down), higher(down, up), higher(up, wide)) == (1, -1, 0)
    assert higher(up, pooled([])) == 0


# ---- the study ----


@pytest.fixture(scope="module")
def small(tiny_base, image_folder, tmp_path_factory):
    """Flags of runs of a few steps."""
    small = {"model": tiny_base, "data": image_folder, "members": 10, "steps": 4, "rank": 2}
    small |= {"alpha": 2.0, "batch_size": 2, "target": "attention", "jobs": 1, "hessian_every": 1}
    return small | {"out": str(tmp_path_factory.mktemp("study"))}


def test_runs_join_the_table(small, in_thread, monkeypatch, capsys):
    """One seed, then one more: the first is not trained again; the numbers are those of
    metrics.jsonl.
    """
    first = smoothness.study(Study(rows=["paper"], seeds=1, **small))
    trained, honest = [], train.train

    def seen(s, extra=()):
        trained.append(s.out)
        return honest(s)

    monkeypatch.setattr(train, "train", seen)
    out = Path(small["out"])
    before = (out / "seed-0" / "paper-mp" / "metrics.jsonl").read_bytes()
    both = smoothness.study(Study(rows=["paper"], seeds=2, **small))
    assert (out / "seed-0" / "paper-mp" / "metrics.jsonl").read_bytes() == before
    assert trained == [str(out / "seed-1" / f"paper-{method}") for method in ("mp", "smp")]
    assert both == (out / "table.md").read_text() != first
    assert len({line.count("|") for line in both.splitlines()}) == 1
    found = smoothness.read(out)
    assert [(g["row"], g["method"], g["seeds"]) for g in found["groups"]] == [
        ("paper", "mp", [0, 1]),
        ("paper", "smp", [0, 1]),
    ]
    for run in found["runs"]:
        assert run["flags"]["proxy"] == "raw" and run["flags"]["lam"] == 0.05
    lines = (out / "seed-1" / "paper-smp" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "hessian_norm" in row]
    pair = [[row[k] for row in rows] for k in ("hessian_norm", "fixed_grad_norm")]
    assert len(rows) == 4 and found["groups"][1]["r"][1] == pytest.approx(pearsonr(*pair)[0])
    assert found["groups"][1]["held"] == [8, 8] and found["groups"][0]["slope_share"] == 0
    assert (out / "correlations.png").is_file()
    assert smoothness.read(out / "seed-0") is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"rows": ["papers"]}, "no row papers"),
        ({"hessian_every": 0}, "--hessian-every"),
        ({"lr": -1.0}, "--lr"),
    ],
)
def test_what_cannot_work_is_refused(small, tmp_path, flags, problem):
    """Before anything is trained."""
    with pytest.raises(UserError, match=problem):
        smoothness.study(Study(**small | {"out": str(tmp_path / "new")} | flags))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", smoothness.SETTINGS)
def test_every_row_can_be(name):
    """Flags that resolve on the embedded model, and say what they are to say."""
    s = resolve(Settings(method="mp", **smoothness.SETTINGS[name]))
    assert s.proxy == ("pooled" if name == "pooled" else "raw")
    assert (s.lam == 0.05) == (name == "paper")


def test_a_trend_that_both_share():
    """Two series that fall alike correlate; their changes do not."""
    rng, fall = np.random.default_rng(1), np.linspace(3, 0, 200)
    columns = [np.exp(fall + 0.1 * rng.normal(size=200)) for _ in range(2)]
    run = {"columns": dict(zip(("hessian_norm", "fixed_grad_norm"), columns, strict=True))}
    found = {kind: correlation(*pair).r for kind, pair in smoothness.series(run).items()}
    assert found["norms"] > 0.9 and found["logarithms"] > 0.9 and abs(found["changes"]) < 0.2


def test_the_record_is_whole():
    """Three settings over three seeds, whose pooled r is that of its runs."""
    kept = smoothness.read(Path(__file__).parent.parent / "docs" / "records" / "smoothness")
    assert {g["row"]: g["seeds"] for g in kept["groups"]} == {key: [0, 1, 2] for key in SETTINGS}
    for g in kept["groups"]:
        runs = [r for r in kept["runs"] if (r["row"], r["method"]) == (g["row"], g["method"])]
        again = smoothness.group(g["row"], g["method"], runs)
        assert again["norms"]["z"] == pytest.approx(g["norms"]["z"])
        assert again["mean"]["hessian_norm"] == pytest.approx(g["mean"]["hessian_norm"])
