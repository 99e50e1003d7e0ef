"""The paper's tables as data: which runs, what the paper has for them, and what it says follows.

Figures are of Luo et al. (arXiv 2402.11989 v3), Stable Diffusion v1.5: `fid` and `kid` against the
training images, `asr` of the paper's attack, `folded` |AUC - .5| / .5 of it, `black-box` and `GSA1`
the ASR of those; rates in [0, 1].  Imports nothing heavy.
"""

from dataclasses import dataclass, field

DATA = (
    "pokemon"  # the set of the paper's ablations, and of figures where --data is none of its sets
)


@dataclass(frozen=True)
class Run:
    """One kind of run, of which there is one per seed; tables share them."""

    says: str
    flags: dict  # of train.py
    times: dict = field(default_factory=dict)  # flags as multiples of what they would be
    one_caption: bool = False  # every image has the same, see paper.py


@dataclass(frozen=True)
class Claim:
    """That a figure of one run lies above or below that of another, as the paper's does."""

    says: str
    first: str  # names of RUNS
    second: str
    figure: str  # a key of paper.FIGURES
    other: str | None = None  # the second run's, where that is another


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    title: str
    paper: dict[str, dict]  # {set: {run: {figure: value}}}
    claims: list[Claim]
    attacks: tuple[str, ...] = ("proxy-raw-1", "combined")
    note: str = ""

    @property
    def rows(self) -> list[str]:
        """Names of RUNS, in the table's order."""
        return list(self.paper[DATA])


def claims(says: str, first: str, second: str, *figures: str) -> list[Claim]:
    """The same of several figures."""
    return [Claim(says, first, second, figure) for figure in figures]


SMP = {"method": "smp"}
FULL = {"target": "full", "rank": None, "alpha": None}

RUNS = {
    "lora": Run("LoRA", {"method": "lora"}),
    "mp": Run("MP", {"method": "mp"}),
    "smp": Run("SMP", SMP),
    **{f"smp-lambda-x{k:g}": Run("SMP", SMP, {"lam": k}) for k in (20, 10, 2, 0.2)},
    **{f"smp-lr-x{k:g}": Run("SMP", SMP, {"lr": k}) for k in (0.1, 0.01)},
    **{f"smp-rank-x{k:g}": Run("SMP", SMP, {"rank": k, "alpha": k}) for k in (2, 0.5, 0.25, 0.125)},
    "lora-full": Run("full fine-tuning", {"method": "lora", **FULL}),
    "smp-full": Run("full fine-tuning, SMP", {"method": "smp", **FULL}),
    "lora-token": Run("LoRA, one caption", {"method": "lora"}, one_caption=True),
    "smp-token": Run("SMP, one caption", SMP, one_caption=True),
    "mp-unclipped": Run("MP, gradients not clipped", {"method": "mp", "clip": 1e9}),
    "mp-normalised": Run("MP, gradients normalised", {"method": "mp", "normalise": True}),
}

SETS = {
    "pokemon": {
        "lora": {"fid": 0.20, "kid": 0.003, "asr": 0.8227, "folded": 0.73},
        "mp": {"fid": 2.10, "kid": 0.121, "asr": 0.5167, "folded": 0.07},
        "smp": {"fid": 0.32, "kid": 0.004, "asr": 0.5197, "folded": 0.14},
    },
    "celeba_small": {
        "lora": {"kid": 0.05, "asr": 0.9153, "folded": 0.94},
        "mp": {"kid": 0.30, "asr": 0.5567, "folded": 0.12},
        "smp": {"kid": 0.03, "asr": 0.5600, "folded": 0.24},
    },
    "celeba_large": {
        "lora": {"fid": 0.52, "kid": 0.06, "asr": 0.8783, "folded": 0.87},
        "mp": {"fid": 2.34, "kid": 0.30, "asr": 0.5358, "folded": 0.07},
        "smp": {"fid": 0.60, "kid": 0.05, "asr": 0.4883, "folded": 0.19},
    },
    "celeba_gender": {
        "lora": {"kid": 0.06, "asr": 0.8463, "folded": 0.79},
        "mp": {"kid": 0.32, "asr": 0.5543, "folded": 0.14},
        "smp": {"kid": 0.06, "asr": 0.5420, "folded": 0.15},
    },
    "celeba_varying": {
        "lora": {"kid": 0.06, "asr": 0.8730, "folded": 0.83},
        "mp": {"kid": 0.26, "asr": 0.5573, "folded": 0.07},
        "smp": {"kid": 0.04, "asr": 0.5397, "folded": 0.15},
    },
    "celeba_large_5x": {
        "lora": {"fid": 0.53, "kid": 0.051, "asr": 0.9280, "folded": 0.94},
        "smp": {"fid": 0.59, "kid": 0.062, "asr": 0.5185, "folded": 0.15},
    },
    "afhq_5x": {
        "lora": {"fid": 0.39, "kid": 0.025, "asr": 0.8820, "folded": 0.86},
        "smp": {"fid": 0.51, "kid": 0.041, "asr": 0.5600, "folded": 0.26},
    },
    "ms-coco_5x": {
        "lora": {"fid": 0.37, "kid": 0.014, "asr": 0.8040, "folded": 0.78},
        "smp": {"fid": 0.72, "kid": 0.023, "asr": 0.4610, "folded": 0.14},
    },
}


