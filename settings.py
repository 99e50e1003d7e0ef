"""Every flag of train.py, what it means, and its default; imports nothing heavy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from command.flags import option
from run import released

EMBEDDED = str(Path(__file__).parent / "base")
ATTACKED = ("mp", "smp", "smp-detached")  # methods with an attacker in the loop
METHODS = ("lora", *ATTACKED, "distill", "subspace", "dp")
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
FULL_LR = {True: 1e-4, False: 5e-6}  # of --target full, for the embedded model or not
TABLES = {"embedded": FAST, "Stable Diffusion": PAPER}


@dataclass
class Settings:
    """Everything that decides a run; each field is a flag.  None: by the model, FAST or PAPER."""

    # What and where
    method: str = option(
        "smp",
        "lora, or with a defence: the paper's mp (the sum, Eq. 6) or smp (the ratio, Eq. 10), or "
        "distill, which learns from adapters that never saw the image, subspace, which moves along "
        "public directions alone, or dp, which clips every image's gradient and adds noise; "
        "smp-detached is a control",
        METHODS,
        group="what and where",
    )
    model: str = option(
        EMBEDDED,
        "StableDiffusionPipeline folder, hub name, or one .safetensors checkpoint",
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
    image_clip: float = option(
        0.1, "dp: limit of the gradient norm of one image", group="differential privacy"
    )
    noise_multiplier: float | None = option(
        None,
        "dp: deviation of the noise as a multiple of --image-clip (default: the one whose noise is "
        "0.16 of a clipped gradient, which guarantees nothing)",
        group="differential privacy",
    )
    draws: int = option(
        1, "dp: timesteps and noises of an image in a step", group="differential privacy"
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

    subspace: str | None = option(
        None,
        "train a core between the public directions in this file, with any method; public: those "
        "of the embedded model (the default of --method subspace)",
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
        "outer steps (default: what --epochs makes, with distill half of it)",
        group="optimisation",
        beats="epochs",
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
    weight_decay: float = option(0.01, "of A and B (AdamW)", group="regularisation")
    ema: float = option(
        0.0,
        "decay of a running mean of A and B, such as 0.98; the mean is what is saved and judged",
        group="regularisation",
    )
    dropout: float = option(
        0.0, "share of what each A is given that is set to zero in a step", group="regularisation"
    )
    caption_dropout: float = option(
        0.0, "share of the members' draws that are shown without a caption", group="regularisation"
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
    split: str = option(
        "default",
        "roles of the images; pokemon is the paper's 200/200/200/233",
        ("default", "pokemon"),
    )
    members: int | None = option(
        None,
        "images to adapt on; half of them also train the attacker; left out, as many as the "
        "images serve, up to the default",
        tables=TABLES,
    )
    alpha: float | None = option(
        None, "LoRA alpha: the adapter is scaled by alpha / rank", tables=TABLES
    )
    delta: float = option(1e-5, "stabiliser in the ratio's denominator")
    attacker_lr: float | None = option(None, "learning rate of the attacker (Adam)", tables=TABLES)
    attacker_members: str = option(
        "drawn",
        "the attacker's members in a step: drawn and noised for it as in Algorithm 1, or reused: "
        "those of the adapter's last batch that it may see, with half as many non-members; "
        "a quarter of the forwards",
        ("drawn", "reused"),
    )
    as_released: str | None = option(
        None,
        "do as the authors' code where it is not the paper: some of order, half, lambda, forward, "
        "dropout, text-encoder with commas between, or all (docs/paper-and-code.md)",
    )
    accumulate: int = option(
        1, "forwards per step: with N, a step is that of a batch N times as large"
    )
    epochs: int | None = option(None, "passes over the members; --steps wins", tables=TABLES)
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
    threads: int = option(0, "CPU threads; 0 leaves it to torch")
    samples: int = option(
        4,
        "captions of members that the grid of pictures shows, and as many held-out ones; 0 makes "
        "no pictures, which saves hours on a CPU",
    )
    sample_every: int | None = option(
        None,
        "steps between grids of pictures (default: at every save; of large pictures on a CPU only "
        "the first and the last)",
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
    keep: int = option(2, "training states kept")
    format: str = option(
        "diffusers", "kohya writes that form too, for ComfyUI and A1111", ("diffusers", "kohya")
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

    def released(self, name: str) -> bool:
        """Whether the run does `name`, one of released.NAMES, as the authors' code does."""
        return name in released.chosen(self.as_released)

    @property
    def weight(self) -> float:
        """The weight of G in the objective: lambda, or twice that where G goes without the 1/2 of
        Eq. 5.
        """
        return 2 * self.lam if self.released("half") else self.lam

    # flags of earlier versions: (the last commit that had it, the values that changed nothing)
    RETIRED: ClassVar[dict] = {"attacker_every": ("7ba68a5", 1)}


# may change on --resume
FREE = ("out", "device", "threads", "state_every", "keep", "resume", "track", "dry_run")
# change no number of the training itself
LOOKS = ("norms_every", "hessian_every", "samples", "prompt", "sample_every", "format")

# The highest value of each number, so that a slip of the finger is told before anything is loaded.
ABOVE_ZERO = {
    "size": 16_384, "rank": 4096, "alpha": 1e6, "members": 10**7, "batch_size": 65_536,
    "accumulate": 10**6, "epochs": 10**6, "steps": 10**9, "lr": 1e37, "attacker_lr": 1e37,
    "clip": None, "norms_every": 10**9, "save_every": 10**9, "sample_every": 10**9,
    "state_every": 10**9, "keep": 10**9, "teachers": 1000, "teacher_steps": 10**9,
    "image_clip": 1e30, "draws": 10_000,
}  # fmt: skip
FROM_ZERO = {
    "lam": 1e9, "delta": 1e9, "weight_decay": 1e6, "ema": 0.999999, "caption_dropout": 1.0,
    "dropout": 0.999999, "noise_multiplier": 1e9, "samples": 10_000, "hessian_every": 10**9,
    "threads": 4096, "seed": 2**62 - 1,
}  # fmt: skip


def is_embedded(model: str) -> bool:
    """Whether it is the model in base/, whose defaults are FAST."""
    return os.path.realpath(model) == os.path.realpath(EMBEDDED)


def most_members(settings: Settings) -> int:
    """Members where --members is left out and there are images enough."""
    return (FAST if is_embedded(settings.model) else PAPER)["members"]
