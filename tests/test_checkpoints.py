"""files/checkpoints.py: single files whose tensors would be dropped, and which prediction they
state; and the same tensors in folders.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_base_files import assert_same, change, edit, folder, refused, single_file  # noqa: F401

from files.bases import load_base
from files.checkpoints import require_known


@pytest.fixture
def checkpoint(tiny_base, tmp_path):
    """The tiny base as one file, without a prediction type in the configs beside it."""
    path = single_file(tiny_base, tmp_path / "model.safetensors")
    edit(path.with_suffix("") / "scheduler" / "scheduler_config.json", drop="prediction_type")
    return path


def rewrite(path: Path, metadata=None, **tensors) -> None:
    """Add tensors and metadata to a file."""
    save_file(load_file(path) | tensors, path, metadata)


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LDM = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1"
DROPPED = [
    ("unet", f"{LAYER}.to_q.lora_layer.up.weight"),
    ("unet", f"{LAYER}.processor.to_q_lora.down.weight"),
    ("unet", "down_blocks.0.motion_modules.0.proj_in.weight"),
    ("text_encoder", "encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight"),
    ("vae", "encoder.adapter.weight"),
    (None, f"{LDM}.to_q.lora_layer.up.weight"),
    (None, "control_model.input_blocks.0.0.weight"),
    (None, "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"),
    (None, "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.scale_weight"),
    (None, "first_stage_model.decoder.lora_up.weight"),
]


@pytest.mark.parametrize(("part", "key"), DROPPED)
def test_refuses_tensors_that_would_be_dropped(folder, checkpoint, part, key):  # noqa: F811
    more = {key: torch.ones(2, 2)}
    if part:
        change(folder, part, lambda tensors: tensors.update(more))
        refused(folder, f"the {part} of", key, "would be dropped")
    else:
        rewrite(checkpoint, **more)
        refused(checkpoint, key, "would be dropped")


def test_harmless_tensors_are_read(tiny_base, folder, checkpoint):  # noqa: F811
    """Averages, buffers, and the half of CLIP that sees."""
    want = load_base(tiny_base)
    keys = ["text_model.embeddings.position_ids", "logit_scale", "text_projection.weight"]
    keys += ["vision_model.post_layernorm.bias", "visual_projection.weight"]
    change(folder, "text_encoder", lambda tensors: tensors.update({k: torch.ones(2) for k in keys}))
    assert_same(load_base(str(folder)), want)
    keys = ["model_ema.decay", "model_ema.diffusion_modelout2bias", "alphas_cumprod", "logvar"]
    keys += ["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    keys += ["first_stage_model.loss.logvar", "cond_stage_model.logit_scale"]
    rewrite(checkpoint, **{k: torch.ones(2) for k in keys})
    assert_same(load_base(str(checkpoint)), want)


def test_the_names_of_openclip_are_known(checkpoint):
    """Stable Diffusion 2's text encoder, all of whose layers but the last diffusers takes."""
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_TO_LDM_MAPPING,
        SD_2_TEXT_ENCODER_KEYS_TO_IGNORE,
    )

    names = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].values()
    keys = [f"cond_stage_model.model.{name}" for name in names] + SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
    rewrite(checkpoint, **{k: torch.ones(2) for k in keys})
    require_known(checkpoint)


STATED = [  # metadata, keys, .yaml, what is predicted
    ({}, [], None, "epsilon"),
    ({}, ["v_pred"], None, "v_prediction"),
    ({"modelspec.prediction_type": "v"}, ["v_pred"], None, "v_prediction"),
    ({"modelspec.prediction_type": "epsilon"}, [], None, "epsilon"),
    ({}, [], 'model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
    ({}, [], "model:\n  params:\n    timesteps: 1000\n", "epsilon"),
    ({"modelspec.prediction_type": "epsilon"}, ["v_pred"], None, "both"),
    ({}, ["v_pred"], "parameterization: eps", "both"),
    ({"modelspec.prediction_type": "flow"}, [], None, "'flow'"),
]


@pytest.mark.parametrize(("metadata", "keys", "yaml", "want"), STATED)
def test_the_prediction_that_a_file_states(checkpoint, metadata, keys, yaml, want):
    rewrite(checkpoint, metadata, **dict.fromkeys(keys, torch.zeros(0)))
    if yaml:
        checkpoint.with_suffix(".yaml").write_text(yaml)
    if want not in ("epsilon", "v_prediction"):
        refused(checkpoint, want)
        return
    base = load_base(str(checkpoint))
    assert base.prediction == base.pipeline.scheduler.config.prediction_type == want


def test_the_prediction_against_the_configs_beside(checkpoint):
    """The step of Stable Diffusion 2-base says epsilon; a config beside the file may not disagree
    with the file; zero terminal SNR is read as well.
    """
    config = checkpoint.with_suffix("") / "scheduler" / "scheduler_config.json"
    wrong = json.loads(config.read_text()) | {"prediction_type": "v_prediction"}
    rewrite(checkpoint, global_step=torch.tensor(875_000))
    assert load_base(str(checkpoint)).prediction == "epsilon"
    config.write_text(json.dumps(wrong))
    refused(checkpoint, "predicts epsilon", "global_step", "scheduler_config.json", "v_prediction")
    rewrite(checkpoint, global_step=torch.tensor(1), v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    base = load_base(str(checkpoint))
    assert base.prediction == "v_prediction" and base.abar[-1] < 1e-6
