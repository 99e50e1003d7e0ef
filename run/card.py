"""The model card of a run, adapter/README.md, as the hubs of adapters show one: what the adapter is
of, how it was made, how to load it, and what its evaluation found.

Its words are in card.md.jinja.  A card may be published, so it holds no name, caption or picture of
an image.  An existing card belongs to its owner: only what stands between our two marks is ever
replaced.  Tested in tests/test_card.py, with the hub's own reader.
"""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from command.errors import UserError, shown
from command.whole_files import read_json, write_whole
from files import EMBEDDED_SETS
from run.folder import RunFolder
from settings import Settings, is_embedded

NAME = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md.jinja")
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
NOT_YET = "Not evaluated yet: `python evaluate.py RUN` measures what this adapter leaks."
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TAGS = ["text-to-image", "diffusers", "stable-diffusion", "membership-inference"]

# settings that the card names
ALWAYS = ["rank", "alpha", "target", "lr", "schedule", "batch_size", "seed", "dtype"]
OF_METHOD = {
    "attacked": ["lam", "proxy", "attacker_lr"],
    "distill": ["teachers", "teacher_steps"],
    "dp": ["epsilon", "steps"],
}
IF_CHANGED = ["accumulate", "flip", "crop", "normalise", "stop"]

# AUC of an attacker with adapters of his own (LiRA pooled) on the embedded model; the figures are
# those of docs/records, and the sentences stand in docs/defences.md
AUDITED = {
    "lora": "plain LoRA reads .90 after 50 steps and 1.00 after 400, LoRA of 75 steps .92, with "
    "--flip .89, with --flip --crop .83",
    "smp": "SMP reads .84 after 50 steps and .96 after 400",
    "mp": "MP reads .57 after 400 steps, at a median held-out loss of .192",
    "distill": "leave-out distillation reads .71, with --flip .67, with --flip --crop .64; at the "
    "losses of the last two LoRA --flip reads .78 and .82; wrong captions that come twice read .74 "
    "with --flip, LoRA --flip .94",
    "dp": "dp reads .60 with --epsilon 8, .54 with 3 and .52 with 1, LoRA --flip there .72 to .89",
}


def audited(s: Settings) -> str | None:
    """What audits of a method on the embedded model found, in a sentence; None for another model,
    a method that was not audited and --target full.
    """
    if s.method in AUDITED and is_embedded(s.model) and s.target != "full":
        return f"{AUDITED[s.method]} (audit.py, embedded model; docs/defences.md)"
    return None


def write(run, step: int, summary: dict, promise=None) -> None:
    """Write the card of a finished run, unless there is one: it may have been edited."""
    path = RunFolder(run.settings.out).path / "adapter" / NAME
    if not path.exists():
        write_whole(path, text(run, step, summary, promise))


def text(run, step: int, summary: dict, promise=None) -> str:
    """All of the card.

    `summary` is that of config.json, and `promise` the guarantee of --method dp, if there is one.
    """
    s = run.settings
    base, whole = base_name(s.model), s.target == "full"
    named = "the embedded base of smp-lora" if is_embedded(s.model) else base
    header = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS if whole else ["lora", *TAGS],
    )
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        title=f"A UNet fine-tuned from {named}" if whole else f"An adapter for {named}",
        method=s.method,
        whole=whole,
        pipeline=type(run.base.pipeline).__name__,
        size=run.base.size,
        source=s.data if s.data in EMBEDDED_SETS else "private pictures with captions",
        base=json.dumps(base),
        members=len(run.data.members()),
        step=step,
        batch=run.size,
        roles=run.data.roles,
        flags=flags(s),
        found=summary,
        promise=promise,
        audited=audited(s),
        evaluation=f"{BEGIN}\n{NOT_YET}\n{END}",
    )
    return f"{card.content}\n"


def flags(s: Settings) -> dict[str, object]:
    """The settings that matter, by flag; none of them names a file."""
    names = ALWAYS + OF_METHOD.get("attacked" if s.attacked else s.method, [])
    names += [name for name in IF_CHANGED if getattr(s, name) != getattr(Settings, name)]
    unsaid = ("rank", "alpha") if s.target == "full" else ()
    if s.method == "dp":  # the seed deals the members, the directions give the shape
        unsaid = ("seed", "rank", "alpha", "target")
    names = [name for name in names if name not in unsaid]
    values = {f"--{name.replace('_', '-')}": getattr(s, name) for name in names}
    return {flag: "by default" if value is None else value for flag, value in values.items()}


def base_name(model: str) -> str:
    """The name of a base: that on the hub if its folder knows it, else that of its folder or file;
    the path to it is private.
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
    path = path.resolve()
    return shown(path.stem if path.is_file() else path.name)


# --------------------------------------------------------------------------------------------------
# After an evaluation


def evaluated(adapter: Path, record: dict) -> None:
    """Put the findings of an evaluation, a record of eval.json, between the marks of a card; a card
    without marks stays as it is, and so does a folder without a card.
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
    """What an evaluation found, in Markdown."""
    adapted, base, sizes = record["adapted"], record["base"], record["images"]
    head = adapted["headline"]
    (low, high), of_base = head["auc_interval"], base["attacks"].get(head["attack"])
    losses = [f"{model['held_out_loss']:.4f}" for model in (adapted, base)]
    areas = [f"{head['auc']:.2f} [{low:.2f}, {high:.2f}]"]
    areas.append(f"{of_base['auc']:.2f}" if of_base else "-")
    rows = [["", "adapter", "base"], ["---"] * 3, ["held-out loss", *losses]]
    rows.append([f"AUC of {head['attack']}, chosen beforehand", *areas])
    if "quality" in adapted:
        for key, images in (("held_out", "held-out images"), ("members", "members")):
            distances = [f"{m['quality'][f'frechet_{key}']:.0f}" for m in (adapted, base)]
            rows.append([f"Frechet distance to {images}", *distances])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    tried = "The strongest attack known, with shadow adapters, was not tried."
    if record["shadows"]:
        tried = f"An attack with {record['shadows']} shadow adapters was tried."
    counts = f"{sizes['member_test']} test members and {sizes['nonmember_test']} non-members"
    return "\n\n".join([record["verdict"], table, f"On {counts}. {tried}"])
