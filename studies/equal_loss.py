"""Audits at the same held-out loss: how much less a defence leaks than LoRA stopped there.

    found = at_equal_loss(step, [lora, ...])     # Compared, of steps and audits of audit.json
    found.change                                 # -.11 with its interval over pairs of adapters

Both audits are on the same halves of one pool, so adapters are compared pair by pair.  What a pair
is ahead of LoRA is its AUC, minus LoRA's on the line between two steps, minus slope times what its
held-out loss is beside that of the line (the delta method):

    d_p = a_p - (1 - w) l1_p - w l2_p - slope (x_p - (1 - w) x1_p - w x2_p)

with w and slope from the means over adapters.  The interval is Student's over the pairs.  It holds
for this pool; the second pool of docs/records/defences-1 says what other images do.  Tested in
tests/test_verdicts.py, and by simulation in bench/equal_loss.py.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from attacks.lira import HEADLINE
from command.whole_files import read_json
from studies.records import Estimate


class Compared(NamedTuple):
    """A step of an audit beside LoRA at the same held-out loss."""

    change: Estimate  # of the AUC; the interval over pairs of adapters
    auc: float  # LoRA's there
    tpr: float | None  # the highest TPR at 1 % FPR of all attacks on LoRA there


def read_audits(folder: Path) -> dict[str, dict]:
    """{name: audit.json} of the audits in a folder."""
    return {path.parent.name: read_json(path) for path in sorted(folder.glob("*/audit.json"))}


def best_step(audit: dict) -> str:
    """The step with the lowest held-out loss."""
    return min(audit["steps"], key=lambda at: audit["steps"][at]["held_out_loss"])


def of_step(step: dict) -> Estimate:
    """The AUC of the shadow attack at a step of an audit, with its interval over adapters.

    The AUC is of all decisions together, which may lie beside the mean of the adapters: the
    interval is widened to hold it.
    """
    figures = step["attacks"][HEADLINE]
    value = figures["auc"]
    low, high = figures["auc_t_interval"]
    adapters = list(range(len(figures["auc_by_adapter"])))
    return Estimate(value, [max(min(low, value), 0.0), min(max(high, value), 1.0)], adapters)


def at_equal_loss(step: dict, loras: list[dict]) -> Compared | None:
    """An audit's step beside LoRA stopped at the same held-out loss.

    Of several audits of LoRA the one with the lowest AUC counts.  Where none of them came down to
    the loss, the best step of the one that came nearest is taken.  None where each was first asked
    at a lower loss: LoRA was at this loss earlier than the audit shows.  An audit with another
    number of adapters is left out, since its attacker has another number of shadows: with eight
    adapters LoRA with --flip reads .79 where it reads .81 with sixteen.
    """
    count = len(_pairs(step, "loss"))
    loras = [a for a in loras if len(_pairs(a["steps"][best_step(a)], "loss")) == count]
    if not loras:
        return None
    loss = step["held_out_loss"]
    best = [lora["steps"][best_step(lora)]["held_out_loss"] for lora in loras]
    limit = loss if min(best) <= loss else min(best)
    there = [lora for lora, reached in zip(loras, best, strict=True) if reached <= limit]
    found = [beside(step, line) for lora in there if (line := on_the_way(lora, loss))]
    return min(found, key=lambda compared: compared.auc, default=None)


def on_the_way(audit: dict, loss: float) -> tuple[dict, dict, float] | None:
    """(a step above `loss`, one below it, the weight of the second): where an audit passed a loss,
    before its best step.  Twice the best step if it never came there, None if it was not asked that
    early.
    """
    names = list(audit["steps"])
    steps = [audit["steps"][at] for at in names[: names.index(best_step(audit)) + 1]]
    steps.sort(key=lambda step: -step["held_out_loss"])
    if loss > steps[0]["held_out_loss"]:
        return None
    for above, below in pairwise(steps):
        high, low = above["held_out_loss"], below["held_out_loss"]
        if low <= loss:
            return above, below, (high - loss) / (high - low)
    return steps[-1], steps[-1], 0.0


def beside(step: dict, line: tuple[dict, dict, float]) -> Compared:
    """A step against the line between two steps of another audit."""
    first, second, w = line

    def mixed(read) -> float | np.ndarray:
        return (1 - w) * read(first) + w * read(second)

    fall = first["held_out_loss"] - second["held_out_loss"]
    slope = (_auc(second) - _auc(first)) / -fall if fall else 0.0
    ahead = [_pairs(step, "auc"), mixed(lambda s: _pairs(s, "auc"))]
    loss = [_pairs(step, "loss"), mixed(lambda s: _pairs(s, "loss"))]
    apart = ahead[0] - ahead[1] - slope * (loss[0] - loss[1])
    pairs = list(range(len(apart)))
    half = stdtrit(len(pairs) - 1, 0.975) * apart.std(ddof=1) / math.sqrt(len(pairs))
    lora, rates = mixed(_auc), [highest_rate(s) for s in (first, second)]
    tpr = None if None in rates else (1 - w) * rates[0] + w * rates[1]
    value = _auc(step) - lora
    return Compared(Estimate(value, [value - half, value + half], pairs), lora, tpr)


def highest_rate(step: dict) -> float | None:
    """The highest TPR at 1 % FPR of all attacks at a step; None for too few non-members."""
    rates = [found.get("tpr_at_1_fpr") for found in step["attacks"].values()]
    return max((rate for rate in rates if rate is not None), default=None)


def _auc(step: dict) -> float:
    return step["attacks"][HEADLINE]["auc"]


def _pairs(step: dict, of: str) -> np.ndarray:
    """AUC or held-out loss of adapters 2k and 2k + 1 together, (N / 2,)."""
    by_adapter = {
        "auc": step["attacks"][HEADLINE]["auc_by_adapter"],
        "loss": step["held_out_loss_by_adapter"],
    }
    return np.array(by_adapter[of]).reshape(-1, 2).mean(1)
