"""Loading a frozen base model: a pipeline folder, a hub name, or one .safetensors checkpoint.

Pickles are never read.  Every fault of a base is one sentence, said before anything is written: the
folder's configs are checked, each part must find all its tensors in its file, no weight may be
absurdly large, and one small picture goes through all the parts.
Tested in tests/test_base_files.py.
"""

import os
import re
from pathlib import Path
from warnings import catch_warnings

import torch

from command import progress
from command.errors import UserError, shown
from command.whole_files import read_json
from diffusion import Base, ddim
from files import checkpoints, contents, sdxl
from files.base_checks import (
    check_weights,
    fit_tokenizer,
    noise_schedule,
    one_sentence,
    picture_size,
    try_out,
)
from files.devices import require_device, resolve_device, resolve_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
XL = "StableDiffusionXLPipeline"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionPipelineSafe", XL)
# those with weights: the class, and how the names of the files begin; _2 are of SDXL alone
PARTS = {
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("CLIPTextModel", "model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "model"),
}
CONFIGS = dict.fromkeys(PARTS, "config.json") | {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
CONFIG_SUFFIXES = (".json", ".txt")  # configs, and merges of a tokenizer
UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


@progress.stage("loading the base model")
def load_base(
    model: str, device: str = "cpu", dtype: str = "float32", size: int | None = None
) -> Base:
    """Load and freeze a base model for pictures of `size` px (None: the size of its UNet's config).

    Raises UserError for one that is missing or cannot be used.
    """
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for log in (logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
    device = resolve_device(device)
    require_device(device)
    dtype, name = DTYPES[resolve_dtype(dtype, device)], shown(model)
    source = Path(model) if os.path.isfile(model) else _find(model)
    pipeline = (_single_file if source.is_file() else _folder)(source, dtype)
    xl = type(pipeline).__name__ == XL
    for part in _of_kind(PARTS, xl):
        check_weights(name, part, getattr(pipeline, part))
    abar, prediction = noise_schedule(name, pipeline.scheduler)
    for tokenizer, encoder in sdxl.encoders(pipeline):
        fit_tokenizer(name, tokenizer, encoder.config)
    takes, has = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != has:
        what = f"{takes} channels for latents of {has}: is it an inpainting model?"
        raise UserError(f"{name} takes {what}")
    size = picture_size(name, pipeline, size)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if device == "cpu":  # convolutions are a tenth faster
        pipeline.unet.to(memory_format=torch.channels_last)
    device = torch.device(device)
    given = model, pipeline, pipeline.unet, abar.to(device), prediction, size, device, source
    base = sdxl.BaseXL(*given) if xl else Base(*given)
    try_out(base)
    return base


def content(base: Base) -> str | None:
    """SHA-256 of the files that a base was loaded from, wherever they lie and whatever its dtype;
    None of one that was not loaded.
    """
    source = base.source
    if source is None:
        return None
    if source.is_file():
        beside = source.with_suffix("")
        files = [f for f in beside.rglob("*") if f.suffix in CONFIG_SUFFIXES]
        yaml = source.with_suffix(".yaml")
        own = contents.of_files(source.parent, [source, yaml], named=False)
        return own + contents.of_files(beside, files)
    parts = _of_kind(CONFIGS, isinstance(base, sdxl.BaseXL))
    files = [f for part in parts for f in (source / part).iterdir()]
    files = [source / "model_index.json", *(f for f in files if f.suffix in CONFIG_SUFFIXES)]
    for part, (_, stem) in PARTS.items():
        files += _weights(source / part, stem)[1]
    return contents.of_files(source, files)


def _of_kind(parts: dict, xl: bool) -> list[str]:
    """Those of `parts` that a pipeline has."""
    return [part for part in parts if xl or not part.endswith("_2")]


# --------------------------------------------------------------------------------------------------
# Where it is


def _find(model: str) -> Path:
    """The pipeline's folder: `model` itself, or the copy of the hub's model of that name."""
    from diffusers import StableDiffusionPipeline

    where = shown(os.path.abspath(model))
    if os.path.isdir(model):
        return Path(model)
    if os.path.lexists(model):
        raise UserError(f"{where} is neither a folder nor a file that can be read")
    if not HUB_NAME.fullmatch(model):
        raise UserError(
            f"there is no {where}: --model takes a pipeline folder, a .safetensors file or a hub "
            "name (owner/name)"
        )
    nowhere = f"there is no folder {where}, and {model} cannot be loaded from the hub"
    with one_sentence(nowhere), catch_warnings(action="ignore"):
        # the kind first, before gigabytes of another model are downloaded
        index = StableDiffusionPipeline.load_config(model)
        _check_kind(model, index)
        kind, options = _class(index["_class_name"] == XL), {"use_safetensors": True, **UNUSED}
        try:
            return Path(kind.download(model, **options))
        except OSError:  # some models have weights in half precision only
            return Path(kind.download(model, variant="fp16", **options))


# --------------------------------------------------------------------------------------------------
# A folder


def _folder(folder: Path, dtype: torch.dtype):
    """The pipeline in a folder; raises UserError unless it is Stable Diffusion 1.x, 2.x or XL in
    safetensors.
    """
    xl = _check_configs(folder)
    exact = {"vae": torch.float32} if xl else {}  # its VAE overflows in half precision
    parts = {p: _load_part(folder, p, exact.get(p, dtype)) for p in _of_kind(PARTS, xl)}
    with one_sentence(f"cannot load the tokenizer and scheduler of {shown(folder)}"):
        return _class(xl).from_pretrained(folder, **parts, **UNUSED, local_files_only=True)


def _class(xl: bool) -> type:
    import diffusers

    return getattr(diffusers, XL if xl else PIPELINES[0])


def _check_configs(folder: Path) -> bool:
    """Whether the folder is one of SDXL; raises UserError unless it has all parts of a pipeline
    that can be adapted.
    """
    name, index = shown(folder), folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{name} is not a StableDiffusionPipeline folder: it has no {index.name}")
    index = _read_config(index)
    _check_kind(name, index)
    xl = index["_class_name"] == XL
    for part in _of_kind(CONFIGS, xl):
        config = CONFIGS[part]
        if not (folder / part).is_dir():
            raise UserError(f"{name} is incomplete: it has no folder {part}")
        (_check_sizes if part in PARTS else _read_config)(folder / part / config)
        kind = index.get(part)
        if not (isinstance(kind, list) and len(kind) == 2 and all(kind)):
            raise UserError(f"{name}/model_index.json does not say which class its {part} is")
        if part in PARTS and kind[1] != (only := PARTS[part][0]):
            raise UserError(f"the {part} of {name} is a {shown(kind[1])}: only {only} can be used")
    names = ("tokenizer.json",), ("vocab.json", "merges.txt")
    for tokenizer in (folder / part for part in _of_kind(CONFIGS, xl) if part[:5] == "token"):
        if not any(all((tokenizer / file).is_file() for file in files) for files in names):
            # transformers would make an empty one, and all captions would be the same
            raise UserError(f"{shown(tokenizer)} holds no vocabulary (vocab.json and merges.txt)")
    return xl


def _read_config(path: Path) -> dict:
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{shown(path)} is not a config: it holds no JSON object")
    return config


def _check_sizes(path: Path) -> None:
    """Raises UserError for a config whose numbers are absurd.

    A part is built before its file is read: a million layers would take hours, or all memory.
    """
    for key, value in _read_config(path).items():
        most = 100 if "layers" in key else 10**6  # Stable Diffusion 2: 23 layers, 49,408 tokens
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, int) and n > most for n in numbers):
            raise UserError(f"{shown(path)}: {shown(key)} is above {most:,}")


def _check_kind(name: str, index: dict) -> None:
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        only = f"a StableDiffusionPipeline (1.x or 2.x) or a {XL}"
        raise UserError(f"{name} is a {shown(kind)}: only {only} can be adapted")


def _load_part(folder: Path, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """A part with weights.  Raises UserError unless its file holds all of them: the libraries would
    draw the missing ones at random, and say so in a log only.
    """
    import diffusers
    import transformers

    kind, stem = PARTS[part]
    library = transformers if part.startswith("text_encoder") else diffusers
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if library is transformers:  # else its error does not name the tensor
        options["ignore_mismatched_sizes"] = True
    variant, where = _weights(folder / part, stem)[0], f"the {part} of {shown(folder)}"
    with one_sentence(f"cannot load {where} from safetensors"):
        module, info = getattr(library, kind).from_pretrained(
            folder / part, dtype=dtype, variant=variant, **options
        )
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        raise UserError(f"{where} is incomplete: its file lacks {shown(missing)}")
    for key in sorted(info["unexpected_keys"]):
        if not checkpoints.HARMLESS.fullmatch(key):
            raise UserError(checkpoints.dropped(where, key))
    for key, found, wanted in info["mismatched_keys"]:
        raise UserError(
            f"{where} is not what its config says: {key} is {tuple(found)}, not {tuple(wanted)}"
        )
    return module


def _weights(folder: Path, stem: str) -> tuple[str | None, list[Path]]:
    """The variant of the weights, "fp16" for `model.fp16.safetensors`, None for the plain name; and
    its files.
    """
    name = re.compile(rf"{stem}(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    matches = {file: name.fullmatch(file.name) for file in folder.glob("*.safetensors")}
    variants = {file: match[1] for file, match in matches.items() if match}
    order = [None, "fp16", *sorted(filter(None, variants.values()))]
    variant = next((v for v in order if v in variants.values()), None)
    return variant, [file for file, v in variants.items() if v == variant]


# --------------------------------------------------------------------------------------------------
# A single file


def _single_file(path: Path, dtype: torch.dtype):
    """A single .safetensors checkpoint, loaded by diffusers.

    Its configs come from a folder of the same name beside it (any pipeline folder of that
    architecture; weights are not needed), else from the hub.
    """
    xl = checkpoints.require_whole(path)
    beside, config = path.with_suffix(""), {}
    where = f"(no configs in {shown(beside)}/, so the hub is asked for them)"
    if (beside / "model_index.json").is_file():
        if _check_configs(beside) != xl:
            kinds = ["SDXL", "Stable Diffusion 1.x or 2.x"][:: 1 if xl else -1]
            others = f"the configs in {shown(beside)} are of {kinds[1]}"
            raise UserError(f"{shown(path)} is {kinds[0]} but {others}: put its own there")
        config, where = {"config": str(beside)}, f"with the configs in {shown(beside)}"
    with one_sentence(f"cannot load the checkpoint {shown(path)} {where}"):
        try:
            parts = _exact_vae(path, config) if xl else checkpoints.bare_clip(path, dtype, config)
            pipeline = _class(xl).from_single_file(
                str(path), dtype=dtype, **UNUSED, **parts, **config
            )
        except NotImplementedError:  # PyTorch's, for a tensor without a value
            lack = "it lacks tensors of its unet or vae"
            raise UserError(f"{shown(path)} is incomplete: {lack}") from None
    checkpoints.require_known(path)
    _read_prediction(path, pipeline, beside if config else None)
    return pipeline


def _exact_vae(path: Path, config: dict) -> dict[str, torch.nn.Module]:
    """{"vae": that of a checkpoint of SDXL in float32}: in half precision it overflows."""
    from diffusers import AutoencoderKL

    where = config | {"subfolder": "vae"} if config else {}
    return {"vae": AutoencoderKL.from_single_file(str(path), dtype=torch.float32, **where)}


def _read_prediction(path: Path, pipeline, beside: Path | None) -> None:
    """Let the scheduler be as the checkpoint says.  Raises UserError if the scheduler's config
    beside it says that the model predicts something else.
    """
    value, where, changes = checkpoints.prediction(path)
    config = beside and beside / "scheduler" / "scheduler_config.json"
    other = read_json(config).get("prediction_type", value) if value and config else value
    if value != other:
        raise UserError(
            f"{shown(path)} predicts {shown(value)} ({where}), but {shown(config)} says "
            f"{shown(other)}: correct one of them"
        )
    if changes:
        pipeline.scheduler = ddim(pipeline.scheduler, **changes)
