"""Adapter files: ours, and what diffusers, peft, kohya and older trainers write for a UNet.

A key is a prefix, the name of a module and an ending:

    unet.<module>.lora_A.weight                      diffusers; also .lora.down.weight
    unet.<attention>.processor.to_q_lora.down.weight diffusers of 2023
    <module>.lora_A.weight                           diffusers' `unet.save_lora_adapter`
    base_model.model.<module>.lora_A.weight          peft, with adapter_config.json beside it
    lora_unet_<module_with_underscores>.lora_down.weight, .alpha           kohya, LoCon
    text_encoder.text_model.<module>..., lora_te_text_model_<module_with_underscores>...

The last are of the text encoder (text_encoder.py); lora_writing.py writes the first and kohya's.
The scale alpha / rank stands in the header (diffusers), beside the file (peft) or in tensors of its
own (kohya).  Only safetensors are read: a pickle can run code.  A file of a stranger is opened,
matched with the model and read in this order, so that it costs no more than it holds.
Tested in tests/test_lora_files.py against diffusers and peft loading the same file.
"""

import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import lora
from command.errors import UserError, shown
from command.whole_files import read_json

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
KOHYA_NAME = "kohya_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER = "lora_adapter_metadata"  # diffusers' key for peft's settings, in the file's header

# ending -> (what of the module's name it hides, which tensor)
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
FORMS = {"unet.": DOTTED, "base_model.model.": DOTTED, "lora_unet_": KOHYA, "": DOTTED}
# of the text encoder; diffusers of 2023 had an ending of its own there
LINEAR = {f".lora_linear_layer.{n}.weight": ("", f) for n, f in (("down", "A"), ("up", "B"))}
TEXT_FORMS = {"text_encoder.": DOTTED | LINEAR, "lora_te_": KOHYA, "lora_te1_": KOHYA}
TEXT = tuple(TEXT_FORMS)
SDXL = ("lora_te2_", "text_encoder_2.", "conditioner", "add_k_proj")
BLOCKS = ("input_blocks", "middle_block", "output_blocks")
OTHERS = {  # part of a key -> what such a file is
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon with a third factor",
    **dict.fromkeys(SDXL, "an adapter of SDXL"),
    **dict.fromkeys(BLOCKS, "an adapter of SDXL, or of a UNet with its names"),
}
UNUSUAL = ("use_dora", "lora_bias", "fan_in_fan_out")  # peft's settings that change the formula
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base

MOST_HEADER = 16 * 2**20  # bytes; Stable Diffusion 1.5 takes 0.2 MB, tag lists of kohya some more
MOST_TENSORS = 20_000  # twice those of SDXL with both text encoders
MOST_PATTERNS = 1000
LONGEST_NAME = 500
LARGEST = 1e30  # numbers beyond this overflow float32 a few products later


# --------------------------------------------------------------------------------------------------
# Reading


def load(
    unet: nn.Module, path: str | Path, beside: bool = False
) -> tuple[lora.Adapter, dict[str, str]]:
    """Inject the adapter of a file or folder into a plain `unet`; returns it and the file's header.
    With `beside` its part for the text encoder is read by somebody else.

    Everything is checked before the model is touched.  Raises UserError naming the first layer that
    does not fit.
    """
    modules = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    factors, metadata = read(path, modules, beside=TEXT if beside else ())
    names = [n for n in modules if n in factors]
    inside = (t for t in lora.TARGETS if set(names) <= set(lora.layer_names(unet, t)))
    target = next(inside, "all")
    whole = names == lora.layer_names(unet, target)
    unet.requires_grad_(False)
    layers = {}
    for name in names:
        a, b, alpha = factors[name]
        layers[name] = layer = lora.wrap(unet, name, len(a), alpha)
        with torch.no_grad():
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
    return lora.Adapter(layers, target, lora.TARGETS[target] if whole else tuple(names)), metadata


