"""lora.py: the adapted UNet against the base, against itself merged, and against diffusers + peft on the same file."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cli import UserError
from diffusion import load_base
from lora import FILE_NAME, KOHYA_NAME, TARGETS, Adapter, LoRAConv2d, inject, load, read

RANK, ALPHA = 4, 8


@torch.no_grad()
def predict(unet, dtype=torch.float32):
    """The UNet's output for two fixed inputs."""
    g = torch.Generator().manual_seed(5)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 16, 32, generator=g)
    return unet(x.to(dtype), torch.tensor([10, 700]), text.to(dtype)).sample


@torch.no_grad()
def trained(adapter: Adapter) -> Adapter:
    """Stands in for training: B random instead of zero."""
    g = torch.Generator().manual_seed(6)
    for layer in adapter.layers.values():
        layer.lora_B.weight.copy_(0.3 * torch.randn(layer.lora_B.weight.shape, generator=g))
    return adapter


def tensors_of(file) -> dict[str, torch.Tensor]:
    """Copies: safetensors maps the file into memory, and some tests overwrite it."""
    return {k: v.clone() for k, v in load_file(file).items()}


@pytest.fixture
def unet(tiny_base):
    """A fresh tiny UNet."""
    return load_base(tiny_base).unet


@pytest.fixture(scope="module")
def base_output(tiny_base):
    return predict(load_base(tiny_base).unet)


@pytest.fixture
def saved(unet, tmp_path):
    """(folder of a trained attention adapter, the adapted UNet's output)."""
    adapter = trained(inject(unet, "attention", RANK, ALPHA, torch.Generator().manual_seed(1)))
    adapter.save(tmp_path / "adapter", {"method": "smp", "lam": 0.05})
    return tmp_path / "adapter", predict(unet)


# ---- layers and switches ----


@pytest.mark.parametrize("target", TARGETS)
def test_untrained_adapter_changes_nothing(unet, base_output, target):
    """B = 0: exactly the base model, bit for bit; with B random it is another model."""
    adapter = inject(unet, target, RANK, ALPHA)
    assert torch.equal(predict(unet), base_output)
    trained(adapter)
    assert (predict(unet) - base_output).abs().max() > 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_merged_equals_unmerged(unet, target):
    """W x + (alpha / r) B A x = (W + (alpha / r) B A) x, in float64; unmerge gives the base weights back."""
    adapter = trained(inject(unet, target, RANK, ALPHA))
    unet.double()
    weights = {n: layer.base.weight.clone() for n, layer in adapter.layers.items()}
    apart = predict(unet, torch.float64)
    adapter.merge()
    adapter.merge()  # the second call must not add it again
    assert all(
        (layer.base.weight - weights[n]).abs().max() > 1e-3 for n, layer in adapter.layers.items()
    )
    assert torch.allclose(predict(unet, torch.float64), apart, rtol=0, atol=1e-11)
    adapter.unmerge()
    adapter.unmerge()
    assert all(
        torch.allclose(layer.base.weight, weights[n], rtol=0, atol=1e-14)
        for n, layer in adapter.layers.items()
    )
    assert torch.allclose(predict(unet, torch.float64), apart, rtol=0, atol=1e-11)


def test_disabled_is_the_base_model(unet, base_output):
    """Exactly, after training too; and the adapter is back afterwards, after an exception too."""
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    adapted = predict(unet)
    with adapter.disabled():
        assert torch.equal(predict(unet), base_output)
        with adapter.disabled():
            pass
        assert torch.equal(
            predict(unet), base_output
        )  # the inner block restores what it found: off
    assert torch.equal(predict(unet), adapted)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(predict(unet), adapted)


def test_disabled_refuses_a_merged_adapter(unet):
    """The base weights are not there to be shown: better an error than the adapted model under the base's name."""
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    adapter.merge()
    with pytest.raises(RuntimeError, match="unmerge"), adapter.disabled():
        pass


