"""The paper's tables: what is asked for, and what is made of it, on made-up figures."""

from pathlib import Path

import numpy as np
import pytest

from command.errors import UserError
from command.whole_files import write_json
from files import folders
from files.images import FOLDERS, load_images
from run.resolve import resolve
from settings import Settings
from studies import paper, seeds
from studies.captions import one_caption
from studies.paper import Study
from studies.paper_tables import DATA, RUNS, SETS, TABLES, Claim
from studies.seeds import Estimate


@pytest.mark.parametrize("name", RUNS)
def test_every_run_can_be(name, tmp_path):
    """On the embedded model and on Stable Diffusion, where multiples are those of the paper."""
    for flags in ({}, {"model": "nobody/sd"}):
        s = Study(dry_run=True, **flags)
        run = resolve(paper.run_of(s, name, 7, "twemoji", tmp_path))
        assert (run.seed, run.out) == (7, str(tmp_path / "seed-7" / name))
    want = {
        "smp-lambda-x20": 1.0,
        "smp-lambda-x0.2": 0.01,
        "smp-rank-x0.125": 8,
        "smp-lr-x0.01": 1e-6,
    }
    if name in want:
        assert getattr(run, next(iter(RUNS[name].times))) == pytest.approx(want[name])
    if "rank" in name:
        assert run.alpha / run.rank == pytest.approx(0.5)


def test_tables_are_of_runs_that_there_are():
    """Each has figures of the paper for all of its rows, and claims of figures that it shows."""
    for table in TABLES.values():
        assert set(table.rows) <= set(RUNS)
        for claim in table.claims:
            assert {claim.first, claim.second} <= set(table.rows) and claim.figure in paper.FIGURES
            change, said = paper.paper_difference(table.paper[DATA], claim)
            assert change and said != "-", claim
    used = {row for table in TABLES.values() for row in table.rows}
    assert used == set(RUNS)
    rates = [v for rows in SETS.values() for f in rows.values() for k, v in f.items() if k == "asr"]
    assert all(0.45 < rate < 0.95 for rate in rates)


@pytest.mark.parametrize(
    "ours, paper_has, says",
    [
        (None, 0.3, "not measured"),
        (Estimate(-0.2, [-0.3, -0.1], [0, 1]), -0.3, "same direction"),
        (Estimate(-0.2, [-0.3, -0.1], [0, 1]), 0.3, "other direction"),
        (Estimate(0.2, [0.1, 0.3], [0, 1]), 0.3, "same direction"),
        (Estimate(0.2, [-0.1, 0.3], [0, 1]), 0.3, "not told apart"),
        (Estimate(200.0, None, [0]), 0.3, "not told apart (one seed)"),
        (Estimate(0.2, [0.1, 0.3], [0, 1]), None, "the paper has none"),
    ],
)
def test_verdict(ours, paper_has, says):
    """By the interval alone."""
    assert paper.verdict(ours, paper_has) == says


def test_the_papers_figure_of_a_set():
    """By the name of the folder; without a FID by the KID; Pokemon's for any other set."""
    table, claim = TABLES["datasets"], Claim("", "smp", "mp", "pictures")
    name, figures = paper.figures_of(table, Path("runs/CelebA_Small"))
    assert name == "celeba_small" and paper.of_paper(table, Path("CelebA_Small"), "lora") == (
        "celeba_small: KID 0.05, ASR 91.5 %, folded AUC 0.94"
    )
    assert paper.paper_difference(figures, claim) == (pytest.approx(-0.27), "KID -0.27")
    assert paper.figures_of(table, Path("twemoji"))[0] == "pokemon"
    assert paper.paper_difference(SETS["afhq_5x"], claim) == (None, "-")


def test_sets(tmp_path):
    """Several with commas; one whose name has a comma; not two of one name."""
    assert paper.sets("twemoji") == ["twemoji"] and paper.sets("a/x,b/y") == ["a/x", "b/y"]
    (tmp_path / "x,y").mkdir()
    assert paper.sets(str(tmp_path / "x,y")) == [str(tmp_path / "x,y")]
    for flag in ("a/x,b/x", ","):
        with pytest.raises(UserError, match="--data"):
            paper.sets(flag)


# ---- one caption ----


def test_one_caption(tiny_base, image_folder, tmp_path):
    """The same pictures in the same order, all with one caption; made once."""
    s = Settings(model=tiny_base, data=image_folder)
    folder = one_caption(s, "sks shape", tmp_path)
    before, after = load_images(image_folder, 32), load_images(str(folder), 32)
    assert np.array_equal(before.pixels, after.pixels) and set(after.captions) == {"sks shape"}
    (folder / "000000.txt").write_text("kept")
    assert one_caption(s, "sks shape", tmp_path) == folder
    assert (folder / "000000.txt").read_text() == "kept"
    assert one_caption(s, "zwx shape", tmp_path) != folder
    with pytest.raises(UserError, match="--token"):
        one_caption(s, " ", tmp_path)


