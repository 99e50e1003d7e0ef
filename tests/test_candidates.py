"""The search for members among candidates: its shares hold by simulation, and it finds those that
are planted in the answers of an adapter."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import lora
from attacks import audit_tasks, candidates
from command.errors import UserError
from command.whole_files import write_json
from files import adapters as files
from files.bases import load_base

PARTS = {"data": "candidates", "nonmembers": "others", "trained_with": "how.json"}

pytestmark = pytest.mark.usefixtures("elsewhere")


# ---- the list ----


def test_p_values_count_the_others_by_hand():
    """Ties count as higher."""
    found = candidates.p_values(np.array([3.0, 1.0, 0.0]), np.array([2.0, 1.0, 0.5, 4.0]))
    assert found.tolist() == [2 / 5, 4 / 5, 1.0]


def test_wrong_shares_by_hand():
    """m p / j of Benjamini & Hochberg, the least over longer lists; with few p above a half m is
    Storey's estimate.
    """
    found = candidates.wrong_shares(np.array([0.7, 0.01, 0.03, 0.035]))
    np.testing.assert_allclose(found, [0.7, 0.04, 4 * 0.035 / 3, 4 * 0.035 / 3])
    found = candidates.wrong_shares(np.array([0.5, 0.01, 0.03, 0.035]))
    np.testing.assert_allclose(found, [0.25, 0.02, 2 * 0.035 / 3, 2 * 0.035 / 3])
    assert candidates.wrong_shares(np.array([1.0, 1.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("members", [0, 10, 40])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_no_more_are_wrong_than_the_list_says(members, shift):
    """2,000 searches among fifty candidates, with any number of members and an adapter that is
    better on all pictures: the mean share of wrong ones is at most WRONG, and not far below.
    """
    rng, wrong, listed = np.random.default_rng(members), [], []
    for _ in range(2000):
        score = rng.normal(shift, 1, 1050)
        score[:members] += 3
        p = candidates.p_values(score[:50], score[50:])
        named = candidates.wrong_shares(p) <= candidates.WRONG
        wrong.append(named[members:].sum() / max(named.sum(), 1))
        listed.append(named[:members].sum())
    error = np.std(wrong) / np.sqrt(len(wrong))
    assert np.mean(wrong) <= candidates.WRONG + 2.5 * error
    assert np.mean(wrong) > 0.6 * candidates.WRONG - 2.5 * error
    assert np.mean(listed) >= 0.6 * members


@pytest.mark.parametrize("listed", [0, 1, 20])
def test_the_sentence_says_how_many_are_wrong(listed):
    """Rounded up: of one picture one."""
    found = candidates.sentence(listed, 60)
    assert ("None of the 60" in found) == (listed == 0)
    assert listed == 0 or f"{-(-listed // 10)} of these {listed}." in found


# ---- the search ----


@pytest.fixture(scope="module")
def taken(tiny_base, tmp_path_factory):
    """A function of other flags: those of a search for the twelve members of an adapter among
    eighteen candidates, with 22 others.
    """
    folder = tmp_path_factory.mktemp("taken")
    rng = np.random.default_rng(5)
    for part, names in {"candidates": {"trained": 12, "mine": 6}, "others": {"other": 22}}.items():
        (folder / part).mkdir()
        for name in (f"{kind}-{i:02d}" for kind, count in names.items() for i in range(count)):
            blocks = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(blocks).save(folder / part / f"{name}.png")
            (folder / part / f"{name}.txt").write_text(f"blocks {name}\n")
    how = {"method": "lora", "steps": 1, "batch_size": 4, "schedule": "constant"}
    (folder / "run").mkdir()  # where the adapter was trained, finished
    write_json(folder / "run" / "config.json", {"settings": how, "summary": {}})
    how["out"] = str(folder / "run")
    write_json(folder / "how.json", how)
    unet = load_base(tiny_base).unet
    adapter = lora.inject(unet, "attention", 2, 4.0, torch.Generator().manual_seed(0))
    files.save(adapter, folder / "adapter", {})
    common = {"adapter": str(folder / "adapter"), "model": tiny_base, "jobs": 1, "shadow": 6}
    common |= {part: str(folder / name) for part, name in PARTS.items()}
    return lambda **more: evaluate.Settings(**common | more)


def planted(base, data, plan, adapter, drawn=None):
    """Answers of a model that leaks: losses of members are lower."""
    inside = [i for role, index in data.roles.items() if role.startswith("member") for i in index]
    member = np.array([name.startswith("trained") for name in plan.names])
    if inside:  # a shadow
        member = np.isin(np.arange(plan.pool), inside)
    rng = np.random.default_rng(inside or 1)
    log = rng.normal(0, 0.2, (plan.pool, 10, 4)) - member[:, None, None]
    log += np.random.default_rng(7).normal(0, 1, (plan.pool, 1, 1))  # how hard a picture is
    shape = {"predictions": (10, 8), "held_out": ()}
    found = {name: rng.normal(size=(plan.pool, *rest)) for name, rest in shape.items()}
    return found | {"losses": np.exp(log), "sima": np.exp(log[:, :, 0])}


def test_it_finds_the_members(taken, in_thread, tmp_path, monkeypatch, capsys):
    """The list holds the members and hardly anyone else; the ranking is on disk, every candidate
    once; shadows are trained as the adapter was, once, on half of the pictures.
    """
    monkeypatch.setattr(audit_tasks, "ask", planted)
    (record,) = evaluate.evaluate(taken(out=str(tmp_path / "out")))
    named = record["listed"]
    assert {name for name in named if name.startswith("trained")} == {
        f"trained-{i:02d}.png" for i in range(12)
    }
    assert len(named) <= 14 and record["sentence"] in capsys.readouterr().out
    with open(tmp_path / "out" / "candidates.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == record["candidates"] == 18 and record["others"] == 22
    assert [r["image"] for r in rows[: len(named)]] == named
    answers = list(tmp_path.glob("out/shadows-*/adapters/*/answers.npz"))
    before = {path: path.stat().st_mtime_ns for path in answers}
    assert len(before) == 6 and record["shadow_members"] == 20
    shadow = load_file(answers[0].parent / "adapter" / "pytorch_lora_weights.safetensors")
    assert {min(t.shape[:2]) for t in shadow.values()} == {2}  # the rank of the adapter
    assert evaluate.evaluate(taken(out=str(tmp_path / "out")))[0]["listed"] == named
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_cannot_be_searched_is_refused(taken, tmp_path, image_folder):
    """In one sentence each, before anything is trained."""
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(Path(taken().nonmembers).iterdir())[:8]:
        (few / path.name).write_bytes(path.read_bytes())
    write_json(tmp_path / "no.json", [1])
    write_json(tmp_path / "odd.json", {"stepz": 3})
    for flags, sentence in (
        ({"nonmembers": str(few)}, "18 candidates and 4 pictures"),
        ({"trained_with": str(tmp_path / "no.json")}, "does not hold flags of train.py"),
        (
            {"trained_with": str(tmp_path / "odd.json")},
            "there is no flag stepz; did you mean steps",
        ),
        ({"data": None}, "--data is missing"),
        ({"nonmembers": None}, "--nonmembers is missing"),
        ({"members": image_folder}, "remove --members"),
        ({"shadow": 0}, "give their number with --shadow"),
        (
            {"shadow": 4, "trained_with": str(tmp_path / "five.json")},
            "is too few for these pictures",
        ),
    ):
        write_json(tmp_path / "five.json", {"method": "lora", "members": 8, "steps": 2})
        with pytest.raises(UserError, match=sentence):
            evaluate.evaluate(taken(**flags, out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()
