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
        "lora has no defence; mp (the sum, Eq. 6) and smp (the ratio, Eq. 10) are the paper's; "
        "distill learns each image from adapters that never saw it; dp clips each image's "
        "gradient and adds noise, which guarantees --epsilon; smp-detached is a control",
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
        "take all non-members from here, in the forms of --data, so that all your images can be "
        "members (default: part of --data is held out)",
        group="what and where",
    )
    out: str | None = option(None, "run folder (default: runs/<method>)", group="what and where")
    device: str = option(
        "auto",
        "cpu, cuda, cuda:1 or mps; auto takes the first available of cuda, mps and cpu, and with "
        "--resume the device of the run",
        group="what and where",
    )
    resume: bool = option(
        False,
        "continue the run in --out with its settings; starts a new run if none exists",
        group="what and where",
    )

    # The method
    lam: float | None = option(
        None,
        "privacy weight lambda; 0 gives plain LoRA",
        group="method",
        aliases=("lambda",),
        tables=TABLES,
    )
    proxy: str | None = option(
        None,
        "what the attacker in the loop reads: raw error maps (the paper's MLP), pooled statistics, "
        "or calibrated: pooled statistics and those of the base",
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

    # Differential privacy
    epsilon: float = option(
        8.0,
        "dp: the guarantee, which bounds every attack on one image's membership; smaller values "
        "add more noise",
        group="differential privacy",
    )
    delta_dp: float | None = option(
        None,
        "dp: delta of the guarantee, its slack beside epsilon (default: 0.1 / members)",
        group="differential privacy",
    )
    directions: str | None = option(
        None,
        "dp: file of public directions to train along (default: those of the embedded model)",
        group="differential privacy",
    )

    # The adapter
    rank: int | None = option(
        None,
        "LoRA rank r; a higher one fits faster and leaks more",
        group="adapter",
        tables=TABLES,
    )
    target: str | None = option(
        None,
        "layers to adapt; full trains the UNet's own weights, without LoRA",
        ("attention", "transformer", "all", "full"),
        group="adapter",
        tables=TABLES,
    )
    init: str | None = option(
        None,
        "adapter to start from; its rank, alpha and layers override the flags",
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
        "members per forward pass, and per half of the attacker's batch",
        group="optimisation",
        tables=TABLES,
    )
    steps: int | None = option(
        None,
        "training steps (default: 32 passes over the members with the embedded model, 400 with "
        "Stable Diffusion; distill: half as many; dp: 6 steps)",
        group="optimisation",
    )
    seed: int = option(
        0, "seed of the split, initialisation, data order and noise", group="optimisation"
    )

    # Regularisation: what stops the adapter from memorising, without an attacker
    schedule: str | None = option(
        None,
        "learning rate schedule: constant, or from --lr down to 0 along half a cosine or a line",
        ("constant", "cosine", "linear"),
        group="regularisation",
        tables=TABLES,
    )
    normalise: bool = option(
        False, "scale every gradient to norm --clip, small ones too", group="regularisation"
    )
    flip: bool = option(False, "mirror each member every other time", group="regularisation")
    crop: bool = option(
        False,
        "show each member as random crops, of 70 to 100 % of its area",
        group="regularisation",
    )
    stop: str = option(
        "last",
        "which saved step becomes the adapter: the last, or the one with the best held-out loss",
        ("last", "best"),
        group="regularisation",
    )

    # Saving and looking
    save_every: int | None = option(
        None,
        "steps between saved adapters, each with its held-out loss (default: an eighth of the run; "
        "the first after a twentieth)",
        group="saving and looking",
    )
    prompt: list[str] | None = option(
        None,
        "your own prompt for the grid of pictures; repeat the flag for more",
        group="saving and looking",
    )
    dry_run: bool = option(
        False,
        "run two steps, print the plan with hours, disk space and memory, and stop",
        group="saving and looking",
    )

    # Advanced
    size: int | None = option(
        None, "pixels per side, a multiple of 8 (default: the model's own size)"
    )
    caption: str | None = option(None, "caption for all images without one")
    members: int | None = option(
        None,
        "images to train on; half of them also train the attacker (fewer than the default if there "
        "are too few images)",
        tables=TABLES,
    )
    alpha: float | None = option(
        None, "LoRA alpha; the adapter is scaled by alpha / rank", tables=TABLES
    )
    attacker_lr: float | None = option(None, "learning rate of the attacker (Adam)", tables=TABLES)
    accumulate: int = option(
        1, "gradient accumulation: N forward passes per step, as one batch N times as large"
    )
    clip: float = option(1.0, "maximum gradient norm")
    dtype: str | None = option(
        None,
        "dtype of the frozen base; the rest stays float32. auto: bfloat16 or float16 on a GPU, "
        "float32 on a CPU",
        ("auto", "float32", "bfloat16", "float16"),
        tables=TABLES,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: a third slower, far less memory"
    )
    samples: int = option(
        4,
        "member captions in the grid of pictures, and as many held-out ones; 0 draws no pictures, "
        "which saves hours on a CPU",
    )
    norms_every: int = option(
        20, "steps between gradient norms of L and G, which cost two more backward passes"
    )
    hessian_every: int = option(
        0,
        "steps between Hessian norms and their bound on a fixed batch, each as costly as dozens of "
        "steps; 0: never",
    )
    state_every: int | None = option(
        None, "steps between training states for --resume (default: every five minutes)"
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
    RETIRED: ClassVar[dict] = {
        "attacker_every": ("7ba68a5", 1),
        "public": ("4cfba20", None, "none"),
    } | {
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
PLACES = ("model", "data", "nonmembers", "init", "directions")
# change no number of the training itself
LOOKS = ("norms_every", "hessian_every", "samples", "prompt")

# The highest value of each number, so that a slip of the finger is told before anything is loaded.
ABOVE_ZERO = {
    "size": 16_384, "rank": 4096, "alpha": 1e6, "members": 10**7, "batch_size": 65_536,
    "accumulate": 10**6, "steps": 10**9, "lr": 1e37, "attacker_lr": 1e37, "clip": None,
    "norms_every": 10**9, "save_every": 10**9, "state_every": 10**9, "teachers": 1000,
    "teacher_steps": 10**9, "epsilon": 1e3, "delta_dp": 0.5,
}  # fmt: skip
FROM_ZERO = {"lam": 1e9, "samples": 10_000, "hessian_every": 10**9, "seed": 2**31 - 1}


def is_embedded(model: str) -> bool:
    """Whether it is the model in base/, whose defaults are FAST."""
    return os.path.realpath(model) == os.path.realpath(EMBEDDED)


def most_members(settings: Settings) -> int:
    """Members where --members is left out and there are images enough."""
    return (FAST if is_embedded(settings.model) else PAPER)["members"]
