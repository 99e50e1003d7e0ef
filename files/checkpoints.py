"""What a single .safetensors file is: a checkpoint with all its parts or something else, with
tensors that diffusers would drop, and of a model that predicts what.

    xl = require_whole(path)       # a UNet, a VAE and a text encoder, of text to image
    require_known(path)            # every tensor has a place in Stable Diffusion, or is harmless
    value, where, changes = prediction(path)

Tested in tests/test_checkpoints.py.
"""

import re
from pathlib import Path

import torch

from command.errors import UserError, shown
from command.whole_files import read_text
from files.tensors import opened, refusal

# The words that the names of tensors are made of, in the first releases of Stable Diffusion
WORDS = {
    "model.diffusion_model": "input_blocks middle_block output_blocks time_embed label_emb out "
    "in_layers emb_layers out_layers skip_connection op conv norm proj_in proj_out "
    "transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj norm1 norm2 norm3",
    "first_stage_model": "encoder decoder quant_conv post_quant_conv conv_in conv_out norm_out "
    "down up mid block block_1 block_2 attn attn_1 norm norm1 norm2 conv1 conv2 conv nin_shortcut "
    "conv_shortcut q k v to_q to_k to_v to_out group_norm proj_out downsample upsample",
    "cond_stage_model": "transformer text_model embeddings token_embedding position_embedding "
    "encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2 "
    "final_layer_norm model resblocks attn in_proj_weight in_proj_bias c_fc c_proj ln_1 ln_2 "
    "ln_final positional_embedding",
}
WORDS["conditioner"] = "embedders " + WORDS["cond_stage_model"]
# Tensors that no picture depends on: averages of the weights over the training beside the weights,
# buffers, parts of CLIP for images and of the VAE's training.  A name without a dot is no layer's.
HARMLESS = re.compile(
    r"[^.]+|(model_ema|safety_checker|first_stage_model\.loss|cond_stage_model\.model\.visual)\..*"
    r"|(.*\.)?(position_ids|attn_mask|logit_scale|text_projection(\.weight)?)"
    r"|(vision_model|visual_projection)\..*"
)
PREDICTIONS = {"v": "v_prediction", "eps": "epsilon"}  # in diffusers' words
PARAMETERIZATION = re.compile(r"""^\s*parameterization:\s*["']?(\w+)""", re.M)
# Of a single file: how the keys of each part begin, and keys that say that it is something else
CLIP, CONV_IN = "cond_stage_model.transformer.", "model.diffusion_model.input_blocks.0.0.weight"
HELD = {
    "a UNet": r"model\.diffusion_model\.|(conv_in|down_blocks|mid_block|input_blocks)\.",
    "a VAE": r"first_stage_model\.|vae\.|(encoder|decoder)\.(conv_in|down|up|mid)",
    "a text encoder": r"(cond_stage_model|conditioner|text_model|encoder\.layers|embeddings)\.",
}
OTHERS = {
    "a LoRA (--init starts from one)": r".*(lora[._](A|B|up|down|layer)\b|hada_w|lokr_w)",
    "a ControlNet": r"control_model\.|controlnet_",
    "Stable Diffusion 3": r"(.*\.)?joint_blocks\.",
    "Flux, or a model like it": r"(.*\.)?double_blocks\.",
    "a motion module of AnimateDiff": r".*\bmotion_modules\.",
    "a textual inversion": r"(emb_params|string_to_param|clip_[lg])\b",
}
XL_CLIPS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an InstructPix2Pix", 9: "an inpainting"}
BASE_STEP = 875_000  # of Stable Diffusion 2-base, the epsilon model of that family; diffusers' test
MOST_YAML = 10**6  # bytes


