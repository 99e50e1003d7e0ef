"""files/lora_files.py and lora_writing.py: our files in diffusers + peft, theirs and those of
other trainers here, and what is refused.
"""

import contextlib
import json
import re
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import ALPHA, RANK, predict, trained

from command.errors import UserError
from files.bases import load_base
from files.lora_files import FILE_NAME, KOHYA_NAME, _matcher, load, read
from files.lora_writing import save
from lora import TARGETS, inject

few = hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    save(adapter, tmp_path / "adapter", {"method": "smp", "lam": 0.05})
    return tmp_path / "adapter", predict(unet)


@pytest.fixture
def in_diffusers(tiny_base, base_output, caplog):
    """A function: the output of diffusers' pipeline with a file, which loads without a warning."""

    def predicted(file):
        from diffusers.utils import logging

        pipeline = load_base(tiny_base).pipeline
        logging.set_verbosity_warning()
        logging.enable_propagation()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        logging.set_verbosity_error()
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert not [text for text in said if "associated to CLIPTextModel" not in text]
        output = predict(pipeline.unet)
        assert (output - base_output).abs().max() > 0.1
        return output

    return predicted


def here(tiny_base, path):
    """(our output with the adapter of a file, the adapter)."""
    unet = load_base(tiny_base).unet
    adapter, _ = load(unet, path)
    return predict(unet), adapter


# ---- our files ----


@pytest.mark.parametrize("base", ["tiny_base", "tiny_base_linear"])
@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("target", TARGETS)
def test_diffusers_and_peft_load_our_file(request, tmp_path, base_output, target, kohya, base):
    """`pipeline.load_lora_weights(folder)` predicts what our own layers predict, alpha != rank
    included.
    """
    path = request.getfixturevalue(base)
    unet = load_base(path).unet
    file = save(trained(inject(unet, target, RANK, ALPHA)), tmp_path, {"seed": 1}, kohya=kohya)
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
    file = save(adapter, tmp_path / "a", {"method": "smp", "lam": 0.05}, kohya=kohya)
    other = load_base(tiny_base).unet
    again, metadata = load(other, file)
    assert torch.equal(predict(other), predict(unet))
    assert list(again.layers) == list(adapter.layers) and again.target == adapter.target
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in again.state_dict().items())
    assert (
        metadata["method"] == "smp" and metadata["lam"] == "0.05" and metadata["target"] == target
    )
    second = save(again, tmp_path / "b", {"method": "smp", "lam": 0.05}, kohya=kohya)
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
    """The scale stands in `lora_adapter_metadata`; without it diffusers would take alpha for the
    rank.
    """
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


def mixed(unet):
    """An adapter whose ranks and alphas differ: the first two layers from the others and each
    other.
    """
    from lora import Adapter, wrap

    names = [n for n, _ in unet.named_modules() if n.endswith((".to_q", ".conv1", "conv_in"))]
    scales = {names[0]: (3, 5.0), names[1]: (2, 0.5)}
    unet.requires_grad_(False)
    layers = {n: wrap(unet, n, *scales.get(n, (RANK, ALPHA))) for n in names}
    return trained(Adapter(layers, "all", tuple(names)))


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
def test_ranks_and_alphas_of_each_layer(unet, tiny_base, tmp_path, in_diffusers, kohya):
    """Both forms hold them: diffusers and we load what was saved, and what is saved again."""
    adapter = mixed(unet)
    file = save(adapter, tmp_path / "a", kohya=kohya)
    assert torch.allclose(in_diffusers(file), predict(unet), atol=1e-5)
    output, again = here(tiny_base, file)
    assert torch.equal(output, predict(unet))
    for name, layer in adapter.layers.items():
        assert (again.layers[name].rank, again.layers[name].alpha) == (layer.rank, layer.alpha)
    second = save(again, tmp_path / "b", kohya=not kohya)
    assert torch.allclose(in_diffusers(second), predict(unet), atol=1e-5)
    assert torch.equal(here(tiny_base, second)[0], predict(unet))


