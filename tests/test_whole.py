"""files/whole.py: full fine-tuning, saved as a UNet folder; the base is there again after it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import evaluate
import lora
import train
from attacks import single as attacks
from command.errors import UserError
from diffusion import squared_error
from files import adapters as files
from files import whole
from files.bases import load_base
from run.resolve import resolve
from settings import FULL_LR, Settings

FLAGS = {"target": "full", "members": 20, "batch_size": 4, "steps": 3, "save_every": 2}
FLAGS |= {"lr": 0.001, "attacker_lr": 0.01, "proxy": "pooled", "lam": 1.0, "samples": 0}


def trained(tiny_base, image_folder, out, **flags):
    train.train(
        Settings(**{"model": tiny_base, "data": image_folder, "out": str(out), **FLAGS, **flags})
    )
    return out


@pytest.fixture(scope="module")
def run(tiny_base, image_folder, tmp_path_factory):
    """The folder of three steps of SMP on all weights."""
    return trained(tiny_base, image_folder, tmp_path_factory.mktemp("runs") / "smp")


def given(base, batch=3):
    """(latents, text, timesteps, noise) for a forward."""
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(batch, *base.latent_shape, generator=g) for _ in range(2))
    return latents, torch.randn(batch, 16, 32, generator=g), torch.tensor([10, 400, 900]), noise


def test_every_weight_is_trained_and_the_base_comes_back(tiny_base):
    """No tensor of the UNet is left out; switched off or removed it has the bits it had."""
    base = load_base(tiny_base)
    unet, before = base.unet, copy.deepcopy(base.unet.state_dict())
    adapter = whole.WholeUNet(unet)
    assert len(adapter.parameters()) == len(before)  # there are no buffers
    optimizer = torch.optim.AdamW(adapter.parameters())
    squared_error(base, *given(base)).mean().backward()
    assert all(p.grad.norm() > 0 for p in adapter.parameters())
    optimizer.step()
    moved = copy.deepcopy(unet.state_dict())
    assert not any(torch.equal(moved[k], v) for k, v in before.items())
    with adapter.disabled():
        assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert all(torch.equal(v, moved[k]) for k, v in unet.state_dict().items())
    lora.remove(unet, adapter)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert not any(p.requires_grad for p in unet.parameters())


def test_half_precision_trains_in_float32_and_comes_back_in_half(tiny_base):
    """The trained weights are float32; the base keeps its dtype and bits."""
    base = load_base(tiny_base, dtype="bfloat16")
    before = copy.deepcopy(base.unet.state_dict())
    adapter = whole.WholeUNet(base.unet)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32} == {base.unet.dtype}
    with adapter.disabled():
        assert base.unet.dtype == torch.bfloat16
    lora.remove(base.unet, adapter)
    after = base.unet.state_dict()
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, before[k]) for k, v in after.items())


def test_diffusers_loads_the_folder_with_the_same_prediction(run, tiny_base):
    """`UNet2DConditionModel.from_pretrained` in place of the base's UNet, against our loader."""
    names = {p.name for p in (run / "adapter").iterdir()}
    assert names == {whole.CONFIG, whole.FILE_NAME, "README.md"}
    base = load_base(tiny_base)
    data = given(base)
    plain = squared_error(base, *data)
    adapter, header = files.load(base, run / "adapter")
    assert (header["method"], header["steps"]) == ("smp", "3") and adapter.target == "full"
    ours = squared_error(base, *data)
    lora.remove(base.unet, adapter)
    assert torch.equal(squared_error(base, *data), plain) and not torch.allclose(ours, plain)
    base.unet = UNet2DConditionModel.from_pretrained(run / "adapter")
    # its weights lie otherwise in memory
    assert torch.allclose(squared_error(base, *data), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"accumulate": 2, "stop": "best"}], ids=str)
