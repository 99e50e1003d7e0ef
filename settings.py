"""Every flag of train.py, what it means, and its default; imports nothing heavy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from command.errors import UserError
from command.flags import option

EMBEDDED = str(Path(__file__).parent / "base")
ATTACKED = ("mp", "smp", "smp-detached")  # methods with an attacker in the loop
METHODS = ("lora", *ATTACKED, "distill", "dp")
DIRECTIONS = str(Path(__file__).parent / "embedded" / "directions.safetensors")

# What the flags left out are set to.  The paper's values for Stable Diffusion; for the embedded
# model, values set by hand, but for the schedule (docs/results.md says how).
PAPER = {
    "dtype": "auto",
    "rank": 64, "alpha": 32.0, "target": "attention", "proxy": "raw", "lam": 0.05,
    "lr": 1e-4, "attacker_lr": 1e-5, "batch_size": 1, "epochs": 400, "members": 400,
    "schedule": "constant",
}  # fmt: skip
FAST = {
    "dtype": "float32",
    "rank": 64, "alpha": 64.0, "target": "all", "proxy": "pooled", "lam": 4.0,
    "lr": 1e-3, "attacker_lr": 3e-3, "batch_size": 8, "epochs": 32, "members": 100,
    "schedule": "cosine",
}  # fmt: skip
DP = {"lr": 0.08, "steps": 6, "schedule": "linear"}  # of --method dp, methods/dp.py
FULL_LR = {True: 1e-4, False: 5e-6}  # of --target full, for the embedded model or not
TABLES = {"embedded": FAST, "Stable Diffusion": PAPER}


@dataclass
class Settings:
    """Everything that decides a run; each field is a flag.  None: by the model, FAST or PAPER."""

    # What and where
    method: str = option(
        "smp",
        "lora, or with a defence: the paper's mp (the sum, Eq. 6) or smp (the ratio, Eq. 10), or "
        "distill, which learns from adapters that never saw the image, or dp, which clips every "
        "image's gradient, adds noise and so promises --epsilon; smp-detached is a control",
        METHODS,
        group="what and where",
    )
    model: str = option(
        EMBEDDED,
        "StableDiffusion(XL)Pipeline folder, hub name, or one .safetensors checkpoint",
        group="what and where",
        shows="the embedded model, for pictures of 48 pixels",
    )
    data: str = option(
        "twemoji", "twemoji, openmoji, or a folder of captioned images", group="what and where"
    )
    nonmembers: str | None = option(
        None,
        "public or otherwise unrelated images, as --data, to be all the non-members, so that "
        "one's own can all be members (default: a part of --data is kept apart)",
        group="what and where",
    )
    out: str | None = option(None, "run folder (default: runs/<method>)", group="what and where")
    device: str = option(
        "auto",
        "cpu, cuda, cuda:1, mps; auto is the first there is of cuda, mps and cpu, with --resume "
        "that of the run",
        group="what and where",
    )
    resume: bool = option(
        False,
        "continue the run in --out, with its settings; a run not begun is begun",
        group="what and where",
    )

    # The method
    lam: float | None = option(
        None,
        "privacy weight lambda; 0 is plain LoRA",
        group="method",
        aliases=("lambda",),
        tables=TABLES,
    )
    proxy: str | None = option(
        None,
        "the attacker in the loop: the paper's MLP on raw errors, pooled statistics, or "
        "calibrated: these and the base's",
        ("raw", "pooled", "calibrated"),
        group="method",
        tables=TABLES,
    )

    # Leave-out distillation
    teachers: int = option(
        5, "folds of the members, each with a teacher trained on the others", group="distillation"
    )
    teacher_steps: int | None = option(
        None, "steps of each teacher (default: a quarter of --steps)", group="distillation"
    )
    public: str | None = option(
        None,
        "public pictures beside the private ones, as many in a batch: a folder with captions, "
        "openmoji, or none (default: openmoji for the embedded model)",
        group="distillation",
    )

    # Differential privacy
    epsilon: float = option(
        8.0,
        "dp: the promise: no attack tells one image's membership better than this allows; the "
        "smaller, the more noise",
        group="differential privacy",
    )
    delta_dp: float | None = option(
        None,
        "dp: the chance that the promise fails (default: 0.1 / members)",
        group="differential privacy",
    )
    directions: str | None = option(
        None,
        "dp: file of the public directions that it trains along (default: those of the embedded "
        "model)",
        group="differential privacy",
    )

    # The adapter
    rank: int | None = option(
        None, "LoRA rank r; more adapts faster and leaks more", group="adapter", tables=TABLES
    )
    target: str | None = option(
        None,
        "which layers are adapted; full trains the weights of the UNet themselves, without LoRA",
        ("attention", "transformer", "all", "full"),
        group="adapter",
        tables=TABLES,
    )
    init: str | None = option(
        None,
        "adapter to start from; its rank, alpha and layers win over the flags",
        group="adapter",
    )

    # Optimisation
    lr: float | None = option(
        None,
        "learning rate of the adapter (AdamW)",
        group="optimisation",
        tables=TABLES,
    )
    batch_size: int | None = option(
        None,
        "members per forward, and per half of the attacker's batch",
        group="optimisation",
        tables=TABLES,
    )
    steps: int | None = option(
        None,
        "outer steps (default: 32 passes over the members of the embedded model, 400 of Stable "
        "Diffusion; with distill half of it, with dp 6 steps)",
        group="optimisation",
    )
    seed: int = option(
        0, "decides split, initialisation, data order and noise", group="optimisation"
    )

    # Regularisation: what stops the adapter from memorising, without an attacker
    schedule: str | None = option(
        None,
        "learning rate over the run: from --lr down to 0 along half a cosine or a line",
        ("constant", "cosine", "linear"),
        group="regularisation",
        tables=TABLES,
    )
    normalise: bool = option(
        False, "scale every gradient to the norm of --clip, small ones too", group="regularisation"
    )
    flip: bool = option(False, "mirror every other draw of a member", group="regularisation")
    stop: str = option(
        "last",
        "which of the saved steps becomes the adapter: the last, or that of the best held-out loss",
        ("last", "best"),
        group="regularisation",
    )

    # Saving and looking
    save_every: int | None = option(
        None,
        "steps between adapters kept, each with its held-out loss (default: an eighth of the run; "
        "the first after a twentieth)",
        group="saving and looking",
    )
    prompt: list[str] | None = option(
        None,
        "a prompt of your own for the grid of pictures; give it again for more",
        group="saving and looking",
    )
    dry_run: bool = option(
        False,
        "say what would happen, with hours, gigabytes and memory from two steps, and stop",
        group="saving and looking",
    )

    # Advanced
    size: int | None = option(
        None, "pixels of a side, a multiple of 8 (default: what the model was trained at)"
    )
    caption: str | None = option(None, "one caption for images that have none of their own")
    members: int | None = option(
        None,
        "images to adapt on; half of them also train the attacker; left out, as many as the "
        "images serve, up to the default",
        tables=TABLES,
    )
    alpha: float | None = option(
        None, "LoRA alpha: the adapter is scaled by alpha / rank", tables=TABLES
    )
    attacker_lr: float | None = option(None, "learning rate of the attacker (Adam)", tables=TABLES)
    accumulate: int = option(
        1, "forwards per step: with N, a step is that of a batch N times as large"
    )
    clip: float = option(1.0, "limit of the gradient norm")
    dtype: str | None = option(
        None,
        "of the frozen base, the rest stays float32; auto: bfloat16 or float16 on a GPU, "
        "float32 on a CPU",
        ("auto", "float32", "bfloat16", "float16"),
        tables=TABLES,
    )
    gradient_checkpointing: bool = option(
        False, "compute activations twice to keep fewer: a third slower, far smaller"
    )
    samples: int = option(
        4,
        "captions of members that the grid of pictures shows, and as many held-out ones; 0 makes "
        "no pictures, which saves hours on a CPU",
    )
    norms_every: int = option(
        20, "steps between separate gradient norms of L and G (two more backward passes)"
    )
    hessian_every: int = option(
        0,
        "steps between Hessian norms and their bound on a fixed batch (each costs dozens of "
        "steps); 0 is never",
    )
    state_every: int | None = option(
        None, "steps between training states for --resume (default: five minutes)"
    )
    track: str | None = option(None, "also log to a dashboard", ("tensorboard",))

    @property
    def attacked(self) -> bool:
        """Whether an attacker trains in the loop."""
        return self.method in ATTACKED

    @property
    def objective(self) -> str:
        """Its name in objectives.py: without an attacker it is L, whatever L is measured to."""
        return self.method if self.attacked else "lora"

    @property
    def epochs(self) -> int:
        """Passes over the members where --steps is left out."""
        passes = (FAST if is_embedded(self.model) else PAPER)["epochs"]
        return -(-passes // 2) if self.method == "distill" else passes

    @staticmethod
    def adopted(values: dict, path: Path) -> dict:
        """The settings of a config file; raises UserError for those of a method that is gone."""
        if values.get("method") == "dp" and "image_clip" in values:  # one of its flags
            raise UserError(f"{path}: its --method dp is gone; commit 0db7ef9 was the last with it")
        return values

    # Flags of earlier versions: the last commit that had each, and the values at which it changed
    # nothing; ... stands for any.
    RETIRED: ClassVar[dict] = {"attacker_every": ("7ba68a5", 1)} | {
        flag: ("0db7ef9", *neutral)
        for flag, neutral in {
            "attacker_members": ("drawn",),
            "as_released": (None,),
            "subspace": (None,),
            "ema": (0.0,),
            "dropout": (0.0,),
            "caption_dropout": (0.0,),
            "weight_decay": (0.01,),
            "delta": (1e-5,),
            "split": ("default",),
            "image_clip": (0.1,),
            "noise_multiplier": (None,),
            "draws": (1,),
            "epochs": (...,),
            "keep": (...,),
            "threads": (...,),
            "format": (...,),
            "sample_every": (...,),
        }.items()
    }


# may change on --resume
FREE = ("out", "device", "state_every", "resume", "track", "dry_run")
# name what may lie elsewhere on --resume, if its content is the same
PLACES = ("model", "data", "nonmembers", "public", "init", "directions")
# change no number of the training itself
LOOKS = ("norms_every", "hessian_every", "samples", "prompt")

# The highest value of each number, so that a slip of the finger is told before anything is loaded.
ABOVE_ZERO = {
    "size": 16_384, "rank": 4096, "alpha": 1e6, "members": 10**7, "batch_size": 65_536,
    "accumulate": 10**6, "steps": 10**9, "lr": 1e37, "attacker_lr": 1e37, "clip": None,
    "norms_every": 10**9, "save_every": 10**9, "state_every": 10**9, "teachers": 1000,
    "teacher_steps": 10**9, "epsilon": 1e3, "delta_dp": 0.5,
}  # fmt: skip
FROM_ZERO = {"lam": 1e9, "samples": 10_000, "hessian_every": 10**9, "seed": 2**62 - 1}


def is_embedded(model: str) -> bool:
    """Whether it is the model in base/, whose defaults are FAST."""
    return os.path.realpath(model) == os.path.realpath(EMBEDDED)


def most_members(settings: Settings) -> int:
    """Members where --members is left out and there are images enough."""
    return (FAST if is_embedded(settings.model) else PAPER)["members"]
