"""The model card of a run, adapter/README.md, as the hubs of adapters show one: what the adapter is
of, how it was made, how to load it, and what its evaluation found.

It may be shown around, so no name, caption or picture of an image is in it.  A card that is there
is its owner's: only what stands between our two marks is ever replaced.  Tested in
tests/test_card.py, with the hub's own reader.
"""

import json
import re
from pathlib import Path

from command.errors import UserError, shown
from command.whole_files import read_json, write_whole
from run import advice
from run.prepare import Run
from settings import EMBEDDED, EMBEDDED_SETS, Settings

NAME = "README.md"
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TAGS = ("lora", "text-to-image", "diffusers", "stable-diffusion", "membership-inference")
# of the settings
ALWAYS = ("rank", "alpha", "target", "lr", "schedule", "batch_size", "seed", "dtype")
CHANGED = ("accumulate", "weight_decay", "ema", "dropout", "caption_dropout", "flip", "normalise")
CHANGED += ("stop", "subspace", "as_released")  # told where they are not the default
OF_METHOD = {
    "attacked": ("lam", "proxy", "attacker_lr", "attacker_members"),
    "distill": ("teachers", "teacher_steps"),
    "dp": ("image_clip", "noise_multiplier", "draws"),
}
NOT_YET = "Not evaluated yet: `python evaluate.py RUN` measures what this adapter gives away."


def write(run: Run, step: int, summary: dict, promised=None) -> None:
    """The card of a finished run, unless there is one: it may have been edited."""
    path = run.folder.path / "adapter" / NAME
    if not path.exists():
        write_whole(path, text(run, step, summary, promised))


def text(run: Run, step: int, summary: dict, promised=None) -> str:
    """All of the card; `promised` is the guarantee of --method dp."""
    s, data = run.settings, run.data
    model = base_name(s.model)
    loss, before = summary["held_out_loss"], summary["held_out_loss_base"]
    (low, high), area = summary["validation_auc_interval"], summary["validation_auc"]
    sentences = [
        f"Held-out loss {loss:.4f}, {before:.4f} before. Loss attack on auxiliary and validation "
        f"images: AUC {area:.2f} [{low:.2f}, {high:.2f}]; 0.5 is none."
    ]
    sentences += [f"Promise: {promised}."] if promised else []
    sentences += [f"Audited: {advice.sentence(s.method)}."] if s.method in advice.AUDITED else []
    whole = s.target == "full"
    kind = "A UNet fine-tuned from" if whole else "An adapter for"
    parts = [
        "\n".join(front_matter(model, whole)),
        f"# {kind} {'the embedded base of smp-lora' if own(s) else model}, by {s.method}",
        f"{'UNet' if whole else 'LoRA'} for pictures of {run.base.size} px, from "
        f"{s.data if s.data in EMBEDDED_SETS else 'private pictures with captions'}.",
        "## Load it",
        "\n".join(loading(model, whole)),
        "## How it was made",
        f"Trained on {len(data.members())} images, {step} steps of {run.batch}. Images by role:",
        table("role", "images", {role: len(index) for role, index in data.roles.items()}),
        table("setting", "value", {"method": s.method} | settings_of(s)),
        "## What it learned and what it gives away",
        *sentences,
        f"{BEGIN}\n{NOT_YET}\n{END}",
    ]
    return "\n\n".join(parts) + "\n"


def evaluated(adapter: Path, record: dict) -> None:
    """Put the verdict of an evaluation, a record of eval.json, between the marks of a card; without
    a card or marks nothing is done.
    """
    path = adapter / NAME
    if not path.is_file():
        return
    try:
        card = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # no card of ours
        return
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        write_whole(path, f"{before}{BEGIN}\n{findings(record)}\n{END}{after}")


def findings(record: dict) -> str:
    """What an evaluation found, for the card."""
    adapted, base, sizes = record["adapted"], record["base"], record["images"]
    rows = {"held-out loss": [f"{m['held_out_loss']:.4f}" for m in (adapted, base)]}
    head, of_base = adapted["headline"], base["attacks"].get(adapted["headline"]["attack"])
    low, high = head["auc_interval"]
    rows[f"AUC of {head['attack']}, chosen beforehand"] = [
        f"{head['auc']:.2f} [{low:.2f}, {high:.2f}]",
        f"{of_base['auc']:.2f}" if of_base else "-",
    ]
    sets = {"held_out": "held-out images", "members": "members"}
    for real, what in sets.items() if "quality" in adapted else ():
        cells = [f"{m['quality'][f'frechet_{real}']:.0f}" for m in (adapted, base)]
        rows[f"Frechet distance to {what}"] = cells
    measured = table("", "adapter | base", {title: " | ".join(c) for title, c in rows.items()})
    measured = measured.replace("|---|---|", "|---|---|---|", 1)
    tried = "An attacker who trains adapters of his own, the strongest known, was not tried."
    if record["shadows"]:
        tried = f"An attacker with {record['shadows']} adapters of his own was tried."
    counts = f"{sizes['member_test']} test members and {sizes['nonmember_test']} non-members"
    return "\n\n".join([record["verdict"], measured, f"On {counts}. {tried}"])


# --------------------------------------------------------------------------------------------------
# Parts of a card


def front_matter(model: str, whole: bool) -> list[str]:
    """What the hubs read: YAML between two lines of dashes; of a `whole` UNet or a LoRA."""
    fields = {"base_model": model, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]  # JSON is YAML
    tags = [tag for tag in TAGS if not (whole and tag == "lora")]
    return ["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"]


def loading(model: str, whole: bool) -> list[str]:
    """How diffusers takes it up; a LoRA needs peft."""
    if whole:
        also, given = ", UNet2DConditionModel", f"{json.dumps(model)}, unet=unet"
        first = ['unet = UNet2DConditionModel.from_pretrained(".")  # this folder']
        then = []
    else:
        also, given, first = "", json.dumps(model), []
        then = ['pipeline.load_lora_weights(".")  # this folder; needs peft']
    return [
        "```python",
        f"from diffusers import StableDiffusionPipeline{also}",
        "",
        *first,
        f"pipeline = StableDiffusionPipeline.from_pretrained({given})",
        *then,
        'pipeline("a caption").images[0].save("picture.png")',
        "```",
    ]


def table(left: str, right: str, rows: dict) -> str:
    """A table of two columns in Markdown."""
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    return "\n".join(lines)


def settings_of(s: Settings) -> dict[str, object]:
    """The settings that matter, by flag; of files only that there was one."""
    names = [*ALWAYS, *OF_METHOD.get("attacked" if s.attacked else s.method, ())]
    names += [name for name in CHANGED if getattr(s, name) != getattr(Settings, name)]
    names = [n for n in names if not (s.target == "full" and n in ("rank", "alpha"))]
    found = {f"--{name.replace('_', '-')}": getattr(s, name) for name in names}
    if s.subspace not in (None, "public"):
        found["--subspace"] = "a file"
    return {flag: "by default" if value is None else value for flag, value in found.items()}


def own(s: Settings) -> bool:
    """Whether the base is the embedded one."""
    return Path(s.model).resolve() == Path(EMBEDDED).resolve()


def base_name(model: str) -> str:
    """What to call a base: its name on the hub where it has one, else that of its folder or file;
    the way to it is private.
    """
    path = Path(model)
    if not path.exists():
        return shown(model)
    try:
        index = read_json(path / "model_index.json")
        name = index.get("_name_or_path") if isinstance(index, dict) else None
    except UserError:
        name = None
    if isinstance(name, str) and HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    return shown(path.resolve().stem if path.is_file() else path.resolve().name)
