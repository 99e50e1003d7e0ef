"""diffusion.py: the noise process and the caches against diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS

import diffusion
from diffusion import (
    add_noise,
    ddim,
    encode_captions,
    encode_images,
    loss_grid,
    prediction_target,
    sample,
    squared_error,
)
from files.bases import load_base
from files.encode import encode
from files.images import Images
from lora import inject
from settings import EMBEDDED


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base)


@pytest.fixture
def batch():
    """latents, text, timesteps, noise of four examples."""
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=g)
    return latents, torch.randn(4, 16, 32, generator=g), torch.tensor([0, 50, 500, 999]), noise


def test_add_noise_equals_diffusers(base, batch):
    """z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, with SD's abar."""
    latents, _, timesteps, noise = batch
    want = base.pipeline.scheduler.add_noise(latents, noise, timesteps)
    assert torch.allclose(add_noise(latents, noise, timesteps, base.abar), want, atol=1e-6)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(base.abar.numpy(), np.cumprod(1 - betas), rtol=1e-4)


def test_targets_equal_diffusers(base, batch):
    """eps itself, and v = sqrt(abar) eps - sqrt(1 - abar) z0."""
    latents, _, timesteps, noise = batch
    assert prediction_target(latents, noise, timesteps, base.abar, "epsilon") is noise
    v = prediction_target(latents, noise, timesteps, base.abar, "v_prediction")
    want = base.pipeline.scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(v, want, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_squared_error_by_hand(tiny_base, tiny_base_v, batch, prediction):
    """e = (target - f(z_t, t, tau(y)))^2, elementwise, one example at a time with diffusers' own
    noising.
    """
    base = load_base(tiny_base if prediction == "epsilon" else tiny_base_v)
    assert base.prediction == prediction
    latents, text, timesteps, noise = batch
    error = squared_error(base, latents, text, timesteps, noise)
    assert error.shape == (4, 4, 8, 8) and error.dtype == torch.float32
    for i in range(4):
        one = slice(i, i + 1)
        scheduler = base.pipeline.scheduler
        noisy = scheduler.add_noise(latents[one], noise[one], timesteps[one])
        v = scheduler.get_velocity(latents[one], noise[one], timesteps[one])
        target = noise[one] if prediction == "epsilon" else v
        pred = base.unet(noisy, timesteps[i], encoder_hidden_states=text[one]).sample
        assert torch.allclose(error[one], (target - pred) * (target - pred), atol=1e-4)


def test_squared_error_in_bfloat16(tiny_base, batch):
    """A half-precision base under a float32 adapter: the error is float32, near the float32 one,
    and differentiable.
    """
    latents, text, timesteps, noise = batch
    want = squared_error(load_base(tiny_base), latents, text, timesteps, noise)
    base = load_base(tiny_base, dtype="bfloat16")
    adapter = inject(base.unet, "attention", rank=2, alpha=2)
    error = squared_error(base, latents, text.bfloat16(), timesteps, noise)
    assert error.dtype == torch.float32 and torch.allclose(error, want, atol=0.3)
    error.mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapter.parameters())


@torch.no_grad()
def test_latents_are_the_scaled_posterior_mean(base, monkeypatch):
    """z0 = scaling_factor * E(x) with x in [-1, 1]; batches of any size give the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    want = base.pipeline.vae.encode(x).latent_dist.mean * 0.7
    assert base.latent_shape == (4, 8, 8)
    for n in (2, 32):
        monkeypatch.setattr(diffusion, "at_once", lambda _, n=n: n)
        assert torch.allclose(encode_images(base, pixels), want, atol=1e-5)


@torch.no_grad()
def test_captions_are_embedded_as_the_pipeline_does(base):
    """tau(y) equals the pipeline's own encode_prompt; different captions differ."""
    ours = encode_captions(base, CAPTIONS[:3], batch=2)
    theirs, _ = base.pipeline.encode_prompt(CAPTIONS[:3], "cpu", 1, False)
    assert ours.shape == (3, 16, 32) and torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)


