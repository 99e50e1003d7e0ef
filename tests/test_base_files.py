"""files/bases.py: the bases that load, and one sentence for each way in which others do not."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from command.errors import UserError
from diffusion import encode_captions
from files.bases import load_base

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit(file: Path, drop: str | None = None, **changes) -> None:
    """Change entries of a JSON object, or drop one."""
    config = json.loads(file.read_text()) | changes
    config.pop(drop, None)
    file.write_text(json.dumps(config))


def change(folder: Path, part: str, function) -> None:
    """Rewrite a part's weights: `function` edits the dict of its tensors."""
    path = folder / part / WEIGHTS[part]
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path, {"format": "pt"})


def weights(base) -> dict[str, torch.Tensor]:
    """All tensors of the three parts."""
    parts = {part: getattr(base.pipeline, part) for part in WEIGHTS}
    return {f"{p}.{k}": t for p, module in parts.items() for k, t in module.state_dict().items()}


def assert_same(base, wanted) -> None:
    """The same tensors of the same dtypes."""
    got, wanted = weights(base), weights(wanted)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in wanted.items())


def refused(model, *words, **options) -> str:
    """The one line with which load_base refuses; it holds all the words."""
    with pytest.raises(UserError) as caught:
        load_base(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message  # paths are long
    assert all(word in message for word in words), message
    return message


# --------------------------------------------------------------------------------------------------
# What loads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_plain_diffusers(tiny_base, dtype):
    """Every tensor and dtype as `StableDiffusionPipeline.from_pretrained` loads them, and no random
    number drawn on the way.
    """
    from diffusers import StableDiffusionPipeline

    before = torch.get_rng_state()
    base = load_base(tiny_base, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    plain = StableDiffusionPipeline.from_pretrained(
        tiny_base, dtype=getattr(torch, dtype), safety_checker=None
    )
    want = {f"{p}.{k}": t for p in WEIGHTS for k, t in getattr(plain, p).state_dict().items()}
    got = weights(base)
    assert got.keys() == want.keys() and {t.dtype for t in got.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(got[k], t) for k, t in want.items())


def test_a_variant_that_is_all_there_is(folder):
    """`.fp16` files load where there are no plain ones, part by part; where there are, they win."""
    want = load_base(str(folder))
    for part, name in WEIGHTS.items():
        (folder / part / name).rename(folder / part / name.replace(".", ".fp16.", 1))
    assert_same(load_base(str(folder)), want)
    unet = folder / "unet" / WEIGHTS["unet"]
    plain = load_file(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    save_file({k: t + 1 for k, t in plain.items()}, unet, {"format": "pt"})
    moved = load_base(str(folder)).unet.conv_in.bias
    assert torch.equal(moved, want.unet.conv_in.bias + 1)


def test_shards(folder):
    """Weights in several files with an index, of which none may be missing."""
    want = load_base(str(folder))
    (folder / "unet" / WEIGHTS["unet"]).unlink()
    want.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert_same(load_base(str(folder)), want)
    shards[1].unlink()
    refused(folder, "unet", shards[1].name)


def test_parts_that_are_not_needed_may_be_absent(folder):
    """A model index that names a safety checker and a feature extractor, without their folders."""
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )
    load_base(str(folder))


def test_names_of_older_libraries(tiny_base, folder):
    """`position_ids`, the `text_model.` prefix and the VAE's `query` are the same model."""

    def old_text(tensors):
        new = {f"text_model.{key}": tensors.pop(key) for key in list(tensors)}
        new["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        tensors.update(new)

    def old_vae(tensors):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for key in list(tensors):
            for new, old in names.items():
                if f".attentions.0.{new}." in key:
                    tensors[key.replace(new, old)] = tensors.pop(key)

    change(folder, "text_encoder", old_text)
    change(folder, "vae", old_vae)
    assert any(".query." in key for key in load_file(folder / "vae" / WEIGHTS["vae"]))
    assert_same(load_base(str(folder)), load_base(tiny_base))


def test_sizes(folder):
    """Two equal numbers are one; without a size, --size says it."""
    for size in (8, [8, 8]):
        edit(folder / "unet" / "config.json", sample_size=size)
        assert load_base(str(folder)).size == 32
    for size in ([8, 16], [8], [], "8", 0, -8, 1e9, 10**5, True, [[8], [8]], None):
        edit(folder / "unet" / "config.json", sample_size=size)
        refused(folder, "sample_size", "--size")
        assert load_base(str(folder), size=48).size == 48
    edit(folder / "unet" / "config.json", drop="sample_size")
    refused(folder, "sample_size", "--size")
    refused(folder, "30 is not a multiple of 8", size=30)


def test_zero_terminal_snr(folder):
    """A v-prediction model whose last step is pure noise: abar ends at 0."""
    edit(
        folder / "scheduler" / "scheduler_config.json",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    base = load_base(str(folder))
    assert base.prediction == "v_prediction"
    assert base.abar[-1] == 0 and 0.99 < base.abar[0] < 1


def test_captions_end_where_the_text_encoder_does(folder):
    """A tokenizer that knows no limit takes the text encoder's."""
    edit(folder / "tokenizer" / "tokenizer_config.json", drop="model_max_length")
    assert encode_captions(load_base(str(folder)), ["red " * 50]).shape == (1, 16, 32)


# --------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("part", WEIGHTS)
def test_refuses_missing_tensors(folder, part):
    """Never filled at random: the part and the first tensor are named."""
    gone = sorted(load_file(folder / part / WEIGHTS[part]))[3:7]
    change(folder, part, lambda tensors: [tensors.pop(key) for key in gone])
    refused(folder, f"the {part} of {folder}", f"lacks {gone[0]}")


@pytest.mark.parametrize("part", WEIGHTS)
def test_refuses_shapes_that_are_not_the_config(folder, part):
    key = min(load_file(folder / part / WEIGHTS[part]))
    change(folder, part, lambda tensors: tensors.update({key: torch.zeros(3)}))
    refused(folder, part, key, "3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -1e30])
@pytest.mark.parametrize("part", WEIGHTS)
def test_refuses_absurd_weights(folder, part, value):
    """One element is enough, even in the last row of the token embedding or the VAE's decoder."""
    key = max(load_file(folder / part / WEIGHTS[part]))
    change(folder, part, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    refused(folder, part, f"{key} holds NaN, infinite or absurdly large numbers (as float32)")


def test_refuses_what_half_precision_cannot_hold(folder):
    """1e6 is a number in float32 and infinite in float16."""
    change(folder, "unet", lambda tensors: tensors["conv_in.bias"].fill_(1e6))
    load_base(str(folder))
    refused(folder, "conv_in.bias", "as float16", dtype="float16")


def pickled(file):
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:5000])


def empty(file):
    file.write_bytes(b"")


def instead(make):
    """A damage that puts something else in the place of the file."""

    def damage(file):
        file.unlink()
        make(file)

    return damage


BROKEN = [
    ("unet", pickled, "safetensors"),
    ("unet", cut, WEIGHTS["unet"]),
    ("text_encoder", cut, "text_encoder"),
    ("vae", empty, "vae"),
    ("vae", instead(os.mkfifo), "vae"),
    ("text_encoder", instead(lambda file: file.symlink_to("/dev/zero")), "text_encoder"),
    ("unet", instead(lambda file: file.symlink_to(file)), "unet"),
    ("unet", instead(Path.mkdir), "unet"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("part", "damage", "words"), BROKEN)
def test_refuses_files_that_are_no_weights(folder, part, damage, words):
    """One line that names the folder and the part, at once."""
    damage(folder / part / WEIGHTS[part])
    refused(folder, str(folder), words)


# --------------------------------------------------------------------------------------------------
# Configs and folders


@pytest.mark.parametrize("part", [*WEIGHTS, "scheduler", "tokenizer"])
def test_refuses_a_missing_folder(folder, part):
    shutil.rmtree(folder / part)
    refused(folder, f"{folder} is incomplete: it has no folder {part}")


CONFIGS = [
    *("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_damaged_configs(folder, name):
    """Missing, a pipe, a link to itself, another kind of JSON, none, no text, deeper than Python
    reads.
    """
    path = folder / name
    path.unlink()
    refused(folder, path.name)
    os.mkfifo(path)
    refused(folder, path.name)
    path.unlink()
    path.symlink_to(path)
    refused(folder, path.name)
    path.unlink()
    for content in (b"[]", b"null", b'"text"', b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        refused(folder, str(path))


def test_refuses_an_empty_vocabulary(folder):
    """transformers would give all captions the same tokens."""
    for name in ("tokenizer.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    refused(folder, str(folder / "tokenizer"), "vocabulary")


@pytest.mark.parametrize(
    "kind", ["StableDiffusion3Pipeline", "StableDiffusionInpaintPipeline", "FluxPipeline", None]
)
def test_refuses_another_pipeline(folder, kind):
    """The folder says what it is; guessing would load half of it."""
    edit(folder / "model_index.json", _class_name=kind)
    refused(folder, f"base is a {kind}")


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        ("vae", ["diffusers", "AutoencoderTiny"], "only AutoencoderKL"),
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"], "only CLIPTextModel"),
        ("unet", [None, None], "does not say which class its unet is"),
        ("scheduler", ["diffusers", "NoSuchScheduler"], "NoSuchScheduler"),
        ("tokenizer", "CLIPTokenizer", "does not say which class its tokenizer is"),
    ],
)
def test_refuses_parts_of_another_class(folder, part, kind, words):
    edit(folder / "model_index.json", **{part: kind})
    refused(folder, part, words)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet/config.json", {"block_out_channels": "x"}),
        ("unet/config.json", {"down_block_types": ["NoSuchBlock"]}),
        ("unet/config.json", {"attention_head_dim": 0}),
        ("unet/config.json", {"layers_per_block": 10**7}),
        ("unet/config.json", {"transformer_layers_per_block": [1, 10**7]}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**7}),
        ("vae/config.json", {"block_out_channels": None}),
        ("vae/config.json", {"block_out_channels": [10**7] * 3}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("vae/config.json", {"scaling_factor": float("nan")}),
        ("text_encoder/config.json", {"hidden_act": "no such function"}),
        ("text_encoder/config.json", {"num_attention_heads": 0}),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}),
        ("scheduler/scheduler_config.json", {"beta_start": float("nan")}),
        ("scheduler/scheduler_config.json", {"beta_end": 7.0}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no such schedule"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "no such spacing"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 100}),
    ],
)
def test_refuses_configs_that_make_no_sense(folder, name, changes):
    """Whatever the libraries raise for them is a sentence; a schedule is also looked at."""
    edit(folder / name, **changes)
    refused(folder, str(folder))


@pytest.mark.parametrize(
    "kind",
    ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"],
)
def test_refuses_schedulers_without_betas(folder, kind):
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=kind)
    refused(folder, kind, "betas")


def test_refuses_schedules_that_cannot_be_sampled(folder):
    """Found before the training and not after it, when the pictures are drawn."""
    edit(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    refused(folder, "DDIM", "sigmoid")


def test_refuses_another_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    refused(folder, "'sample'", "epsilon", "v_prediction")


# --------------------------------------------------------------------------------------------------
# Parts that do not fit together


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "9 channels for latents of 4"),
        ({"out_channels": 8}, "do not work together"),  # it also predicts a variance
        ({"cross_attention_dim": 48}, "do not work together"),  # of another text encoder
        ({"num_class_embeds": 3}, "do not work together"),  # it wants a class
    ],
)
def test_refuses_another_unet(folder, changes, words):
    """Whole, and its config is right; but it is not for this text encoder and VAE."""
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(folder / "unet") | changes
    )
    unet.save_pretrained(folder / "unet")
    refused(folder, str(folder), words)