def test_parameter_count(unet):
    """Sum of r (in + out) over the four projections of every attention block, counted without lora.py."""
    from diffusers.models.attention_processor import Attention

    blocks = [m for m in unet.modules() if isinstance(m, Attention)]
    layers = [x for m in blocks for x in (m.to_q, m.to_k, m.to_v, m.to_out[0])]
    want = sum(RANK * (x.in_features + x.out_features) for x in layers)
    adapter = inject(unet, "attention", RANK, ALPHA)
    assert len(blocks) == 8 and len(adapter.layers) == len(layers)
    assert sum(p.numel() for p in adapter.parameters()) == want
    trainable = {id(p) for p in unet.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


def test_parameters_can_be_asked_twice(unet):
    """The optimiser's list and the clipping's list hold the same tensors; a generator would be empty by then."""
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    parameters = adapter.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    g = torch.Generator().manual_seed(0)
    unet(
        torch.randn(1, 4, 8, 8, generator=g), 10, torch.randn(1, 16, 32, generator=g)
    ).sample.sum().backward()
    assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 0
    assert [id(p) for p in parameters] == [id(p) for p in optimizer.param_groups[0]["params"]]


def test_the_generator_decides_the_initial_weights(tiny_base):
    """The same seed gives the same A whatever the global random state is; A has a standard deviation of 1 / r."""
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        adapter = inject(
            load_base(tiny_base).unet, "all", RANK, ALPHA, torch.Generator().manual_seed(seed)
        )
        drawn.append(
            torch.cat([layer.lora_A.weight.flatten() for layer in adapter.layers.values()])
        )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(1 / RANK, rel=0.05)


def test_projections_as_convolution_and_as_linear(tiny_base, tiny_base_linear):
    """proj_in is a 1x1 convolution in Stable Diffusion 1.x and linear in 2.x; target transformer takes both."""
    for path, kind in ((tiny_base, nn.Conv2d), (tiny_base_linear, nn.Linear)):
        unet = load_base(path).unet
        layers = inject(unet, "transformer", RANK, ALPHA).layers
        projections = [
            layer for name, layer in layers.items() if name.endswith(("proj_in", "proj_out"))
        ]
        assert len(projections) == 8 and all(type(layer.base) is kind for layer in projections)
        assert all(isinstance(layer, LoRAConv2d) == (kind is nn.Conv2d) for layer in projections)


# ---- files ----


@pytest.mark.parametrize("base", ["tiny_base", "tiny_base_linear"])
@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("target", TARGETS)
def test_diffusers_and_peft_load_our_file(request, tmp_path, base_output, target, kohya, base):
    """`pipeline.load_lora_weights(folder)` predicts what our own layers predict, alpha != rank included."""
    path = request.getfixturevalue(base)
    unet = load_base(path).unet
    file = trained(inject(unet, target, RANK, ALPHA)).save(tmp_path, {"seed": 1}, kohya=kohya)
    pipeline = load_base(path).pipeline
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(str(tmp_path), **({"weight_name": file.name} if kohya else {}))
    theirs = predict(pipeline.unet)
    assert torch.allclose(theirs, predict(unet), atol=1e-5)
    assert (theirs - before).abs().max() > 0.1


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("target", TARGETS)
def test_round_trip_is_exact(unet, tiny_base, tmp_path, target, kohya):
    """save -> load -> save gives the same weights, output, target and bytes, and our own facts."""
    adapter = trained(inject(unet, target, RANK, ALPHA))
    file = adapter.save(tmp_path / "a", {"method": "smp", "lam": 0.05}, kohya=kohya)
    other = load_base(tiny_base).unet
    again, metadata = load(other, file)
    assert torch.equal(predict(other), predict(unet))
    assert list(again.layers) == list(adapter.layers) and again.target == adapter.target
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in again.state_dict().items())
    assert (
        metadata["method"] == "smp" and metadata["lam"] == "0.05" and metadata["target"] == target
    )
    second = again.save(tmp_path / "b", {"method": "smp", "lam": 0.05}, kohya=kohya)
    assert [p.name for p in (tmp_path / "b").iterdir()] == [
        KOHYA_NAME if kohya else FILE_NAME
    ]  # no .tmp left
    tensors, copies = load_file(file), load_file(second)
    assert tensors.keys() == copies.keys() and all(
        torch.equal(tensors[k], copies[k]) for k in tensors
    )
    with safe_open(second, framework="pt") as opened:
        assert opened.metadata() == metadata


