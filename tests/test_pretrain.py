"""embedded/pretrain.py on a few pictures: both stages, a kill in each, and a folder further."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion
from command.errors import UserError
from embedded import pretrain, stage, train_unet, train_vae
from files import emojis
from files.bases import load_base
from settings import EMBEDDED

ROOT = Path(__file__).parent.parent


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Settings for a few steps on 60 public pictures and 20 private ones."""
    rng, work = np.random.default_rng(0), tmp_path / "work"
    work.mkdir()
    captions = [f"thing {i}, {style}" for i in range(30) for style in ("noto", "fluent")]
    images = rng.integers(0, 256, (60, 48, 48, 3), np.uint8)
    np.savez(work / f"public{emojis.SIZE}.npz", captions=captions, images=images)
    names = [f"thing {i}" for i in range(20)]
    private = names, names, rng.integers(0, 256, (20, 48, 48, 3), np.uint8)
    monkeypatch.setattr(emojis, "twemoji", lambda: private)
    small = {"vae_steps": 2, "vae_batch": 4, "unet_steps": 2, "unet_batch": 4}
    folders = {"work": str(work), "out": str(tmp_path / "base")}
    return pretrain.Settings(**folders, **small, no_compile=True, threads=1)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_both_stages_and_a_further_one(few, tmp_path, monkeypatch):
    """What is written loads as a base; a second run changes nothing; one from it keeps the VAE."""
    honest = diffusion.sample
    monkeypatch.setattr(diffusion, "sample", lambda *given: honest(*given[:4], 2))  # of 50 steps
    pretrain.main(few)
    first = load_base(few.out)
    card = json.loads(Path(few.out, "pretraining.json").read_text())
    assert card["settings"]["unet_steps"] == 2 and card["public_images"] == 60
    assert all(Path(few.work, f"{name}.png").is_file() for name in ("samples", "reconstructions"))
    monkeypatch.setattr(pretrain, "show", lambda settings, captions: None)  # slow, and seen above
    pretrain.main(few)  # loads the finished state
    again = load_base(few.out)
    assert equal(again.unet, first.unet) and equal(again.pipeline.vae, first.pipeline.vae)
    few.start, few.out = few.out, str(tmp_path / "further")
    with pytest.raises(
        UserError, match=r"work/unet is the state of .*give this run another --work"
    ):
        pretrain.main(few)
    public = Path(few.work, f"public{emojis.SIZE}.npz")
    few.work = str(tmp_path / "work2")
    Path(few.work).mkdir()
    public.rename(Path(few.work, public.name))
    pretrain.main(few)
    further = load_base(few.out)
    assert not equal(further.unet, first.unet) and equal(further.pipeline.vae, first.pipeline.vae)
    assert further.pipeline.vae.config.scaling_factor == first.pipeline.vae.config.scaling_factor
    card = json.loads(Path(few.out, "pretraining.json").read_text())
    assert card["started_from"]["settings"]["unet_steps"] == 2


def test_a_killed_stage_goes_on_to_the_same_weights(few, tmp_path, monkeypatch):
    """Bit for bit, for both stages; the seconds before the kill are counted."""
    captions, images = emojis.public(Path("icons"), Path(few.work))
    few.vae_steps, few.unet_steps, few.save_minutes = 4, 4, 0

    def trained():
        vae, _ = train_vae.train_vae(few, images)
        return vae, train_unet.train_unet(few, vae, captions, images).model

    whole = trained()
    few.work = str(tmp_path / "killed")
    for module, name in ((train_vae, "augment"), (train_unet, "unet_loss")):
        calls, real = [], getattr(module, name)

        def third_call_dies(*arguments, calls=calls, real=real):
            calls.append(0)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, third_call_dies)
            trained()
    saved = [path.name for path in stage.state.files(Path(few.work, "unet"))]
    assert saved == ["step-000001.safetensors", "step-000002.safetensors"]
    before = stage.state.load(Path(few.work, "unet"))[2]["seconds"]
    resumed = trained()
    assert equal(resumed[0], whole[0]) and equal(resumed[1], whole[1])
    assert stage.state.load(Path(few.work, "unet"))[2]["seconds"] > before > 0


def test_cosine_rises_and_falls():
    """A tenth of the way up at the first of ten steps, half way down in the middle, 1 % at last."""
    assert stage.cosine(0, 1000, 10) == pytest.approx(0.1, rel=1e-4)
    assert stage.cosine(500, 1000, 10) == pytest.approx(0.505)
    assert stage.cosine(1000, 1000, 10) == pytest.approx(0.01)


def test_augmented_white_stays_white():
    """Zoom and shift bring in white, and mixing the channels keeps it."""
    white = torch.ones(16, 3, 12, 12)
    moved = train_vae.augment(white, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, white)


def test_noise_loss_is_the_formula():
    """A UNet that predicts 0 has error mean(noise^2), weighted by min(SNR, gamma) / SNR."""

    class Zero:
        def __call__(self, noisy, timesteps, text):
            self.sample = torch.zeros_like(noisy)
            return self

    abar = torch.linspace(0.99, 0.01, 1000)
    noise, t = torch.full((2, 1, 2, 2), 2.0), torch.tensor([0, 999])
    error, weighted = train_unet.unet_loss(
        Zero(), lambda ids: [ids], abar, 5.0, noise, torch.zeros(2, 1), t, noise
    )
    assert error.item() == pytest.approx(4)
    assert weighted.item() == pytest.approx((4 * 5 / 99 + 4) / 2, rel=1e-4)  # SNR 99 and 1 / 99


def test_psnr_is_the_formula(few):
    """10 log10(4 / mse) of pictures in [-1, 1], per picture."""
    vae = load_base(EMBEDDED).pipeline.vae
    images = emojis.twemoji()[2][:5]
    pictures, values = train_vae.reconstruct(vae, images)
    mse = (pictures - train_vae.to_pixels(images)).square().mean((1, 2, 3))
    torch.testing.assert_close(values, 10 * torch.log10(4 / mse), rtol=1e-4, atol=1e-3)


def test_missing_sets_are_named(tmp_path):
    with pytest.raises(UserError, match=r"noto/icons.json is missing: see python -m embedded"):
        emojis.public(tmp_path / "icons", tmp_path)


def test_help_and_a_mistyped_flag_import_nothing_heavy():
    """Both are answered without torch, in well under the time that importing it takes."""
    command = [sys.executable, "-X", "importtime", "-m", "embedded.pretrain"]
    began = time.monotonic()
    answer = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and "--unet-steps" in answer.stdout
    assert "| torch" not in answer.stderr and time.monotonic() - began < 5
    wrong = subprocess.run(
        [*command[:1], "-m", command[-1], "--unet", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ")