@pytest.mark.parametrize(
    "part", ["attn2", "conv_in", "down_blocks.0.downsamplers", "time_embedding"]
)
def test_a_part_of_the_layers_is_named_as_such(unet, tiny_base, tmp_path, in_diffusers, part):
    """An adapter of some layers, or outside every target, states their names: no warning there."""
    modules = [
        n
        for n, m in unet.named_modules()
        if n.startswith(part) or (part == "attn2" and "attn2.to_" in n)
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    g, tensors = torch.Generator().manual_seed(2), {}
    for name in modules:
        weight = unet.get_submodule(name).weight
        flat = (1, 1) if weight.ndim == 4 else ()
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(3, *weight.shape[1:], generator=g)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(len(weight), 3, *flat, generator=g)
    save_file(tensors, tmp_path / "theirs.safetensors")
    output, adapter = here(tiny_base, tmp_path / "theirs.safetensors")
    assert list(adapter.layers) == list(adapter.modules) == modules
    torch.testing.assert_close(in_diffusers(tmp_path / "theirs.safetensors"), output)
    torch.testing.assert_close(in_diffusers(save(adapter, tmp_path / "ours")), output)


# ---- files of others ----


def older_keys(tensors):
    """diffusers before peft."""
    names = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    return {re.sub(r"\.lora_[AB]\.", lambda m: names[m[0]], k): v for k, v in tensors.items()}


def processor_keys(tensors):
    """diffusers of 2023, the attention processors' own layers."""
    return {
        re.sub(r"\.(to_\w+)(\.0)?\.lora\.", r".processor.\1_lora.", k): v
        for k, v in older_keys(tensors).items()
    }


@pytest.mark.parametrize("keys", [older_keys, processor_keys])
def test_older_keys_of_diffusers(unet, tiny_base, tmp_path, in_diffusers, keys):
    """Their alpha is the rank; diffusers is the judge."""
    file = save(trained(inject(unet, "attention", RANK, RANK)), tmp_path / "a")
    save_file(keys(tensors_of(file)), tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as opened:
        keys = list(opened.keys())
        assert any("lora.down" in k or "processor.to_out_lora.down" in k for k in keys)
    output, adapter = here(tiny_base, tmp_path / "old.safetensors")
    assert adapter.target == "attention" and len(adapter.layers) == 32
    assert torch.equal(output, predict(unet))
    torch.testing.assert_close(in_diffusers(tmp_path / "old.safetensors"), output)


def peft_config(**more):
    """Patterns with names, ends of names and wild cards; everything random."""
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | more
    modules = ["to_q", "to_v", "conv1", "conv_in", "ff.net.2"]
    ranks = {"attn2.to_q": 2, "conv_in": 3}
    alphas = {"^mid_block.*to_v": 3, "attn1.to_q": 1, ".*conv1": 2.5, r"resnets\.1\.conv1": 9}
    return LoraConfig(target_modules=modules, rank_pattern=ranks, alpha_pattern=alphas, **settings)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("form", ["save_lora_weights", "save_lora_adapter", "save_pretrained"])
def test_what_diffusers_and_peft_write(unet, tiny_base, tmp_path, in_diffusers, form, rslora):
    """Their own three ways to save, with patterns, loaded by us from the folder; then saved by
    us.
    """
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(3)
    config = peft_config(use_rslora=rslora)
    if form == "save_pretrained":
        adapted = get_peft_model(unet, config)
        adapted.save_pretrained(str(tmp_path / "theirs"))
    else:
        unet.add_adapter(config)
        if form == "save_lora_adapter":
            unet.save_lora_adapter(str(tmp_path / "theirs"), adapter_name="default")
        else:
            StableDiffusionPipeline.save_lora_weights(
                str(tmp_path / "theirs"),
                unet_lora_layers=get_peft_model_state_dict(unet),
                unet_lora_adapter_metadata=config.to_dict(),
            )
    want = predict(unet)
    output, adapter = here(tiny_base, tmp_path / "theirs")
    torch.testing.assert_close(output, want)
    assert len({(layer.rank, layer.alpha) for layer in adapter.layers.values()}) > 4
    torch.testing.assert_close(in_diffusers(save(adapter, tmp_path / "ours")), want)


def test_peft_needs_its_config(unet, tmp_path):
    """Only it states alpha; at another scale the adapter would be another."""
    from peft import get_peft_model

    get_peft_model(unet, peft_config()).save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"needs peft's adapter_config\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_kohya_in_any_dtype(unet, tiny_base, tmp_path, capsys, dtype):
    """With alphas of any shape, or none (then it is the rank), beside a text encoder, which is
    noted.
    """
    adapter = trained(inject(unet, "all", RANK, ALPHA))
    file, shapes = save(adapter, tmp_path, kohya=True), [(), (1,), (1, 1)]
    tensors = {k: v.to(dtype) for k, v in tensors_of(file).items()}
    alphas = [k for k in tensors if k.endswith(".alpha")]
    for i, key in enumerate(alphas[1:]):
        tensors[key] = tensors[key].reshape(shapes[i % 3])
    del tensors[alphas[0]]
    save_file(tensors | {"lora_te_text_model.lora_down.weight": torch.ones(2, 2)}, file)
    _, again = here(tiny_base, file)
    assert "lora_te_text_model.lora_down.weight" in capsys.readouterr().out
    found = {n.replace(".", "_"): layer.alpha for n, layer in again.layers.items()}
    missing = alphas[0].removeprefix("lora_unet_").removesuffix(".alpha")
    assert found.pop(missing) == RANK and set(found.values()) == {ALPHA}
    for name, layer in adapter.layers.items():
        assert torch.equal(again.layers[name].lora_B.weight, layer.lora_B.weight.to(dtype).float())


# ---- refusals ----

FIRST = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"unet.{FIRST}.lora_A.weight", f"unet.{FIRST}.lora_B.weight"


def unknown_layer(tensors):
    for key in (A, B):
        tensors[key.replace(FIRST, "mid.nowhere")] = tensors[key].clone()


def other_keys(tensors):
    tensors.clear()
    tensors["model.weight"] = torch.ones(2)


MAGNITUDE = f"unet.{FIRST}.lora_magnitude_vector"
TENSORS = {  # a change of the file's tensors: what the message says
    "a shape": (lambda t: t.update({A: torch.zeros(4, 48)}), [FIRST, "(4, 48)", "(4, 32)"]),
    "a rank": (
        lambda t: t.update({A: torch.zeros(0, 32), B: torch.zeros(32, 0)}),
        [FIRST, "(0, 32)"],
    ),
    "a layer": (unknown_layer, ["mid.nowhere"]),
    "no B": (lambda t: t.pop(B), [FIRST, "second"]),
    "no A": (lambda t: t.pop(A), [B]),
    "one more": (lambda t: t.update({MAGNITUDE: torch.ones(32)}), [MAGNITUDE]),
    "others": (other_keys, ["no UNet LoRA"]),
}
UNREADABLE = "not a readable safetensors"
BYTES = {  # a change of the file
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:2000]), [UNREADABLE]),
    "empty": (lambda file: file.write_bytes(b""), [UNREADABLE]),
    "pickle": (
        lambda file: torch.save(tensors_of(file), file),
        [UNREADABLE, "pickles are not read"],
    ),
    "missing": (lambda file: file.unlink(), ["no adapter file"]),
}


