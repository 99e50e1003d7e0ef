"""LoRA files: ours, and what diffusers, peft, kohya and older trainers write for Stable Diffusion.

A key is a prefix, the name of a module and an ending:

    unet.<module>.lora_A.weight                      diffusers; also .lora.down.weight
    unet.<attention>.processor.to_q_lora.down.weight diffusers of 2023
    <module>.lora_A.weight                           diffusers' `unet.save_lora_adapter`
    base_model.model.<module>.lora_A.weight          peft, with adapter_config.json beside it
    lora_unet_<module_with_underscores>.lora_down.weight, .alpha           kohya, LoCon
    text_encoder.text_model.<module>..., lora_te_text_model_<module_with_underscores>...

The last two are layers of the text encoder (text_encoder.py); text_encoder_2 and lora_te2 are the
second of SDXL, and kohya has the first release's names of its UNet (sdxl.py).  lora_writing.py
writes the first form and kohya's.  The scale alpha / rank is in the header (diffusers), in
adapter_config.json (peft) or in tensors of its own (kohya).  A file is opened, matched with the
model and read, in this order: one that does not fit costs nothing.
Tested in tests/test_lora_files.py against diffusers and peft loading the same file.
"""

import fnmatch
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lora
from command.errors import UserError, shown
from command.whole_files import read_json
from files.sdxl import present_name
from files.tensors import LARGEST, LONGEST_NAME, finite, opened, refusal

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
KOHYA_NAME = "kohya_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER = "lora_adapter_metadata"  # diffusers' key for peft's settings, in the file's header

# ending of a key: (the end of the module's name that it replaces, which tensor)
OLD = {"to_q": ".to_q", "to_k": ".to_k", "to_v": ".to_v", "to_out": ".to_out.0"}
DOTTED = {
    ".lora_A.weight": ("", "A"),
    ".lora_B.weight": ("", "B"),
    ".lora.down.weight": ("", "A"),
    ".lora.up.weight": ("", "B"),
    **{f".{old}_lora.down.weight": (name, "A") for old, name in OLD.items()},
    **{f".{old}_lora.up.weight": (name, "B") for old, name in OLD.items()},
}
KOHYA = {".lora_down.weight": ("", "A"), ".lora_up.weight": ("", "B"), ".alpha": ("", "alpha")}
# diffusers of 2023 had an ending of its own for the text encoder
LINEAR = {f".lora_linear_layer.{n}.weight": ("", f) for n, f in (("down", "A"), ("up", "B"))}
TEXT = {"text_encoder.": DOTTED | LINEAR, "lora_te_": KOHYA, "lora_te1_": KOHYA}
TEXT |= {"text_encoder_2.": DOTTED | LINEAR, "lora_te2_": KOHYA}
UNET = {"unet.": DOTTED, "base_model.model.": DOTTED, "lora_unet_": KOHYA, "": DOTTED}
FORMS = TEXT | UNET  # by prefix; "" is the last, as every key begins with it

# before the names of their layers, among those of the UNet
TEXT_ENCODER, TEXT_ENCODER_2 = "text_encoder.", "text_encoder_2."
TEXT_MODEL = "text_model"  # their names in files begin with it; newer libraries leave it out

SDXL = ("lora_te2_", "text_encoder_2.", "conditioner", "add_k_proj")
BLOCKS = ("input_blocks", "middle_block", "output_blocks")
OF_XL = {  # the same, of what only a UNet with the layer XL_LAYER takes
    **dict.fromkeys(SDXL, "an adapter of SDXL"),
    **dict.fromkeys(BLOCKS, "an adapter of SDXL, or of a UNet with its names"),
}
XL_LAYER = "add_embedding.linear_1"
OTHERS = {  # part of a key: what such a file is
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon with a third factor",
}
UNUSUAL = ("use_dora", "lora_bias", "fan_in_fan_out")  # peft's settings that change the formula
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base
MOST_PATTERNS = 1000

Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # module: (A, B, alpha)


# --------------------------------------------------------------------------------------------------
# Reading


def load(unet: nn.Module, path: str | Path) -> tuple[lora.Adapter, dict[str, str]]:
    """Inject the LoRA of a file or folder into a plain `unet`; returns it and the file's header.

    A part for the text encoder is left out with a note.  Everything is checked before the model is
    changed.  Raises UserError naming the first layer that does not fit.
    """
    factors, header = read(path, layers_of(unet))
    return inject(unet, factors), header


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a plain model that can have a LoRA, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def inject(unet: nn.Module, factors: Factors) -> lora.Adapter:
    """Wrap the layers of a plain `unet` that have factors."""
    names = [n for n in layers_of(unet) if n in factors]
    fitting = (t for t in lora.TARGETS if set(names) <= set(lora.layer_names(unet, t)))
    target = next(fitting, "all")
    complete = names == lora.layer_names(unet, target)
    unet.requires_grad_(False)
    layers = {name: wrap(unet, name, factors[name]) for name in names}
    return lora.Adapter(layers, target, lora.TARGETS[target] if complete else tuple(names))


