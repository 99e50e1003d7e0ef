"""files/sdxl.py and what rests on it: a tiny random SDXL, with diffusers' own calls as judges."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, SMALL, assembled, assert_same_run, tiny_vae
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_base_files import VAE_NAMES
from test_text_encoder import file_of

import evaluate
import lora
import train
from algorithm import algorithm_1
from attacks import model, paper, single
from audit import Audit, audit
from command.errors import UserError
from diffusion import answer, encode_captions, encode_images, squared_error
from files import adapters, lora_files, lora_writing, sdxl, text_encoder
from files.bases import load_base
from files.encode import encode
from files.images import FOLDERS, load_images
from methods import subspace
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
        transformer_layers_per_block=1,
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
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextModelWithProjection

    from embedded.base_model import build_text_encoder, build_tokenizer

    tokenizer = build_tokenizer(CAPTIONS, folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_unet()
        vae = tiny_vae(0.13025)
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
    whole = zip(shapes, corners, strict=True)
    ids = [pipe._get_add_time_ids(s, c, (32, 32), prompt.dtype, 24) for s, c in whole]
    added = {"text_embeds": pooled, "time_ids": torch.cat(ids)}
    shape, t = (3, *base.latent_shape), torch.tensor([5, 300, 800])
    z, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
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
def test_every_method_steps(xl, settings, tmp_path, method):
    """Two steps of finite numbers that move the weights, the same with activations kept or not."""
    more, found = {}, []
    if method == "dp":
        unet = load_base(xl).unet
        layers = lora.inject(unet, "attention", 4, 4.0, torch.Generator().manual_seed(0)).layers
        updates = [{k: torch.randn(x.delta().shape) for k, x in layers.items()}]
        file = tmp_path / "d.safetensors"
        subspace.save(subspace.directions_of(updates, 4), "attention", file, {})
        more = {"rank": None, "alpha": None, "target": None, "directions": str(file)}
    if method == "distill":
        more = {"teachers": 2, "teacher_steps": 1, "flip": True}
    for kept in (True, False) if method == "smp" else (True,):
        s = settings(tmp_path / "run", method=method, gradient_checkpointing=not kept, **more)
        run = assembled(s)
        before = [p.detach().clone() for p in run.parameters]
        for teacher in run.lessons() if method == "distill" else ():
            list(algorithm_1(teacher, range(1, 2)))
        found.append([row["objective"] for row in algorithm_1(run, range(1, 3))])
        assert np.isfinite(found).all()
        assert any((p - b).abs().max() > 0 for p, b in zip(run.parameters, before, strict=True))
    assert found[0] == pytest.approx(found[-1], rel=1e-5)


def test_resumes_bit_for_bit(settings, tmp_path, no_pictures, stopped_and_gone_on_with):
    train.train(settings(tmp_path / "whole", method="smp"))

    def begin(folder):
        train.train(settings(folder, method="smp", state_every=1))

    stopped_and_gone_on_with(begin, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 3)


def test_a_run_with_pictures(settings, tmp_path):
    """Its card names the pipeline."""
    s = settings(tmp_path / "run", method="lora", prompt=["a red ring"], steps=1)
    train.train(s)
    assert (tmp_path / "run" / "samples" / "step-000001.png").is_file()
    assert "= StableDiffusionXLPipeline." in (tmp_path / "run/adapter/README.md").read_text()


def test_audits(settings, tmp_path, in_thread, no_pictures, capsys):
    names = ("members", "save_every", "samples")
    flags = {k: v for k, v in SMALL.items() if k not in names} | {"steps": 1}
    s = settings("x")
    flags |= {"model": s.model, "data": s.data, "method": "lora", "out": str(tmp_path / "audit")}
    audit(Audit(**flags, adapters=4, pool=10))
    assert "LiRA pooled, all" in capsys.readouterr().out


def test_dry_run(settings, tmp_path, capsys):
    train.train(settings(tmp_path / "run", method="smp", dry_run=True))
    said = capsys.readouterr().out
    assert "time:     about" in said and "memory:" in said
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize(("target", "kohya"), [("attention", 0), ("all", 0), ("all", 1)])
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


@pytest.fixture(scope="module")
def theirs(xl, tmp_path_factory):
    """A file that diffusers and peft wrote, with parts for both text encoders."""
    folder, tensors = tmp_path_factory.mktemp("theirs"), {}
    pipe = StableDiffusionXLPipeline.from_pretrained(xl)
    torch.manual_seed(0)
    parts = {
        "unet": ["to_q", "to_out.0", "proj_in", "conv1", "downsamplers.0.conv"],
        "text_encoder": ["q_proj", "out_proj", "fc1"],  # of kohya's diffusers asks for out_proj
        "text_encoder_2": ["k_proj", "out_proj", "fc2"],
    }
    for rank, (part, names) in enumerate(parts.items(), start=2):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, **FORCE)
        getattr(pipe, part).add_adapter(config)
        found = get_peft_model_state_dict(getattr(pipe, part))
        tensors[f"{part}_lora_layers"] = found
        tensors[f"{part}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionXLPipeline.save_lora_weights(str(folder), **tensors)
    return folder / lora_files.FILE_NAME


# of a UNet with two layers in a block: its names, and those of the first release
BLOCKS = {
    r"down_blocks\.(\d)\.resnets\.(\d)": ("input_blocks.{}.0", 1),
    r"down_blocks\.(\d)\.attentions\.(\d)": ("input_blocks.{}.1", 1),
    r"down_blocks\.(\d)\.downsamplers\.(0)\.conv": ("input_blocks.{}.0.op", 3),
    r"up_blocks\.(\d)\.resnets\.(\d)": ("output_blocks.{}.0", 0),
    r"up_blocks\.(\d)\.attentions\.(\d)": ("output_blocks.{}.1", 0),
    r"up_blocks\.(\d)\.upsamplers\.(0)\.conv": ("output_blocks.{}.2.conv", 2),
}
PLAIN = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def old(name):
    """The first release's name of a layer."""
    inner = "transformer_blocks" not in name
    for new, (form, start) in BLOCKS.items():
        if found := re.match(new, name):
            block = start + 3 * int(found[1]) + int(found[2])
            name = form.format(block) + name[found.end() :]
    for new, before in PLAIN.items():
        if inner or "." in new:
            name = re.sub(rf"(^|\.){re.escape(new)}(\.|$)", rf"\g<1>{before}\g<2>", name)
    return name