@pytest.mark.parametrize("damage", [*TENSORS, *BYTES])
def test_refuses_a_file_that_does_not_fit(saved, tiny_base, base_output, damage):
    """One line that names the file and the first mismatch, and a UNet that was not changed."""
    file, unet = saved[0] / FILE_NAME, load_base(tiny_base).unet
    change, words = (TENSORS | BYTES)[damage]
    if damage in TENSORS:
        tensors = tensors_of(file)
        change(tensors)
        save_file(tensors, file)
    else:
        change(file)
    with pytest.raises(UserError) as caught:
        load(unet, saved[0])
    message = str(caught.value)
    assert "\n" not in message and all(w in message for w in [str(saved[0]), *words]), message
    assert torch.equal(predict(unet), base_output)
    assert not any("lora" in name for name, _ in unet.named_parameters())


def test_refuses_half_a_kohya_pair(unet, tmp_path):
    file = save(inject(unet, "attention", RANK, ALPHA), tmp_path, kohya=True)
    tensors = tensors_of(file)
    del tensors["lora_unet_" + FIRST.replace(".", "_") + ".lora_up.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"attn1_to_q .*second"):
        read(file)


# ---- what the header says ----


def adapter_file(path, metadata=None, extra=None, rank=2):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"unet.{name}.lora_A.weight": torch.ones(rank, 32),
        f"unet.{name}.lora_B.weight": torch.ones(32, rank),
    }
    save_file(
        tensors | (extra or {}),
        path,
        {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None,
    )
    return path, name


@pytest.mark.parametrize(
    "pattern, alpha",
    [("to_q", 7.0), ("attn1.to_q", 7.0), (".*attn1.to_q", 7.0), ("attn2.to_q", 3.0), ("o_q", 3.0)],
)
def test_alpha_pattern_is_honoured(tmp_path, pattern, alpha):
    """As peft matches it (checked against its own function)."""
    from peft.utils.other import get_pattern_key

    path, name = adapter_file(
        tmp_path / "a.safetensors", {"unet.lora_alpha": 3, "unet.alpha_pattern": {pattern: 7}}
    )
    found, _ = read(path)
    assert found[name][2] == alpha
    assert {pattern: 7}.get(get_pattern_key([pattern], name), 3) == alpha


def test_rank_comes_from_the_factors(tmp_path):
    path, name = adapter_file(
        tmp_path / "a.safetensors",
        {"unet.r": 64, "unet.rank_pattern": {"to_q": 5}, "unet.lora_alpha": 2},
        rank=5,
    )
    assert read(path)[0][name][0].shape[0] == 5


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        *(({name: True}, name) for name in ("use_dora", "lora_bias", "fan_in_fan_out")),
        *(({"init_lora_weights": s}, f"made with '{s}'") for s in ("pissa", "olora", "loftq")),
    ],
)
def test_refuses_another_formula_or_base(tmp_path, setting, words):
    """Some starts also change the weights of the base."""
    config = {f"unet.{name}": value for name, value in setting.items()}
    path, _ = adapter_file(tmp_path / "a.safetensors", config)
    with pytest.raises(UserError, match=words):
        read(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@few
@given(
    config=json_values
    | st.dictionaries(
        st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.r"]), json_values
    )
)
def test_fuzz_adapter_settings(tmp_path, config):
    """Whatever the header says, the adapter is read with a finite scale or refused in one line."""
    path, name = adapter_file(tmp_path / "a.safetensors", config)
    try:
        found, _ = read(path)
        assert abs(found[name][2]) < float("inf")
    except UserError as error:
        assert "\n" not in str(error)


@few
@given(start=st.integers(0, 400), junk=st.binary(max_size=40), end=st.integers(0, 600))
def test_fuzz_adapter_bytes(tmp_path, start, junk, end):
    """The same for damaged and cut files."""
    path, _ = adapter_file(tmp_path / "a.safetensors", {"unet.lora_alpha": 3})
    content = bytearray(path.read_bytes())
    content[start : start + len(junk)] = junk
    path.write_bytes(content[: len(content) - end])
    with contextlib.suppress(UserError):
        read(path)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*", "(.*)*", "to_[qk]", "a{9999}", "x" * 501])
def test_refuses_a_regular_expression(tmp_path, pattern):
    """Only names with . and .* are matched: any other could take for ever."""
    path, _ = adapter_file(tmp_path / "a.safetensors", {"unet.alpha_pattern": {pattern: 7}})
    began = time.time()
    with pytest.raises(UserError, match="alpha_pattern that is not read"):
        read(path)
    assert time.time() - began < 1


def test_wild_cards_do_not_explode(tmp_path):
    """Forty .* over a name of a's: peft's own matching would outlive us."""
    name, config = "a" * 300, {"unet.alpha_pattern": {".*a" * 40 + "b": 7}, "unet.lora_alpha": 3}
    tensors = {f"unet.{name}.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    began = time.time()
    assert read(tmp_path / "a.safetensors")[0][name][2] == 3
    assert time.time() - began < 1


pieces = st.sampled_from(["a", "b", "a.b", ".", r"\.", ".*", ".+", "_1", "-"])


@few
@given(
    st.lists(pieces, min_size=1, max_size=6).map("".join),
    st.booleans(),
    st.text("ab._1-", max_size=9),
)
def test_fuzz_patterns_against_peft(tmp_path, body, anchored, name):
    """Names, ends of names and wild cards hold where peft's own expression holds."""
    pattern = "^" * anchored + body
    want = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert _matcher(tmp_path, pattern)(name) == want


@pytest.mark.parametrize("alpha", [float("nan"), 1e308, 10**400, "x", [], None])
def test_alpha_that_is_none(tmp_path, alpha):
    """Numbers that float32 cannot hold are refused as words are; null is peft's for unstated."""
    path, name = adapter_file(tmp_path / "a.safetensors", {"unet.lora_alpha": alpha})
    if alpha is None:
        assert read(path)[0][name][2] == 2
    else:
        with pytest.raises(UserError, match="no usable alpha"):
            read(path)


@pytest.mark.parametrize(
    "stem, words",
    [(f"unet.{FIRST}.lora.down", "holds both"), (f"base_model.model.{FIRST}.lora_A", "twice")],
)
def test_refuses_a_layer_twice(unet, tmp_path, stem, words):
    """In two spellings or two forms, of which one would be lost."""
    second = stem.replace("down", "up").replace("lora_A", "lora_B")
    more = {f"{stem}.weight": torch.ones(2, 32), f"{second}.weight": torch.ones(32, 2)}
    path, _ = adapter_file(tmp_path / "a.safetensors", {"unet.lora_alpha": 3}, more)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=words):
        load(unet, path)


# ---- bounds ----


def raw_file(path, tensors: dict, size: int):
    """A safetensors file by hand: {name: (dtype, shape, start, end)} over `size` sparse bytes."""
    keys = ("dtype", "shape", "data_offsets")
    header = {
        k: dict(zip(keys, (d, s, [i, j]), strict=True)) for k, (d, s, i, j) in tensors.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(np.uint64(len(text)).tobytes() + text)
        file.truncate(8 + len(text) + size)
    return path


def test_shapes_are_compared_first(unet, tmp_path):
    """A rank of forty million on 80 MB: refused before any of its 10 GB is built or its bytes
    read.
    """
    n = 40_000_000
    shapes = {A: ("I8", [n, 1], 0, n), B: ("I8", [1, n], n, 2 * n)}
    path = raw_file(tmp_path / "a.safetensors", shapes, 2 * n)
    began = time.time()
    with pytest.raises(UserError, match=r"does not fit .*\(40000000, 1\)"):
        load(unet, path)
    assert time.time() - began < 1


@pytest.mark.parametrize("count, words", [(30_000, "holds 30000 tensors"), (150_000, "header of")])
def test_refuses_a_flood_of_tensors(unet, tmp_path, count, words):
    """Within seconds: the header is measured before it is parsed."""
    tensors = {f"unet.{i:070}": ("I8", [1], i, i + 1) for i in range(count)}
    path = raw_file(tmp_path / "a.safetensors", tensors, count)
    began = time.time()
    with pytest.raises(UserError, match=words):
        load(unet, path)
    assert time.time() - began < 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("part", "AB")
def test_refuses_numbers_that_are_none(saved, tiny_base, base_output, value, part):
    """The file and the tensor are named, before a run can blame its learning rate."""
    tensors = tensors_of(saved[0] / FILE_NAME)
    key = f"unet.{FIRST}.lora_{part}.weight"
    tensors[key][1, 1] = value
    save_file(tensors, saved[0] / FILE_NAME)
    unet = load_base(tiny_base).unet
    with pytest.raises(UserError, match=f"{FILE_NAME} is damaged: {key} holds NaN"):
        load(unet, saved[0])
    assert torch.equal(predict(unet), base_output)


def test_names_stay_on_one_line(unet, tmp_path):
    """A newline or an escape sequence in a file's or tensor's name is spelled out."""
    path = tmp_path / "a\nb.safetensors"
    tensors = {f"unet.x\n\x1b[2J.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        load(unet, path)
    assert r"a\nb.safetensors adapts the layer x\n\x1b[2J, which" in str(caught.value)


@pytest.mark.parametrize(
    "key, kind",
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "a LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "a DoRA"),
        (f"base_model.model.{FIRST}.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight", "a LoCon with a third factor"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "an adapter of SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "an adapter of SDXL"),
        ("conditioner.embedders.0.lora_A.weight", "an adapter of SDXL"),
        ("unet.mid_block.attn.add_k_proj.lora_A.weight", "an adapter of SDXL"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_other_kinds_are_named(saved, key, kind, alone):
    """Alone in a file or beside plain layers."""
    tensors = {} if alone else tensors_of(saved[0] / FILE_NAME)
    save_file(tensors | {key: torch.ones(2, 2)}, saved[0] / FILE_NAME)
    with pytest.raises(UserError, match=f"is {kind}") as caught:
        read(saved[0])
    assert key in str(caught.value)
