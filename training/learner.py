"""All that changes while a run trains: weights, optimisers, data order, random streams; and all of it as tensors."""

import torch

from attacker import PROXIES
from diffusion import Base
from training import state
from training.run_folder import Run


class Batches:
    """Endless shuffled batches of `size` from `indices`: every index once per pass, a pass may end inside a batch."""

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


def draw_noise(
    base: Base, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (count,) uniform in 0..T-1 and Gaussian noise (count, C, h, w), drawn on the CPU for every device."""
    timesteps = torch.randint(len(base.abar), (count,), generator=generator)
    noise = torch.randn((count, *base.latent_shape), generator=generator)
    return timesteps.to(base.device), noise.to(base.device)


class Learner:
    """All that changes while a run trains, and so what a training state holds: weights, optimisers, orders, noise."""

    def __init__(self, run: Run):
        settings = run.settings
        # separate streams, so that every method sees the same batches and noise in its outer steps
        self.outer, self.inner = (
            torch.Generator().manual_seed(settings.seed * 2 + k) for k in (1, 2)
        )
        self.private = Batches(run.members, run.batch, self.outer)
        half = max(1, settings.batch_size // 2) * (run.batch // settings.batch_size)
        sizes = run.batch, run.batch if settings.attacker_members == "drawn" else half
        aux = run.roles["member_aux"], run.roles["nonmember_aux"]
        self.aux = [
            Batches(found, size, self.inner) for found, size in zip(aux, sizes, strict=True)
        ]
        # (errors, timesteps) of the auxiliary members in the last outer batch, for --attacker-members reused
        self.reused: tuple[torch.Tensor, ...] = ()
        self.adapter, self.parameters, self.device = (
            run.adapter,
            run.adapter.parameters(),
            run.base.device,
        )
        self.attacker = PROXIES[settings.proxy](run.base.latent_shape).to(run.base.device).eval()
        self.attacker_optimizer = torch.optim.Adam(
            self.attacker.parameters(), lr=settings.attacker_lr
        )
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as named tensors; random streams as the bytes of their state."""
        groups = {
            "adapter": self.adapter.state_dict(),
            "optimizer": state.optimizer_tensors(self.optimizer),
            "attacker": self.attacker.state_dict(),
            "attacker_optimizer": state.optimizer_tensors(self.attacker_optimizer),
            "random": {
                "outer": self.outer.get_state(),
                "inner": self.inner.get_state(),
                "cpu": torch.get_rng_state(),
            },
            "queue": {str(i): batches.queue for i, batches in enumerate([self.private, *self.aux])},
            "reused": {str(i): tensor for i, tensor in enumerate(self.reused)},
        }
        if self.device.type != "cpu":
            groups["random"]["device"] = getattr(torch, self.device.type).get_rng_state()
        return {
            f"{group}/{name}": t for group, found in groups.items() for name, t in found.items()
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        groups: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "attacker_optimizer": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = tensor
        with torch.no_grad():
            for name, weight in self.adapter.state_dict().items():
                weight.copy_(groups["adapter"][name])
        self.attacker.load_state_dict(groups["attacker"])
        state.restore_optimizer(self.optimizer, groups["optimizer"])
        state.restore_optimizer(self.attacker_optimizer, groups["attacker_optimizer"])
        self.outer.set_state(groups["random"]["outer"])
        self.inner.set_state(groups["random"]["inner"])
        torch.set_rng_state(groups["random"]["cpu"])
        if "device" in groups["random"] and self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(groups["random"]["device"])
        for i, batches in enumerate([self.private, *self.aux]):
            batches.queue = groups["queue"][str(i)]
        self.reused = tuple(
            tensor.to(self.device) for _, tensor in sorted(groups.get("reused", {}).items())
        )
