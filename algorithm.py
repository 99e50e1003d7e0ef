"""Algorithm 1 of Luo et al. 2025 (arXiv 2402.11989), and the one class that a step touches.

    run = Run(settings, base, data, adapter)
    for row in algorithm_1(run, range(1, 401)):    # row: a dictionary of the step's numbers
        print(row["step"], row["adaptation_loss"], row["mi_gain"], row["grad_norm"])

What goes beyond the paper attaches from outside: a subclass that overrides one of the five methods
of `Run` (run/, methods/).  Tested in tests/test_algorithm.py against a step written out by hand.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch

from attacker import PROXIES, ascend, attacker_gain
from diffusion import Base, Encoded, draw_noise, predict, prediction_target
from lora import Adapter
from objectives import adaptation_loss, clip_, gradient_norms, gradients, mi_gain, objective


@dataclass
class Batch:
    """B images with the noise that they get in one step."""

    index: torch.Tensor  # (B,) positions among the run's images
    z0: torch.Tensor  # (B, C, h, w) latents
    c: torch.Tensor  # (B, L, D) embedded captions
    t: torch.Tensor  # (B,) timesteps in 0..T-1
    eps: torch.Tensor  # (B, C, h, w) noise
    target: torch.Tensor  # (B, C, h, w) what the UNet should answer: eps, or v

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | list[int]) -> "Batch":
        """Some of its images."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))


class Shuffled:
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


class Run:
    """The adapter A, B and the attacker h in training, and the five things that a step does.

    `settings` has the fields of settings.Settings; those used here are objective, proxy, lam, lr,
    attacker_lr, batch_size, clip, normalise, norms_every, seed and attacked.
    """

    def __init__(self, settings, base: Base, data: Encoded, adapter: Adapter):
        s = self.settings = settings
        self.base, self.data, self.adapter = base, data, adapter
        self.attacked = s.attacked  # whether there is an attacker in the loop
        self.objective = s.objective  # "lora", "mp", "smp" or "smp-detached"
        # two streams, so that every method has the same batches and noise in its outer steps
        self.outer = torch.Generator().manual_seed(s.seed * 2 + 1)
        self.inner = torch.Generator().manual_seed(s.seed * 2 + 2)
        self.D_tr = Shuffled(data.members(), self.size, self.outer)
        self.D_m = Shuffled(data.roles["member_aux"], self.size, self.inner)
        self.D_n = Shuffled(data.roles["nonmember_aux"], self.size, self.inner)
        self.h = self.proxies[s.proxy](base.latent_shape).to(base.device).eval()
        self.attacker_optimizer = torch.optim.Adam(self.h.parameters(), lr=s.attacker_lr)
        self.parameters = adapter.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.lr)

    proxies = PROXIES  # {name: class} of attackers

    @property
    def size(self) -> int:
        """Members in one step."""
        return self.settings.batch_size

    def batch(self, *sets: Shuffled) -> Batch:
        """A fresh batch from these sets in turn, each image with its own (t, eps)."""
        index = torch.cat([D.draw() for D in sets])
        t, eps = draw_noise(self.base, len(index), sets[0].generator)
        z0, c = self.data.latents[index], self.data.text[index]
        target = prediction_target(z0, eps, t, self.base.abar, self.base.prediction)
        return Batch(index, z0, c, t, eps, target)

    def error(self, b: Batch) -> torch.Tensor:
        """e = (target - f(z_t, t, c))^2, elementwise (B, C, h, w): one UNet forward."""
        return (b.target - predict(self.base, b.z0, b.c, b.t, b.eps)) ** 2

    def log_h(self, e: torch.Tensor, b: Batch) -> torch.Tensor:
        """What the attacker says of e: (B, 2) log-probabilities, column MEMBER is log h."""
        return self.h(e, b.t)

    def gradients(self, value: torch.Tensor, keep_graph: bool = False) -> list[torch.Tensor]:
        """d value / d(A, B), through h and through the UNet."""
        return gradients(value, self.parameters, keep_graph)

    def descend(self, g: list[torch.Tensor], step: int) -> None:
        """One step of AdamW on A and B along g, which stays in their `.grad`."""
        for parameter, gradient in zip(self.parameters, g, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


class Diverged(ArithmeticError):
    """The objective or its gradient is no longer finite; no weight has moved by it.  `row` has the
    numbers of the step.
    """

    def __init__(self, row: dict):
        super().__init__(f"not finite at step {row['step']}")
        self.row = row


def algorithm_1(run: Run, steps: Iterable[int]) -> Iterator[dict]:
    """Algorithm 1: attacker h and adapter A, B in turn.  Yields a row of numbers per step.

    The members D_tr = D_aux^m + D_te^m are what the adapter trains on.  D_aux, half members D_m and
    half non-members D_n, is what the attacker trains on.  Raises Diverged.
    """
    s = run.settings
    for step in steps:
        row = {"step": step}

        if run.attacked:  # inner step: h ascends on G
            b = run.batch(run.D_m, run.D_n)
            with torch.no_grad(), run.adapter.folded():  # A and B do not move here
                e = run.error(b)
            member, nonmember = slice(0, len(b) // 2), slice(len(b) // 2, None)
            run.h.train()
            log_m = run.log_h(e[member], b[member])
            log_n = run.log_h(e[nonmember], b[nonmember])
            G, accuracy = attacker_gain(log_m, log_n)  # Eq. 5, both halves
            ascend(run.attacker_optimizer, G)
            run.h.eval()
            row["attacker_loss"] = -G.item()
            row["attacker_accuracy"] = accuracy

        b = run.batch(run.D_tr)  # outer step: A and B descend on J
        e = run.error(b)  # serves L and G
        L = adaptation_loss(e)  # Eq. 3
        G = mi_gain(run.log_h(e, b)) if run.attacked else None  # Eq. 5, its member half
        J = objective(run.objective, L, G, s.lam)  # Eq. 6, the sum, or Eq. 10, the ratio
        if step == 1 or step % s.norms_every == 0:
            row |= gradient_norms(J, run.gradients)  # |grad L|, |grad G| and their cosine
        g = run.gradients(J.total)
        row["grad_norm"] = clip_(g, s.clip, s.normalise)  # the norm before clipping
        row |= J.numbers()
        if not math.isfinite(row["objective"]) or not math.isfinite(row["grad_norm"]):
            raise Diverged(row)
        run.descend(g, step)
        yield row
