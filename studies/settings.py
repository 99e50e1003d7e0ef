"""Flags of the studies that train and evaluate many runs; imports nothing heavy."""

from dataclasses import dataclass

from command.flags import option
from settings import Settings

WHERE = "what and where"


@dataclass
class Study(Settings):
    """Flags of train.py, and how many runs; those that a row sets win over them."""

    seeds: int = option(3, "runs of each row, from --seed upwards", group=WHERE)
    jobs: int | None = option(
        None, "runs at a time, a process each (default: cores, or 1 on a GPU)", group=WHERE
    )
    pictures: int = option(100, "pictures of each run for the Frechet distance", group=WHERE)
    features: str = option(
        "embedded",
        "network of the Frechet distance; the paper's is inception",
        ("embedded", "inception"),
        group=WHERE,
    )
    test_nonmembers: int = option(200, "test non-members to score; 0 takes all", group=WHERE)