def test_metadata_is_what_diffusers_reads(saved):
    """The scale stands in `lora_adapter_metadata`; without it diffusers would take alpha for the rank."""
    with safe_open(saved[0] / FILE_NAME, framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config == {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    }
    assert metadata["format"] == "pt"
    assert all(re.fullmatch(r"unet\..+\.lora_[AB]\.weight", k) for k in keys)


def test_loads_a_file_that_peft_wrote_without_metadata(unet, tiny_base, tmp_path):
    """A foreign trainer's file: alpha is taken to be the rank, as diffusers takes it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules, init_lora_weights=False)
    )
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path), unet_lora_layers=get_peft_model_state_dict(unet)
    )
    other = load_base(tiny_base).unet
    adapter, metadata = load(other, tmp_path)
    assert "lora_adapter_metadata" not in metadata and adapter.target == "attention"
    assert {layer.alpha for layer in adapter.layers.values()} == {RANK}
    assert torch.allclose(predict(other), predict(unet), atol=1e-5)


def test_only_kohya_files_hold_mixed_scales(unet, tiny_base, tmp_path):
    """One alpha stands for all layers in a diffusers file, so another for one layer would be lost without a word."""
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    next(iter(adapter.layers.values())).alpha = 1.0
    with pytest.raises(UserError, match="kohya"):
        adapter.save(tmp_path)
    other = load_base(tiny_base).unet
    load(other, adapter.save(tmp_path, kohya=True))
    assert torch.equal(predict(other), predict(unet))


# ---- refusals ----

FIRST = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"unet.{FIRST}.lora_A.weight", f"unet.{FIRST}.lora_B.weight"


def edit(change):
    """A damage that rewrites the file's tensors."""

    def damage(file):
        tensors = tensors_of(file)
        words = change(tensors)
        save_file(tensors, file)
        return words

    return damage


def wrong_shape(tensors):
    tensors[A] = torch.zeros(4, 48)
    return [FIRST, "(4, 48)", "(4, 32)"]


def unknown_layer(tensors):
    for key in (A, B):
        tensors[key.replace(FIRST, "mid.nowhere")] = tensors[key].clone()
    return ["mid.nowhere"]


def no_second_factor(tensors):
    del tensors[B]
    return [FIRST, "second"]


def no_first_factor(tensors):
    del tensors[A]
    return [B]


def other_lora(tensors):
    tensors[f"unet.{FIRST}.lora_magnitude_vector"] = torch.ones(32)
    return [f"{FIRST}.lora_magnitude_vector"]


def rank_zero(tensors):
    tensors[A], tensors[B] = torch.zeros(0, 32), torch.zeros(32, 0)
    return [FIRST, "(0, 32)"]


def other_keys(tensors):
    tensors.clear()
    tensors["model.weight"] = torch.ones(2)
    return ["no UNet LoRA"]


def truncated(file):
    file.write_bytes(file.read_bytes()[:2000])
    return ["not a readable safetensors"]


def empty(file):
    file.write_bytes(b"")
    return ["not a readable safetensors"]


def pickled(file):
    torch.save(tensors_of(file), file)
    return ["not a readable safetensors", "pickles are not read"]


def missing(file):
    file.unlink()
    return ["no adapter file"]


TENSORS = [
    wrong_shape,
    unknown_layer,
    no_second_factor,
    no_first_factor,
    other_lora,
    rank_zero,
    other_keys,
]
DAMAGES = {f.__name__: edit(f) for f in TENSORS} | {
    f.__name__: f for f in (truncated, empty, pickled, missing)
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_a_file_that_does_not_fit(saved, tiny_base, base_output, damage):
    """One line that names the file and the first mismatch, and a UNet that was not touched."""
    words = [str(saved[0]), *DAMAGES[damage](saved[0] / FILE_NAME)]
    unet = load_base(tiny_base).unet
    with pytest.raises(UserError) as caught:
        load(unet, saved[0])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert torch.equal(predict(unet), base_output)
    assert not any("lora" in name for name, _ in unet.named_parameters())


def test_refuses_half_a_kohya_pair(unet, tmp_path):
    file = inject(unet, "attention", RANK, ALPHA).save(tmp_path, kohya=True)
    tensors = tensors_of(file)
    del tensors["lora_unet_" + FIRST.replace(".", "_") + ".lora_up.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"attn1_to_q .*second"):
        read(file)


@pytest.mark.parametrize("rank", [0, -3])
def test_refuses_a_rank_below_one(unet, rank):
    with pytest.raises(UserError, match=f"1 or more, not {rank}"):
        inject(unet, "attention", rank, ALPHA)


def test_refuses_a_model_without_such_layers():
    with pytest.raises(UserError, match="to_q"):
        inject(nn.Sequential(nn.Linear(2, 2)), "attention", RANK, ALPHA)