def test_refuses_a_tokenizer_with_more_words(folder):
    """An embedding that is not there would be asked for by the first caption with that word."""
    for name in ("token_embedding", "position_embedding"):
        key = f"embeddings.{name}.weight"
        change(folder, "text_encoder", lambda t, key=key: t.update({key: t[key][:10].clone()}))
    edit(folder / "text_encoder" / "config.json", vocab_size=10, max_position_embeddings=10)
    refused(folder, "tokenizer", "text encoder has only 10")


# --------------------------------------------------------------------------------------------------
# Places where there is no base


@pytest.mark.parametrize(
    "name", ["nothing", "./runs/base", "../base", "runs/of/mine", "/no/such/base", "~/base", "a\nb"]
)
def test_a_path_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    """The absolute path says which folder was meant, as of a relative --model read elsewhere."""
    monkeypatch.chdir(tmp_path)
    where = os.path.abspath(name).replace("\n", "\\n")
    message = refused(name, f"there is no {where}", "owner/name")
    assert "connect" not in message


def test_a_hub_name(tmp_path, monkeypatch):
    """It could also be a folder: both places are named."""
    monkeypatch.chdir(tmp_path)
    refused("nobody/no-such-model", f"no folder {tmp_path}/nobody/no-such-model", "from the hub")