def read(
    path: str | Path,
    modules: dict[str, nn.Module] | None = None,
    forms: dict[str, dict] = FORMS,
    beside: tuple[str, ...] = (),
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], dict[str, str]]:
    """({module: (A, B, alpha)}, the file's header) of an adapter file, or of a folder with one.

    With the `modules` of a model the keys are their names, and all shapes are compared before the
    first tensor is read; without, kohya's names keep underscores in place of dots.  A file without
    a stated alpha takes alpha = rank, as diffusers does.  A part for the text encoder is left out
    with a note, unless its prefixes are those `beside`; with TEXT_FORMS it alone is read, and may
    be empty.  Raises UserError for whatever is no plain LoRA of a UNet.
    """
    path = _located(Path(path))
    with _opened(path) as file:
        metadata = file.metadata() or {}
        found, layers, factors = _places(path, file.keys(), forms, beside), {}, {}
        settings = {p: _settings(path, p, metadata) for p in {p for p, _ in found}}
        for (prefix, key), tensors in found.items():
            shapes = [tuple(file.get_slice(tensors[p]).get_shape()) for p in "AB"]
            name = _fitted(path, key, shapes, modules)
            if name in layers:
                raise refusal(path, f"adapts the layer {name} twice")
            layers[name] = prefix, tensors
        for name, (prefix, tensors) in layers.items():
            a, b = (_finite(path, tensors[p], file) for p in "AB")
            if "alpha" in tensors:
                alpha = _usable(path, name, file.get_tensor(tensors["alpha"]))
            else:
                alpha = settings[prefix](name, len(a))
            factors[name] = a, b, alpha
    return factors, metadata


def refusal(path: Path, what: str) -> UserError:
    """The one line that says what is wrong with a file, whatever stands in its names."""
    return UserError(shown(f"{path} {what}"))


def _located(path: Path) -> Path:
    """The adapter file of a folder: diffusers' or peft's name, else the only safetensors file."""
    if path.is_dir():
        there = sorted(path.glob("*.safetensors"))
        named = [path / n for n in (FILE_NAME, PEFT_NAME) if path / n in there]
        path = named[0] if named else there[0] if len(there) == 1 else path / FILE_NAME
    if not path.is_file():
        raise UserError(shown(f"there is no adapter file {path}"))
    return path


@contextmanager
def _opened(path: Path) -> Iterator:
    """The safetensors file, its header bounded before it is parsed; its faults are one line."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MOST_HEADER < header < path.stat().st_size:
            raise refusal(path, f"has a header of {header} bytes: that is no LoRA of a UNet")
        with safe_open(path, framework="pt") as file:
            if (count := len(keys := file.keys())) > MOST_TENSORS:
                raise refusal(path, f"holds {count} tensors: that is no LoRA of a UNet")
            if (longest := max(map(len, keys), default=0)) > LONGEST_NAME:
                raise refusal(path, f"has a tensor name of {longest} characters")
            yield file
    except (SafetensorError, OSError) as error:
        what = f"is not a readable safetensors adapter ({error}); pickles are not read"
        raise refusal(path, what) from None


def _place(key: str, prefix: str) -> tuple[str, str] | None:
    """(module, "A", "B" or "alpha") of a key; None if it is no part of a LoRA of this form."""
    for ending, (hidden, part) in (FORMS | TEXT_FORMS)[prefix].items():
        if key.endswith(ending):
            name = key.removeprefix(prefix).removesuffix(ending) + hidden
            return name.replace(".processor.", "."), part
    return None


def _places(
    path: Path, keys: list[str], forms: dict, beside: tuple
) -> dict[tuple[str, str], dict[str, str]]:
    """{(prefix, module): {"A": key, "B": key}}, for kohya with "alpha"; both factors are there."""
    known, text = TEXT_FORMS | FORMS, forms is TEXT_FORMS
    prefixes = {k: next(p for p in known if k.startswith(p)) for k in keys}
    bare = not any(
        p for p in prefixes.values() if p in FORMS
    )  # else a key without prefix is not the UNet's
    ours = [k for k, p in prefixes.items() if (p or bare) and p in forms]
    strange = ((k, what) for k in keys for part, what in OTHERS.items() if part in k)
    for key, what in strange:
        raise refusal(
            path, f"is {what} ({key}): only plain LoRA of Stable Diffusion 1 or 2 is read"
        )
    found, rest = {}, []
    for key in ours:
        if place := _place(key, prefixes[key]):
            tensors = found.setdefault((prefixes[key], place[0]), {})
            if tensors.setdefault(place[1], key) != key:
                raise refusal(path, f"holds both {tensors[place[1]]} and {key}")
        else:
            rest.append(key)
    if not found and not text:
        raise refusal(path, "holds no UNet LoRA in a form of diffusers, peft or kohya")
    for (_, name), tensors in found.items():
        if "A" in tensors and "B" not in tensors:
            raise refusal(path, f"has the first factor of {name} but not the second")
        rest += [key for key in tensors.values() if "A" not in tensors]
    if rest:  # leaving it out would be another model
        raise refusal(path, f"holds {rest[0]}, which is no part of a plain LoRA")
    if others := sorted(k for k in set(keys) - set(ours) if not (text or k.startswith(beside))):
        what = f"what is not the UNet ({len(others)} tensors, such as {others[0]})"
        print(shown(f"note: {path} also adapts {what}: not read"))
    return found


def _fitted(path: Path, name: str, shapes: list[tuple], modules: dict | None) -> str:
    """The model's name of a layer whose factors have these shapes, which must fit it."""
    a, b = shapes
    found = f"{name} has factors {a!s:.40} and {b!s:.40}"
    if len(a) < 2 or 0 in (*a, *b):
        raise refusal(path, f"holds no LoRA: {found}")
    if modules is None:
        return name
    if name not in modules:
        dotted = [n for n in modules if n.replace(".", "_") == name]
        if not dotted:
            raise refusal(path, f"adapts the layer {name}, which this base model does not have")
        name = dotted[0]
    want = lora.layer_class(modules[name]).shapes(modules[name], a[0])
    if (a, b) != want:
        wanted = f"the model wants {want[0]} and {want[1]}"
        raise refusal(path, f"does not fit this base model: {found}, {wanted}")
    return name


