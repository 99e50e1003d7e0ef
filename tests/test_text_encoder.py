"""files/text_encoder.py: adapters of others with a part for the text encoder, read, switched,
evaluated and removed, with diffusers and peft as judges.
"""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import lora
from command.errors import UserError
from diffusion import encode_captions, squared_error
from files import adapters, lora_files, text_encoder
from files.bases import load_base
from files.convert import Flags, convert
from files.images import FOLDERS

CAPTIONS = ["a red circle", "a blue ring", ""]
TEXT_ALPHA = 6.0


@pytest.fixture(scope="module")
def theirs(tiny_base, tmp_path_factory):
    """A file that diffusers and peft wrote: ranks 2 and 3, everything random."""
    folder = tmp_path_factory.mktemp("theirs")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    torch.manual_seed(0)
    start = {"init_lora_weights": False}
    unet = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], **start)
    names = ["q_proj", "v_proj", "out_proj", "fc1"]
    pattern = {"q_proj": 9}
    text = LoraConfig(
        r=3, lora_alpha=TEXT_ALPHA, target_modules=names, alpha_pattern=pattern, **start
    )
    pipe.unet.add_adapter(unet)
    pipe.text_encoder.add_adapter(text)
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    return folder / lora_files.FILE_NAME


def kohya(theirs, file, prefix="lora_te_"):
    """The same in kohya's form, without the scales, which are then 1."""
    tensors = {}
    for key, tensor in load_file(theirs).items():
        for name, ending in ((".lora_A.", ".lora_down."), (".lora_B.", ".lora_up.")):
            key = key.replace(name, ending)
        name, _, ending = key.partition(".lora_")
        part, _, name = name.partition(".")
        start = {"unet": "lora_unet_", "text_encoder": prefix}[part]
        tensors[f"{start}{name.replace('.', '_')}.lora_{ending}"] = tensor
    save_file(tensors, file)
    return file


def outputs(base):
    """(embeddings of the captions, error map of three images with them)."""
    text = encode_captions(base, CAPTIONS)
    shape, t = (3, *base.latent_shape), torch.tensor([5, 300, 800])
    z, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    with torch.no_grad():
        return text, squared_error(base, z, text, t, noise)


def close(one, two) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def file_of(theirs, form, model, folder, kohya):
    """The same LoRA as it is, in kohya's form by hand, or in the form that files.convert writes."""
    if form == "converted":
        return convert(Flags([str(theirs)], str(model), str(folder)))
    return theirs if form == "diffusers" else kohya(theirs, folder / "k.safetensors")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_loads_both_parts(theirs, tiny_base, tmp_path, form):
    """`load_lora_weights` gives the embeddings and errors that our loader gives; switched off the
    base has the bits it had, merged it is the same model, removed it is the base.
    """
    file = file_of(theirs, form, tiny_base, tmp_path, kohya)
    base = load_base(tiny_base)
    plain = outputs(base)
    adapter, _ = adapters.load(base, file)
    assert isinstance(adapter, text_encoder.TwoLoRA) and len(adapter.text) == 4
    adapted = outputs(base)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(adapted, plain, strict=True))
    with adapter.disabled():
        assert all(map(torch.equal, outputs(base), plain))
    adapter.merge()
    close(outputs(base), adapted)
    lora.remove(base.unet, adapter)
    close(outputs(base), plain)
    for model in (base.unet, base.pipeline.text_encoder):
        assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())
    pipe = load_base(tiny_base).pipeline
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    base.unet = pipe.unet
    base.pipeline.text_encoder = pipe.text_encoder
    close(outputs(base), adapted)


def test_converted_is_the_same_with_scales_of_its_own(theirs, tiny_base, tmp_path):
    """Under the keys that ComfyUI looks for; diffusers itself loses these scales."""
    file, found = file_of(theirs, "converted", tiny_base, tmp_path, kohya), []
    starts = ("lora_unet_", "lora_te_text_model_encoder_layers_")
    assert {key.startswith(starts) for key in load_file(file)} == {True}
    for each in (theirs, file):
        base = load_base(tiny_base)
        adapters.load(base, each)
        found.append(outputs(base))
    close(*found)


