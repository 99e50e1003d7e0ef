"""Shadows of one run: who trains on what, and the command line.  The attacks are test_lira.py's."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from attacks import audit_plan, audit_tasks, lira, shadows
from attacks.examination import prepare
from attacks.target import read_run
from command.errors import UserError
from curves import roc
from settings import Settings


@pytest.mark.parametrize(("images", "members"), [(360, 100), (200, 100), (12, 9), (10, 3)])
def test_blocks_are_balanced(images, members):
    """Every shadow has as many members as the run, every image is in as often as any other, up to
    one; no two shadows are alike.
    """
    for count in (4, 8, 10):
        orders = shadows.blocks(images, members, count, seed=3)
        assert all(sorted(order) == list(range(images)) for order in orders)
        inside = [order[:members] for order in orders]
        times = np.bincount(list(itertools.chain(*inside)), minlength=images)
        assert times.max() - times.min() <= 1 and times.sum() == count * members
        assert len({tuple(sorted(i)) for i in inside}) == count


def test_roles_have_the_runs_sizes():
    """Members first, so they are the block; everyone has one role."""
    sizes = {"nonmember_aux": 2, "member_aux": 3, "member_test": 4, "nonmember_test": 6}
    order = np.random.default_rng(0).permutation(15).tolist()
    roles = shadows.shadow_roles(sizes, order)
    assert {role: len(index) for role, index in roles.items() if index} == sizes
    assert sorted(itertools.chain(*roles.values())) == list(range(15))
    assert set(shadows.members_of(roles)) == set(order[:7])


def test_signal_is_found_and_nothing_without_it():
    """Images differ by far more than membership moves them, and the run's members are unlike the
    shadows' in number; without a signal nothing is found, also in 200 dimensions.
    """
    images, members, count = 360, 100, 8
    inside = np.zeros((count + 1, images), bool)
    for row, order in zip(inside, shadows.blocks(images, members, count, 0), strict=False):
        row[order[:members]] = True
    rng = np.random.default_rng(1)
    run = rng.permutation(images) < members
    truth = np.vstack([inside[:-1], run])
    for signal, low, high in ((1.0, 0.7, 1.0), (0.0, 0.42, 0.58)):
        hard, noise = rng.normal(0, 3, (images, 1)), rng.normal(0, 0.6, (count + 1, images, 5))
        log = hard + noise - signal * truth[:, :, None]
        axis = rng.normal(size=(images, 4, 50)) * 0.3
        predictions = rng.normal(size=(count + 1, images, 4, 50))
        answers = {
            "losses": np.exp(log[:, :, :4, None]),
            "sima": np.exp(log[:, :, 4:]),
            "predictions": predictions + signal * axis * truth[:, :, None, None],
        }
        found = lira.attacks(answers, inside, targets=[count])  # whose own labels are all False
        areas = {name: roc.auc(s[0, run], s[0, ~run]) for name, s in found.items()}
        threshold = areas.pop(lira.THRESHOLD)
        assert threshold < 0.65
        assert all(low <= area <= high for area in areas.values()), str(areas)


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
    """The attacks with shadows stand beside the others, for the run and the base; adapters and
    answers are kept, and the whole is the same again.
    """
    settings = evaluate.Settings(runs=[run], pictures=0, shadow=8, jobs=2)
    (record,) = evaluate.evaluate(settings)
    wanted = {*lira.ATTACKS, "projected prediction"}
    for model in ("adapted", "base"):
        assert wanted <= set(record[model]["attacks"])
    assert record["shadows"] == 8 and "--shadow" not in record["verdict"]
    folders = sorted(Path(run).parent.glob("shadows-*/adapters/*"))
    assert len(folders) == 8 and all((f / "answers.npz").is_file() for f in folders)
    assert json.loads((Path(run) / "eval.json").read_text())["shadows"] == 8
    monkeypatch.setattr(audit_tasks, "ask", None)
    monkeypatch.setattr(audit_tasks, "work", None)
    (again,) = evaluate.evaluate(settings)
    assert again["adapted"]["attacks"] == record["adapted"]["attacks"]


def test_shadows_of_a_step_on_the_way_have_the_whole_schedule(run):
    """They stop at the step, with the learning rates that the run had until then."""
    target = read_run(run, "1")
    target.config["schedule"] = "cosine"
    plan = shadows.plan(target, prepare(target), 8, "cpu")
    assert plan.settings.steps == 3 and plan.due() == [1]
    other = read_run(run)
    assert shadows.plan(other, prepare(other), 8, "cpu").out != plan.out


def test_shadows_of_another_version_lie_elsewhere(run, monkeypatch):
    """What they were asked is in the name of their folder, and of the answers that are kept."""
    target = read_run(run)
    e = prepare(target)
    before = shadows.plan(target, e, 8, "cpu").out
    assert before == shadows.plan(target, e, 8, "cpu").out
    monkeypatch.setattr(audit_plan, "ASKED", [0])
    assert before != shadows.plan(target, e, 8, "cpu").out


def test_refusals(run, tiny_base, image_folder, tmp_path, monkeypatch):
    """Too few shadows for an image, and an adapter of which nobody knows how it was trained."""
    monkeypatch.setattr(audit_tasks, "train_all", None)  # refused before any training
    for count, words in (
        (4, "Use --shadow 8"),
        (2, "an even number of 4 or more"),
        (7, "an even number of 4 or more"),
        (-1, "--shadow must be 0 to"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.evaluate(evaluate.Settings(runs=[run], pictures=0, shadow=count))
    flags = {
        "adapter": f"{run}/adapter",
        "model": tiny_base,
        "data": image_folder,
        "splits": f"{run}/splits.json",
    }
    with pytest.raises(UserError, match="name a --trained-with"):
        evaluate.evaluate(evaluate.Settings(pictures=0, shadow=8, out=str(tmp_path), **flags))
