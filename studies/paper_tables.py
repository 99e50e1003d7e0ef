"""The paper's tables as data: which runs, what the paper has for them, and what it says follows.

Figures are of Luo et al. (arXiv 2402.11989 v3), Stable Diffusion v1.5: `fid` and `kid` against the
training images, `asr` of the paper's attack, `folded` |AUC - .5| / .5 of it, `black-box` and `GSA1`
the ASR of those; rates in [0, 1].
"""

from dataclasses import dataclass

from studies.grid import Row

DATA = "pokemon"  # the set of the paper's ablations, also beside runs on a set it does not have
ALL = ("asr", "combined", "pictures")

SMP = {"method": "smp"}
FULL = {"target": "full", "rank": None, "alpha": None}
RUNS = {
    "lora": Row("LoRA", {"method": "lora"}),
    "mp": Row("MP", {"method": "mp"}),
    "smp": Row("SMP", SMP),
    "lora-full": Row("full fine-tuning", {"method": "lora", **FULL}),
    "smp-full": Row("full fine-tuning, SMP", {"method": "smp", **FULL}),
    "lora-token": Row("LoRA, one caption", {"method": "lora"}),
    "smp-token": Row("SMP, one caption", SMP),
    "mp-unclipped": Row("MP, gradients not clipped", {"method": "mp", "clip": 1e9}),
    "mp-normalised": Row("MP, gradients normalised", {"method": "mp", "normalise": True}),
}
ONE_CAPTION = ("lora-token", "smp-token")  # every image has the same
# multiples of the model's own default, as the paper's are of .05, 1e-4 and 64
for k in (20, 10, 2, 0.2):
    RUNS[f"smp-lambda-x{k:g}"] = Row(f"SMP, lambda x {k:g}", SMP, {"lam": k})
for k in (0.1, 0.01):
    RUNS[f"smp-lr-x{k:g}"] = Row(f"SMP, learning rate x {k:g}", SMP, {"lr": k})
for k in (2, 0.5, 0.25, 0.125):
    RUNS[f"smp-rank-x{k:g}"] = Row(f"SMP, rank x {k:g}", SMP, {"rank": k, "alpha": k})

COLUMNS = ("fid", "kid", "asr", "folded", "black-box", "GSA1")
# the set of images, or the table of an ablation on DATA; the run; COLUMNS
FIGURES = """
pokemon          lora             0.20   0.003  0.8227  0.73
pokemon          mp               2.10   0.121  0.5167  0.07
pokemon          smp              0.32   0.004  0.5197  0.14
celeba_small     lora             -      0.05   0.9153  0.94
celeba_small     mp               -      0.30   0.5567  0.12
celeba_small     smp              -      0.03   0.5600  0.24
celeba_large     lora             0.52   0.06   0.8783  0.87
celeba_large     mp               2.34   0.30   0.5358  0.07
celeba_large     smp              0.60   0.05   0.4883  0.19
celeba_gender    lora             -      0.06   0.8463  0.79
celeba_gender    mp               -      0.32   0.5543  0.14
celeba_gender    smp              -      0.06   0.5420  0.15
celeba_varying   lora             -      0.06   0.8730  0.83
celeba_varying   mp               -      0.26   0.5573  0.07
celeba_varying   smp              -      0.04   0.5397  0.15
celeba_large_5x  lora             0.53   0.051  0.9280  0.94
celeba_large_5x  smp              0.59   0.062  0.5185  0.15
afhq_5x          lora             0.39   0.025  0.8820  0.86
afhq_5x          smp              0.51   0.041  0.5600  0.26
ms-coco_5x       lora             0.37   0.014  0.8040  0.78
ms-coco_5x       smp              0.72   0.023  0.4610  0.14
attackers        lora             -      -      0.8227  -       0.724      0.924
attackers        smp              -      -      0.5197  -       0.554      0.635
lambda           smp-lambda-x20   1.633  -      0.460
lambda           smp-lambda-x10   1.769  -      0.462
lambda           smp-lambda-x2    0.361  -      0.471
lambda           smp              0.274  -      0.503
lambda           smp-lambda-x0.2  0.214  -      0.612
lr               smp              0.274  -      0.503
lr               smp-lr-x0.1      0.436  -      0.462
lr               smp-lr-x0.01     0.802  -      0.459
rank             smp-rank-x2      0.337  -      0.561
rank             smp              0.274  -      0.503
rank             smp-rank-x0.5    0.512  -      0.540
rank             smp-rank-x0.25   0.541  -      0.531
rank             smp-rank-x0.125  0.661  -      0.489
full             lora-full        0.176  -      0.804
full             smp-full         1.05   -      0.545
captions         lora-token       0.260  -      0.806
captions         smp-token        0.748  -      0.564
clipping         mp-unclipped     2.10   -      0.5167
clipping         mp               3.513  -      0.462
clipping         mp-normalised    2.390  -      0.524
clipping         smp              0.274  -      0.503
"""


