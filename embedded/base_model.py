"""The four parts of the embedded base model, and the pipeline folder that they make together.

`python -m embedded.pretrain` trains them.  `StableDiffusionPipeline.from_pretrained` loads the
folder.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from files import emojis

LATENT_CHANNELS = 6
MAX_TOKENS = 16  # longest emoji name: 14 tokens with both ends


def build_vae() -> AutoencoderKL:
    """The autoencoder: pixels (N, 3, 48, 48) in [-1, 1] to latents (N, 6, 12, 12)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=emojis.SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """The denoiser: noise in latents (N, 6, 12, 12), given text (N, 16, 128) and timesteps (N,)."""
    return UNet2DConditionModel(
        sample_size=emojis.SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",  # one ResNet block, to keep the folder below 20 MB
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer, width: int = 128, layers: int = 2
) -> CLIPTextModel:
    """A small CLIP text encoder, four heads: the tokenizer's ids (N, 16) -> (N, 16, width)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges are learned on the captions, saved to `folder`.

    The vocabulary has at most 2,000 merged tokens, each seen at least three times.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(r"\w+|[^\s\w]+"), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2000,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
            min_frequency=3,
        ),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    # other tools read this pair of files
    (Path(folder) / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False)
    )
    (Path(folder) / "merges.txt").write_text(
        "\n".join(["#version: 0.2"] + [" ".join(m) for m in merges]) + "\n"
    )
    return tokenizer


def pipeline(
    vae, text_encoder, tokenizer, unet, prediction: str = "epsilon"
) -> StableDiffusionPipeline:
    """The parts with Stable Diffusion's noise schedule (DDIM), without a safety checker.

    `prediction` is what the UNet predicts, "epsilon" or "v_prediction".
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(made: StableDiffusionPipeline, folder: str | Path, vocabulary: str | Path) -> None:
    """Write the pipeline in half precision; `from_pretrained(folder)` loads it in single precision.

    vocab.json and merges.txt, which older tools read, are copied from `vocabulary`/tokenizer.
    """
    folder = Path(folder)
    made.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # else transformers loads it in half precision
    _edit(folder / "text_encoder" / "config.json", dtype="float32")
    for part in ("unet", "vae"):
        _edit(folder / part / "config.json", _name_or_path=None)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(Path(vocabulary) / "tokenizer" / name, folder / "tokenizer")


def _edit(path: Path, **changes) -> None:
    """Set values in a JSON file; None removes."""
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(values, indent=2) + "\n")