def _finite(path: Path, key: str, file) -> torch.Tensor:
    """A tensor of the file; raises UserError if it holds what no training can go on from."""
    tensor = file.get_tensor(key)
    if not tensor.float().abs().max() < LARGEST:  # so also for NaN
        raise refusal(path, f"is damaged: {key} holds NaN, infinite or absurdly large numbers")
    return tensor


# --------------------------------------------------------------------------------------------------
# The scale


def _settings(path: Path, prefix: str, metadata: dict[str, str]) -> Callable:
    """A function of (module, rank) that gives alpha by the file's peft settings.

    Raises UserError for settings that change the formula.
    """
    plain = FORMS.get(prefix) is not KOHYA and TEXT_FORMS.get(prefix) is not KOHYA
    config = _config(path, prefix, metadata) if plain else {}
    for name in (n for n in UNUSUAL if config.get(n)):
        raise refusal(path, f"was made with {name}, which is no plain LoRA: it cannot be read here")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise refusal(path, f"was made with {start!r:.60}, which changes the base model's weights")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise refusal(path, f"has no usable alpha_pattern: not an object of up to {MOST_PATTERNS}")
    rules = [(_matcher(path, pattern), alpha) for pattern, alpha in patterns.items()]
    every = config.get("lora_alpha", 8 if config else None)  # peft's default

    def alpha_of(name: str, rank: int):
        """The first pattern that the name ends with (peft's rule), else that of all, else rank."""
        stated = next((alpha for fits, alpha in rules if fits(name)), every)
        alpha = _usable(path, name, rank if stated is None else stated)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # over sqrt(rank)

    return alpha_of


def _config(path: Path, prefix: str, metadata: dict[str, str]) -> dict:
    """peft's settings: from the header as diffusers writes it, or peft's own file beside."""
    if prefix == "base_model.model.":
        beside = path.with_name(PEFT_CONFIG)
        if not beside.is_file() or beside.stat().st_size > MOST_HEADER:
            raise refusal(path, f"needs peft's {PEFT_CONFIG} beside it, which states its alpha")
        config, where = read_json(beside), PEFT_CONFIG
    else:
        where = HEADER
        try:
            config = json.loads(metadata.get(HEADER, "{}"))
        except (ValueError, RecursionError) as error:
            raise refusal(path, f"has a damaged header: {HEADER} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise refusal(path, f"has damaged settings: {where} is not an object of settings")
    if prefix in ("unet.", "text_encoder."):
        return {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    return config


GLOB = {".*": "*", ".+": "?*", "\\.": ".", ".": "?"}  # of a regular expression, as a glob


def _matcher(path: Path, pattern: str) -> Callable[[str], bool]:
    """Whether peft's `re.match(rf"(.*\\.)?({pattern})$", name)` holds, for patterns made of names.

    A stranger's regular expression can take for ever.  Those in use are names and ends of names,
    with . and .* here and there: they become globs, whose matching does not go back.
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
