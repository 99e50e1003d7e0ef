"""The grid of runs, the audits of defences, and the tables of the documents."""

import re
from pathlib import Path

import pytest

import evaluate
import train
from attacks.lira import HEADLINE
from command.errors import UserError
from command.whole_files import read_json, write_json
from methods import dp
from report.tables import cell
from run.resolve import resolve
from settings import METHODS, Settings
from studies import as_released, defences, grid, records, tables
from studies.grid import EvaluatedStudy, Row

pytestmark = pytest.mark.usefixtures("elsewhere")

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "records"


# ---- the grid ----


@pytest.fixture
def work(in_thread, monkeypatch):
    """Trains and evaluates in no time; a list of what was asked for, in order."""
    done = []

    def fake_train(s, extra=()):
        assert s.nonmembers is None  # a folder of images, not their number
        done.append(("train", s.seed, Path(s.out).name, s.resume, extra))
        (Path(s.out) / "adapter").mkdir(parents=True)

    def fake_evaluate(s):
        assert s.test_nonmembers == 200 and s.nonmembers is s.model is None
        done.append(("evaluate", *s.runs))
        print("evaluated")
        write_json(Path(s.runs[0]) / "eval.json", {})

    monkeypatch.setattr(train, "train", fake_train)
    monkeypatch.setattr(evaluate, "evaluate", fake_evaluate)
    return done


def test_only_what_is_missing_is_done(work, tmp_path, tiny_base, image_folder):
    """One row, then another over the same seeds; the first run of a seed is evaluated first."""
    s = EvaluatedStudy(model=tiny_base, data=image_folder, seeds=2, jobs=1, resume=False)
    rows = {"a": Row("a", {"method": "lora"}), "b": Row("b", {"method": "smp"}, extra=(Row,))}

    def runs(*names):
        places = [(seed, name) for seed in grid.seeds(s) for name in names]
        return [
            grid.run_of(s, rows[name], tmp_path / f"seed-{seed}" / name, seed)
            for seed, name in places
        ]

    grid.complete(s, runs("a")[:1])
    assert work == [("train", 0, "a", True, ()), ("evaluate", f"{tmp_path}/seed-0/a")]
    assert (tmp_path / "seed-0" / "a.log").read_text() == "evaluated\n"
    work.clear()
    grid.complete(s, runs("a", "b"))
    trained = [given[1:3] for given in work if given[0] == "train"]
    assert trained == [(0, "b"), (1, "a"), (1, "b")] and work[0][4] == (Row,)
    assert [Path(given[1]).name for given in work if given[0] == "evaluate"] == ["b", "a", "b"]
    assert Path(work[-1][1]) == tmp_path / "seed-1" / "b"  # behind the first of its seed
    work.clear()
    grid.complete(s, runs("a", "b"))
    assert work == []


def test_a_run_of_other_flags_is_refused(work, tmp_path):
    """Rather than taken for what was asked for; before anything is trained."""
    folder = tmp_path / "seed-0" / "paper"
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"settings": {"steps": 4}})
    with pytest.raises(UserError, match="started with --steps 4, not 5"):
        as_released.study(as_released.Study(steps=5, out=str(tmp_path)))
    assert work == []


def test_a_dry_run_makes_nothing(work, tmp_path, tiny_base, image_folder, capsys):
    flags = {"model": tiny_base, "data": image_folder, "seeds": 2, "dry_run": True, "jobs": 3}
    asked = as_released.Study(rows=["order"], out=str(tmp_path / "new"), **flags)
    assert as_released.study(asked) == "" and not (tmp_path / "new").exists() and work == []
    said = capsys.readouterr().out
    assert "2 of 2 runs are missing, 3 at a time" in said and "rows order; seeds 0, 1" in said


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"rows": ["orders"]}, "no row orders: take some of paper"),
        ({"seeds": 0}, "--seeds must be 1 or more"),
        ({"jobs": 0, "dry_run": True}, "--jobs must be 1 or more"),
        ({"lr": -1.0, "dry_run": True}, "--lr"),
    ],
)
def test_what_cannot_be_is_refused(work, tmp_path, flags, problem):
    """Before anything is made."""
    with pytest.raises(UserError, match=problem):
        as_released.study(as_released.Study(**{"out": str(tmp_path / "new")} | flags))
    assert work == [] and not (tmp_path / "new").exists()


def test_processes(monkeypatch):
    """As many as cores on a CPU, also where that is what --device auto finds."""
    monkeypatch.setattr(grid.os, "cpu_count", lambda: 6)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    counts = [grid.processes(grid.Study(device=d)) for d in ("auto", "cpu", "meta")]
    assert counts == [6, 6, 1] and grid.processes(grid.Study(jobs=3)) == 3