def require_whole(path: Path) -> bool:
    """Whether a checkpoint is of SDXL; raises UserError that says what a file is, unless it has all
    parts of one.
    """
    name = shown(path)
    with opened(path) as file:
        keys = list(file.keys())
        shape = file.get_slice(CONV_IN).get_shape() if CONV_IN in keys else []
    for kind, known in OTHERS.items():
        if CONV_IN not in keys and any(re.match(known, key) for key in keys):
            raise UserError(f"{name} is {kind}: --model takes Stable Diffusion 1.x, 2.x or XL")
    parts = {part: any(re.match(known, key) for key in keys) for part, known in HELD.items()}
    if not any(parts.values()):
        raise UserError(f"{name} is not a checkpoint: it has no UNet, no VAE and no text encoder")
    if not all(parts.values()):
        has = " and ".join(part for part, there in parts.items() if there)
        lacks = " and ".join(f"no {part[2:]}" for part, there in parts.items() if not there)
        raise UserError(f"{name} has {has} but {lacks}: --model takes a whole checkpoint")
    for channels in shape[1:2]:
        if channels in CHANNELS:
            kind = f"is {CHANNELS[channels]} model (its UNet takes {channels} channels)"
            raise UserError(f"{name} {kind}: --model takes a text-to-image one")
    xl = any(key.startswith("conditioner.") for key in keys)
    if xl and not all(any(key.startswith(clip) for key in keys) for clip in XL_CLIPS):
        lacks = "lacks one of the two text encoders of Stable Diffusion XL (is it the refiner?)"
        raise UserError(f"{name} {lacks}: --model takes a whole base")
    return xl


def bare_clip(path: Path, dtype: torch.dtype, config: dict) -> dict[str, torch.nn.Module]:
    """{"text_encoder": of a checkpoint whose keys of CLIP lack `text_model.`}, else {}.

    Such a file works in A1111, and diffusers does not find its text encoder.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel

    with opened(path) as file:
        keys = [key for key in file.keys() if key.startswith(CLIP)]  # noqa: SIM118
        if not keys or any(key.startswith(f"{CLIP}text_model.") for key in keys):
            return {}
        tensors = {key.replace(CLIP, f"{CLIP}text_model."): file.get_tensor(key) for key in keys}
    where = {"subfolder": "text_encoder", "config": config.get("config")}
    where["torch_dtype"] = dtype
    module = create_diffusers_clip_model_from_ldm(CLIPTextModel, tensors, **where)
    return {"text_encoder": module}


def require_known(path: Path) -> None:
    """Raises UserError that names the first tensor with no place in Stable Diffusion: without it
    the base would be another model.
    """
    words = {part: {*names.split(), "weight", "bias"} for part, names in WORDS.items()}
    with opened(path) as file:
        for key in sorted(file.keys()):
            part = next((part for part in words if key.startswith(part + ".")), None)
            names = key[len(part) + 1 :].split(".") if part else [key]
            known = all(name.isdecimal() or name in words.get(part, ()) for name in names)
            if not known and not HARMLESS.fullmatch(key):
                raise UserError(dropped(shown(path), key))


def dropped(name: str, key: str) -> str:
    """The sentence about a tensor that a base would be loaded without."""
    return (
        f"{name} holds {shown(key)}, which is no part of Stable Diffusion and would be dropped: "
        "merge an adapter into the weights, or take the plain base"
    )


def prediction(path: Path) -> tuple[str | None, str | None, dict]:
    """What the model predicts and where that is said, by a key, the metadata or a .yaml beside it,
    None and None where nothing says it; and what its scheduler's config is to say.

    Raises UserError where two of them disagree.
    """
    stated = {}
    with opened(path) as file:
        keys, metadata = set(file.keys()), file.metadata() or {}
        step = file.get_tensor("global_step") if "global_step" in keys else torch.zeros(0)
    if "v_pred" in keys:
        stated["its key v_pred"] = "v"
    if value := metadata.get("modelspec.prediction_type"):
        stated["its modelspec.prediction_type"] = value
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        found = PARAMETERIZATION.search(read_text(beside, MOST_YAML))
        stated[shown(beside)] = found[1] if found else "eps"
    if not stated and step.flatten().tolist() == [BASE_STEP]:
        stated["its global_step"] = "eps"
    stated = {where: PREDICTIONS.get(value, value) for where, value in stated.items()}
    if len(set(stated.values())) > 1:
        both = " and ".join(f"{shown(value)} ({where})" for where, value in stated.items())
        raise refusal(path, f"says that it predicts both {both}: correct one of them")
    where, value = next(iter(stated.items()), (None, None))
    changes = {"prediction_type": value} if value else {}
    changes |= {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
    return value, where, changes