def test_long_captions_are_cut_with_one_note(base, capsys):
    """One line, however many captions are cut; none if none is."""

    def encoded(*captions):
        pixels = np.zeros((len(captions), 32, 32, 3), np.uint8)
        data = encode(base, Images(list(captions), list(captions), pixels), {})
        return data.text.shape, capsys.readouterr().out

    assert encoded("a red circle") == ((1, 16, 32), "")
    shape, said = encoded("red " * 100, "a red circle", "blue " * 100)
    assert shape == (3, 16, 32) and said == "note: 2 of 3 captions are cut to 16 tokens\n"


@torch.no_grad()
def test_long_loops_say_what_is_done(base, batch, monkeypatch):
    """Every image, caption, forward and picture once, whatever goes through together."""
    latents, text, *_, noise = batch
    monkeypatch.setattr(diffusion, "at_once", lambda *_: 3)
    pixels = np.zeros((5, 32, 32, 3), np.uint8)
    for count, loop in (
        (5, lambda done: encode_images(base, pixels, done)),
        (7, lambda done: encode_captions(base, CAPTIONS[:7], done, batch=3)),
        (4 * 2 * 3, lambda done: loss_grid(base, latents, text, (50, 150), 3, done)),
        (4, lambda done: sample(base, text, text[:1], noise, 5, done=done)),
    ):
        found = []
        loop(found.append)
        assert sum(found) == pytest.approx(count) and len(found) > 1


def test_the_base_is_frozen_and_in_eval_mode(base):
    parts = (base.unet, base.pipeline.vae, base.pipeline.text_encoder)
    assert not any(m.training for m in parts) and not any(
        p.requires_grad for m in parts for p in m.parameters()
    )


def test_embedded_base_in_plain_diffusers():
    """`from_pretrained(folder)` without any argument loads it, in one dtype, and samples the
    picture that we sample.
    """
    from diffusers import StableDiffusionPipeline

    base, steps = load_base(EMBEDDED), 4
    noise = torch.randn((1, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    text, empty = (encode_captions(base, [caption]) for caption in ("red apple, noto", ""))
    ours = sample(base, text, empty, noise, steps, guidance=3.0)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    options = {"height": 48, "width": 48, "guidance_scale": 3.0, "output_type": "np"}
    options["num_inference_steps"] = steps
    theirs = pipeline("red apple, noto", latents=noise, **options).images[0]
    assert abs(ours / 255 - theirs).max() < 2 / 255
    total = sum(path.stat().st_size for path in Path(EMBEDDED).rglob("*") if path.is_file())
    assert total <= 20_000_000


FAMILIES = ["DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "EulerDiscrete"]
FAMILIES += ["HeunDiscrete", "LCM", "PNDM", "UniPCMultistep"]


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_do_not_depend_on_what_a_scheduler_is_silent_on(tiny_base, tmp_path, family):
    """A base whose scheduler says betas alone draws what one with Stable Diffusion's whole config
    draws: DDIM's own defaults would clip the latents.
    """
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    kind = f"{family}Scheduler"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for file, changes in {
        "scheduler/scheduler_config.json": {"_class_name": kind, **betas},
        "model_index.json": json.loads((folder / "model_index.json").read_text())
        | {"scheduler": ["diffusers", kind]},
    }.items():
        (folder / file).write_text(json.dumps(changes))
    pictures = []
    for model in (tiny_base, str(folder)):
        base = load_base(model)
        noise = torch.randn((2, *base.latent_shape), generator=torch.Generator().manual_seed(0))
        text = encode_captions(base, ["a red circle", "a blue ring", ""])
        pictures += [sample(base, text[:2], text[2:], noise, 3) for _ in range(2)]
    assert all((p == pictures[0]).all() for p in pictures[1:])
    base.pipeline.scheduler = ddim(base.pipeline.scheduler, clip_sample=True)
    assert (sample(base, text[:2], text[2:], noise, 3) != pictures[0]).any()
