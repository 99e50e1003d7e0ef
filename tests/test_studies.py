"""The studies on the tiny model: rows that are finished stay, and make the table."""

import re
from pathlib import Path

import pytest

import train
from attacks.lira import HEADLINE
from command.errors import UserError
from command.whole_files import read_json, write_json
from report.tables import cell
from run.resolve import resolve
from settings import METHODS, Settings
from studies import as_released, defences, runs, seeds
from studies.defences import Study

pytestmark = pytest.mark.usefixtures("elsewhere")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tiny_base, image_folder, tmp_path_factory):
    """Flags of four adapters of two steps."""
    small = {"model": tiny_base, "data": image_folder, "adapters": 4, "pool": 10, "steps": 2}
    small |= {"rank": 2, "alpha": 2.0, "batch_size": 2, "target": "attention", "jobs": 1}
    return small | {"out": str(tmp_path_factory.mktemp("study"))}


def test_rows_join_the_table(small, in_thread, monkeypatch, capsys):
    """One row, then another: the first is not trained again, both stand in the table."""
    monkeypatch.setattr(defences, "ROWS", {k: {"method": k} for k in ("lora", "distill", "dp")})
    first = defences.study(Study(rows=["distill"], **small))
    table, against = (part.splitlines() for part in first.split("\n\n"))
    assert [line.split()[1] for line in table[2:]] == ["distill"] * 2
    # no LoRA to compare with
    assert against[2:] == [f"| distill | {at} | - | - | - | not measured |" for at in (1, 2)]
    trained, honest = [], train.train_adapter

    def seen(base, data, s):
        trained.append(s.method)
        return honest(base, data, s)

    monkeypatch.setattr(train, "train_adapter", seen)
    both = defences.study(Study(rows=["lora", "distill"], **small))
    assert trained == ["lora"] * 4 and set(table) < set(both.splitlines())
    for part in both.split("\n\n"):
        assert len({line.count("|") for line in part.splitlines()}) == 1


@pytest.mark.parametrize("pool", ["defences", "defences-1"])
def test_what_the_docs_say_of_distillation_is_in_the_records(pool):
    """On both pools: what it leaks less than plain LoRA, and with mirrored images than any LoRA;
    and its lines, and those of LoRA with mirrored images, in docs/defences.md.
    """
    folders = sorted((ROOT / "docs" / "records" / pool).iterdir())
    records = {path.name: read_json(path / "audit.json") for path in folders}
    lines = [line.strip("| ").split(" | ") for line in defences.against_lora(records).splitlines()]
    found = {(name, at): cells for name, at, *cells in lines[2:]}
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/defences.md").read_text()
    plain, _, _, less = found["distill", "200"]
    assert less == "yes" and as_said(plain) in page
    for name in ("distill-flip", "distill-private-flip"):
        _, of_any, _, less_than_any = found[name, "200"]
        assert less_than_any == "yes"
        assert as_said(of_any) in page and as_said(of_any) in readme
    for name in {*records} - {"lora-shorter"}:
        for at, step in records[name]["steps"].items():
            figures = step["attacks"][HEADLINE]
            line = f"| {at} | {step['held_out_loss']:.4f} | {cell(figures)} |"
            line += f" {figures['tpr_at_1_fpr']:.2f} |"
            assert line.replace(" 0.", " .").replace("[0.", "[.") in page


def as_said(difference: str) -> str:
    """-0.10 [-0.12, -0.07] as the docs say it, of what is less: .10 [.07, .12]."""
    middle, low, high = re.findall(r"0(\.\d+)", difference)
    return f"{middle} [{high}, {low}]"


SCREENED = {  # rows of docs/results.md whose records are not in records/screen
    "smp-short": "smp",
    "smp-calibrated": "calibrated-400",
    "smp-calibrated-short": "calibrated",
    "smp-calibrated-less": "calibrated-lam1",
    "distill + ratio": "ratio",
    "distill + ratio + calibrated": "ratio-calibrated",
}