def test_scales_of_the_text_encoder(theirs, tiny_base):
    """By their own patterns, not by those of the UNet."""
    adapter, _ = adapters.load(load_base(tiny_base), theirs)
    alphas = {name.rpartition(".")[2]: layer.alpha for name, layer in adapter.text.items()}
    assert alphas == {"q_proj": 9.0, "v_proj": 6.0, "out_proj": 6.0, "fc1": 6.0}
    assert {(layer.rank, layer.alpha) for layer in adapter.unet.layers.values()} == {(2, 4.0)}


def test_other_names(theirs, tiny_base, tmp_path, capsys):
    """Names without `text_model.`, the ending of diffusers of 2023, and `lora_te1_`.  A loader of
    the UNet alone leaves the part out with a note.
    """
    base = load_base(tiny_base)
    good = load_file(theirs)
    with safe_open(theirs, "pt") as opened:
        header = opened.metadata()
    older = {}
    for key, tensor in good.items():
        if key.startswith("text"):
            key = key.replace("lora_A", "lora_linear_layer.down")
            key = key.replace("lora_B", "lora_linear_layer.up")
        older[key] = tensor
    save_file(older, tmp_path / "older.safetensors", header)
    flat = {k.replace("text_model.", ""): v for k, v in good.items()}
    save_file(flat, tmp_path / "flat.safetensors", header)
    kohya(theirs, tmp_path / "te1.safetensors", "lora_te1_")
    adapter, _ = adapters.load(base, theirs)
    want = {k: v.clone() for k, v in adapter.state_dict().items()}
    assert sum(k.startswith("text_encoder.") for k in want) == 8
    lora.remove(base.unet, adapter)
    for name in ("older", "flat", "te1"):
        adapter, _ = adapters.load(base, tmp_path / f"{name}.safetensors")
        found = adapter.state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], v) for k, v in want.items()), name
        lora.remove(base.unet, adapter)
    assert "not the UNet" not in capsys.readouterr().out
    lora_files.load(base.unet, theirs)
    assert "not the UNet (8 tensors, such as text_encoder." in capsys.readouterr().out


@pytest.mark.parametrize("change", ["shape", "name", "half", "alone"])
def test_a_part_that_does_not_fit_is_refused(theirs, tiny_base, tmp_path, change):
    """Before the model is changed."""
    base, tensors = load_base(tiny_base), load_file(theirs)
    key = min(k for k in tensors if k.startswith("text_encoder.") and "lora_A" in k)
    if change == "shape":
        tensors[key] = torch.zeros(3, 7)
    elif change == "name":
        tensors |= {key.replace("layers.0", "layers.9"): tensors[key].clone()}
        tensors |= {k.replace("A", "B"): torch.ones(2, 2) for k in tensors if "layers.9" in k}
    elif change == "half":
        del tensors[key]
    else:
        tensors = {k: v for k, v in tensors.items() if k.startswith("text")}
    save_file(tensors, tmp_path / "a.safetensors")
    words = {
        "shape": r"does not fit this base model: .*\(3, 7\)",
        "name": r"layers\.9\.\S*, which this base model does not have",
        "half": "which is not part of a plain LoRA",
        "alone": "holds no UNet LoRA",
    }
    with pytest.raises(UserError, match=words[change]):
        adapters.load(base, tmp_path / "a.safetensors")
    for model in (base.unet, base.pipeline.text_encoder):
        assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())


def test_evaluation_embeds_captions_by_the_adapter(theirs, tiny_base, image_folder, tmp_path):
    """Without its part for the text encoder the same LoRA has other held-out losses; the base has
    the same.
    """
    for i, file in enumerate(sorted(Path(image_folder).glob("*.png"))):
        folder = tmp_path / "images" / list(FOLDERS)[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        for path in (file, file.with_suffix(".txt")):
            shutil.copy(path, folder)
    tensors = {k: v for k, v in load_file(theirs).items() if k.startswith("unet.")}
    with safe_open(theirs, "pt") as opened:
        save_file(tensors, tmp_path / "unet.safetensors", opened.metadata())
    found = {}
    for name, file in (("both", theirs), ("unet", tmp_path / "unet.safetensors")):
        flags = {"model": tiny_base, "data": str(tmp_path / "images"), "out": str(tmp_path / name)}
        s = evaluate.Settings(adapter=str(file), pictures=0, **flags)
        (found[name],) = evaluate.evaluate(s)
    assert found["both"]["base"]["held_out_loss"] == found["unet"]["base"]["held_out_loss"]
    losses = [found[name]["adapted"]["held_out_loss"] for name in ("both", "unet")]
    assert abs(losses[0] - losses[1]) > 1e-4, losses