# ---- defences ----


@pytest.fixture(scope="module")
def small(tiny_base, image_folder, tmp_path_factory):
    """Flags of four adapters of two steps."""
    small = {"model": tiny_base, "data": image_folder, "adapters": 4, "pool": 10, "steps": 2}
    small |= {"rank": 2, "alpha": 2.0, "batch_size": 2, "target": "attention", "jobs": 1}
    return small | {"out": str(tmp_path_factory.mktemp("study"))}


def test_audits_join_the_table(small, in_thread, monkeypatch, capsys):
    """One row, then another: the first is not trained again, both stand in the table."""
    monkeypatch.setattr(defences, "ROWS", {k: {"method": k} for k in ("lora", "distill", "dp")})
    first = defences.study(defences.Study(rows=["distill"], **small)).splitlines()
    # no LoRA to compare with
    ends = [[line.strip("| ").split(" | ")[k] for k in (0, 7, 8, 9)] for line in first[2:]]
    assert ends == [[f"distill, {at}", "-", "-", "not measured"] for at in (1, 2)]
    trained, honest = [], train.train_adapter

    def seen(base, data, s):
        trained.append(s.method)
        return honest(base, data, s)

    monkeypatch.setattr(train, "train_adapter", seen)
    both = defences.study(defences.Study(rows=["lora", "distill"], **small)).splitlines()
    assert trained == ["lora"] * 4
    assert [line.split()[1] for line in both[2:]] == ["lora,"] * 2 + ["distill,"] * 2
    assert {line.split(" | ")[0] for line in first} <= {line.split(" | ")[0] for line in both}
    assert len({line.count("|") for line in both}) == 1
    with pytest.raises(UserError, match="no row lorax"):
        defences.study(defences.Study(rows=["lora", "lorax"], **small))


@pytest.mark.parametrize("name", defences.ROWS)
def test_every_row_is_a_method_that_can_be(name):
    """Flags that resolve on the embedded model."""
    assert resolve(Settings(**defences.ROWS[name])).method in METHODS


def test_costs_by_hand():
    """In trainings of plain LoRA: 400 steps of 8 images, three passes each."""

    def cost(at, **flags):
        return defences.cost(vars(resolve(Settings(**flags))) | {"pool": 200}, at)

    assert cost(400, method="lora") == 1
    # micro-batches go through twice, the first time without gradient
    assert cost(100, method="lora", accumulate=4) == pytest.approx(4 / 3)
    assert cost(400, method="smp") == pytest.approx(5 / 3)
    assert cost(400, method="smp", proxy="calibrated") == pytest.approx(8 / 3)
    # all 100 members in each of 20 steps, four times
    assert cost(20, method="dp") == 20 * 3 * 4 * 100 / 9600 and defences.DP_DRAWS == dp.DRAWS
    # five teachers of 50 steps; 200 steps of 8 images, each once more through its teacher; with
    # public pictures, of 16
    distill = {"method": "distill", "steps": 200}
    assert cost(200, **distill) == pytest.approx((5 * 50 * 24 + 200 * 32) / 9600)
    old = vars(resolve(Settings(**distill))) | {"pool": 200, "public": "openmoji"}
    assert defences.cost(old, 200) == pytest.approx((5 * 50 * 24 + 200 * 64) / 9600)


def test_what_a_row_uses():
    """Non-members for an attacker, public pictures for directions and some old students."""
    found = {n: defences.uses(vars(resolve(Settings(**f)))) for n, f in defences.ROWS.items()}
    assert found["lora"] == found["distill-private"] == "-"
    assert found["smp"] == "non-members" and found["dp-epsilon-8"] == "public pictures"
    assert defences.uses({"method": "distill", "public": "openmoji"}) == "public pictures"


# ---- the tables of the documents ----


def test_the_documents_are_up_to_date():
    """Every table that stands in docs/ is that of its records."""
    old = [path for path, text in tables.pages().items() if path.read_text() != text]
    assert not old, "python -m studies.tables writes them"


