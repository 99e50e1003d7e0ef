"""evaluate.py on a real run of the tiny model: what it writes, resumes and selects on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from attacks import examination, model
from attacks.examination import prepare, subset
from attacks.target import kind, read_adapter, read_run
from command.errors import UserError
from diffusion import Encoded
from files.images import FOLDERS, PARTS, SIDES
from report import tables
from settings import Settings

FILES = ("report.html", "exposure.csv", "figures/roc.png", "figures/scores.png")


@pytest.fixture(scope="module")
def run(tiny_base, image_folder, tmp_path_factory):
    """A short run on the tiny base."""
    return short_run(tiny_base, image_folder, tmp_path_factory.mktemp("runs") / "smp")


def short_run(tiny_base, image_folder, out, **flags):
    """The folder of four steps of SMP."""
    small = {
        "members": 20,
        "rank": 2,
        "alpha": 4,
        "batch_size": 4,
        "target": "attention",
        "lr": 0.01,
    } | flags
    train.train(
        Settings(
            model=tiny_base,
            data=image_folder,
            out=str(out),
            steps=4,
            attacker_lr=0.01,
            proxy="pooled",
            lam=1.0,
            **small,
        )
    )
    return str(out)


def test_evaluation_of_a_run(run, capsys, monkeypatch):
    """Every attack gives figures for the run, the control holds all but the difference, and a
    second call asks nothing of the model again.
    """
    settings = evaluate.Settings(runs=[run], pictures=4, sampling_steps=2)
    (record,) = evaluate.evaluate(settings)
    saved = json.loads(Path(run, "eval.json").read_text())
    assert saved["adapted"]["attacks"] == record["adapted"]["attacks"]
    assert set(record["adapted"]["attacks"]) - set(record["base"]["attacks"]) == {"difference"}
    assert len(record["adapted"]["attacks"]) == 15
    assert 0.5 < record["adapted"]["null"] < 1
    assert record["adapted"]["quality"]["pictures"] == 4 and record["adapted"]["held_out_loss"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert record["verdict"] in printed and all((Path(run) / f).stat().st_size > 500 for f in FILES)
    monkeypatch.setattr(model.paper, "draw", None)
    monkeypatch.setattr(model, "loss_grid", None)
    monkeypatch.setattr(model.paper, "residuals", None)
    (again,) = evaluate.evaluate(settings)
    assert again["adapted"]["attacks"] == record["adapted"]["attacks"]


def test_the_bar_counts_all_that_is_asked(run, monkeypatch):
    """Every ask has a share of its model's part of the bar, and the shares make it whole; what an
    earlier evaluation asked does not count as the work of this one.
    """
    measured = []
    monkeypatch.setattr(evaluate, "conclude", lambda s, found, models, _: measured.extend(models))
    for _ in range(2):
        evaluate.evaluate(evaluate.Settings(runs=[run], pictures=4, sampling_steps=2))
    for one in (measured[-1], measured[-1].control):
        assert set(one.shares) == {"encoding", "drawing", "features"}  # parts of other parts
    bar = measured[-1].bar
    assert bar.done == 2 and bar.first == pytest.approx(2)


def test_runs_of_two_seeds_are_pooled(run, tiny_base, image_folder, tmp_path, capsys):
    """Runs that differ by their seed, and by what was looked at on the way, are one claim; another
    step of one is not.
    """
    other = short_run(tiny_base, image_folder, tmp_path / "smp", seed=1, samples=0, norms_every=1)
    records = evaluate.evaluate(evaluate.Settings(runs=[run, other], pictures=4, sampling_steps=2))
    (pooled,) = json.loads((Path(run).parent / "seeds.json").read_text())
    printed = " ".join(capsys.readouterr().out.split())
    assert pooled["seeds"] == [0, 1] and f"{', '.join(pooled['runs'])}: headline" in printed
    areas = [r["adapted"]["headline"]["auc"] for r in records]
    assert pooled["headline"]["auc"] == pytest.approx(np.mean(areas))
    assert pooled["headline"]["auc_by_seed"] == pytest.approx(areas)
    distances = [r["adapted"]["quality"]["frechet_members"] for r in records]
    assert pooled["quality"]["frechet_members"] == pytest.approx(np.mean(distances))
    assert kind(read_run(run)) == kind(read_run(other)) != kind(read_run(run, "best"))


def test_choice_is_made_on_known_images():
    """A signal planted in auxiliary and validation images alone decides the column; test images
    have no say.
    """
    rng = np.random.default_rng(0)
    roles = {
        f"{s}_{p}": list(range(k * 10, k * 10 + 10))
        for k, (s, p) in enumerate((s, p) for s in SIDES for p in PARTS)
    }
    data = Encoded(*[None] * 5, roles)
    score = rng.normal(size=(60, 3))
    score[roles["member_test"], 0] += 5  # tempting, and not to be looked at
    score[roles["member_aux"] + roles["member_val"], 2] += 3
    chosen = model.choose(data, score)
    np.testing.assert_array_equal(chosen, score[:, 2])
    before = model.known_pair(data, "loss", chosen)
    chosen[roles["member_test"]] += 100
    np.testing.assert_array_equal(model.known_pair(data, "loss", chosen), before)
    assert len(model.known_pair(data, "proxy-raw", chosen)[0]) == 10  # validation alone


def test_of_equal_columns_the_first_is_chosen():
    """Equal by the exact count of pairs, whatever the rounding of an AUC."""
    sizes = {"member_aux": 3, "member_val": 1, "nonmember_aux": 3, "nonmember_val": 2}
    ends = np.cumsum(list(sizes.values()))
    roles = {r: list(range(e - n, e)) for (r, n), e in zip(sizes.items(), ends, strict=True)}
    data, ties = Encoded(*[None] * 5, roles), 0
    for seed in range(60):
        score = np.random.default_rng(seed).normal(size=(9, 6))
        member, nonmember = data.pair(score, "aux", "val")
        wins = (member[:, None] > nonmember).sum((0, 1))  # of 20 pairs
        ties += (wins == wins.max()).sum() > 1
        np.testing.assert_array_equal(model.choose(data, score), score[:, wins.argmax()])
    assert ties > 5


def test_refusals(run, tmp_path):
    """A folder that is no run, a step that was not saved, an adapter without its data: one sentence
    each.
    """
    for settings, words in (
        (evaluate.Settings(runs=[str(tmp_path)]), "not a run folder"),
        (evaluate.Settings(runs=[run], at="99"), "no adapter of step 99"),
        (evaluate.Settings(adapter="x"), "--model is missing"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.evaluate(settings)


def test_an_adapter_with_two_folders(run, tiny_base, image_folder, tmp_path):
    """Those it was trained on and others: every image has a role of its side, none is fresh."""
    folders = {"members": tmp_path / "in", "nonmembers": tmp_path / "out"}
    for i, folder in enumerate(folders.values()):
        folder.mkdir()
        for path in sorted(Path(image_folder).iterdir()):
            if (int(path.stem) < 16) == (i == 0):
                shutil.copy(path, folder)
    flags = {name: str(folder) for name, folder in folders.items()}
    target = read_adapter(evaluate.Settings(adapter=f"{run}/adapter", model=tiny_base, **flags))
    data = prepare(target).data
    members, others = data.sides("aux", "val", "test")
    assert len(members) == 16 and len(others) == 8 + 4 + 12
    assert all(data.names[i].startswith("nonmembers/") for i in others)
    assert not any(data.names[i].startswith("nonmembers/") for i in members)


def test_test_non_members_are_a_random_subset():
    """File names sort emojis by kind: the first ones would all be of a kind, and any attack would
    tell them apart.
    """
    found = subset(list(range(1000)), 200)
    assert len(set(found)) == 200 and found == sorted(found) == subset(list(range(1000)), 200)
    assert 400 < np.mean(found) < 600
    assert subset([3, 1], 0) == subset([3, 1], 5) == [3, 1]


def test_adapter_with_a_folder_in_four_parts(run, tiny_base, image_folder, tmp_path):
    """An adapter from elsewhere on the paper's four sub-folders, without a run folder or splits."""
    pictures = sorted(Path(image_folder).glob("*.png"))
    for k, folder in enumerate(FOLDERS):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for picture in pictures[10 * k : 10 * k + 10]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, tmp_path / "data" / folder)
    flags = {"pictures": 0, "adapter": f"{run}/adapter", "model": tiny_base}
    flags |= {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    (record,) = evaluate.evaluate(evaluate.Settings(**flags))
    sizes = {f"{s}_{p}": n for s in SIDES for p, n in (("aux", 9), ("val", 1), ("test", 10))}
    assert record["images"] == sizes
    saved = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert saved["base"]["attacks"] == record["base"]["attacks"]
    data = prepare(read_adapter(evaluate.Settings(**flags))).data
    for k, roles in enumerate(
        FOLDERS.values()
    ):  # who lies in a folder has its roles, whatever the names
        captions = {data.captions[i] for role in roles for i in data.roles[role]}
        files = (p.with_suffix(".txt") for p in pictures[10 * k : 10 * k + 10])
        assert captions == {file.read_text().strip() for file in files}


def test_runs_are_called_by_their_last_name_unless_two_share_it():
    """Seeds of one method live in folders of one name."""
    records = [{"run": name} for name in ("runs/0/smp @4", "runs/1/smp @4", "runs/0/mp @4")]
    assert tables.titles(records) == ["runs/0/smp @4", "runs/1/smp @4", "mp @4"]


def test_another_choice_of_images_is_another_evaluation(run, monkeypatch):
    """Scores are kept by position, so those of other test images must not be found again."""
    found, settings = read_run(run), evaluate.Settings()
    before = examination.fingerprint(found, "content", settings)
    monkeypatch.setattr(examination, "SUBSET_SEED", 1)
    assert examination.fingerprint(found, "content", settings) != before
