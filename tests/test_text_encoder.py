"""--as-released text-encoder: a LoRA on CLIP beside the UNet's, trained, saved, loaded, judged."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import audit
import lora
import train
from attacks import examination
from attacks.model import Model
from attacks.target import read_run
from diffusion import encode_captions, squared_error
from files import adapters as files
from files import lora_files, text_encoder
from files.bases import load_base
from run.learner import Learner
from run.prepare import Batch, prepare
from run.processes import Processes
from run.resolve import resolve
from settings import Settings

FLAGS = {"members": 20, "batch_size": 4, "target": "attention", "rank": 2, "alpha": 4.0}
FLAGS |= {"lr": 0.05, "attacker_lr": 0.01, "proxy": "pooled", "lam": 1.0, "norms_every": 10**9}
FLAGS |= {"as_released": "text-encoder", "steps": 3, "save_every": 2, "samples": 1}
CAPTIONS = ["a red circle", "a blue ring", ""]


def trained(tiny_base, image_folder, out, **flags):
    given = {"model": tiny_base, "data": image_folder, "out": str(out), **FLAGS, **flags}
    train.train(Settings(**given))
    return out


def started(tiny_base, image_folder, **flags):
    given = {"model": tiny_base, "data": image_folder, "out": "/nowhere", **FLAGS, **flags}
    run = prepare(resolve(Settings(**given)), Processes())
    return run, Learner(run)


@pytest.fixture(scope="module")
def run(tiny_base, image_folder, tmp_path_factory):
    """The folder of three steps of SMP with a LoRA on both, also in kohya's form."""
    return trained(tiny_base, image_folder, tmp_path_factory.mktemp("r") / "smp", format="kohya")


def test_it_begins_as_the_base_and_the_unet_part_as_without(tiny_base, image_folder):
    """B is zero; the UNet's A is drawn first; the attention of every layer is wrapped."""
    run, _ = started(tiny_base, image_folder)
    alone, _ = started(tiny_base, image_folder, as_released=None)
    for name, tensor in alone.adapter.state_dict().items():
        assert torch.equal(run.adapter.state_dict()[name], tensor)
    added = [n for n in run.adapter.layers if n not in alone.adapter.layers]
    assert [n.rpartition(".")[2] for n in added] == ["k_proj", "v_proj", "q_proj", "out_proj"]
    index = torch.tensor([0, 5])
    bare = torch.tensor([False, True])
    empty = encode_captions(alone.base, [""])[0]
    torch.testing.assert_close(run.text(index, None), alone.data.text[index])
    torch.testing.assert_close(run.text(index, bare)[1], empty)


def test_a_step_by_hand(tiny_base, image_folder):
    """Gradients run through captions into CLIP; its part learns at a tenth of the rate."""
    run, learner = started(tiny_base, image_folder, method="lora", clip=1e6)
    other, again = started(tiny_base, image_folder, method="lora", clip=1e6)
    for layer in (*run.adapter.layers.values(), *other.adapter.layers.values()):
        torch.nn.init.constant_(layer.lora_B.weight, 0.01)
    for _ in train.algorithm_1(run, learner, (1, 2)):
        pass
    unet, text = other.adapter.unet.parameters(), other.adapter.text.parameters()
    optimizers = [torch.optim.AdamW(p, lr=lr) for p, lr in ((unet, 0.05), (text, 0.005))]
    tokenizer, encoder = other.base.pipeline.tokenizer, other.base.pipeline.text_encoder
    for _ in range(2):
        batch = again.member_batch()
        captions = [other.data.captions[i] for i in batch.index]
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        latents, drawn = other.data.latents[batch.index], (batch.timesteps, batch.noise)
        squared_error(other.base, latents, encoder(ids)[0], *drawn).mean().backward()
        assert all(p.grad.norm() > 0 for p in text)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    want = other.adapter.state_dict()
    for name, tensor in run.adapter.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=2e-4, msg=name)


def test_accumulated_and_switched_off(tiny_base, image_folder):
    """Parts give the gradient of the whole; off, merged, and removed are what they should be."""
    run, learner = started(tiny_base, image_folder, caption_dropout=0.5, flip=True)
    base, plain = run.base, run.data.text[:3]
    for layer in run.adapter.layers.values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    batch = learner.member_batch()
    whole = run.through(batch)
    parts = type(whole)(
        lambda p: run.errors(batch, p), [slice(0, 2), slice(2, 4)], learner.parameters, Processes()
    )
    for one, two in zip(
        whole.gradients(whole.error.mean()), parts.gradients(parts.error.mean()), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)
    adapted = run.seen_data().text[:3]
    assert (adapted - plain).abs().max() > 1e-3
    with run.adapter.disabled():
        torch.testing.assert_close(run.seen_data().text[:3], plain)
    run.adapter.merge()
    torch.testing.assert_close(run.seen_data().text[:3], adapted, rtol=1e-4, atol=1e-5)
    lora.remove(base.unet, run.adapter)
    torch.testing.assert_close(
        encode_captions(base, run.data.captions[:3]), plain, rtol=1e-4, atol=1e-5
    )
    for model in (base.unet, base.pipeline.text_encoder):
        assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())
    assert isinstance(batch, Batch)


