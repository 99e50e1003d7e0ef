"""Every flag of train.py, what it means, and what it is set to when left out; imports nothing heavy."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cli import UserError, option

EMBEDDED = str(Path(__file__).parent / "base")

# What the flags left out are set to.  The paper's values for Stable Diffusion; for the embedded model, values
# set by hand, but for the number of epochs (README, "How the defaults were chosen").
PAPER = {
    "rank": 64, "alpha": 32.0, "target": "attention", "proxy": "raw", "lam": 0.05,
    "lr": 1e-4, "attacker_lr": 1e-5, "batch_size": 1, "epochs": 400, "members": 400,
}  # fmt: skip
FAST = {
    "rank": 64, "alpha": 64.0, "target": "all", "proxy": "pooled", "lam": 4.0,
    "lr": 1e-3, "attacker_lr": 3e-3, "batch_size": 8, "epochs": 32, "members": 100,
}  # fmt: skip


@dataclass
class Settings:
    """Everything that decides a run; each field is a flag.  None: PAPER, or FAST for the embedded model."""

    method: str = option(
        "smp",
        "lora, or with the defence: mp (the sum, Eq. 6) or smp (the ratio, Eq. 10); smp-detached is a control",
        ("lora", "mp", "smp", "smp-detached"),
    )
    model: str = option(
        EMBEDDED, "StableDiffusionPipeline folder, hub name, or one .safetensors checkpoint"
    )
    size: int | None = option(
        None, "pixels of a side, a multiple of 8 (default: what the model was trained at)"
    )
    data: str = option("twemoji", "twemoji, or a folder of captioned images")
    caption: str | None = option(None, "one caption for images that have none of their own")
    split: str = option(
        "default",
        "roles of the images; pokemon is the paper's 200/200/200/233",
        ("default", "pokemon"),
    )
    members: int | None = option(
        None, "how many images to adapt on; half of them also train the attacker"
    )
    out: str | None = option(None, "run folder (default: runs/<method>)")
    init: str | None = option(
        None, "adapter to start from; its rank, alpha and layers win over the flags"
    )
    rank: int | None = option(None, "LoRA rank r; more adapts faster and leaks more")
    alpha: float | None = option(None, "LoRA alpha: the adapter is scaled by alpha / rank")
    target: str | None = option(
        None, "which layers are adapted", ("attention", "transformer", "all")
    )
    proxy: str | None = option(
        None,
        "the attacker in the loop: the paper's MLP on raw errors, or pooled statistics",
        ("raw", "pooled"),
    )
    lam: float | None = option(None, "privacy weight lambda; 0 is plain LoRA")
    delta: float = option(1e-5, "stabiliser in the ratio's denominator")
    lr: float | None = option(None, "learning rate of the adapter (AdamW, constant)")
    attacker_lr: float | None = option(None, "learning rate of the attacker (Adam)")
    attacker_every: int = option(
        1, "steps per step of the attacker: 1 is Algorithm 1; more is faster, its gain older"
    )
    attacker_members: str = option(
        "drawn",
        "its members in a step: drawn and noised for it as in Algorithm 1, or reused: those of the adapter's last batch "
        "that it may see, with half as many non-members; a quarter of the forwards",
        ("drawn", "reused"),
    )
    batch_size: int | None = option(
        None, "members per forward, and per half of the attacker's batch"
    )
    accumulate: int = option(
        1, "forwards per step: with N, a step is that of a batch N times as large"
    )
    steps: int | None = option(None, "outer steps; overrides --epochs")
    epochs: int | None = option(None, "passes over the members")
    clip: float = option(1.0, "limit of the gradient norm")
    seed: int = option(0, "decides split, initialisation, data order and noise")
    dtype: str = option(
        "auto",
        "of the frozen base, the rest stays float32; auto: bfloat16 or float16 on a GPU, float32 on a CPU",
        ("auto", "float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = option(
        False, "compute activations twice to keep fewer: a third slower, far smaller"
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    threads: int = option(0, "CPU threads; 0 leaves it to torch")
    save_every: int | None = option(
        None,
        "steps between adapters kept, each with its held-out loss (default: an eighth of the run)",
    )
    sample_every: int | None = option(None, "steps between sample grids (default: only the last)")
    samples: int = option(
        8, "pictures in each of the grid's two rows; 0 makes none, which saves hours on a CPU"
    )
    norms_every: int = option(
        20, "steps between separate gradient norms of L and G (two more backward passes)"
    )
    hessian_every: int = option(
        0,
        "steps between Hessian norms and their bound on a fixed batch (each costs dozens of steps); 0 is never",
    )
    state_every: int = option(100, "steps between training states for --resume")
    keep: int = option(2, "how many of them are kept")
    resume: bool = option(
        False, "continue the run in --out, with its settings; a run not begun is begun"
    )
    format: str = option(
        "diffusers", "kohya writes that form too, for ComfyUI and A1111", ("diffusers", "kohya")
    )
    track: str | None = option(None, "also log to a dashboard", ("tensorboard",))
    dry_run: bool = option(
        False, "say what would happen, with time and memory from two steps, and stop"
    )


FREE = (
    "out",
    "device",
    "threads",
    "state_every",
    "keep",
    "resume",
    "track",
    "dry_run",
)  # may change on --resume
LOOKS = (
    "norms_every",
    "hessian_every",
    "samples",
    "sample_every",
    "format",
)  # change no number of the training itself


def resolve(settings: Settings) -> Settings:
    """Fill the flags that were left out and refuse what cannot work; raises UserError."""
    embedded = Path(settings.model).resolve() == Path(EMBEDDED).resolve()
    for name, value in (FAST if embedded else PAPER).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.out = settings.out or f"runs/{settings.method}"
    positive = "size rank members batch_size accumulate epochs steps lr attacker_lr attacker_every clip alpha"
    for name in (
        *positive.split(),
        "norms_every",
        "save_every",
        "sample_every",
        "state_every",
        "keep",
    ):
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not (0 <= settings.lam < float("inf") and 0 <= settings.delta < float("inf")):
        raise UserError(
            f"--lam and --delta must be 0 or more, not {settings.lam} and {settings.delta}"
        )
    for name in ("hessian_every", "threads", "samples"):
        if getattr(settings, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} must be 0 or more, not {getattr(settings, name)}"
            )
    if not 0 <= settings.seed < 2**62:
        raise UserError(f"--seed must be from 0 to 2**62, not {settings.seed}")
    for path in (Path(settings.out), *Path(settings.out).parents):
        if path.is_file():
            raise UserError(f"{path} is a file: give --out the name of a folder")
    if (Path(settings.out) / "config.json").exists() and not (settings.resume or settings.dry_run):
        raise UserError(
            f"{settings.out} already holds a run: give another --out, or --resume to continue it"
        )
    return settings


def stored(settings: Settings) -> tuple[Settings, dict | None]:
    """For --resume: the settings of the run in --out, and its summary if it is finished.

    A flag given that says something else is refused, save those in FREE.
    """
    path = Path(settings.out or f"runs/{settings.method}") / "config.json"
    if not path.is_file():
        return settings, None
    try:
        config = json.loads(path.read_text())
        known = {
            f.name: config["settings"][f.name]
            for f in fields(Settings)
            if f.name in config["settings"]
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a run's config ({error}): it cannot be continued, take another --out"
        ) from None
    for f in fields(Settings):
        given = getattr(settings, f.name)
        if f.name in known and f.name not in FREE and given not in (f.default, known[f.name]):
            flag = "--" + f.name.replace("_", "-")
            raise UserError(
                f"{path.parent} was begun with {flag} {known[f.name]}, not {given}: leave {flag} out"
            )
    return replace(
        Settings(**known), **{name: getattr(settings, name) for name in FREE}
    ), config.get("summary")