def wrap(model: nn.Module, name: str, factors: tuple) -> lora.LoRALinear:
    """Put a LoRA layer with these (A, B, alpha) around one module of `model`; returns it."""
    a, b, alpha = factors
    layer = lora.wrap(model, name, len(a), alpha)
    with torch.no_grad():
        layer.lora_A.weight.copy_(a)
        layer.lora_B.weight.copy_(b)
    return layer


def read(
    path: str | Path, modules: dict[str, nn.Module] | None = None
) -> tuple[Factors, dict[str, str]]:
    """({module: (A, B, alpha)}, the file's header) of a LoRA file, or of a folder with one.

    With the `modules` of a model the keys are their names, and all shapes are compared before the
    first tensor is read.  Without, kohya's names keep underscores in place of dots.
    A part for the text encoder is read if `modules` holds such layers, with TEXT_ENCODER before
    their names.  Else it is left out with a note.
    A file that states no alpha has alpha = rank, as in diffusers.
    Raises UserError for all that is not a plain LoRA of a UNet.
    """
    path = _located(Path(path))
    text = any(name.startswith(TEXT_ENCODER) for name in modules or ())
    with opened(path) as file:
        header = file.metadata() or {}
        others = OTHERS if XL_LAYER in (modules or ()) else OTHERS | OF_XL
        pairs, layers, factors = _pairs(path, file.keys(), text, others), {}, {}
        alphas = {prefix: _stated_alpha(path, prefix, header) for prefix, _ in pairs}
        for (prefix, listed), keys in pairs.items():
            shapes = [tuple(file.get_slice(keys[part]).get_shape()) for part in "AB"]
            name = _fitted(path, prefix, listed, shapes, modules)
            if name in layers:
                raise refusal(path, f"adapts the layer {name} twice")
            layers[name] = prefix, listed, keys
        for name, (prefix, listed, keys) in layers.items():
            a, b = (finite(path, keys[part], file) for part in "AB")
            if "alpha" in keys:
                alpha = _usable(path, name, file.get_tensor(keys["alpha"]))
            else:
                alpha = alphas[prefix](listed, len(a))
            factors[name] = a, b, alpha
    return factors, header


def _located(path: Path) -> Path:
    """The LoRA file of a folder: diffusers' or peft's name, else the only safetensors file."""
    if path.is_dir():
        there = sorted(path.glob("*.safetensors"))
        named = [path / n for n in (FILE_NAME, PEFT_NAME) if path / n in there]
        path = named[0] if named else there[0] if len(there) == 1 else path / FILE_NAME
    if not path.is_file():
        raise UserError(shown(f"there is no adapter file {path}"))
    return path


def _pairs(
    path: Path, keys: list[str], text: bool, others: dict[str, str]
) -> dict[tuple[str, str], dict[str, str]]:
    """{(prefix, module): {"A": key, "B": key}} of the UNet and, with `text`, of the text encoder.

    kohya's also have an "alpha".  Raises UserError for a file that holds anything but whole pairs,
    or one of `others`.
    """
    pairs, strange, ours = {}, [], _ours(path, keys, text, others)
    for key, prefix in ours.items():
        name, part = _module(key, prefix)
        if part is None:
            strange.append(key)
            continue
        tensors = pairs.setdefault((prefix, name), {})
        if tensors.setdefault(part, key) != key:
            raise refusal(path, f"holds both {tensors[part]} and {key}")
    if not any(prefix in UNET for prefix, _ in pairs):
        raise refusal(path, "holds no UNet LoRA in a form of diffusers, peft or kohya")
    for (_, name), tensors in pairs.items():
        if "A" in tensors and "B" not in tensors:
            raise refusal(path, f"has the first factor of {name} but not the second")
        if "A" not in tensors:
            strange += tensors.values()
    if strange:  # without it the adapter would be another one
        raise refusal(path, f"holds {strange[0]}, which is not part of a plain LoRA")
    if left := sorted(set(keys) - set(ours)):
        what = f"what is not the UNet ({len(left)} tensors, such as {left[0]})"
        print(shown(f"note: {path} also adapts {what}: not read"))
    return pairs


def _ours(path: Path, keys: list[str], text: bool, others: dict[str, str]) -> dict[str, str]:
    """{key: prefix} of the keys that are to be read.  Raises UserError for other kinds of LoRA."""
    for key in keys:
        for part, what in others.items():
            if part in key:
                raise refusal(path, f"is {what} ({key}): only plain LoRA of the base is read")
    prefixes = {key: next(p for p in FORMS if key.startswith(p)) for key in keys}
    read_here = {p for p in FORMS if p in UNET or text}
    if any(p and p in UNET for p in prefixes.values()):
        read_here.remove("")  # a key without a prefix is the UNet's only where none has its prefix
    return {key: prefix for key, prefix in prefixes.items() if prefix in read_here}


