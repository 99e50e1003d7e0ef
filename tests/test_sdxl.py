"""files/sdxl.py and what rests on it: a tiny random SDXL, with diffusers' own calls as judges."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, SMALL, assembled, assert_same_run, rows
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import evaluate
import lora
import train
from algorithm import algorithm_1
from audit import Audit, audit
from diffusion import answer, encode_captions, encode_images, squared_error
from files import adapters, lora_writing, sdxl
from files.bases import load_base
from files.encode import encode
from files.images import load_images
from settings import Settings

FORCE = {"init_lora_weights": False}


def tiny_unet(width=32, pooled=24, blocks=("DownBlock2D", "CrossAttnDownBlock2D")):
    """A UNet with the parts of SDXL's, of two or three levels."""
    ups = tuple(b.replace("Down", "Up") for b in reversed(blocks))
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=blocks,
        up_block_types=ups,
        block_out_channels=(8, 16, 16)[: len(blocks)],
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 1)[: len(blocks)],
        attention_head_dim=(2, 4, 4)[: len(blocks)],
        cross_attention_dim=width,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + pooled,
    )


def save_tiny_xl(folder):
    """A StableDiffusionXLPipeline folder of 32 px pictures: widths 12 and 20, pooled 24, seed 0."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextModelWithProjection

    from embedded.base_model import build_text_encoder, build_tokenizer

    tokenizer = build_tokenizer(CAPTIONS, folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_unet()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
            scaling_factor=0.13025,
        )
        first = build_text_encoder(tokenizer, width=12, layers=2)
        config = build_text_encoder(tokenizer, width=20, layers=2).config
        config.projection_dim = 24
        second = CLIPTextModelWithProjection(config)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    ).save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            if not (folder / part / name).exists():
                shutil.copy(folder / "tokenizer" / name, folder / part)
    return str(folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """Path of the tiny SDXL."""
    return save_tiny_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture
def base(xl):
    return load_base(xl)


@pytest.fixture(scope="module")
def settings(xl, image_folder):
    """A function: the settings of a small run on it."""
    common = {"model": xl, "data": image_folder} | SMALL
    return lambda out, **more: Settings(**common | {"out": str(out)} | more)


def errors(base, text=None):
    """Error maps of three images."""
    text = encode_captions(base, [*CAPTIONS[:2], ""]) if text is None else text
    shape, t = (3, *base.latent_shape), torch.tensor([5, 300, 800])
    z, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    with torch.no_grad():
        return squared_error(base, z, text, t, noise)


# --------------------------------------------------------------------------------------------------
# The base


def test_errors_equal_diffusers_own(xl, tmp_path):
    """By `encode_prompt`, `vae.encode`, `add_noise` and the UNet, of files of other shapes; the
    sizes as diffusers' script for LoRA of SDXL has them.
    """
    from PIL import Image

    rng, shapes = np.random.default_rng(0), [(64, 48), (40, 40), (33, 97)]  # height, width
    for i, shape in enumerate(shapes):
        noise = rng.integers(0, 255, (*shape, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(CAPTIONS[i])
    base, images = load_base(xl), load_images(str(tmp_path), 32)
    data = encode(base, images, {})
    found = errors(base, data.text)

    pipe = StableDiffusionXLPipeline.from_pretrained(xl)
    prompt, _, pooled, _ = pipe.encode_prompt(CAPTIONS[:3], do_classifier_free_guidance=False)
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z0 = pipe.vae.encode(pixels).latent_dist.mode() * 0.13025
    torch.testing.assert_close(data.latents, z0)
    corners = [(5, 0), (0, 0), (0, 31)]  # of 42 x 32, 32 x 32 and 32 x 94
    ids = [
        pipe._get_add_time_ids(s, c, (32, 32), prompt.dtype, 24) for s, c in zip(shapes, corners)
    ]
    added = {"text_embeds": pooled, "time_ids": torch.cat(ids)}
    shape, t = (3, *base.latent_shape), torch.tensor([5, 300, 800])
    z, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    from diffusers import DDPMScheduler

    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(z, noise, t)
    with torch.no_grad():
        answered = pipe.unet(noisy, t, prompt, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, (noise - answered) ** 2)
    with torch.no_grad():  # the sizes matter
        added["time_ids"] = added["time_ids"][[1, 0, 2]]
        other = pipe.unet(noisy, t, prompt, added_cond_kwargs=added).sample
    assert (other - answered).abs()[:2].max() > 1e-4


def test_empty_caption_is_the_pipelines(base):
    """The negative embeddings that diffusers has without a negative prompt."""
    _, negative, _, pooled = base.pipeline.encode_prompt("x", do_classifier_free_guidance=True)
    text = encode_captions(base, ["", "x"])
    given = base.condition(text, torch.float32)
    assert torch.equal(given["encoder_hidden_states"][:1], negative)
    assert torch.equal(given["added_cond_kwargs"]["text_embeds"][:1], pooled)
    base.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode_captions(base, [""])[0, :-6].abs().max() > 0.01


def test_half_precision_rounds_no_size_and_not_the_vae(xl):
    """1333 is no bfloat16."""
    base = load_base(xl, dtype="bfloat16")
    text = sdxl.framed(base, encode_captions(base, ["x"]), [(1333, 2001)])
    given = base.condition(text, torch.bfloat16)
    assert given["encoder_hidden_states"].dtype == torch.bfloat16
    ids = given["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[1333, 2001, 0, 8, 32, 32]]
    assert base.pipeline.vae.dtype == torch.float32 and base.unet.dtype == torch.bfloat16
    exact = load_base(xl).pipeline.vae.state_dict()
    assert all(torch.equal(exact[k], t) for k, t in base.pipeline.vae.state_dict().items())
    latents = encode_images(base, np.zeros((1, 32, 32, 3), np.uint8))
    out = answer(base, latents, torch.tensor([10]), text)
    assert out.isfinite().all() and out.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# What runs


@pytest.mark.parametrize("method", ["lora", "mp", "smp", "distill", "dp"])
def test_every_method_trains(settings, tmp_path, no_pictures, method):
    more = {}
    if method == "dp":
        from methods import directions

        public = Path(settings("x").data)
        flags = {"data": [str(public)], "out": str(tmp_path / "d.safetensors"), "steps": 2}
        flags |= {"model": settings("x").model, "batch_size": 4, "target": "attention"}
        directions.make(directions.Flags(**flags))
        more = {"rank": None, "alpha": None, "target": None, "directions": flags["out"]}
    if method == "distill":
        more = {"teachers": 2, "teacher_steps": 1, "flip": True}
    train.train(settings(tmp_path / "run", method=method, **more))
    found = rows(tmp_path / "run")
    assert len(found) == 4 and all(np.isfinite(row["objective"]) for row in found[1:])


def test_resumes_bit_for_bit(settings, tmp_path, no_pictures, stopped_and_gone_on_with):
    whole = settings(tmp_path / "whole", method="smp")
    train.train(whole)

    def begin(folder):
        train.train(settings(folder, method="smp", state_every=1))

    stopped_and_gone_on_with(begin, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 3)


def test_run_with_pictures_and_card_then_evaluated(settings, tmp_path):
    """A grid, an adapter that diffusers loads as the card says, and figures of every attack."""
    s = settings(tmp_path / "run", method="lora", prompt=["a red ring"])
    train.train(s)
    assert (tmp_path / "run" / "samples" / "step-000003.png").is_file()
    assert "StableDiffusionXLPipeline" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    (record,) = evaluate.evaluate(evaluate.Settings(runs=[s.out], pictures=2, sampling_steps=1))
    assert len(record["adapted"]["attacks"]) == 15


def test_audits(settings, tmp_path, in_thread, no_pictures):
    s = settings("x")
    flags = {k: v for k, v in SMALL.items() if k not in ("members", "save_every")}
    flags |= {"model": s.model, "data": s.data, "method": "lora", "steps": 1, "samples": 0}
    found = audit(Audit(**flags, adapters=4, pool=20, out=str(tmp_path / "audit")))
    assert found


def test_dry_run_says_hours_and_memory(settings, tmp_path, capsys):
    train.train(settings(tmp_path / "run", method="smp", dry_run=True))
    said = capsys.readouterr().out
    assert "hours" in said or "time:" in said
    assert "memory:" in said and not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_no_step(settings, tmp_path):
    found = []
    for on in (False, True):
        run = assembled(settings(tmp_path / "r", method="lora", gradient_checkpointing=on))
        found.append([row["grad_norm"] for row in algorithm_1(run, range(1, 3))])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Adapters


def random_adapter(base, target="all"):
    """An adapter that changes the base."""
    generator = torch.Generator().manual_seed(3)
    adapter = lora.inject(base.unet, target, 2, 6.0, generator)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.weight.normal_(std=0.1, generator=generator)
    return adapter


@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize("target", list(lora.TARGETS))
def test_an_adapter_goes_to_diffusers_and_back(xl, tmp_path, target, kohya):
    base = load_base(xl)
    adapter = random_adapter(base, target)
    want, plain = errors(base), errors(load_base(xl))
    assert (want - plain).abs().max() > 1e-3
    file = lora_writing.save(adapter, tmp_path, kohya=kohya)
    other = load_base(xl)
    loaded, _ = adapters.load(other, file)
    assert torch.equal(errors(other), want) and loaded.layers.keys() == adapter.layers.keys()
    other = load_base(xl)
    other.pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    torch.testing.assert_close(errors(other), want, rtol=1e-4, atol=1e-5)
