"""lora.py: the adapted UNet against the base and against itself merged."""

import pytest
import torch
from torch import nn

from files.bases import load_base
from lora import TARGETS, Adapter, LoRAConv2d, LoRALinear, inject, layer_class, remove

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


@pytest.fixture
def unet(tiny_base):
    """A fresh tiny UNet."""
    return load_base(tiny_base).unet


@pytest.fixture(scope="module")
def base_output(tiny_base):
    return predict(load_base(tiny_base).unet)


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
    """W x + (alpha / r) B A x = (W + (alpha / r) B A) x, in float64; unmerge gives the base weights
    back.
    """
    adapter = trained(inject(unet, target, RANK, ALPHA))
    unet.double()
    weights = {n: layer.base.weight.clone() for n, layer in adapter.layers.items()}
    apart = predict(unet, torch.float64)
    adapter.merge()
    adapter.merge()  # the second call must not add it again
    for name, layer in adapter.layers.items():
        assert (layer.base.weight - weights[name]).abs().max() > 1e-3
    assert torch.allclose(predict(unet, torch.float64), apart, rtol=0, atol=1e-11)
    adapter.unmerge()
    adapter.unmerge()
    for name, layer in adapter.layers.items():
        assert torch.allclose(layer.base.weight, weights[name], rtol=0, atol=1e-14)
    assert torch.allclose(predict(unet, torch.float64), apart, rtol=0, atol=1e-11)


def test_folded_leaves_no_trace(unet):
    """The same outputs inside, and the very weights of before after it, which adding and taking
    away would not give; also after an exception.  Nothing in a switched-off or merged adapter.
    """
    adapter = trained(inject(unet, "all", RANK, ALPHA))
    layers, apart = list(adapter.layers.values()), predict(unet)
    before = [(layer.base.weight, layer.base.weight.clone()) for layer in layers]
    with pytest.raises(KeyError), adapter.folded():
        assert all(layer.merged for layer in layers)
        assert not torch.equal(layers[0].base.weight, before[0][1])
        assert torch.allclose(predict(unet), apart, rtol=1e-3, atol=1e-4)
        raise KeyError
    assert not any(layer.merged for layer in layers)
    for layer, (weight, bits) in zip(layers, before, strict=True):
        assert layer.base.weight is weight and torch.equal(weight, bits)
    with adapter.disabled(), adapter.folded():
        assert not any(layer.merged for layer in layers)
    adapter.merge()
    with adapter.folded():
        pass
    assert all(layer.merged for layer in layers)


def test_disabled_is_the_base_model(unet, base_output):
    """Exactly, after training too; and the adapter is back afterwards, after an exception too."""
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    adapted = predict(unet)
    with adapter.disabled():
        assert torch.equal(predict(unet), base_output)
        with adapter.disabled():
            pass
        # the inner block restores what it found: off
        assert torch.equal(predict(unet), base_output)
    assert torch.equal(predict(unet), adapted)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(predict(unet), adapted)


def test_disabled_refuses_a_merged_adapter(unet):
    """The base weights are not there to be shown: better an error than the adapted model under the
    base's name.
    """
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    adapter.merge()
    with pytest.raises(RuntimeError, match="unmerge"), adapter.disabled():
        pass


def test_parameter_count(unet):
    """Sum of r (in + out) over the four projections of every attention block, counted without
    lora.py.
    """
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
    """The optimiser's list and the clipping's list hold the same tensors; a generator would be
    empty by then.
    """
    adapter = trained(inject(unet, "attention", RANK, ALPHA))
    parameters = adapter.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    unet(torch.ones(1, 4, 8, 8), 10, torch.ones(1, 16, 32)).sample.sum().backward()
    assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 0
    assert [id(p) for p in parameters] == [id(p) for p in optimizer.param_groups[0]["params"]]


def test_the_generator_decides_the_initial_weights(tiny_base):
    """The same seed gives the same A whatever the global random state is; A has a standard
    deviation of 1 / r.
    """
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        generator = torch.Generator().manual_seed(seed)
        layers = inject(load_base(tiny_base).unet, "all", RANK, ALPHA, generator).layers
        drawn.append(torch.cat([layer.lora_A.weight.flatten() for layer in layers.values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(1 / RANK, rel=0.05)


def test_projections_as_convolution_and_as_linear(tiny_base, tiny_base_linear):
    """proj_in is a 1x1 convolution in Stable Diffusion 1.x and linear in 2.x; target transformer
    takes both.
    """
    for path, kind in ((tiny_base, nn.Conv2d), (tiny_base_linear, nn.Linear)):
        unet = load_base(path).unet
        layers = inject(unet, "transformer", RANK, ALPHA).layers
        ends = ("proj_in", "proj_out")
        projections = [layer for name, layer in layers.items() if name.endswith(ends)]
        assert len(projections) == 8 and all(type(layer.base) is kind for layer in projections)
        assert all(isinstance(layer, LoRAConv2d) == (kind is nn.Conv2d) for layer in projections)


@torch.no_grad()
def test_shapes_are_those_of_the_factors():
    """What a file is compared with is what would be built, also with a stride and unequal sides."""
    for base in (nn.Linear(5, 7), nn.Conv2d(3, 6, (3, 5), stride=2, padding=1)):
        layer = layer_class(base)(base, 2, 1.0)
        assert layer.shapes(base, 2) == (layer.lora_A.weight.shape, layer.lora_B.weight.shape)
        assert layer.delta().shape == base.weight.shape


def test_remove_gives_the_base_back(unet, base_output):
    """Merged or not: the output is the base's again and no LoRA layer is left."""
    adapter = trained(inject(unet, "all", RANK, ALPHA))
    adapter.merge()
    remove(unet, adapter)
    assert not [m for m in unet.modules() if isinstance(m, LoRALinear)]
    assert torch.allclose(predict(unet), base_output, atol=1e-5)


def test_rank_and_alpha_are_those_of_most_layers(unet):
    """All of them after `inject`; a minority that differs does not change the answer."""
    adapter = inject(unet, "attention", RANK, ALPHA)
    assert adapter.rank_and_alpha() == (RANK, ALPHA)
    next(iter(adapter.layers.values())).alpha = 1.0
    assert adapter.rank_and_alpha() == (RANK, ALPHA)


# ---- refusals ----


@pytest.mark.parametrize("rank", [0, -3])
def test_refuses_a_rank_below_one(unet, rank):
    with pytest.raises(ValueError, match=f"1 or more, not {rank}"):
        inject(unet, "attention", rank, ALPHA)


def test_refuses_a_model_without_such_layers():
    with pytest.raises(ValueError, match="to_q"):
        inject(nn.Sequential(nn.Linear(2, 2)), "attention", RANK, ALPHA)
