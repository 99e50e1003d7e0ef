"""--resume under every flag that changes a run: every pair of values is in one run of COMBINATIONS,
which ends in the same bits whether it was interrupted or not.
"""

import copy
import json
import shutil
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from run.learner import Learner
from safetensors.torch import load_file

import train
from files.bases import load_base
from files.encode import encode
from files.images import load_images
from run import pictures
from run import prepare as prepared
from run import watch as monitor
from run.processes import Processes
from settings import Settings

AFTER = 2  # steps after the interruption
FLAGS = ("method", "proxy", "attacker_members", "accumulate", "gradient_checkpointing")
FLAGS += ("init", "dtype", "target", "batch_size")
COMBINATIONS = [
    # step of the interruption, then a value for each of FLAGS
    (6, "smp", "raw", "reused", 2, False, False, "float32", "attention", 2),
    (3, "smp-detached", "pooled", "drawn", 1, True, True, "bfloat16", "all", 3),
    (2, "mp", "raw", "drawn", 2, True, False, "bfloat16", "attention", 3),
    (4, "mp", "pooled", "reused", 1, False, True, "float32", "all", 2),
    (3, "lora", "raw", "drawn", 1, False, False, "bfloat16", "all", 2),
    (2, "lora", "pooled", "reused", 2, True, True, "float32", "attention", 3),
    (3, "smp", "raw", "reused", 1, True, True, "bfloat16", "attention", 2),
    (4, "smp-detached", "pooled", "reused", 2, True, False, "float32", "all", 2),
    (2, "smp-detached", "raw", "drawn", 1, False, True, "float32", "attention", 3),
    (3, "smp", "pooled", "drawn", 2, True, True, "float32", "all", 3),
]


@pytest.fixture(scope="module")
def prepare_once(tiny_base, image_folder):
    """Base and images are loaded and encoded once per dtype; what is only looked at is left out."""
    images = load_images(image_folder, 32)
    bases = {d: load_base(tiny_base, dtype=d) for d in ("float32", "bfloat16")}
    encoded = {d: encode(base, images, {}) for d, base in bases.items()}

    def load(model, device, dtype, size):
        return replace(bases[dtype], unet=copy.deepcopy(bases[dtype].unet))

    def encode_again(base, images, roles):
        return replace(encoded[str(base.unet.dtype).removeprefix("torch.")], roles=roles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "load_base", load)
        patch.setattr(prepared, "load_images", lambda *_: images)
        patch.setattr(prepared, "encode", encode_again)
        patch.setattr(pictures, "sample_grid", lambda *_: None)
        patch.setattr(pictures, "training_curves", lambda *_: None)
        patch.setattr(monitor, "held_out", lambda *_: {"nonmember_val_loss": 1.0})
        patch.setattr(monitor, "verdict", lambda *_: (0.5, (0.0, 1.0)))
        yield Settings(
            model=tiny_base,
            data=image_folder,
            members=20,
            rank=2,
            alpha=4.0,
            lr=0.01,
            attacker_lr=0.01,
            schedule="constant",
            save_every=1000,
            norms_every=1000,
        )


@pytest.fixture(scope="module")
def first_adapter(prepare_once, tmp_path_factory):
    """Folder of an adapter to start from."""
    out = tmp_path_factory.mktemp("first") / "run"
    made = {"method": "lora", "target": "attention", "batch_size": 2, "steps": 1}
    train.train(replace(prepare_once, out=str(out), **made))
    return str(out / "adapter")


def test_every_pair_of_values_is_there():
    """Of the three flags that decide the attacker's batches every triple is."""
    values = [sorted({c[k] for c in COMBINATIONS}, key=str) for k in range(1, len(FLAGS) + 1)]
    for i, j in combinations(range(len(FLAGS)), 2):
        pairs = {(c[i + 1], c[j + 1]) for c in COMBINATIONS}
        assert len(pairs) == len(values[i]) * len(values[j]), (FLAGS[i], FLAGS[j])
    triples = {c[2:5] for c in COMBINATIONS if c[1] != "lora"}
    assert len(triples) == 8


