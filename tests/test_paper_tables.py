"""The paper's tables: what is asked for, and what is made of it, on made-up figures."""

import re
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from command.errors import UserError
from command.whole_files import write_json
from files import folders
from files.images import FOLDERS, load_images
from run.resolve import resolve
from settings import Settings
from studies import paper
from studies.image_sets import one_caption
from studies.paper import Study
from studies.paper_tables import DATA, PAPER, RUNS, TABLES, Change
from studies.records import Estimate


@pytest.mark.parametrize("name", RUNS)
def test_every_run_can_be(name, tmp_path):
    """On the embedded model and on Stable Diffusion, where multiples are those of the paper."""
    for flags in ({}, {"model": "nobody/sd"}):
        s = Study(dry_run=True, **flags)
        run = resolve(paper.run_of(s, name, 7, tmp_path).settings)
        assert (run.seed, run.out) == (7, str(tmp_path / "seed-7" / name))
    want = {"smp-lambda-x20": ("lam", 1.0), "smp-lambda-x0.2": ("lam", 0.01)}
    want |= {"smp-rank-x0.125": ("rank", 8), "smp-lr-x0.01": ("lr", 1e-6)}
    if name in want:
        flag, value = want[name]
        assert getattr(run, flag) == pytest.approx(value)
    if "rank" in name:
        assert run.alpha / run.rank == pytest.approx(0.5)


def test_tables_are_of_runs_that_there_are():
    """Each has figures of the paper for all of its rows, and changes of figures that it shows."""
    for name, table in TABLES.items():
        assert set(table.paper) <= set(RUNS)
        for change in table.changes:
            assert {change.first, change.second} <= set(table.paper)
            for key in change.figures:
                value, said = paper.paper_change(table.paper, change, key)
                assert value and said != "-", (name, change)
    assert {row for table in TABLES.values() for row in table.paper} == set(RUNS)
    assert set(PAPER) & set(TABLES) == set(TABLES) - {"datasets"}
    rates = [f["asr"] for rows in PAPER.values() for f in rows.values()]
    assert len(rates) == 44 and all(0.45 < rate < 0.95 for rate in rates)
    assert PAPER["celeba_small"]["mp"] == {"kid": 0.3, "asr": 0.5567, "folded": 0.12}


@pytest.mark.parametrize(
    "ours, paper_has, says",
    [
        (None, 0.3, None),
        (Estimate(-0.2, [-0.3, -0.1], [0, 1]), -0.3, 1),
        (Estimate(-0.2, [-0.3, -0.1], [0, 1]), 0.3, -1),
        (Estimate(0.2, [0.1, 0.3], [0, 1]), 0.3, 1),
        (Estimate(0.2, [-0.1, 0.3], [0, 1]), 0.3, 0),
        (Estimate(200.0, None, [0]), 0.3, 0),
        (Estimate(0.2, [0.1, 0.3], [0, 1]), None, None),
    ],
)
def test_verdict(ours, paper_has, says):
    """By the interval alone; one seed without an interval tells nothing."""
    assert paper.verdict(ours, paper_has) == says


def test_the_papers_figure_of_a_set():
    """By the name of the folder; without a FID by the KID; Pokemon's for any other set, and for
    every ablation.
    """
    table, change = TABLES["datasets"], Change("", "smp", "mp", ("pictures",))
    name, figures = paper.of_paper(table, Path("runs/CelebA_Small"))
    assert name == "celeba_small"
    assert paper.in_words(figures["lora"]) == "KID 0.05, ASR 91.5 %, folded AUC 0.94"
    assert paper.paper_change(figures, change, "pictures") == (pytest.approx(-0.27), "KID -0.27")
    assert paper.of_paper(table, Path("twemoji")) == (DATA, PAPER[DATA])
    assert paper.of_paper(TABLES["full"], Path("CelebA_Small")) == (DATA, PAPER["full"])
    assert paper.paper_change(PAPER["afhq_5x"], change, "pictures") == (None, "-")


# ---- one caption ----


def test_one_caption(tiny_base, image_folder, tmp_path):
    """The same pictures in the same order, all with one caption; made once."""
    s = Settings(model=tiny_base, data=image_folder)
    folder = one_caption(s, "sks shape", tmp_path / "made")
    before, after = load_images(image_folder, 32), load_images(str(folder), 32)
    assert np.array_equal(before.pixels, after.pixels) and set(after.captions) == {"sks shape"}
    (folder / "000000.txt").write_text("kept")
    assert one_caption(s, "sks shape", folder) == folder
    assert (folder / "000000.txt").read_text() == "kept"


