"""Stable Diffusion XL as a base: what its UNet is told of an image, and old names of its layers.

Its UNet takes the last but one hidden states of two text encoders, a pooled embedding of the
second, and six numbers: original size, corner of the crop, target size, each height first.  All of
it is one row of numbers per image, so that the rest of the program has one tensor to index.
Tested in tests/test_sdxl.py against diffusers' own calls.
"""

import re

import torch

from diffusion import Base

IDS = 6  # numbers at the end of a row


class BaseXL(Base):
    """A base whose embedded captions are (N, L D + P + 6) float32: hidden states, pooled embedding,
    sizes.  Half precision would round the sizes.
    """

    def embed(self, captions: list[str]) -> torch.Tensor:
        """Captions of pictures that are not cut; "" is zeros where the pipeline says so.

        The text encoders are on the device for this alone.
        """
        p, options = self.pipeline, {"padding": "max_length", "truncation": True}
        hidden, pooled = [], None
        for tokenizer, encoder in encoders(p):
            ids = tokenizer(captions, return_tensors="pt", **options).input_ids.to(self.device)
            found = encoder.to(self.device)(ids, output_hidden_states=True)
            encoder.to("cpu")
            hidden.append(found.hidden_states[-2])
            pooled = found[0]
        text = torch.cat([torch.cat(hidden, dim=-1).flatten(1), pooled], dim=1).float()
        if p.config.force_zeros_for_empty_prompt:
            text[[not caption for caption in captions]] = 0
        sizes = text.new_tensor(ids_of((self.size, self.size), self.size))
        return torch.cat([text, sizes.expand(len(text), IDS)], dim=1)

    def condition(self, text: torch.Tensor, dtype: torch.dtype) -> dict:
        """The parts of the rows (N, L D + P + 6)."""
        last = self.pipeline.text_encoder_2.config.projection_dim + IDS
        pooled, ids = text[:, -last:-IDS], text[:, -IDS:]  # (N, P), (N, 6)
        hidden = text[:, :-last].unflatten(1, (-1, self.unet.config.cross_attention_dim))
        added = {"text_embeds": pooled.to(dtype), "time_ids": ids}
        return {"encoder_hidden_states": hidden.to(dtype), "added_cond_kwargs": added}


def encoders(pipeline) -> list[tuple]:
    """(tokenizer, text encoder) of a pipeline of either kind, once or twice."""
    found = [(pipeline.tokenizer, pipeline.text_encoder)]
    if hasattr(pipeline, "text_encoder_2"):
        found.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return found


def ids_of(whole: tuple[int, int], size: int) -> list[int]:
    """The six numbers of the central square of a file of (height, width), scaled to `size`."""
    corner = [round((side * size // min(whole) - size) / 2) for side in whole]
    return [*whole, *corner, size, size]


def framed(base: Base, text: torch.Tensor, sizes: list[tuple[int, int]] | None) -> torch.Tensor:
    """Embedded captions, told the sizes of the files that the pictures were cut from."""
    if not isinstance(base, BaseXL) or sizes is None:
        return text
    return framed_as(base, text, text.new_tensor([ids_of(whole, base.size) for whole in sizes]))


def framed_as(base: Base, text: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Embedded captions with the sizes in the rows of `other`; of another base as they are."""
    if not isinstance(base, BaseXL):
        return text
    ids = other[:, -IDS:].expand(len(text), IDS)
    return torch.cat([text[:, :-IDS], ids], dim=1)


# --------------------------------------------------------------------------------------------------
# Names of layers in the first release, as kohya writes them, and in diffusers; _ stands for .

INNER = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
MIDDLE = ("resnets_0", "attentions_0", "resnets_1")


def present_name(old: str) -> str:
    """input_blocks_4_1_proj_in -> down_blocks_1_attentions_0_proj_in; others stay as they are."""
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:([012])_)?(.*)", old)
    if old in OUTER or not found:
        return OUTER.get(old, old)
    kind, block, sub, layer = found[1], int(found[2]), found[3], found[4]
    layer = INNER.get(layer, layer)
    if kind == "middle_block":
        return f"mid_block_{MIDDLE[block % 3]}_{layer}"
    level, at = divmod(block - (kind == "input_blocks"), 3)
    inside = {"0": f"resnets_{at}", "1": f"attentions_{at}", "2": "upsamplers_0"}.get(sub, "")
    if layer == "op":
        inside, layer = "downsamplers_0", "conv"
    return f"{'down' if kind == 'input_blocks' else 'up'}_blocks_{level}_{inside}_{layer}"