def test_one_caption_of_a_folder_that_comes_split(tiny_base, image_folder, tmp_path):
    """The four sub-folders stay."""
    for i, (image, _) in enumerate(folders.find(Path(image_folder)).images[:12]):
        inside = tmp_path / "split" / list(FOLDERS)[i % 4]
        inside.mkdir(parents=True, exist_ok=True)
        (inside / image.name).write_bytes(image.read_bytes())
        (inside / image.with_suffix(".txt").name).write_text("a shape")
    split = tmp_path / "split"
    made = one_caption(Settings(model=tiny_base, data=str(split)), None, tmp_path)
    before, after = load_images(str(split), 32), load_images(str(made), 32)
    assert before.folders == after.folders and np.array_equal(before.pixels, after.pixels)
    assert set(after.captions) == {"a picture of sks"}


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

    def fake_train(s):
        trained.append((Path(s.out).parent.parent.name, s.seed, Path(s.out).name))
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

    monkeypatch.setattr(paper, "train", fake_train)
    monkeypatch.setattr(paper.evaluate, "evaluate", fake_evaluate)
    return trained


def test_tables_share_runs(done, tiny_base, image_folder, tmp_path, capsys):
    """What one table has trained, another finds; verdicts are those of the figures."""
    s = {"model": tiny_base, "data": image_folder, "out": str(tmp_path), "seeds": 2}
    found = paper.study(Study(tables=["attackers"], **s))
    place = Path(image_folder).name
    assert done == [(place, k, name) for k in (0, 1) for name in ("lora", "smp")]
    done.clear()
    paper.study(Study(tables=["attackers", "datasets"], **s))
    assert done == [(place, k, "mp") for k in (0, 1)]
    text = (tmp_path / "attackers.md").read_text()
    assert text == found and "| LoRA | 4 | 2 | 0.71 [0.63, 0.78] | 0.81 [0.73, 0.88] |" in text
    assert "4 runs of commit 1a2b3c4: 2,800 s of training, 200 s of evaluation." in text
    by_claim = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if "ASR" in x]
    assert ["-0.20 [-0.30, -0.10]", "2", "same direction"] in [line[-3:] for line in by_claim]
    assert by_claim[-1][-1] == "not told apart"  # all attacks alike here
    assert "pokemon: ASR 82.3 %, black-box 72.4 %, GSA1 92.4 %" in text
    assert len({line.count("|") for line in text.split("\n\n")[1].splitlines()}) == 1


def test_a_dry_run(done, tiny_base, image_folder, tmp_path, capsys):
    """Says what is missing, with minutes on the embedded model, and makes nothing."""
    s = {"out": str(tmp_path / "new"), "dry_run": True, "device": "cpu", "jobs": 2}
    assert paper.study(Study(tables=["lambda", "captions"], **s)) == "" and not done
    said = capsys.readouterr().out
    assert "21 of 21 runs" in said and "about" in said and not (tmp_path / "new").exists()
    # training, the evaluations, and those of the base for each seed
    minutes = (15 * 400 * 0.28 + 15 * 140 + 3 * 150) / 2 / 60
    paper.study(Study(tables=["lambda"], **s))
    assert f"about {minutes:.0f} minutes" in capsys.readouterr().out
    paper.study(Study(tables=["lr"], model=tiny_base, data=image_folder, **s))
    assert "minutes" not in capsys.readouterr().out


def test_one_caption_in_the_study(done, tiny_base, image_folder, tmp_path):
    """The runs of one caption have a set of their own, the others the one that is given."""
    s = {"model": tiny_base, "data": image_folder, "out": str(tmp_path), "seeds": 1}
    found = paper.study(Study(tables=["captions"], **s))
    place = tmp_path / Path(image_folder).name
    assert [name for _, _, name in done] == ["lora-token", "smp-token"]
    assert "not told apart (one seed)" in found  # the distance of one seed has no interval
    assert len(list(place.glob("one-caption-*/*.png"))) == 40
    with pytest.raises(UserError, match="--nonmembers"):
        paper.study(Study(tables=["captions"], nonmembers="openmoji", **s))


def test_unknown_tables_and_numbers_are_refused(tmp_path):
    """Before anything is trained."""
    with pytest.raises(UserError, match="no table lamda: take some of datasets"):
        paper.study(Study(tables=["lamda"], out=str(tmp_path)))
    with pytest.raises(UserError, match="--seeds"):
        paper.study(Study(tables=["lambda"], seeds=0, out=str(tmp_path)))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_docs_are_those_of_their_records(name):
    """Word for word."""
    docs, table = Path(__file__).parent.parent / "docs", TABLES[name]
    place = docs / "records" / "paper" / "twemoji"
    found = {place: {row: seeds.read(place, row) for row in table.rows}}
    assert paper.page(Study(), table, found) in (docs / "results.md").read_text()