def test_resumed_is_uninterrupted(
    run, tiny_base, image_folder, tmp_path, stopped_and_gone_on_with, flags
):
    """Killed after the second step and gone on with: the same bits."""
    if flags:
        run = trained(tiny_base, image_folder, tmp_path / "whole", batch_size=2, **flags)
        flags = flags | {"batch_size": 2}

    def begin(folder):
        trained(tiny_base, image_folder, folder, state_every=1, **flags)

    stopped_and_gone_on_with(begin, tmp_path / "r")
    one, two = (load_file(r / "adapter" / whole.FILE_NAME) for r in (run, tmp_path / "r"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert losses(run) == losses(tmp_path / "r")


def losses(run):
    """What a run's rows say, without their times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_evaluation_of_a_run(run, capsys):
    """Every attack, the difference from the base and GSA1 on the weights among them."""
    settings = evaluate.Settings(runs=[str(run)], pictures=0)
    (record,) = evaluate.evaluate(settings)
    assert {"difference", "GSA1", "combined"} <= set(record["adapted"]["attacks"])
    assert record["adapted"]["held_out_loss"] != record["base"]["held_out_loss"]
    assert json.loads((run / "eval.json").read_text())["method"] == "smp"


def test_gradient_features_against_autograd(subject):
    """GSA1 on the weights: log norms of the gradient of one image, tensor by tensor."""
    base, data = subject
    unet = copy.deepcopy(base.unet)
    base = type(base)(**(vars(base) | {"unet": unet}))
    adapter = whole.WholeUNet(unet)
    found = attacks.gradient_features(base, adapter, data.latents[:3], data.text[:3])
    weights = [m.weight for m in adapter.factors()]
    timesteps = torch.tensor(attacks.TIMESTEPS[::2])
    shape, g = (len(timesteps), *base.latent_shape), torch.Generator()
    noise = torch.randn(shape, generator=g.manual_seed(attacks.GRID_SEED))
    z, c = (x[1:2].repeat_interleave(len(timesteps), 0) for x in (data.latents, data.text))
    loss = squared_error(base, z, c, timesteps, noise).mean()
    want = torch.stack([g.norm() for g in torch.autograd.grad(loss, weights)]).log()
    torch.testing.assert_close(torch.from_numpy(found[1]).float(), want, rtol=1e-3, atol=1e-3)


def test_default_learning_rates(tmp_path):
    """The paper's for Stable Diffusion."""
    found = [
        resolve(Settings(target="full", out=str(tmp_path), **m)) for m in ({}, {"model": "SD"})
    ]
    assert [s.lr for s in found] == [FULL_LR[True], FULL_LR[False]] and FULL_LR[False] == 5e-6
    assert {s.rank for s in found} == {None}


WRONG = [
    ({"rank": 4}, "--rank"),
    ({"alpha": 4.0}, "--alpha"),
    ({"method": "dp"}, "dp"),
]


@pytest.mark.parametrize("flags, words", WRONG)
def test_what_it_cannot_be_is_refused(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        resolve(Settings(target="full", out=str(tmp_path), **flags))


def test_files_that_do_not_fit_are_refused(run, tiny_base, tmp_path):
    """By the first tensor that is missing, too many, of another shape or not finite; the UNet is
    as before.
    """
    unet, good = load_base(tiny_base).unet, load_file(run / "adapter" / whole.FILE_NAME)
    before, name = {k: v.clone() for k, v in unet.state_dict().items()}, "conv_in.weight"
    cases = {
        "lacks conv_in.weight": {k: v for k, v in good.items() if k != name},
        "does not have, extra": good | {"extra": torch.zeros(1)},
        "conv_in.weight is": good | {name: torch.zeros(2, 2)},
        "NaN": good | {name: good[name] * torch.nan},
    }
    for words, tensors in cases.items():
        save_file(tensors, tmp_path / whole.FILE_NAME)
        with pytest.raises(UserError, match=words):
            whole.load(unet, tmp_path)
    Path(tmp_path / whole.FILE_NAME).write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable"):
        whole.load(unet, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_init_says_what_it_is(run, tiny_base, image_folder, tmp_path):
    """A whole UNet is gone on with by --target full alone, and by that nothing else."""
    with pytest.raises(UserError, match="a whole UNet"):
        flags = {"init": str(run / "adapter"), "target": "all", "lr": 0.1}
        trained(tiny_base, image_folder, tmp_path / "a", **flags)
    out = trained(tiny_base, image_folder, tmp_path / "b", init=str(run / "adapter"), lr=1e-12)
    one, two = (load_file(r / "adapter" / whole.FILE_NAME) for r in (run, out))
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)