def of_pokemon(*rows: tuple) -> dict[str, dict]:
    """(run, FID, ASR) of an ablation."""
    return {DATA: {run: {"fid": fid, "asr": asr} for run, fid, asr in rows}}


ALL = ("asr", "combined", "pictures")

TABLES = {
    "datasets": Table(
        "Data sets and methods",
        SETS,
        [
            *claims("SMP against LoRA", "smp", "lora", *ALL),
            *claims("MP against LoRA", "mp", "lora", *ALL),
            *claims("SMP against MP", "smp", "mp", "pictures"),
        ],
    ),
    "attackers": Table(
        "Black-box and white-box attackers",
        {
            DATA: {
                "lora": {"asr": 0.8227, "black-box": 0.724, "GSA1": 0.924},
                "smp": {"asr": 0.5197, "black-box": 0.554, "GSA1": 0.635},
            }
        },
        [
            *claims("SMP against LoRA", "smp", "lora", "asr", "black-box", "GSA1"),
            Claim("SMP, read by its gradients and by its losses", "smp", "smp", "GSA1", "asr"),
        ],
        ("proxy-raw-1", "black-box", "GSA1", "combined"),
    ),
    "lambda": Table(
        "Lambda of SMP",
        of_pokemon(
            ("smp-lambda-x20", 1.633, 0.460),
            ("smp-lambda-x10", 1.769, 0.462),
            ("smp-lambda-x2", 0.361, 0.471),
            ("smp", 0.274, 0.503),
            ("smp-lambda-x0.2", 0.214, 0.612),
        ),
        [
            *claims("lambda x 20 against x .2", "smp-lambda-x20", "smp-lambda-x0.2", *ALL),
            *claims("lambda x 20", "smp-lambda-x20", "smp", *ALL),
            *claims("lambda x .2", "smp-lambda-x0.2", "smp", *ALL),
        ],
    ),
    "lr": Table(
        "Learning rate of SMP",
        of_pokemon(
            ("smp", 0.274, 0.503), ("smp-lr-x0.1", 0.436, 0.462), ("smp-lr-x0.01", 0.802, 0.459)
        ),
        [
            *claims("learning rate x .1", "smp-lr-x0.1", "smp", *ALL),
            *claims("learning rate x .01", "smp-lr-x0.01", "smp", *ALL),
        ],
    ),
    "rank": Table(
        "Rank of SMP",
        of_pokemon(
            ("smp-rank-x2", 0.337, 0.561),
            ("smp", 0.274, 0.503),
            ("smp-rank-x0.5", 0.512, 0.540),
            ("smp-rank-x0.25", 0.541, 0.531),
            ("smp-rank-x0.125", 0.661, 0.489),
        ),
        [
            *claims("rank x .125", "smp-rank-x0.125", "smp", *ALL),
            *claims("rank x .125 against x 2", "smp-rank-x0.125", "smp-rank-x2", *ALL),
        ],
        note="Alpha is scaled with the rank, so that alpha / rank stays.",
    ),
    "full": Table(
        "Full fine-tuning",
        of_pokemon(("lora-full", 0.176, 0.804), ("smp-full", 1.05, 0.545)),
        claims("SMP against none, full fine-tuning", "smp-full", "lora-full", *ALL),
    ),
    "captions": Table(
        "One caption with a rare token, as in DreamBooth",
        of_pokemon(("lora-token", 0.260, 0.806), ("smp-token", 0.748, 0.564)),
        claims("SMP against LoRA, one caption", "smp-token", "lora-token", *ALL),
    ),
    "clipping": Table(
        "MP with clipped and with normalised gradients (Table 10)",
        of_pokemon(
            ("mp-unclipped", 2.10, 0.5167),
            ("mp", 3.513, 0.462),
            ("mp-normalised", 2.390, 0.524),
            ("smp", 0.274, 0.503),
        ),
        [
            *claims("MP: clipped against not", "mp", "mp-unclipped", "pictures"),
            *claims(
                "MP: normalised against not clipped", "mp-normalised", "mp-unclipped", "pictures"
            ),
            *claims("SMP against MP, clipped", "smp", "mp", "pictures"),
            *claims("SMP against MP, normalised", "smp", "mp-normalised", "pictures"),
        ],
        note="Gradients are clipped at --clip by default here, for every method, so MP as it is "
        "stands beside the paper's MP with clipping, and MP without beside its plain MP.",
    ),
}

CORRELATIONS = {"mp": 0.043, "smp": 0.761}  # of Hessian and gradient norm, Figure 1b