def result(out):
    """Rows without their times, and the tensors of adapter and attacker."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tensors = {}
    for file in sorted(out.glob("a*/*.safetensors")):
        tensors |= {f"{file.parent.name}/{k}": t for k, t in load_file(file).items()}
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], tensors


REGULARISED = {"schedule": "cosine", "ema": 0.9, "caption_dropout": 0.3, "flip": True}
REGULARISED |= {"dropout": 0.2, "normalise": True}


MORE = [COMBINATIONS[0] + (added,) for added in (REGULARISED, {"proxy": "calibrated"})]


@pytest.mark.parametrize("combination", [*COMBINATIONS, *MORE], ids=str)
def test_interrupted_is_uninterrupted(
    prepare_once, first_adapter, tmp_path, monkeypatch, combination
):
    """The folder as it is after step k, continued, ends as the run that went on."""
    stop, *values = combination
    flags = dict(zip(FLAGS, values, strict=False))
    flags["init"] = first_adapter if flags["init"] else None
    flags |= values[len(FLAGS)] if len(values) > len(FLAGS) else {}
    settings = replace(prepare_once, steps=stop + AFTER, state_every=stop, **flags)
    record = train.record

    def record_and_copy(run, learner, row, *rest):
        record(run, learner, row, *rest)
        if row["step"] == stop:
            shutil.copytree(run.folder.path, tmp_path / "part")

    monkeypatch.setattr(train, "record", record_and_copy)
    train.train(replace(settings, out=str(tmp_path / "whole")))
    monkeypatch.setattr(train, "record", record)
    torch.manual_seed(1)  # another process would be elsewhere in the global stream
    train.train(Settings(out=str(tmp_path / "part"), resume=True))
    (rows, whole), (rows_again, part) = result(tmp_path / "whole"), result(tmp_path / "part")
    assert len(rows) == stop + AFTER + 1 and rows == rows_again
    assert whole.keys() == part.keys() and len(whole) > 8
    different = [name for name in whole if not torch.equal(whole[name], part[name])]
    assert not different, different


def test_what_a_kill_left_half_written_is_removed(prepare_once, tmp_path):
    """Of the training alone: an evaluation may be writing beside it."""
    ours = ["config.json", "metrics.jsonl", "curves.png", "adapter/a.safetensors"]
    ours += ["checkpoints/step-000001/a.safetensors", "samples/step-000001.png"]
    theirs = ["eval.json", "report.html", "scores/grid.npz", "figures/roc.png"]
    for name in [*ours, *theirs]:
        path = tmp_path / "run" / f"{name}.0123456789ab.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    flags = {"method": "lora", "target": "attention", "batch_size": 2, "steps": 1, "resume": True}
    train.train(replace(prepare_once, out=str(tmp_path / "run"), **flags))
    left = {str(p.relative_to(tmp_path / "run")) for p in tmp_path.rglob("*.tmp")}
    assert left == {f"{name}.0123456789ab.tmp" for name in theirs}


def test_restored_tensors_are_fresh(prepare_once, tmp_path):
    """A view into a file lies where it may, and sums round by where they lie: every tensor that a
    learner takes up is an allocation of its own, aligned as torch aligns them.
    """
    flags = {"method": "smp", "proxy": "raw", "attacker_members": "reused"}
    flags |= {"target": "attention", "batch_size": 4, "dtype": "float32", "lam": 1.0, "epochs": 1}
    run = train.prepare(replace(prepare_once, out=str(tmp_path / "run"), **flags), Processes())
    learner = Learner(run)
    for _ in train.algorithm_1(run, learner, (1, 2, 3)):
        pass
    given, askew = {}, {}
    for name, tensor in learner.tensors().items():
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)  # one element off
        askew[name] = room
        given[name] = room[1:].view(tensor.shape).copy_(tensor)
    second = Learner(run)
    second.restore(given)
    kept = second.tensors()
    assert kept.keys() == given.keys() and {"reused/0", "attacker_optimizer/0.exp_avg"} <= set(kept)
    for name, tensor in kept.items():
        assert torch.equal(tensor, given[name]), name
        where = askew[name].data_ptr(), askew[name].data_ptr() + askew[name].nbytes
        assert not where[0] <= tensor.data_ptr() < where[1], name
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel(), name