@pytest.mark.parametrize("form", ["adapter", "kohya"])
def test_diffusers_loads_both_parts(run, tiny_base, form):
    """`load_lora_weights` gives the embeddings and predictions that our loader gives."""
    (file,) = (run / form).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        keys = opened.keys()
    prefix = (
        "text_encoder.text_model.encoder" if form == "adapter" else "lora_te_text_model_encoder"
    )
    assert sum(k.startswith(prefix) for k in keys) == (8 if form == "adapter" else 12)
    base = load_base(tiny_base)
    plain = encode_captions(base, CAPTIONS)
    adapter, _ = files.load(base, run / form)
    text = encode_captions(base, CAPTIONS)
    shape, t = (3, *base.latent_shape), torch.tensor([5, 300, 800])
    z, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    error = squared_error(base, z, text, t, noise)
    assert (text - plain).abs().max() > 1e-3
    lora.remove(base.unet, adapter)
    assert torch.equal(encode_captions(base, CAPTIONS), plain)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(str(run / form), weight_name=file.name)
    ids = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = pipe.text_encoder(ids)[0]
        torch.testing.assert_close(theirs, text, rtol=1e-5, atol=1e-6)
        base.unet = pipe.unet
        torch.testing.assert_close(
            squared_error(base, z, theirs, t, noise), error, rtol=1e-4, atol=1e-5
        )


def test_forms_of_others(run, tiny_base, tmp_path, capsys):
    """Names without `text_model.`, diffusers' ending of 2023, `lora_te1_`; the UNet alone is read
    where a run starts from such a file, with a note.
    """
    base = load_base(tiny_base)
    good = load_file(run / "adapter" / lora_files.FILE_NAME)
    with safe_open(run / "adapter" / lora_files.FILE_NAME, "pt") as opened:
        header = opened.metadata()
    kohya = load_file(run / "kohya" / lora_files.KOHYA_NAME)
    forms = {
        "flat": ({k.replace("text_model.", ""): v for k, v in good.items()}, header),
        "old": (
            {
                k.replace("lora_A", "lora_linear_layer.down").replace(
                    "lora_B", "lora_linear_layer.up"
                )
                if k.startswith("text")
                else k: v
                for k, v in good.items()
            },
            header,
        ),
        "te1": ({k.replace("lora_te_", "lora_te1_"): v for k, v in kohya.items()}, {}),
    }
    adapter, _ = files.load(base, run / "adapter")
    want = {k: v.clone() for k, v in adapter.state_dict().items()}
    lora.remove(base.unet, adapter)
    for name, (tensors, metadata) in forms.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        adapter, _ = files.load(base, tmp_path / f"{name}.safetensors")
        found = adapter.state_dict()
        assert all(torch.equal(found[k], v) for k, v in want.items()), name
        assert {layer.alpha for layer in adapter.layers.values()} == {4.0}, name
        lora.remove(base.unet, adapter)
    assert "not the UNet" not in capsys.readouterr().out
    lora_files.load(base.unet, tmp_path / "flat.safetensors")
    assert "not the UNet (8 tensors" in capsys.readouterr().out


def test_resumed_is_uninterrupted(run, tiny_base, image_folder, tmp_path, stopped_and_gone_on_with):
    """The same bits in both parts."""

    def begin(folder):
        trained(tiny_base, image_folder, folder, format="kohya", state_every=1)

    stopped_and_gone_on_with(begin, tmp_path / "r")
    one, two = (load_file(r / "adapter" / lora_files.FILE_NAME) for r in (run, tmp_path / "r"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_evaluation_sees_the_captions_through_it(run, monkeypatch):
    """An adapter is asked with its own embeddings, whole and cut, the base with the base's."""
    images = examination.prepare(read_run(run))
    plain = images.data.text.clone()
    adapter, _ = files.load(images.base, run / "adapter")
    adapted = Model("it", images, adapter, None)
    own = encode_captions(images.base, images.data.captions)
    torch.testing.assert_close(adapted.data.text, own)
    assert (adapted.data.text - plain).abs().max() > 1e-3
    asked, adapted.keep = [], lambda name, ask: ask()
    grid = np.zeros((len(plain), 2, 1))
    monkeypatch.setattr(
        "attacks.model.loss_grid", lambda _, z, text, *__, **___: (asked.append(text), grid)[1]
    )
    assert adapted.cuts.shape == (len(examination.CUTS), len(plain), 2)
    first = [examination.cut(c, examination.CUTS[0]) for c in images.data.captions]
    torch.testing.assert_close(asked[0], encode_captions(images.base, first))
    lora.remove(images.base.unet, adapter)
    base = Model("the base", images, adapter.untrained(images.base.unet), None)
    assert torch.equal(base.data.text, plain)
    assert isinstance(adapter, text_encoder.TwoLoRA)


def test_an_audit_asks_through_it(tiny_base, image_folder, monkeypatch):
    """What an adapter answers is what it answers with its captions embedded by hand."""
    run, _ = started(tiny_base, image_folder)
    for layer in run.adapter.layers.values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    shown, nothing = [], np.zeros((4, 1, 1))
    monkeypatch.setattr(
        audit.audit_tasks, "predict", lambda base, z, text: (shown.append(text), [nothing] * 2)[1]
    )
    monkeypatch.setattr(audit.audit_tasks.attacks, "sima", lambda *_: nothing[:, 0])
    plan = type("Plan", (), {"pool": 4, "held_out": [5, 6], "settings": run.settings})()
    audit.audit_tasks.ask(run.base, run.data, plan, run.adapter, last=False)
    torch.testing.assert_close(shown[0], encode_captions(run.base, run.data.captions[:4]))
    assert (shown[0] - run.data.text[:4]).abs().max() > 1e-3
    assert text_encoder.seen(run.base, run.data, run.adapter.unet) is run.data
