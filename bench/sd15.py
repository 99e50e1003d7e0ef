"""Stable Diffusion v1.5 in full size with random weights, for machines that cannot download it.

    pip install --no-deps open-clip-torch    # for CLIP's real vocabulary, a text file in it
    python bench/sd15.py FOLDER              # 860 M + 123 M + 84 M parameters, float16
    python bench/speed.py step --model FOLDER --times 3 --warm-up 1 --rounds 1
    python bench/speed.py attacks --model FOLDER --images 2 --times 1 --warm-up 0 --rounds 1

Shapes, memory and time are those of the real model; what it draws is noise.  Not part of the test
suite.
"""

import argparse
import gzip
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# what differs from the defaults of diffusers and transformers, which are those of SD v1.x and CLIP
UNET = {"sample_size": 64, "cross_attention_dim": 768}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TEXT |= {"projection_dim": 768}


def clip_tokenizer(folder: Path):
    """CLIP's byte-pair tokenizer of 49,408 tokens from the merges that open-clip-torch carries."""
    from transformers import CLIPTokenizer

    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise SystemExit(
            "error: CLIP's vocabulary is missing: pip install --no-deps open-clip-torch"
        )
    packed = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m.split()) for m in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
    files[1].write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(*map(str, files), model_max_length=77)
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408 and tokenizer("a photo of a cat").input_ids == cat
    return tokenizer


def write(folder: Path) -> None:
    """The pipeline folder, random weights of seed 0 in float16: 2.1 GB."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from embedded.base_model import pipeline

    torch.manual_seed(0)
    vae, text_encoder = AutoencoderKL(**VAE).half(), CLIPTextModel(CLIPTextConfig(**TEXT)).half()
    unet = UNet2DConditionModel(**UNET).half()
    pipeline(vae, text_encoder, clip_tokenizer(folder / "tokenizer"), unet).save_pretrained(folder)


def main() -> None:
    """Write the folder if it is not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "model_index.json").is_file():
        write(folder)


if __name__ == "__main__":
    main()