def test_the_table_of_six_adapters_is_in_the_records():
    """Loss, AUC and the differences from LoRA of every step of every row in docs/results.md."""
    kept = ROOT / "docs" / "records"
    places = {path.name: path for path in (kept / "screen").iterdir()}
    places |= {name: kept / "pilot" / folder for name, folder in SCREENED.items()}
    records = {name: read_json(path / "audit.json") for name, path in places.items()}
    section = (ROOT / "docs" / "results.md").read_text().split("### Every defence and baseline")[1]
    lines = [line.strip("| \n").split(" | ") for line in section.split("\n#")[0].splitlines()]
    said = {tuple(line[0].split(", ")): line for line in lines if len(line) == 12}
    assert len(said) == 1 + sum(len(record["steps"]) for record in records.values())
    against = [
        line.strip("| ").split(" | ") for line in defences.against_lora(records).splitlines()
    ]
    against = {(name, at): both for name, at, *both in (line[:4] for line in against)}
    for name, record in records.items():
        for at, step in record["steps"].items():
            found = [f"{step['held_out_loss']:.4f}", cell(step["attacks"][HEADLINE])]
            found += against.get((name, at), ["-", "-"])
            line = said[name, at]
            assert [line[k] for k in (1, 6, 10, 11)] == [x.replace("0.", ".") for x in found], name


def test_an_unknown_row_is_refused(small):
    """Before anything is trained."""
    with pytest.raises(UserError, match="no row lorax"):
        defences.study(Study(rows=["lora", "lorax"], **small))


@pytest.mark.parametrize("name", defences.ROWS)
def test_every_row_is_a_method_that_can_be(name):
    """Flags that resolve on the embedded model."""
    s = resolve(Settings(**defences.ROWS[name]))
    assert s.method in METHODS


def test_costs_by_hand():
    """In trainings of plain LoRA: 400 steps of 8 images, three passes each."""

    def settings(**flags):
        return vars(resolve(Settings(**flags)))

    assert defences.cost(settings(method="lora"), 400) == 1
    # micro-batches go through twice, the first time without gradient
    assert defences.cost(settings(method="lora", accumulate=4), 100) == pytest.approx(4 / 3)
    assert defences.cost(settings(method="smp"), 400) == pytest.approx(5 / 3)
    calibrated = settings(method="smp", proxy="calibrated")
    assert defences.cost(calibrated, 400) == pytest.approx(8 / 3)
    assert defences.cost(settings(method="dp", draws=2), 400) == 2
    distill = settings(method="distill", steps=200)
    # five teachers of 50 steps; 200 steps of 16 images, each once more through its teacher
    assert defences.cost(distill, 200) == pytest.approx((5 * 50 * 24 + 200 * 64) / 9600)
    alone = settings(method="distill", steps=200, public="none")
    assert defences.cost(alone, 200) == pytest.approx((5 * 50 * 24 + 200 * 32) / 9600)


def test_what_a_row_uses():
    """Non-members for an attacker, public pictures for a student or a subspace."""
    found = {n: defences.uses(vars(resolve(Settings(**f)))) for n, f in defences.ROWS.items()}
    assert found["lora"] == found["dp"] == found["distill-private"] == "-"
    assert found["smp"] == "non-members" and found["distill"] == "public pictures"
    assert found["subspace-smp"] == "non-members, public pictures"


# ---- the paper against its code ----


def answer(name, seed, auc, frechet=None):
    """An eval.json with what its table reads, and the config beside it."""
    attacks = {
        attack: {"auc": auc, "auc_interval": [auc - 0.1, auc + 0.1]}
        for attack in ("proxy-raw-1", "combined", "GSA1")
    }
    adapted = {"attacks": attacks, "held_out_loss": auc / 10}
    if frechet:
        adapted["quality"] = {"frechet_held_out": frechet}
    summary = {"lambda_effective_mean": 0.5, "seconds": 8.0}
    config = {"settings": {"steps": 4}, "summary": summary, "git_commit": "1a2b3c4d"}
    return {"seed": seed, "adapted": adapted, "seconds": 30}, config