def test_a_hub_model_in_half_precision_only(folder, tmp_path, monkeypatch):
    """diffusers fetches it only if told the variant; the base keeps the name of the hub."""
    from diffusers import StableDiffusionPipeline

    for part, name in WEIGHTS.items():
        (folder / part / name).rename(folder / part / name.replace(".", ".fp16.", 1))
    asked = []

    def download(model, variant=None, **options):
        asked.append((model, variant, options["use_safetensors"]))
        if variant is None:
            raise OSError("Could not find the necessary `safetensors` weights")
        return str(folder)

    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", lambda *_, **__: index)
    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    monkeypatch.chdir(tmp_path)
    name = "nobody/half-a-model"
    assert load_base(name).name == name
    assert asked == [(name, None, True), (name, "fp16", True)]


@pytest.mark.timeout(20)
def test_refuses_what_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "dangling", "pipe"):
        refused(tmp_path / name, f"{tmp_path / name} is neither a folder nor a file")
    refused("/dev/zero", "/dev/zero is neither")
    refused(tmp_path, "is not a StableDiffusionPipeline folder: it has no model_index.json")
    refused(tmp_path / ("x" * 300), "there is no")


# --------------------------------------------------------------------------------------------------
# Single files


UNET_NAMES = [  # of this UNet, with one layer per block: diffusers', and those of the first release
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"conv_in", "input_blocks.0.0"),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (r"down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0"),
    (r"down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1"),
    (r"down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"\.norm1\.(?=\w+$)(?<!transformer_blocks.0.norm1.)", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.(?=\w+$)(?<!transformer_blocks.0.norm2.)", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
VAE_NAMES = [
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{2 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{2 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
]


def single_file(folder: str, path: Path, drop: tuple[str, str] | None = None) -> Path:
    """The tiny base as one checkpoint in the form of Stable Diffusion's first release, its configs
    beside it; `drop` is a (part, key) to leave out.
    """
    names = {
        "unet": ("model.diffusion_model.", UNET_NAMES),
        "vae": ("first_stage_model.", VAE_NAMES),
        "text_encoder": ("cond_stage_model.transformer.text_model.", []),
    }
    tensors = {}
    for part, (prefix, pairs) in names.items():
        for key, tensor in load_file(Path(folder) / part / WEIGHTS[part]).items():
            if (part, key) != drop:
                for new, old in pairs:
                    key = re.sub(new, old, key)
                tensors[prefix + key] = tensor
    save_file(tensors, path)
    shutil.copytree(folder, path.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def test_a_single_file_equals_its_folder(tiny_base, tmp_path):
    path = single_file(tiny_base, tmp_path / "model.safetensors")
    assert_same(load_base(str(path)), load_base(tiny_base))


@pytest.mark.parametrize(
    ("part", "key", "words"),
    [
        ("unet", "mid_block.attentions.0.proj_in.weight", "lacks tensors of its unet or vae"),
        ("vae", "decoder.conv_in.bias", "lacks tensors of its unet or vae"),
        *[
            ("text_encoder", key, f"the text_encoder of .* lacks {key}")
            for key in ("encoder.layers.0.layer_norm1.bias", "final_layer_norm.weight")
        ],
    ],
)
def test_refuses_a_single_file_that_lacks_a_tensor(tiny_base, tmp_path, part, key, words):
    path = single_file(tiny_base, tmp_path / "model.safetensors", (part, key))
    assert re.search(words, refused(path, str(path)))


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 a zipped pickle", b"\x80\x02}q\x00.", b"\x10" + b"\0" * 7 + b'{"a"'],
)
def test_refuses_a_single_file_that_is_no_safetensors(tmp_path, content):
    """Pickles, empty and cut files by their content, whatever the name says."""
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        refused(
            tmp_path / name, f"{name} is not a readable safetensors file", "pickles are not read"
        )


def test_refuses_a_single_file_of_something_else(tiny_base, tmp_path):
    """Without configs at hand the message says where they belong; with them, that the keys do not
    fit.
    """
    path, keys = tmp_path / "model.safetensors", (FIRST, "vae.x", f"{CLIP}text_model.x")
    save_file({key: torch.zeros(2) for key in keys}, path)
    refused(path, "no configs in", "model/")
    shutil.copytree(tiny_base, tmp_path / "model")
    assert "from_single_file" not in refused(path, "with the configs in")


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer."


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("is a LoRA", ["lora_unet_mid_block_proj_in.lora_down.weight"]),
        ("is a LoRA", ["unet.mid_block.attentions.0.proj_in.lora_A.weight"]),
        ("is a LoRA", ["unet.down_blocks.0.attn1.processor.to_q_lora.down.weight"]),
        ("is a LoRA", ["mid_block.attentions.0.to_q.lora_layer.down.weight"]),
        ("is a LoRA", ["lycoris_mid_block_proj_in.hada_w1_a"]),
        ("is a ControlNet", ["control_model.time_embed.0.weight"]),
        ("is a ControlNet", ["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"]),
        ("has a VAE and a text encoder but no UNet", ["conditioner.x", "first_stage_model.x"]),
        ("is Stable Diffusion 3", ["model.diffusion_model.joint_blocks.0.x", "vae.x"]),
        ("is Flux", ["double_blocks.0.img_attn.norm.key_norm.scale"]),
        ("is a motion module", ["down_blocks.0.motion_modules.0.norm.weight"]),
        ("is a textual inversion", ["emb_params"]),
        ("has a UNet but no VAE and no text encoder", [FIRST]),
        ("has a UNet but no VAE and no text encoder", ["conv_in.weight", "mid_block.x"]),
        ("has a UNet and a text encoder but no VAE", [FIRST, f"{CLIP}text_model.x"]),
        ("has a VAE but no UNet and no text encoder", ["encoder.conv_in.weight"]),
        ("has a VAE but no UNet and no text encoder", ["first_stage_model.x"]),
        ("has a text encoder but no UNet and no VAE", ["text_model.embeddings.x"]),
        ("is not a checkpoint", ["something.weight"]),
    ],
)
def test_says_what_a_single_file_is(tmp_path, words, keys):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(2) for key in keys}, path)
    refused(path, words)


@pytest.mark.parametrize(
    ("channels", "words"), [(9, "an inpainting model"), (8, "an InstructPix2Pix model")]
)
def test_says_what_the_unet_of_a_single_file_takes(tiny_base, tmp_path, channels, words):
    path = single_file(tiny_base, tmp_path / "model.safetensors")
    save_file(load_file(path) | {FIRST: torch.zeros(16, channels, 3, 3)}, path)
    refused(path, words, f"takes {channels} channels")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clip_without_text_model_loads(tiny_base, tmp_path, dtype):
    """As in checkpoints that A1111 reads."""
    path = single_file(tiny_base, tmp_path / "model.safetensors")
    tensors = load_file(path)
    assert any(key.startswith(f"{CLIP}text_model.") for key in tensors)
    save_file({key.replace(".text_model.", "."): t for key, t in tensors.items()}, path)
    assert_same(load_base(str(path), dtype=dtype), load_base(tiny_base, dtype=dtype))