def test_one_caption_of_a_folder_that_comes_split(tiny_base, image_folder, tmp_path):
    """The four sub-folders stay."""
    for i, (image, _) in enumerate(folders.find(Path(image_folder)).images[:12]):
        inside = tmp_path / "split" / list(FOLDERS)[i % 4]
        inside.mkdir(parents=True, exist_ok=True)
        (inside / image.name).write_bytes(image.read_bytes())
        (inside / image.with_suffix(".txt").name).write_text("a shape")
    split = str(tmp_path / "split")
    made = one_caption(Settings(model=tiny_base, data=split), "sks", tmp_path / "made")
    before, after = load_images(split, 32), load_images(str(made), 32)
    assert before.folders == after.folders and np.array_equal(before.pixels, after.pixels)
    assert set(after.captions) == {"sks"}


# ---- the study ----


def adapted(auc, frechet):
    """What an evaluation leaves of a run, as far as it is read."""
    figures = {"auc": auc, "auc_interval": [auc - 0.1, auc + 0.1]}
    figures |= {"asr": auc - 0.1, "asr_interval": [auc - 0.2, auc]}
    attacks = dict.fromkeys(("proxy-raw-1", "combined", "black-box", "GSA1"), figures)
    return {"attacks": attacks, "held_out_loss": 0.1, "quality": {"frechet_members": frechet}}


@pytest.fixture
def done(in_thread, monkeypatch):
    """Runs that are trained and evaluated in no time: SMP leaks less, its pictures are far off."""
    trained = []

    def fake_train(s, extra=()):
        trained.append((s.seed, Path(s.out).name, s.data))
        (Path(s.out) / "adapter").mkdir(parents=True)
        config = {"settings": {"steps": 4, "data": s.data}, "summary": {"seconds": 700.0}}
        write_json(Path(s.out) / "config.json", config | {"git_commit": "1a2b3c4d5e"})

    def fake_evaluate(s):
        for run in map(Path, s.runs):
            seed, smp = int(run.parent.name[-1]), run.name.startswith("smp")
            record = {
                "seed": seed,
                "seconds": 50,
                "adapted": adapted(0.8 - 0.2 * smp + 0.01 * seed, 600 + 90 * smp),
            }
            write_json(run / "eval.json", record)

    monkeypatch.setattr(train, "train", fake_train)
    monkeypatch.setattr(evaluate, "evaluate", fake_evaluate)
    return trained


def test_tables_share_runs(done, tiny_base, image_folder, tmp_path, capsys):
    """What one table has trained, another finds; marks are those of the figures."""
    s = {"model": tiny_base, "data": image_folder, "out": str(tmp_path), "seeds": 2, "jobs": 1}
    found = paper.study(Study(tables=["attackers"], **s))
    assert done == [(k, name, image_folder) for k in (0, 1) for name in ("lora", "smp")]
    done.clear()
    paper.study(Study(tables=["attackers", "datasets"], **s))
    assert done == [(k, "mp", image_folder) for k in (0, 1)]
    place = tmp_path / Path(image_folder).name
    text = (place / "attackers.md").read_text()
    assert text == found and "| LoRA | 2 | 0.71 [0.63, 0.78] | 0.81 [0.73, 0.88] |" in text
    assert "4 runs of commit 1a2b3c4: 2,800 s of training, 200 s of evaluation." in text
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if "ASR" in x]
    assert lines[1][-1] == "ASR 82.3 %, black-box 72.4 %, GSA1 92.4 %"
    theirs = "ASR -0.303, black-box -0.17, GSA1 -0.289"
    ours = "**-0.20 [-0.30, -0.10]**"  # the paper's direction, told apart
    assert lines[-1] == ["attackers", "SMP against LoRA", theirs, ours, "-", "-", ours, ours]
    # all attacks alike here: one against the other is not told apart, so there is no mark
    assert re.search(r"by losses \| GSA1 \+0.115 \|( - \|){4} [+-]0.00 \[", text)
    for part in text.split("\n\n")[1:3]:
        assert len({line.count("|") for line in part.splitlines()[:3]}) == 1


def test_one_caption_in_the_study(done, tiny_base, image_folder, tmp_path):
    """The runs of one caption have a set of their own, of the caption that was given."""
    s = {"model": tiny_base, "data": image_folder, "out": str(tmp_path), "seeds": 1, "jobs": 1}
    paper.study(Study(tables=["captions"], **s))
    place = tmp_path / Path(image_folder).name
    (folder,) = place.glob("one-caption-*")
    assert done == [(0, name, str(folder)) for name in ("lora-token", "smp-token")]
    assert set(load_images(str(folder), 32).captions) == {"a picture of sks"}
    with pytest.raises(UserError, match="started with --data"):
        paper.study(Study(tables=["captions"], token="zwx", **s))
    with pytest.raises(UserError, match="--nonmembers"):
        paper.study(Study(tables=["captions"], nonmembers="openmoji", **s))
    with pytest.raises(UserError, match="--token"):
        paper.study(Study(tables=["captions"], token=" ", **s))


def test_an_unknown_table_is_refused(tmp_path):
    """Before anything is trained."""
    with pytest.raises(UserError, match="no table lamda: take some of datasets"):
        paper.study(Study(tables=["lamda"], out=str(tmp_path)))
