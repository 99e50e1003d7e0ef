"""pretrain.py end to end on a few pictures: both stages, a kill in between, and going on from a finished folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cli import UserError
from diffusion import load_base
from embedded import emojis, pretrain
from settings import EMBEDDED


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Settings for a few steps on 60 public pictures and 20 private ones."""
    rng, work = np.random.default_rng(0), tmp_path / "work"
    work.mkdir()
    captions = [f"thing {i}, {style}" for i in range(30) for style in ("noto", "fluent")]
    np.savez(
        work / f"public{emojis.SIZE}.npz",
        captions=captions,
        images=rng.integers(0, 256, (60, 48, 48, 3), np.uint8),
    )
    private = (
        [f"{i}.png" for i in range(20)],
        [f"thing {i}" for i in range(20)],
        rng.integers(0, 256, (20, 48, 48, 3), np.uint8),
    )
    monkeypatch.setattr(emojis, "twemoji", lambda: private)
    small = {
        "vae_steps": 2,
        "vae_batch": 4,
        "unet_steps": 2,
        "unet_batch": 4,
        "no_compile": True,
        "threads": 1,
    }
    return pretrain.Settings(work=str(work), out=str(tmp_path / "base"), **small)


def test_both_stages_and_a_further_one(few, tmp_path):
    """What is written loads as a base; a second run changes nothing; a folder made from it keeps its autoencoder."""
    pretrain.main(few)
    unet = load_base(few.out).unet.state_dict()
    card = json.loads(Path(few.out, "pretraining.json").read_text())
    assert card["settings"]["unet_steps"] == 2 and card["public_images"] == 60
    assert (
        Path(few.work, "samples.png").is_file() and Path(few.work, "reconstructions.png").is_file()
    )
    pretrain.main(few)  # takes up the finished checkpoints
    again = load_base(few.out)
    assert all(torch.equal(again.unet.state_dict()[k], v) for k, v in unet.items())
    few.start, few.out, few.work = few.out, str(tmp_path / "further"), str(tmp_path / "work2")
    Path(few.work).mkdir()
    Path(tmp_path, "work", f"public{emojis.SIZE}.npz").rename(
        Path(few.work, f"public{emojis.SIZE}.npz")
    )
    pretrain.main(few)
    further = load_base(few.out)
    same = [torch.equal(further.unet.state_dict()[k], v) for k, v in unet.items()]
    assert not all(same)
    vaes = [b.pipeline.vae for b in (again, further)]
    assert all(
        torch.equal(a, b) for a, b in zip(*(v.state_dict().values() for v in vaes), strict=True)
    )
    assert vaes[0].config.scaling_factor == vaes[1].config.scaling_factor
    assert (
        json.loads(Path(few.out, "pretraining.json").read_text())["started_from"]["settings"][
            "unet_steps"
        ]
        == 2
    )


def test_psnr_is_the_formula(few):
    """10 log10(4 / mse) of pictures in [-1, 1], per picture."""
    vae = pretrain.load_pipeline(EMBEDDED).vae
    images = emojis.twemoji()[2][:5]
    pictures, values = pretrain.reconstruct(vae, images)
    mse = (pictures - pretrain.to_pixels(images)).square().mean((1, 2, 3))
    torch.testing.assert_close(values, 10 * torch.log10(4 / mse), rtol=1e-4, atol=1e-3)


def test_missing_sets_are_named(tmp_path):
    with pytest.raises(UserError, match=r"noto/icons.json is missing"):
        emojis.public(tmp_path / "icons", tmp_path)