def _read(text: str) -> dict[str, dict]:
    """{first column: {run: {figure: value}}}"""
    found = {}
    for line in text.strip().splitlines():
        name, run, *values = line.split()
        figures = zip(COLUMNS, values, strict=False)  # the last columns may be left out
        found.setdefault(name, {})[run] = {k: float(v) for k, v in figures if v != "-"}
    return found


PAPER = _read(FIGURES)
CORRELATIONS = {"mp": 0.043, "smp": 0.761}  # of Hessian and gradient norm, Figure 1b


@dataclass(frozen=True)
class Change:
    """That figures of one run lie above or below those of another, as the paper's do."""

    says: str
    first: str  # names of RUNS
    second: str
    figures: tuple[str, ...] = ALL  # keys of paper.FIGURES
    other: str | None = None  # the second run's figure, where that is another


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    title: str
    paper: dict[str, dict]  # {run: {figure: value}}; of datasets those of DATA
    changes: list[Change]
    attacks: tuple[str, ...] = ("proxy-raw-1", "combined")


OF_PICTURES = ("pictures",)
TABLES = {
    "datasets": Table(
        "Data sets and methods",
        PAPER[DATA],
        [
            Change("SMP against LoRA", "smp", "lora"),
            Change("MP against LoRA", "mp", "lora"),
            Change("SMP against MP", "smp", "mp", OF_PICTURES),
        ],
    ),
    "attackers": Table(
        "Black-box and white-box attackers",
        PAPER["attackers"],
        [
            Change("SMP against LoRA", "smp", "lora", ("asr", "black-box", "GSA1")),
            Change("SMP, read by gradients and by losses", "smp", "smp", ("GSA1",), "asr"),
        ],
        ("proxy-raw-1", "black-box", "GSA1", "combined"),
    ),
    "lambda": Table(
        "Lambda of SMP",
        PAPER["lambda"],
        [
            Change("lambda x 20 against x .2", "smp-lambda-x20", "smp-lambda-x0.2"),
            Change("lambda x 20", "smp-lambda-x20", "smp"),
            Change("lambda x .2", "smp-lambda-x0.2", "smp"),
        ],
    ),
    "lr": Table(
        "Learning rate of SMP",
        PAPER["lr"],
        [
            Change("learning rate x .1", "smp-lr-x0.1", "smp"),
            Change("learning rate x .01", "smp-lr-x0.01", "smp"),
        ],
    ),
    "rank": Table(
        "Rank of SMP, at the same alpha / rank",
        PAPER["rank"],
        [
            Change("rank x .125", "smp-rank-x0.125", "smp"),
            Change("rank x .125 against x 2", "smp-rank-x0.125", "smp-rank-x2"),
        ],
    ),
    "full": Table(
        "Full fine-tuning",
        PAPER["full"],
        [Change("SMP against none, full fine-tuning", "smp-full", "lora-full")],
    ),
    "captions": Table(
        "One caption with a rare token, as in DreamBooth",
        PAPER["captions"],
        [Change("SMP against LoRA, one caption", "smp-token", "lora-token")],
    ),
    # gradients are clipped by default here: plain MP is the paper's MP with clipping
    "clipping": Table(
        "MP with clipped and with normalised gradients (Table 10)",
        PAPER["clipping"],
        [
            Change("MP: clipped against not", "mp", "mp-unclipped", OF_PICTURES),
            Change("MP: normalised against not", "mp-normalised", "mp-unclipped", OF_PICTURES),
            Change("SMP against MP, clipped", "smp", "mp", OF_PICTURES),
            Change("SMP against MP, normalised", "smp", "mp-normalised", OF_PICTURES),
        ],
    ),
}
