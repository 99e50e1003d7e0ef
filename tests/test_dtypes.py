"""Targets, dtypes and methods through every command: a run trains with pictures, is stopped, goes
on, is evaluated and audited.  Every pair of target, dtype and method trains; the slower commands
have a few of them in half precision.
"""

import numpy as np
import pytest
import torch

import audit
import evaluate
import train
from attacks import paper
from diffusion import encode_captions, encode_images, loss_grid, residuals, sample
from files.bases import DTYPES, load_base
from files.whole import WholeUNet
from methods import directions
from report import figures, page
from run import watch
from run.folder import RunFolder

SQUARE = [  # every pair of target, dtype and method
    ("attention", "float32", "lora"),
    ("attention", "bfloat16", "smp"),
    ("attention", "float16", "distill"),
    ("all", "float32", "smp"),
    ("all", "bfloat16", "distill"),
    ("all", "float16", "lora"),
    ("full", "float32", "distill"),
    ("full", "bfloat16", "lora"),
    ("full", "float16", "smp"),
]
RUNS = [*SQUARE, (None, "bfloat16", "dp")]  # in float32 and with dp: tests/test_dp.py
EVALUATED = [SQUARE[8], (None, "bfloat16", "dp")]
AUDITED = [("full", "bfloat16", "lora")]
DISTILL = {"teachers": 2, "teacher_steps": 1}


def name(case):
    """Of a test."""
    return "-".join(filter(None, case))


@pytest.fixture(scope="module")
def flags(tiny_base, image_folder, tmp_path_factory):
    """A function: the flags of a run of two steps."""
    file = str(tmp_path_factory.mktemp("directions") / "d.safetensors")
    made = {"model": tiny_base, "data": [image_folder], "out": file, "target": "all"}
    directions.make(directions.Flags(**made, steps=2, batch_size=4, directions=2))

    def of(target, dtype, method):
        lora = {"rank": None, "alpha": None} if target in (None, "full") else {}
        found = {"target": target, "dtype": dtype, "method": method, "steps": 2, "lr": 1e-3}
        found |= {"rank": 2, "alpha": 4.0, "proxy": "pooled"} | lora
        found |= DISTILL if method == "distill" else {}
        return found | ({"directions": file} if method == "dp" else {})

    return of


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Without what has one dtype: the report and long training of attackers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "evaluation", lambda *_: None)
        patch.setattr(page, "write", lambda *_: None)
        patch.setattr(evaluate, "conclude", lambda *_: None)
        patch.setattr(paper, "FRESH", 1)
        patch.setattr(paper, "EPOCHS", 1)
        patch.setattr(watch, "DRAWS", 1)
        yield


@pytest.mark.parametrize("case", RUNS, ids=name)
def test_train_and_evaluate(case, flags, small, tmp_path, capsys, stopped_and_gone_on_with):
    """No grid of pictures is left out, and all numbers are finite."""

    def begin(folder):
        train.train(small(folder, members=10, **flags(*case)))

    stopped_and_gone_on_with(begin, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert "no pictures" not in capsys.readouterr().out
    assert (folder.path / "samples" / "step-000002.png").is_file()
    assert all(np.isfinite(row["adaptation_loss"]) for row in folder.rows()[1:])
    if case in EVALUATED:
        few = {"pictures": 2, "sampling_steps": 1, "test_nonmembers": 2}
        (record,) = evaluate.evaluate(evaluate.Settings(runs=[str(folder)], **few))
        assert np.isfinite(record["adapted"]["quality"]["frechet_held_out"])


@pytest.mark.parametrize("case", AUDITED, ids=name)
def test_audit(case, flags, tiny_base, image_folder, tmp_path, in_thread):
    """Of four adapters."""
    places = {"model": tiny_base, "data": image_folder, "out": str(tmp_path)}
    given = flags(*case) | places | {"adapters": 4, "pool": 10, "batch_size": 1, "pictures": 1}
    record = audit.audit(audit.Audit(**given, save_every=2))
    assert np.isfinite(record["steps"]["2"]["held_out_loss"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_unet_beside_a_base_in_any_dtype(dtype, tiny_base):
    """What notebooks ask: the UNet in float32, the base in its dtype, captions and pictures in
    theirs; pictures and losses are those of float32, to rounding.
    """
    found = []
    for each in ("float32", dtype):
        base = load_base(tiny_base, dtype=each)
        text, empty = (encode_captions(base, [c]) for c in ("a red circle", ""))
        latents = encode_images(base, np.full((1, 32, 32, 3), 90, np.uint8))
        noise = torch.randn((1, *base.latent_shape), generator=torch.Generator().manual_seed(0))
        whole = WholeUNet(base.unet)
        before = sample(base, text, empty, noise, 4)
        for p in whole.parameters():
            p.mul_(1.2)
        for inside in (whole.disabled, whole.folded):
            with inside():
                (_, _, _, off) = next(residuals(base, latents, text))
                assert off.dtype == torch.float32
                grid = loss_grid(base, latents, text)
                found.append((sample(base, text, empty, noise, 4).astype(int), grid))
        assert abs(found[-2][0] - before).mean() < 2  # the base again
        assert abs(found[-1][0] - found[-2][0]).mean() > 4
    for (pictures, grid), (wanted, losses) in zip(found[2:], found[:2], strict=True):
        assert abs(pictures - wanted).mean() < 2
        assert torch.allclose(grid, losses, rtol=0.02)