def kohya(theirs, file):
    """The same as kohya names it, with alpha = 2 rank."""
    tensors = {}
    starts = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
    for key, tensor in load_file(theirs).items():
        part, _, key = key.partition(".")
        name, _, ending = key.partition(".lora_")
        name = old(name) if part == "unet" else name
        key = f"lora_{starts[part]}_{name.replace('.', '_')}"
        way = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[ending]
        tensors[f"{key}.{way}"] = tensor
        if way.startswith("lora_down"):
            tensors[f"{key}.alpha"] = torch.tensor(2.0 * len(tensor))
    save_file(tensors, file)
    return file


def test_names_of_the_first_release():
    """Of every layer of a UNet with SDXL's three levels."""
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    names = list(lora_files.layers_of(tiny_unet(blocks=blocks)))
    olds = [old(name).replace(".", "_") for name in names]
    assert not [name for name in olds if "_blocks_" in name and name.startswith(("down", "up"))]
    assert [sdxl.present_name(name) for name in olds] == [n.replace(".", "_") for n in names]
    assert "input_blocks_4_1_proj_in" in olds and "output_blocks_5_2_conv" in olds


@pytest.mark.parametrize("form", ["diffusers", "kohya", "converted"])
def test_adapters_of_others(xl, theirs, tmp_path, form):
    """As diffusers loads the file; switched off the base has its bits, removed it is the base."""
    file = file_of(theirs, form, xl, tmp_path, kohya)
    base = load_base(xl)
    plain = errors(base)
    adapter, _ = adapters.load(base, file)
    starts = ("text_encoder.", "text_encoder_2.")
    assert [sum(k.startswith(s) for k in adapter.text) for s in starts] == [6, 6]
    found = errors(base)
    text = encode_captions(base, ["x"])
    with adapter.disabled():
        assert torch.equal(errors(base), plain)
        before = encode_captions(base, ["x"])
    assert (text - before).abs().max() > 1e-3 and (found - plain).abs().max() > 1e-3
    lora.remove(base.unet, adapter)
    for part in (base.unet, *(e for _, e in sdxl.encoders(base.pipeline))):
        assert not any(isinstance(m, lora.LoRALinear) for m in part.modules())
    base.pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    torch.testing.assert_close(errors(base), found, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_others_is_evaluated(xl, theirs, image_folder, tmp_path, monkeypatch):
    """By attacks that ask of captions.  Captions embedded anew keep the sizes of their pictures."""
    monkeypatch.setattr(paper, "EPOCHS", 2)
    few = ("loss", "proxy-raw-1", "SimA", "CLiD", "GSA1", "black-box")
    monkeypatch.setattr(model, "ATTACKS", {name: single.ATTACKS[name] for name in few})
    for i, file in enumerate(sorted(Path(image_folder).glob("*.png"))[:16]):
        folder = tmp_path / "images" / list(FOLDERS)[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        for path in (file, file.with_suffix(".txt")):
            shutil.copy(path, folder)
    flags = {"model": xl, "data": str(tmp_path / "images"), "out": str(tmp_path / "out")}
    few = {"pictures": 2, "sampling_steps": 1}
    (record,) = evaluate.evaluate(evaluate.Settings(adapter=str(theirs), **few, **flags))
    assert len(record["adapted"]["attacks"]) == 6
    losses = [record[name]["held_out_loss"] for name in ("base", "adapted")]
    assert abs(losses[0] - losses[1]) > 1e-4
    base = load_base(xl)
    adapter, _ = adapters.load(base, theirs)
    images = load_images(flags["data"], 32).take([0, 1])
    data = encode(base, replace(images, sizes=[(50, 70), (32, 32)]), {})
    assert text_encoder.seen(base, data, adapter).text[:, -6:].equal(data.text[:, -6:])
    assert data.text[0, -6:].tolist() == [50, 70, 0, 6, 32, 32]


def test_a_wrong_pairing_is_one_sentence(xl, tiny_base, theirs, tmp_path):
    """An adapter of SDXL on Stable Diffusion 1, in either form, and the reverse."""
    one, two = load_base(tiny_base), load_base(xl)
    for kohya_form in (False, True):
        folder = tmp_path / str(kohya_form)
        file = lora_writing.save(random_adapter(one), folder, kohya=kohya_form)
        with pytest.raises(UserError, match="this base model") as caught:
            adapters.load(two, file)
        assert "\n" not in str(caught.value)
        lora.remove(one.unet, lora.Adapter(injected(one.unet), "all"))
    for file in (theirs, kohya(theirs, tmp_path / "k.safetensors")):
        with pytest.raises(UserError, match="is an adapter of SDXL"):
            adapters.load(one, file)
    file = lora_writing.save(random_adapter(two), tmp_path / "xl")
    with pytest.raises(UserError, match="this base model"):
        adapters.load(one, file)


def injected(unet):
    """The LoRA layers that are in a UNet."""
    return {n: m for n, m in unet.named_modules() if isinstance(m, lora.LoRALinear)}


# --------------------------------------------------------------------------------------------------
# Single files, and what is refused


def single_file(xl, path, drop=""):
    """The tiny SDXL as one checkpoint with its configs beside it, without keys that have `drop`."""
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    parts = {
        part: load_file(Path(xl) / part / f"{names.get(part, 'model')}.safetensors")
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    tensors = {}
    for key, tensor in parts["unet"].items():
        name, _, ending = key.rpartition(".")
        tensors[f"model.diffusion_model.{old(name)}.{ending}"] = tensor
    for key, tensor in parts["vae"].items():
        for new, before in VAE_NAMES:
            key = re.sub(new, before, key)
        tensors[f"first_stage_model.{key}"] = tensor
    for key, tensor in parts["text_encoder"].items():
        key = key.removeprefix("text_model.")
        tensors[f"conditioner.embedders.0.transformer.text_model.{key}"] = tensor
    tensors |= open_clip(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    save_file({k: t.contiguous() for k, t in tensors.items() if not drop or drop not in k}, path)
    shutil.copytree(xl, path.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def open_clip(tensors, start):
    """A text encoder under open_clip's names, with q, k and v in one."""
    names = {
        r"text_model\.": "",
        r"encoder\.layers\.": "transformer.resblocks.",
        r"layer_norm(\d)": r"ln_\1",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
        r"self_attn\.": "attn.",
        r"final_layer_norm": "ln_final",
        r"embeddings\.token_embedding": "token_embedding",
        r"embeddings\.position_embedding\.weight": "positional_embedding",
    }
    found = {}
    for key, tensor in tensors.items():
        for new, before in names.items():
            key = re.sub(new, before, key)
        found[key] = tensor
    found["text_projection"] = found.pop("text_projection.weight").T
    for key in [k for k in found if "q_proj" in k]:
        every = [found.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        found[key.replace("q_proj.", "in_proj_")] = torch.cat(every)
    return {start + key: tensor for key, tensor in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_file_equals_its_folder(xl, tmp_path, dtype):
    path = single_file(xl, tmp_path / "model.safetensors")
    one, two = load_base(str(path), dtype=dtype), load_base(xl, dtype=dtype)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        want = getattr(two.pipeline, part).state_dict()
        got = getattr(one.pipeline, part).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in want.items())
    assert torch.equal(errors(one), errors(two))


def refused(model, *words):
    with pytest.raises(UserError) as caught:
        load_base(str(model))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("embedders.0", ["lacks one of the two text encoders"]),
        ("conditioner.", ["has a UNet and a VAE but no text encoder"]),
        ("resblocks.1.ln_1.bias", ["the text_encoder_2 of", "lacks", "layer_norm1.bias"]),
        ("output_blocks.0.0.in_layers.0.bias", ["lacks tensors of its unet or vae"]),
    ],
)
def test_refuses_a_single_file_with_a_gap(xl, tmp_path, drop, words):
    refused(single_file(xl, tmp_path / "model.safetensors", drop), *words)


def test_refuses_other_configs_beside_a_single_file(xl, tiny_base, tmp_path):
    path = single_file(xl, tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tiny_base, tmp_path / "model")
    refused(path, "is SDXL but the configs", "are of Stable Diffusion 1.x or 2.x")


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_refuses_a_folder_without_a_part(xl, tmp_path, part):
    shutil.copytree(xl, tmp_path / "xl")
    shutil.rmtree(tmp_path / "xl" / part)
    refused(tmp_path / "xl", f"it has no folder {part}")


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_refuses_newer_models_by_name(xl, tmp_path, kind):
    shutil.copytree(xl, tmp_path / "xl")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))
    refused(tmp_path / "xl", f"is a {kind}", "StableDiffusionXLPipeline")
