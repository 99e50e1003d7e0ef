"""--resume under every flag that changes a run: every pair of values is in one run of COMBINATIONS,
which ends in the same bits whether it was interrupted or not.
"""

import copy
import os
import signal
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from conftest import assembled, assert_same_run

import train
from algorithm import algorithm_1
from files.bases import load_base
from files.encode import encode
from files.images import load_images
from run import pictures, prepare, snapshot, watch
from run.keeper import Keeper
from settings import Settings

STEPS = 6
FLAGS = ("method", "proxy", "accumulate", "gradient_checkpointing", "init", "dtype", "target")
FLAGS += ("batch_size", "regularised")
COMBINATIONS = [  # a value for each of FLAGS
    ("lora", "calibrated", 1, False, True, "bfloat16", "attention", 2, False),
    ("lora", "pooled", 1, True, False, "bfloat16", "full", 3, True),
    ("lora", "raw", 2, False, False, "float32", "all", 3, False),
    ("mp", "calibrated", 2, True, False, "bfloat16", "all", 2, False),
    ("mp", "pooled", 1, False, False, "float32", "attention", 3, False),
    ("mp", "raw", 1, False, True, "float32", "full", 3, True),
    ("smp", "calibrated", 2, True, False, "float32", "attention", 3, True),
    ("smp", "pooled", 1, False, True, "bfloat16", "full", 2, True),
    ("smp", "raw", 1, False, True, "bfloat16", "all", 2, False),
    ("smp-detached", "calibrated", 1, False, False, "float32", "full", 2, False),
    ("smp-detached", "pooled", 2, False, False, "float32", "all", 2, True),
    ("smp-detached", "raw", 2, False, False, "float32", "attention", 2, False),
    ("smp-detached", "raw", 2, True, True, "bfloat16", "full", 3, False),
]
REGULARISED = {"schedule": "cosine", "flip": True, "crop": True, "normalise": True}


@pytest.fixture(scope="module")
def loaded_once(tiny_base, image_folder):
    """Base and images are loaded and encoded once per dtype; what is only looked at is left out."""
    images = load_images(image_folder, 32)
    bases = {d: load_base(tiny_base, dtype=d) for d in ("float32", "bfloat16")}
    encoded = {base.unet.dtype: encode(base, images, {}) for base in bases.values()}

    def load(model, device, dtype, size):
        return replace(bases[dtype], unet=copy.deepcopy(bases[dtype].unet))

    def encode_again(base, images, roles, few):
        return replace(encoded[base.unet.dtype], roles=roles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_base", load)
        patch.setattr(prepare, "load_images", lambda *_: images)
        patch.setattr(prepare, "encode", encode_again)
        patch.setattr(pictures, "sample_grid", lambda *_: None)
        patch.setattr(pictures, "training_curves", lambda *_: None)
        patch.setattr(watch, "held_out", lambda *_: {"nonmember_val_loss": 1.0})
        patch.setattr(watch, "verdict", lambda *_: (0.5, (0.0, 1.0)))
        yield


@pytest.fixture(scope="module")
def first_adapters(loaded_once, small, tmp_path_factory):
    """Folders of adapters to start from, by target."""
    tmp, full = tmp_path_factory.mktemp("first"), {"rank": None, "alpha": None, "lr": 1e-4}
    for target in ("attention", "full"):
        more = full if target == "full" else {}
        train.train(small(tmp / target, method="lora", target=target, steps=1, **more))
    return {"full": tmp / "full" / "adapter", "LoRA": tmp / "attention" / "adapter"}


def test_every_pair_of_values_is_there():
    """Nothing is said of triples."""
    values = [{c[k] for c in COMBINATIONS} for k in range(len(FLAGS))]
    assert [len(v) for v in values] == [4, 3, 2, 2, 2, 2, 3, 2, 2]
    for i, j in combinations(range(len(FLAGS)), 2):
        pairs = {(c[i], c[j]) for c in COMBINATIONS}
        assert len(pairs) == len(values[i]) * len(values[j]), (FLAGS[i], FLAGS[j])


def flags(first_adapters, combination):
    """The settings that a combination stands for."""
    found = dict(zip(FLAGS, combination, strict=True))
    full = found["target"] == "full"
    found |= {"rank": None, "alpha": None, "lr": 1e-4} if full else {}
    found |= REGULARISED if found.pop("regularised") else {}
    init = str(first_adapters["full" if full else "LoRA"]) if found["init"] else None
    return found | {"init": init, "steps": STEPS, "norms_every": 1000, "samples": 0}


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(map(str, c)))
def test_interrupted_is_uninterrupted(
    small, first_adapters, tmp_path, stopped_and_gone_on_with, combination
):
    """Killed in its fifth step, with states of every second: it goes on from the fourth."""
    more = flags(first_adapters, combination)
    train.train(small(tmp_path / "whole", state_every=STEPS, **more))

    def begin(folder):
        train.train(small(folder, state_every=2, **more))

    stopped_and_gone_on_with(begin, tmp_path / "part", 5)
    assert_same_run(tmp_path / "whole", tmp_path / "part", STEPS)