def test_tables_stand_between_their_marks(monkeypatch):
    """What was there before is replaced, the rest of the page stays; wrong marks are refused."""
    monkeypatch.setattr(tables, "MADE", {"one": lambda: "| 1 |\n", "two": lambda: "| 2 |\n"})
    marks = "<!-- table: one -->\nold\n<!-- /table -->\n", "<!-- table: two -->\n<!-- /table -->\n"
    page = tables.filled(f"before\n{marks[0]}between\n{marks[1]}", "page.md")
    assert (
        page
        == tables.filled(page, "page.md")
        == (
            "before\n<!-- table: one -->\n| 1 |\n<!-- /table -->\nbetween\n"
            "<!-- table: two -->\n| 2 |\n<!-- /table -->\n"
        )
    )
    for wrong in ("<!-- table: one -->\n", f"<!-- table: one -->\n{marks[1]}", f"a {marks[0]}"):
        with pytest.raises(UserError, match="without its"):
            tables.filled(wrong, "page.md")
    with pytest.raises(UserError, match="there are one, two"):
        tables.filled("<!-- table: three -->\n<!-- /table -->\n", "page.md")


def test_the_command_writes_what_is_out_of_date(monkeypatch, tmp_path, capsys):
    """--check writes nothing and fails."""
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text("old")
    monkeypatch.setattr(tables, "pages", lambda: {path: "new", tmp_path / "docs/other.md": "new"})
    with pytest.raises(UserError, match=r"out of date: docs/page.md, docs/other.md"):
        tables.tables(tables.Tables(check=True))
    assert path.read_text() == "old"
    assert len(tables.tables(tables.Tables())) == 2 and path.read_text() == "new"
    assert tables.tables(tables.Tables(check=True)) == []


def test_the_frontier_is_that_of_the_audits():
    """Loss, AUC and TPR as audit.json has them; distillation with mirrored images, and with crops,
    leaks less than any LoRA on both pools, and that is what README says of it.
    """
    lines = [line.strip("| ").split(" | ") for line in tables.frontier().splitlines()[2:]]
    found = {line[0]: line for line in lines}
    step = read_json(RECORDS / "defences" / "distill-crop" / "audit.json")["steps"]["200"]
    line = found["distill `--flip --crop`"]
    assert line[1] == f"{step['held_out_loss']:.4f}"[1:]
    assert line[4] == cell(step["attacks"][HEADLINE])
    assert line[5] == f"{max(a['tpr_at_1_fpr'] for a in step['attacks'].values()):.2f}"
    second = tables.second_pool()
    for flags, name in (("flip", "distill-private-flip"), ("flip --crop", "distill-crop")):
        again, title = defences.row(name, "200", second[name], second), f"distill `--{flags}`"
        assert found[title][9] == again[9] == "yes"
        assert found[title][12] == cell(second[name]["steps"]["200"]["attacks"][HEADLINE])


@pytest.mark.parametrize("pool", [tables.sixteen, tables.second_pool])
def test_what_the_docs_say_of_distillation_is_in_the_records(pool):
    """On both pools, with mirrored images: how much less it leaks than any LoRA, in sentences."""
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/defences.md").read_text()
    audits = pool()
    for name in ("distill-private-flip", "distill-crop"):
        less = defences.row(name, "200", audits[name], audits)[8]
        middle, low, high = re.findall(r"-0(\.\d+)", less)
        said = f"{middle} [{high}, {low}]"  # -0.10 [-0.12, -0.07] is .10 [.07, .12] less
        assert said in readme and said in page


def test_the_released_rows_of_the_records():
    """All rows over three seeds, those with a LoRA on the text encoder as well; a mean and a change
    by hand.
    """
    found = as_released.table(RECORDS / "as-released").splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in found[2:-2]}
    kept = {path.name for path in (RECORDS / "as-released").glob("seed-0/*")}
    assert set(rows) == kept and {line[1] for line in rows.values()} == {"3"}
    paper, order = (records.read(RECORDS / "as-released", name) for name in ("paper", "order"))
    losses = [
        [r["adapted"]["held_out_loss"] for r in by_seed.values()] for by_seed in (paper, order)
    ]
    assert rows["order"][4].startswith(f"{sum(losses[1]) / 3:.4f}")
    assert rows["order"][7].startswith(f"{(sum(losses[1]) - sum(losses[0])) / 3:+.4f}")
    assert rows["paper"][6:] == ["-"] * 3 and rows["paper-raw"][6:] == ["-"] * 3


@pytest.mark.parametrize("name", as_released.ROWS)
def test_every_released_row_can_be(name, tmp_path):
    """On the embedded model and on Stable Diffusion; without the 1/2 of Eq. 5 lambda is twice."""
    for model, lam in ((Settings().model, 4), ("nobody/sd", 0.05)):
        s = as_released.Study(model=model)
        run = resolve(grid.run_of(s, as_released.ROWS[name], tmp_path, 0).settings)
        assert run.method == "smp" and (run.proxy == "raw" or model == Settings().model)
        if name in ("paper", "half"):
            assert run.lam == pytest.approx(lam * (1 + (name == "half")))
