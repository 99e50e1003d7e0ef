"""All that changes while a run trains: weights, optimisers, data order, random streams; and all of
it as tensors.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch

from attacker import PROXIES
from diffusion import draw_noise
from run import state
from run.prepare import Batch, Run
from run.processes import WholeBatch


class Batches:
    """Endless shuffled batches of `size` from `indices`.

    Every index comes once per pass; a pass may end inside a batch.
    """

    def __init__(self, indices: list[int], size: int, generator: torch.Generator):
        self.indices, self.size, self.generator = torch.tensor(indices), size, generator
        self.queue = torch.empty(0, dtype=torch.long)

    def draw(self) -> torch.Tensor:
        """(size,) indices."""
        while len(self.queue) < self.size:
            order = torch.randperm(len(self.indices), generator=self.generator)
            self.queue = torch.cat([self.queue, self.indices[order]])
        batch, self.queue = self.queue[: self.size], self.queue[self.size :]
        return batch


class Learner:
    """All that changes while a run trains, and so what a training state holds."""

    def __init__(self, run: Run):
        settings, self.run, self.base = run.settings, run, run.base
        # separate streams, so that every method sees the same batches and noise in its outer steps
        self.outer, self.inner = (
            torch.Generator().manual_seed(settings.seed * 2 + k) for k in (1, 2)
        )
        self.private = Batches(run.data.members(), run.batch, self.outer)
        half = max(1, settings.batch_size // 2) * (run.batch // settings.batch_size)
        self.reuses = settings.attacker_members == "reused"
        sizes = run.batch, half if self.reuses else run.batch
        self.aux = [
            Batches(run.data.roles[f"{side}_aux"], size, self.inner)
            for side, size in zip(("member", "nonmember"), sizes, strict=True)
        ]
        self.queues = [self.private, *self.aux]
        # (errors, timesteps) of auxiliary members in the last outer batch, where they are reused
        self.reused: tuple[torch.Tensor, ...] = ()
        self.adapter, self.parameters = run.adapter, run.adapter.parameters()
        self.attacker = PROXIES[settings.proxy](run.base.latent_shape).to(run.base.device).eval()
        self.attacker_optimizer = torch.optim.Adam(
            self.attacker.parameters(), lr=settings.attacker_lr
        )
        groups = [{"params": some, "share": share} for some, share in run.adapter.groups()]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.settings = settings
        # running means of the parameters, with --ema
        self.means = [p.detach().clone() for p in self.parameters] if settings.ema else []

    def member_batch(self) -> Batch:
        """A fresh batch of D_tr, the members, mirrored or without a caption as the flags say."""
        batch = self.noised(self.private.draw())
        return self.noised_again(batch) if self.settings.released("forward") else batch

    def noised(self, index: torch.Tensor) -> Batch:
        """The images at `index` with their draws of the outer step."""
        batch = Batch(index, *draw_noise(self.base, len(index), self.outer))
        shares = {"mirrored": self.settings.flip / 2, "bare": self.settings.caption_dropout}
        for name, share in shares.items():
            if share:
                chosen = torch.rand(len(index), generator=self.outer) < share
                setattr(batch, name, chosen.to(self.base.device))
        if self.settings.dropout:
            batch.dropped = int(torch.randint(2**31, (), generator=self.outer))
        return batch

    def judge(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The attacker as the adapter meets it: with --as-released dropout its own is on."""
        self.attacker.train(self.settings.released("dropout"))
        log_h = self.attacker(error, timesteps)
        self.attacker.eval()
        return log_h

    def noised_again(self, batch: Batch) -> Batch:
        """The batch, and behind it the same images with other timesteps and noise for G."""
        timesteps, noise = draw_noise(self.base, len(batch), self.outer)
        same = {name: getattr(batch, name) for name in ("index", "mirrored", "bare")}
        twice = {name: torch.cat([t, t]) for name, t in same.items() if t is not None}
        twice["timesteps"] = torch.cat([batch.timesteps, timesteps])
        return replace(batch, **twice, noise=torch.cat([batch.noise, noise]), again=len(batch))

    def through(self, batch: Batch) -> WholeBatch:
        """The error maps of a batch, and gradients of functions of them in the adapter."""
        return self.run.through(batch)

    def auxiliary_batch(self) -> Batch:
        """A fresh batch of D_aux: as many members as non-members, the members first.

        With --attacker-members reused, only the non-members: the members are those of the last
        outer step.
        """
        index = torch.cat(
            [batches.draw() for batches in (self.aux[1:] if self.reuses else self.aux)]
        )
        return Batch(index, *draw_noise(self.base, len(index), self.inner))

    def keep(self, batch: Batch, error: torch.Tensor) -> None:
        """Remember what the outer step saw of auxiliary members, where the attacker is to reuse
        it.
        """
        if self.reuses:
            known = torch.isin(batch.index, self.aux[0].indices).to(error.device)
            self.reused = error.detach()[known], batch.timesteps[known]

    def descend(self, gradients: list[torch.Tensor], step: int) -> None:
        """One step of AdamW on A and B along `gradients`, which stay in their `.grad`.

        `step` counts from 1.  The mean's decay begins low, as in diffusers' EMAModel.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * group["share"] * share_of_rate(s.schedule, step, s.steps)
        self.optimizer.step()
        if self.means:
            decay = min(s.ema, (1 + step) / (10 + step))
            for mean, parameter in zip(self.means, self.parameters, strict=True):
                mean.lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapter is the running mean where there is one: what is saved and judged."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for i, mean in enumerate(self.means):
            parameter = self.parameters[i]
            self.means[i], parameter.data = parameter.data, mean

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as named tensors; random streams as the bytes of their state."""
        groups = {
            "adapter": self.adapter.tensors(),
            "optimizer": state.optimizer_tensors(self.optimizer),
            "attacker": self.attacker.state_dict(),
            "attacker_optimizer": state.optimizer_tensors(self.attacker_optimizer),
            "random": {"outer": self.outer.get_state(), "inner": self.inner.get_state()},
            "queue": {str(i): b.queue for i, b in enumerate(self.queues)},
            "reused": {str(i): tensor for i, tensor in enumerate(self.reused)},
            "means": {str(i): mean for i, mean in enumerate(self.means)},
        }
        groups["random"]["cpu"] = torch.get_rng_state()
        if (device := self.base.device).type != "cpu":
            streams, at = device_streams(device)
            groups["random"]["device"] = streams.get_rng_state(*at)
        return {
            f"{group}/{name}": tensor
            for group, named in groups.items()
            for name, tensor in named.items()
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`; nothing of the given ones is kept.

        Raises ValueError, before anything has changed, unless they are as this run has them.
        """
        self._require_fit(tensors)
        groups: dict[str, dict[str, torch.Tensor]] = {"reused": {}, "attacker_optimizer": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            # cloned: a view into a file may lie where the processor sums in another order
            groups.setdefault(group, {})[key] = tensor.clone()
        with torch.no_grad():
            for name, weight in self.adapter.tensors().items():
                weight.copy_(groups["adapter"][name])
        self.attacker.load_state_dict(groups["attacker"])
        state.restore_optimizer(self.optimizer, groups["optimizer"])
        state.restore_optimizer(self.attacker_optimizer, groups["attacker_optimizer"])
        self.outer.set_state(groups["random"]["outer"])
        self.inner.set_state(groups["random"]["inner"])
        torch.set_rng_state(groups["random"]["cpu"])
        device = self.base.device
        if "device" in groups["random"] and device.type != "cpu":
            streams, at = device_streams(device)
            streams.set_rng_state(groups["random"]["device"], *at)
        for i, batches in enumerate(self.queues):
            batches.queue = groups["queue"][str(i)]
        self.means = [
            torch.empty_like(mean).copy_(groups["means"][str(i)])  # as the weights lie in memory
            for i, mean in enumerate(self.means)
        ]
        self.reused = tuple(tensor.to(device) for _, tensor in sorted(groups["reused"].items()))

    def _require_fit(self, tensors: dict[str, torch.Tensor]) -> None:
        """Names, dtypes and shapes of `tensors` against those that a state of this run has."""
        changing = ("optimizer", "attacker_optimizer", "reused")  # not there before their first use
        want = {k: v for k, v in self.tensors().items() if k.split("/")[0] not in changing}
        want |= state.moments("optimizer", self.parameters)
        if any(name.startswith("attacker_optimizer/") for name in tensors):
            want |= state.moments("attacker_optimizer", list(self.attacker.parameters()))
        if self.reuses:
            channels, *sides = self.base.latent_shape
            maps = 2 if self.settings.proxy == "calibrated" else 1
            want["reused/0"] = torch.empty(0, maps * channels, *sides)
            want["reused/1"] = torch.empty(0, dtype=torch.long)
        mine, given = layout(want), layout(tensors)
        for name in sorted(mine.keys() | given.keys()):
            if mine.get(name) != given.get(name):
                raise ValueError(f"{name} is not what this run has: {given.get(name, 'nothing')}")


def share_of_rate(schedule: str, step: int, steps: int) -> float:
    """The learning rate of step 1, 2, ..., `steps` as a share of --lr: in (0, 1], 1 at step 1."""
    done = (step - 1) / steps
    shares = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return shares[schedule]


def device_streams(device: torch.device) -> tuple[ModuleType, tuple]:
    """(torch.cuda or the like, arguments that name this device of that kind)."""
    return getattr(torch, device.type), (device,) if device.type == "cuda" else ()


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)}, without the lengths that change as a run goes on, and without the
    stream of the device, which may change with --resume.
    """
    return {
        name: (t.dtype, tuple(t.shape[1:] if name.startswith(("queue/", "reused/")) else t.shape))
        for name, t in tensors.items()
        if name != "random/device"
    }
