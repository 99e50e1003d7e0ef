"""What both stages of the pre-training share: AdamW, a cosine learning rate, and saved states.

    stage = Stage("vae", settings, {"vae": vae}, steps=900, rate=2e-3, warmup=50)
    for step in stage.steps():              # those after the newest saved state
        stage.descend(loss)

A stage that was killed goes on from its newest state to the same weights (tests/test_pretrain.py).
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from command.errors import UserError
from embedded.settings import Settings
from run import snapshot, state

KEEP = 2  # states on disk, as the newest may be damaged


class Stage:
    """The steps of one stage.

    The first of `modules` is trained; the others are saved with it, in the folder `--work`/name.
    `generator` draws everything that is random after the initial weights.
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
        self.pause = 60 * settings.save_minutes
        self.facts = {"start": settings.start}  # a state must have the same
        self.trained = list(next(iter(modules.values())).parameters())
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99), fused=fused
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.seconds = 0.0  # spent in steps, also before an interruption

    def steps(self) -> Iterator[int]:
        """The steps that are left, with their learning rates set; saves states on the way.

        Raises UserError as `restore`.
        """
        first = self.restore()
        before, began, saved = self.seconds, time.monotonic(), time.monotonic()
        for step in range(first, self.count):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * cosine(step, self.count, self.warmup)
            yield step
            self.seconds = before + time.monotonic() - began
            if step + 1 == self.count or time.monotonic() - saved >= self.pause:
                self.save(step + 1)
                saved = time.monotonic()

    def descend(self, loss: torch.Tensor) -> None:
        """One step of AdamW along the gradient of `loss`, clipped at norm 1."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def save(self, step: int) -> None:
        """Save all that the rest of the stage depends on."""
        tensors = {"generator": self.generator.get_state()}
        parts = {name: module.state_dict() for name, module in self.modules.items()}
        parts["optimizer"] = snapshot.optimizer_tensors(self.optimizer)
        for name, part in parts.items():
            tensors |= {f"{name}/{key}": value for key, value in part.items()}
        state.save(self.folder, step, tensors, self.facts | {"seconds": self.seconds}, KEEP)

    def restore(self) -> int:
        """Load the newest state, if there is one; returns the number of steps that it has done.

        Raises UserError for the state of a run with another `--start`.
        """
        found = state.load(self.folder)
        if found is None:
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
        snapshot.restore_optimizer(self.optimizer, parts["optimizer"])
        self.generator.set_state(tensors["generator"])
        return step


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a linear warm-up on half a cosine from 1 to 0.01."""
    fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return min(1, (step + 1) / warmup) * fall