DISTILL = {"method": "distill", "teachers": 2, "teacher_steps": 2}
DISTILL |= {"flip": True, "crop": True}


@pytest.fixture(scope="module")
def distilled(loaded_once, small, tmp_path_factory):
    """A run of two teachers of two steps and a student of three that was left alone."""
    out = tmp_path_factory.mktemp("distilled") / "whole"
    train.train(small(out, **DISTILL))
    return out


@pytest.mark.parametrize("step", range(1, 8))
def test_interrupted_among_teachers(small, distilled, tmp_path, stopped_and_gone_on_with, step):
    """In any step of a teacher or of the student: the finished teachers are as they were."""

    def begin(folder):
        train.train(small(folder, state_every=1, **DISTILL))

    stopped_and_gone_on_with(begin, tmp_path / "part", step)
    assert_same_run(distilled, tmp_path / "part", 3)
    assert not (tmp_path / "part" / "state").exists()


def test_asked_to_stop_among_teachers(small, distilled, tmp_path, monkeypatch, capsys):
    """A signal in the first step of a teacher ends the run after the next one; nothing is lost."""
    honest, steps = Keeper.state_due, []

    def asked(*given):
        steps.append(1)
        if len(steps) == 1:  # a second signal would end it at once
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*given)

    monkeypatch.setattr(Keeper, "state_due", asked)
    s = small(tmp_path / "part", **DISTILL)
    with pytest.raises(SystemExit) as stop:
        train.train(s)
    monkeypatch.undo()
    assert stop.value.code == 128 + signal.SIGTERM
    assert "to continue: python train.py --out" in capsys.readouterr().err
    train.train(Settings(out=s.out, resume=True))
    assert_same_run(distilled, tmp_path / "part", 3)


def test_what_a_kill_left_half_written_is_removed(loaded_once, small, tmp_path):
    """Of the training alone: an evaluation may be writing beside it."""
    ours = ["config.json", "metrics.jsonl", "curves.png", "adapter/a.safetensors"]
    ours += ["checkpoints/step-000001/a.safetensors", "samples/step-000001.png"]
    theirs = ["eval.json", "report.html", "scores/grid.npz", "figures/roc.png"]
    for name in [*ours, *theirs]:
        path = tmp_path / "run" / f"{name}.0123456789ab.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    train.train(small(tmp_path / "run", method="lora", steps=1, resume=True))
    left = {str(p.relative_to(tmp_path / "run")) for p in tmp_path.rglob("*.tmp")}
    assert left == {f"{name}.0123456789ab.tmp" for name in theirs}


def test_restored_tensors_are_fresh(loaded_once, small, tmp_path):
    """A view into a file lies where it may, and sums round by where they lie: every tensor that a
    run takes up is an allocation of its own, aligned as torch aligns them.
    """
    run, second = (assembled(small(tmp_path / "run", proxy="raw")) for _ in range(2))
    for _ in algorithm_1(run, (1, 2, 3)):
        pass
    given, askew = {}, {}
    for name, tensor in snapshot.tensors_of(run).items():
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)  # one element off
        askew[name] = room
        given[name] = room[1:].view(tensor.shape).copy_(tensor)
    snapshot.restore(second, given)
    kept = snapshot.tensors_of(second)
    assert kept.keys() == given.keys()
    assert {"queue/0", "optimizer/0.exp_avg", "attacker_optimizer/0.exp_avg"} <= set(kept)
    for name, tensor in kept.items():
        assert torch.equal(tensor, given[name]), name
        where = askew[name].data_ptr(), askew[name].data_ptr() + askew[name].nbytes
        assert not where[0] <= tensor.data_ptr() < where[1], name
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel(), name


def test_a_state_behind_the_summary_is_deleted(small, no_pictures, tmp_path):
    """A run that was killed while it cleaned up; with --method dp the state holds its secret."""
    train.train(small(tmp_path / "run", method="lora", steps=1, samples=0))
    left = tmp_path / "run" / "state" / "step-000001.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"secret")
    train.train(Settings(out=str(tmp_path / "run"), resume=True))
    assert not left.parent.exists()