def _module(key: str, prefix: str) -> tuple[str, str | None]:
    """(module, "A", "B" or "alpha") of a key; None if it is no part of a LoRA of this form."""
    for ending, (hidden, part) in FORMS[prefix].items():
        if key.endswith(ending):
            name = key.removeprefix(prefix).removesuffix(ending) + hidden
            return name.replace(".processor.", "."), part
    return key, None


def _fitted(path: Path, prefix: str, listed: str, shapes: list[tuple], modules: dict | None) -> str:
    """The model's name of a layer whose factors have these shapes, which must fit it."""
    a, b = shapes
    found = f"{listed} has factors {a!s:.40} and {b!s:.40}"
    if len(a) < 2 or 0 in (*a, *b):
        raise refusal(path, f"holds no LoRA: {found}")
    name = listed
    if prefix in TEXT:
        first = TEXT_ENCODER_2 if "2" in prefix else TEXT_ENCODER
        name = first + re.sub(f"^{TEXT_MODEL}[._]", "", listed)
    if modules is None:
        return name
    if name not in modules:
        flat = present_name(name.replace(".", "_"))
        fitting = [n for n in modules if n.replace(".", "_") == flat]
        if "." in listed or not fitting:
            raise refusal(path, f"adapts the layer {listed}, which this base model does not have")
        name = fitting[0]
    want = lora.layer_class(modules[name]).shapes(modules[name], a[0])
    if (a, b) != want:
        wanted = f"the model wants {want[0]} and {want[1]}"
        raise refusal(path, f"does not fit this base model: {found}, {wanted}")
    return name


# --------------------------------------------------------------------------------------------------
# The scale


def _stated_alpha(path: Path, prefix: str, header: dict[str, str]) -> Callable[[str, int], float]:
    """A function of (module, rank) that gives alpha by the file's peft settings.

    Raises UserError for settings that change the formula.
    """
    config = {} if FORMS[prefix] is KOHYA else _config(path, prefix, header)
    for name in UNUSUAL:
        if config.get(name):
            what = f"was made with {name}, which is no plain LoRA: it cannot be read here"
            raise refusal(path, what)
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise refusal(path, f"was made with {start!r:.60}, which changes the base model's weights")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise refusal(path, f"has no usable alpha_pattern: not an object of up to {MOST_PATTERNS}")
    rules = [(_matcher(path, pattern), alpha) for pattern, alpha in patterns.items()]
    every = config.get("lora_alpha", 8 if config else None)  # peft's default

    def alpha_of(name: str, rank: int) -> float:
        """That of the first pattern that fits (peft's rule), else that of all layers, else rank."""
        stated = next((alpha for fits, alpha in rules if fits(name)), every)
        alpha = _usable(path, name, rank if stated is None else stated)
        # rsLoRA scales by alpha / sqrt(rank)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

    return alpha_of


def _config(path: Path, prefix: str, header: dict[str, str]) -> dict:
    """peft's settings: from the header, where diffusers writes them, or peft's own file."""
    if prefix == "base_model.model.":
        beside = path.with_name(PEFT_CONFIG)
        if not beside.exists():
            raise refusal(path, f"needs peft's {PEFT_CONFIG} beside it, which states its alpha")
        config, where = read_json(beside), PEFT_CONFIG
    else:
        where = HEADER
        try:
            config = json.loads(header.get(HEADER, "{}"))
        except (ValueError, RecursionError) as error:
            raise refusal(path, f"has a damaged header: {HEADER} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise refusal(path, f"has damaged settings: {where} is not an object of settings")
    if prefix in ("unet.", TEXT_ENCODER, TEXT_ENCODER_2):
        return {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    return config


GLOB = {".*": "*", ".+": "?*", "\\.": ".", ".": "?"}  # of a regular expression, as a glob


def _matcher(path: Path, pattern: str) -> Callable[[str], bool]:
    """Whether peft's `re.match(rf"(.*\\.)?({pattern})$", name)` holds, for patterns made of names.

    A stranger's regular expression can take for ever.  Those in use are names, or ends of names,
    with . and .*; as globs they are matched without going back.
    """
    body = pattern.removeprefix("^").removesuffix("$")
    pieces = re.findall(r"\.\*|\.\+|\\\.|[\w.-]", body)
    if "".join(pieces) != body or len(body) > LONGEST_NAME:
        raise refusal(path, f"has an alpha_pattern that is not read here: {pattern[:60]!r}")
    fits = re.compile(fnmatch.translate("".join(GLOB.get(p, p) for p in pieces))).match
    if pattern.startswith("^"):
        return lambda name: fits(name) is not None
    dots = re.compile(r"\.")
    return lambda name: any(fits(name[i:]) for i in (0, *(m.end() for m in dots.finditer(name))))


def _usable(path: Path, name: str, alpha) -> float:
    try:
        value = float(alpha)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = math.nan
    if not abs(value) < LARGEST:
        raise refusal(path, f"states no usable alpha for {name}: {alpha!r:.60}")
    return value
