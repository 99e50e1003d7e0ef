"""Shadow models: the formula, what calibration finds that the raw score hides, and the command
line.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
import roc
import train
from cli import UserError
from evaluation import shadows
from settings import Settings


def test_formula():
    """By hand, one image and one column at a time."""
    rng = np.random.default_rng(0)
    run, asked = rng.normal(size=(4, 2)), rng.normal(size=(5, 4, 2))
    out = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1]], bool)
    found = shadows.calibrated(run, asked, out)
    for c in range(2):
        groups = [[asked[s, i, c] for s in range(5) if out[s, i]] for i in range(4)]
        squares = sum(sum((x - np.mean(g)) ** 2 for x in g) for g in groups)
        sd = (squares / sum(len(g) - 1 for g in groups)) ** 0.5
        np.testing.assert_allclose(
            found[:, c], [(run[i, c] - np.mean(groups[i])) / sd for i in range(4)]
        )


def test_calibration_finds_what_the_hardness_of_images_hides():
    """Images differ by far more than membership moves them; without membership there is nothing to
    find.
    """
    rng = np.random.default_rng(0)
    hardness, member = rng.normal(0, 5, 200), np.arange(200) < 100
    asked = (hardness + rng.normal(0, 0.3, (8, 200)))[:, :, None]
    out = np.ones((8, 200), bool)
    for signal, low, high in ((1.0, 0.9, 1.0), (0.0, 0.35, 0.65)):
        run = (hardness + signal * member + rng.normal(0, 0.3, 200))[:, None]
        score = shadows.calibrated(run, asked, out)[:, 0]
        assert low <= roc.auc(score[member], score[~member]) <= high
    assert roc.auc(run[member, 0] + 1.0, run[~member, 0]) < 0.7  # the raw score, with the signal


@pytest.fixture(scope="module")
def run(tiny_base, image_folder, tmp_path_factory):
    """A short run on the tiny base, a quarter of the images its members."""
    out = str(tmp_path_factory.mktemp("runs") / "lora")
    small = {"members": 10, "rank": 2, "alpha": 4, "batch_size": 4, "samples": 0, "lr": 0.01}
    train.train(
        Settings(method="lora", model=tiny_base, data=image_folder, out=out, steps=3, **small)
    )
    return out


def test_evaluation_with_shadows(run, monkeypatch):
    """Both attacks stand beside the others, for the run and the base; shadows differ in their
    members and are kept.
    """
    settings = evaluate.Settings(runs=[run], pictures=0, bootstrap=50, shadow=7)
    (record,) = evaluate.evaluate(settings)
    for model in ("adapted", "base"):
        assert {"LiRA-loss", "LiRA-SimA"} <= set(record[model]["attacks"])
        assert record[model]["worst"]["auc"] == max(
            f["auc"] for f in record[model]["attacks"].values()
        )
    folders = sorted(Path(run).parent.glob("shadows-*/seed-*"))
    members = {
        str(sorted(json.loads((f / "splits.json").read_text())["member_aux"]))
        for f in [*folders, Path(run)]
    }
    assert len(folders) == 7 and len(members) == 8
    monkeypatch.setattr(shadows, "loss_grid", None)
    (again,) = evaluate.evaluate(settings)
    assert again["adapted"]["attacks"] == record["adapted"]["attacks"]


def test_refusals(run, tiny_base, image_folder, tmp_path, monkeypatch):
    """Too few shadows for an image, and an adapter of which nobody knows how it was trained."""
    monkeypatch.setattr(shadows, "query", None)  # refused before any training
    for count, words in ((1, "fewer than 2 shadows"), (-1, "--shadow must be 0 to")):
        with pytest.raises(UserError, match=words):
            evaluate.evaluate(evaluate.Settings(runs=[run], pictures=0, bootstrap=50, shadow=count))
    flags = {
        "adapter": f"{run}/adapter",
        "model": tiny_base,
        "data": image_folder,
        "splits": f"{run}/splits.json",
    }
    with pytest.raises(UserError, match=r"needs a run of train\.py"):
        evaluate.evaluate(
            evaluate.Settings(pictures=0, bootstrap=50, shadow=2, out=str(tmp_path), **flags)
        )
