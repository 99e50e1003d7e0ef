"""What both stages of the pre-training share: AdamW, a cosine learning rate, and state on disk.

    stage = Stage("vae", settings, {"vae": vae}, steps=900, rate=2e-3, warmup=50)
    for step in stage.steps():              # from the newest saved state on
        stage.descend(loss)

A stage that is killed goes on from its newest state to the same weights (tests/test_pretrain.py).
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from command.errors import UserError
from embedded.settings import Settings
from run import state

KEEP = 2  # states on disk: one to go back to, should the newest be damaged


class Stage:
    """The steps of one stage.

    The first of `modules` is trained; the others are saved with it.  The state lies in the folder
    `--work`/name.  `generator` draws everything that is random after the initial weights.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        modules: dict[str, nn.Module],
        steps: int,
        rate: float,
        warmup: int,
        fused: bool = False,
    ):
        self.folder, self.modules = Path(settings.work) / name, modules
        self.count, self.rate, self.warmup = steps, rate, warmup
        self.export, self.pause = settings.stage == "export", 60 * settings.save_minutes
        self.facts = {"start": settings.start}  # what a state must have in common with this run
        self.trained = list(next(iter(modules.values())).parameters())
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99), fused=fused
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.seconds = 0.0  # spent in steps, those before an interruption included

    def steps(self) -> Iterator[int]:
        """The steps that are left, each with its learning rate set; saves now and then, and last.

        With `--stage export` there are none.  Raises UserError as `restore`.
        """
        first = self.restore()
        last = first if self.export else max(first, self.count)
        before, began, saved = self.seconds, time.time(), time.time()
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * cosine(step, self.count, self.warmup)
            yield step
            self.seconds = before + time.time() - began
            if step + 1 == last or time.time() - saved >= self.pause:
                self.save(step + 1)
                saved = time.time()

    def descend(self, loss: torch.Tensor) -> None:
        """One step of AdamW along the gradient of `loss`, clipped at norm 1."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def save(self, step: int) -> None:
        """Write everything that the rest of the stage depends on."""
        tensors = {"generator": self.generator.get_state()}
        parts = {name: module.state_dict() for name, module in self.modules.items()}
        parts["optimizer"] = state.optimizer_tensors(self.optimizer)
        for name, part in parts.items():
            tensors |= {f"{name}/{key}": value for key, value in part.items()}
        state.save(self.folder, step, tensors, self.facts | {"seconds": self.seconds}, KEEP)

    def restore(self) -> int:
        """Take up the newest state, if there is one; returns the number of steps behind it.

        Raises UserError if that state began from another `--start`, or `--stage export` finds none.
        """
        found = state.load(self.folder)
        if found is None:
            if self.export:
                raise UserError(f"{self.folder} holds no state to export: train it first")
            return 0
        step, tensors, facts = found
        self.seconds = facts.pop("seconds")
        if facts != self.facts:
            raise UserError(
                f"{self.folder} is the state of a run with --start {facts['start']}: "
                "give this run another --work"
            )
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = value
        for name, module in self.modules.items():
            module.load_state_dict(parts[name])
        state.restore_optimizer(self.optimizer, parts["optimizer"])
        self._match_layout()
        self.generator.set_state(tensors["generator"])
        return step

    def _match_layout(self) -> None:
        """Lay the moments out in memory as their weights are, which a file does not keep.

        The fused AdamW walks both in the order of memory, and would pair channels_last weights with
        the wrong moments.
        """
        for weights, slots in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name] = torch.empty_like(weights).copy_(slots[name])


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine from 1 down to 0.01."""
    fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return min(1, (step + 1) / warmup) * fall
