"""The grids of a run: what is in them and when, and that the training does not feel them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_run

import train
from command.errors import UserError
from curves import plots
from run import due, pictures
from run.precheck import stored
from run.resolve import resolve
from settings import Settings

PROMPTS = ["a violet circle", "costs $5 or $6"]


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Two runs of one seed, with pictures and without; all grids and all drawings of the first."""
    tmp, grids, drawn = tmp_path_factory.mktemp("pictures"), [], []
    honest, draw = plots.picture_rows, pictures.draw

    def seen(rows, above, groups, title):
        grids.append((rows, above, groups, title))
        return honest(rows, above, groups=groups, title=title)

    def counted(run, shown, steps):
        layer = next(iter(run.adapter.layers.values()))
        drawn.append((steps, layer.enabled, len(shown.noise)))
        return draw(run, shown, steps)

    flags = {"batch_size": 2, "proxy": "raw", "steps": 5, "save_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "picture_rows", seen)
        patch.setattr(pictures, "draw", counted)
        train.train(small(tmp / "with", samples=3, prompt=PROMPTS, **flags))
        train.train(small(tmp / "bare", samples=0, **flags))
    return tmp, grids, drawn


def test_the_training_does_not_feel_them(runs):
    """The same rows and the same weights, bit for bit, attacker's dropout included."""
    tmp, *_ = runs
    assert_same_run(tmp / "with", tmp / "bare", 5)
    assert not (tmp / "bare" / "samples").exists()


def test_a_grid_at_the_start_at_every_save_and_at_the_end(runs):
    """The base is drawn once for the small grids and once for the last one."""
    tmp, grids, drawn = runs
    files = sorted(path.name for path in (tmp / "with" / "samples").iterdir())
    assert files == [f"step-{step:06d}.png" for step in (0, 2, 4, 5)]
    few, last = 2 * pictures.FEW + len(PROMPTS), 2 * 3 + len(PROMPTS)
    on_the_way = [(pictures.FEW_STEPS, True, few)] * 2
    assert drawn == [
        (pictures.FEW_STEPS, False, few),
        *on_the_way,
        (pictures.STEPS, False, last),
        (pictures.STEPS, True, last),
    ]
    titles = [title for *_, title in grids]
    assert titles[0] == "Before the first step of smp" and titles[-1] == "smp, step 5 of 5"
    assert [list(rows) for rows, *_ in grids[:2]] == [["image", "base"], ["image", "base", "smp"]]


def test_columns_show_what_their_headings_say(runs, image_folder):
    """Images above their own captions, members first; prompts have no image; the first columns are
    those of every grid.
    """
    tmp, grids, _ = runs
    splits = json.loads((tmp / "with" / "splits.json").read_text())
    names = {
        Path(image_folder, f"{n[:-4]}.txt").read_text().strip(): role
        for role, found in splits.items()
        for n in found
    }
    for rows, above, groups, _ in grids:
        members, held_out, prompts = groups.values()
        assert members == held_out and prompts == 2 and above[-2:] == PROMPTS
        assert [names[c] for c in above[:members]] == ["member_test"] * members
        assert [names[c] for c in above[members:-2]] == ["nonmember_test"] * members
        assert [x is None for x in rows["image"]] == [False] * (2 * members) + [True] * 2
        assert {x.shape for row in rows.values() for x in row if x is not None} == {(32, 32, 3)}
    few, last = grids[0], grids[-1]
    assert few[1][:2] == last[1][:2] and few[1][2:4] == last[1][3:5]
    np.testing.assert_array_equal(few[0]["image"][0], last[0]["image"][0])
    np.testing.assert_array_equal(grids[0][0]["base"], grids[1][0]["base"])
    # the adapter has moved
    assert any((a != b).any() for a, b in zip(last[0]["base"], last[0]["smp"], strict=True))


def test_prompts_are_kept(runs):
    """In config.json, where --resume finds them; others are refused, and so is what is no text."""
    out = str(runs[0] / "with")
    assert stored(Settings(out=out, resume=True))[0].prompt == PROMPTS
    with pytest.raises(UserError, match="--prompt"):
        stored(Settings(out=out, resume=True, prompt=["other"]))
    for wrong in ("half \ud800", "x" * 10_001):
        with pytest.raises(UserError, match="--prompt"):
            resolve(Settings(out=f"{out}-new", prompt=["fine", wrong]))


@pytest.mark.parametrize(
    ("flags", "device", "size", "steps"),
    [
        ({}, "cpu", 48, [0, 4, 8]),
        ({}, "cpu", 512, [4]),
        ({}, "cuda", 512, [0, 4, 8]),
        ({"samples": 0}, "cuda", 48, []),
    ],
)
def test_when_there_is_one(flags, device, size, steps):
    """Of ten steps, every fourth of which is saved; of large pictures a CPU draws the first
    adapter's, and all wait for the last step.
    """
    base = SimpleNamespace(device=torch.device(device), size=size)
    run = SimpleNamespace(settings=Settings(steps=10, save_every=4, **flags), base=base)
    assert [k for k in range(11) if due.draws(run, k)] == steps
