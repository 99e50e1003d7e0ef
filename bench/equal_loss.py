"""How often two defences that are the same are told apart at the same held-out loss, by the
interval of studies/equal_loss.py: .05 is wanted.

    python bench/equal_loss.py      # a minute on one core

Both are LoRA on the same halves: AUC falls on a line over the loss; an adapter's loss scatters by
.0013 and its AUC by .03, as audits have it, in part as its pair does, and steps of one adapter are
alike.  The audit of LoRA is asked at three steps, the defence at one between them.  No model is
needed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from attacks.lira import HEADLINE
from studies.equal_loss import at_equal_loss

LOSSES, AREAS = (0.100, 0.095, 0.093), (0.70, 0.85, 0.92)  # of LoRA's steps
SCATTER = {"loss": 0.0013, "auc": 0.03}  # of adapters


def step_of(loss: float, scatter: dict[str, np.ndarray]) -> dict:
    """A step of an audit as audit.json has it, at a true loss, with each adapter's scatter."""
    area = np.interp(loss, LOSSES[::-1], AREAS[::-1])
    losses, areas = loss + scatter["loss"], area + scatter["auc"]
    figures = {"auc": areas.mean(), "auc_by_adapter": areas.tolist()}
    return {
        "held_out_loss": losses.mean(),
        "held_out_loss_by_adapter": losses.tolist(),
        "attacks": {HEADLINE: figures},
    }


def scatter_of(rng, adapters: int, shared: dict) -> dict[str, np.ndarray]:
    """Of one audit's adapters: half of the variance is the halves', `shared` by both audits."""
    return {
        name: sd * (shared[name] + rng.normal(size=adapters)) / np.sqrt(2)
        for name, sd in SCATTER.items()
    }


def told_apart(adapters: int, repetitions: int, seed: int = 0) -> float:
    """The share of simulations whose interval excludes 0."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(repetitions):
        halves = {name: rng.normal(size=(adapters // 2, 1)) for name in SCATTER}
        shared = {name: np.repeat(x, 2) for name, x in halves.items()}
        defence = step_of(rng.uniform(0.0945, 0.0985), scatter_of(rng, adapters, shared))
        own = scatter_of(rng, adapters, shared)  # an adapter's, at all of its steps
        again = [scatter_of(rng, adapters, shared) for _ in LOSSES]
        steps = {
            str(k): step_of(loss, {n: 0.9 * own[n] + 0.1 * more[n] for n in SCATTER})
            for k, (loss, more) in enumerate(zip(LOSSES, again, strict=True))
        }
        compared = at_equal_loss(defence, [{"steps": steps}])
        found += compared is not None and compared.change.side() != 0
    return found / repetitions


def main() -> None:
    """Print the shares."""
    for adapters in (6, 8, 16):
        print(f"{adapters:2d} adapters: {told_apart(adapters, 4000):.3f}")


if __name__ == "__main__":
    main()