def test_released_rows_join_the_table(tmp_path, in_thread, monkeypatch, tiny_base, image_folder):
    """What is there is not done again; means, differences and times are those by hand."""
    done = []

    def fake_train(s):
        (Path(s.out) / "adapter").mkdir(parents=True)
        assert s.nonmembers is None  # a folder of images, not their number
        done.append((s.seed, Path(s.out).name, s.as_released, s.resume))

    def fake_evaluate(s):
        for run in map(Path, s.runs):
            seed, lower = int(run.parent.name[-1]), 0.2 * (run.name == "order")
            record, config = answer(run.name, seed, 0.8 - lower + 0.01 * seed, 500)
            write_json(run / "eval.json", record)
            write_json(run / "config.json", config)
        assert s.test_nonmembers == 200 and s.nonmembers is s.model is None
        done.append(len(s.runs))

    monkeypatch.setattr(as_released, "train", fake_train)
    monkeypatch.setattr(as_released.evaluate, "evaluate", fake_evaluate)
    flags = {"model": tiny_base, "data": image_folder, "out": str(tmp_path), "seeds": 2, "jobs": 1}
    as_released.study(as_released.Study(rows=["paper"], **flags))
    assert done == [(0, "paper", None, True), (1, "paper", None, True), 1, 1]
    done.clear()
    found = as_released.study(as_released.Study(rows=["paper", "order"], **flags))
    assert done == [(0, "order", "order", True), (1, "order", "order", True), 1, 1]
    heads, _, *rows = (x.strip("| ").split(" | ") for x in found.split("\n\n")[0].splitlines())
    paper, order = (dict(zip(heads, row, strict=True)) for row in rows)
    assert (paper["row"], paper["seeds"]) == ("paper", "2")
    assert paper["combined attack, AUC"] == "0.81 [0.73, 0.88]"
    assert paper["combined attack, AUC, change"] == paper["held-out loss, change"] == "-"
    assert order["combined attack, AUC, change"] == "-0.20 [-0.30, -0.10]"
    assert order["held-out loss"].startswith("0.0605") and order["seconds a step"] == "2.00"
    assert order["held-out loss, change"].startswith("-0.0200")
    assert order["Frechet distance to held-out pictures"].startswith("500")
    assert "4 runs of commit 1a2b3c4: 32 s of training, 120 s of evaluation." in found
    assert (tmp_path / "table.md").read_text() == found


def test_the_table_of_released_rows_is_that_of_its_records():
    """Word for word in docs/paper-and-code.md, all rows over three seeds."""
    docs = ROOT / "docs"
    kept = {name: seeds.read(docs / "records" / "as-released", name) for name in as_released.ROWS}
    assert all(len(by_seed) == 3 for by_seed in kept.values())
    assert as_released.table(kept) in (docs / "paper-and-code.md").read_text()


def test_a_dry_run_of_the_released_rows(tmp_path, tiny_base, image_folder, capsys):
    """Trains nothing and makes nothing."""
    flags = {"model": tiny_base, "data": image_folder, "seeds": 2, "dry_run": True}
    asked = as_released.Study(rows=["order"], out=str(tmp_path / "new"), **flags)
    assert as_released.study(asked) == "" and not (tmp_path / "new").exists()
    assert "2 of 2 runs are to train and to evaluate: order" in capsys.readouterr().out


def test_processes(monkeypatch):
    """As many as cores on a CPU, also where that is what --device auto finds."""
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(runs, "resolve_device", lambda device: {"auto": "cpu"}.get(device, device))
    counts = [runs.processes(as_released.Study(device=d)) for d in ("auto", "cpu", "cuda")]
    assert counts == [6, 6, 1] and runs.processes(as_released.Study(jobs=3)) == 3


def test_evaluations_are_divided_among_processes():
    """By folder where that fills every process; else in parts, the first of each folder first."""
    three = [f"{seed}/{row}" for seed in "abc" for row in "123"]
    whole = [[f"{seed}/{row}" for row in "123"] for seed in "abc"]
    assert runs.divided(three, 1) == runs.divided(three, 3) == whole
    first, second = [[f"{s}/1", f"{s}/2"] for s in "abc"], [[f"{s}/3"] for s in "abc"]
    assert runs.divided(three, 2) == first + second
    assert runs.divided(["a/1"], 2) == [["a/1"]] and runs.divided([], 2) == []


def test_a_run_of_other_flags_is_refused(tmp_path):
    """Rather than taken for what was asked for; before anything is trained."""
    (tmp_path / "seed-0" / "paper").mkdir(parents=True)
    write_json(tmp_path / "seed-0" / "paper" / "config.json", {"settings": {"steps": 4}})
    with pytest.raises(UserError, match="begun with --steps 4, not 5"):
        as_released.study(as_released.Study(steps=5, out=str(tmp_path)))


def test_an_unknown_released_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="no row orders"):
        as_released.study(as_released.Study(rows=["orders"], out=str(tmp_path)))


@pytest.mark.parametrize("name", as_released.ROWS)
def test_every_released_row_can_be(name):
    """On the embedded model and on Stable Diffusion."""
    for model in ({}, {"model": "nobody/sd"}):
        assert resolve(Settings(**as_released.ROWS[name], **model)).method == "smp"
