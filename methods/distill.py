"""Leave-out distillation: the adapter learns each image from a teacher that never saw it.

The members are cut into K folds, like pictures into the same one.  Teacher k is plain LoRA, trained
for few steps on all folds but k.  The student, an adapter that starts where they did, minimises

    E || f_student(z_t, t, c) - f_teacher(fold of x)(z_t, t, c) ||^2

on the members x.  So no target for an image comes from weights that have seen it, unless an adapter
of --init has.  The teachers are thrown away.

This is SELENA (Tang et al. 2022, arXiv 2110.08324), which is for classifiers, carried to the
prediction of noise; with K = 2 it is close to DistillMD (Tran et al. 2024).  It proves nothing: a
student imitates more exactly where it was trained, and an attacker with shadows sees that.  Public
pictures in half of the batch do not close this gap (docs/defences.md, What was tried).  With
teachers that have seen the image most of this is gone (studies/leaving_out.py).  Tested in
tests/test_distill.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from algorithm import Batch, Run, Shuffled
from command.errors import UserError
from diffusion import PARTS, predict
from files.copies import thumbnails
from lora import Adapter
from run.processes import Parallel

SEED = 31  # of the folds, beside the run's own
APART = 1_000_003  # between the seeds of teachers: torch's streams know 32 bits of a seed
NEAR = 8  # nearest pictures before it whose group a picture may join
SHARED = ("processes", "views")  # what a teacher takes from the run, where it is there


def folds(members: list[int], pixels: np.ndarray, count: int, seed: int) -> list[list[int]]:
    """`members` in `count` disjoint parts of about one size.

    Pictures whose thumbnails are alike form groups, and a group stays in one part.  So a picture
    that is there twice has a teacher that has seen neither copy.  A group has at most a quarter of
    a part, or two pictures if a part has two.  Groups are dealt by chance.  `pixels` (N, H, W, 3)
    are, unlike latents, the same on every device.  4,000 members take seven seconds.
    """
    n, pairs = len(members), []
    x = thumbnails(pixels[members]).reshape(n, -1).astype(np.float64)  # whole numbers
    square = (x**2).sum(1)
    for i in range(1, n):
        far = square[:i] - 2 * x[:i] @ x[i] + square[i]
        pairs += [(far[k], i, k) for k in np.argsort(far, kind="stable")[:NEAR].tolist()]
    most = max(n // count // 4, min(2, n // count))
    groups, of = [[i] for i in members], list(range(n))  # and the group of each
    for _, i, k in sorted(pairs):
        a, b = of[i], of[k]
        if a != b and len(groups[a] + groups[b]) <= most:
            groups[a] += groups[b]
            groups[b], of = [], [a if at == b else at for at in of]
    parts: list[list[int]] = [[] for _ in range(count)]
    shuffled = np.random.default_rng([seed, SEED]).permutation(n)
    for group in sorted((groups[at] for at in shuffled), key=len, reverse=True):
        min(parts, key=len).extend(group)
    return [sorted(part) for part in parts]


class Student(Parallel):
    """A run whose target for a member is what the teacher answers that never saw it."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        s, members = self.settings, self.data.members()
        if s.teachers > len(members):
            many = f"--teachers {s.teachers} is more than the {len(members)} members"
            raise UserError(f"{many}: lower it")
        self.folds = folds(members, self.data.pixels, s.teachers, s.seed)
        self.left_out = {i: k for k, fold in enumerate(self.folds) for i in fold}
        self.teachers: list[list[torch.Tensor]] = []  # the weights of each, once it is trained

    def batch(self, *sets: Shuffled) -> Batch:
        """Of members, with the answers of their teachers."""
        b = super().batch(*sets)
        return replace(b, target=self.answers(b, [self.left_out[i] for i in b.index.tolist()]))

    @torch.no_grad()
    def answers(self, b: Batch, by: list[int]) -> torch.Tensor:
        """f of teacher by[i] of each image i, (B, C, h, w); zero where another process answers."""
        found = torch.zeros_like(b.eps)
        mine = [i for part in self.parts(b) for i in range(part.start, part.stop)]
        for k, weights in enumerate(self.teachers):
            rows = [i for i in mine if by[i] == k]
            if rows:
                x = b[rows]
                with held(self.adapter, weights):
                    found[rows] = predict(self.base, x.z0, x.c, x.t, x.eps)
        return found

    # ----------------------------------------------------------------------------------------------
    # Its teachers

    def lessons(self) -> Iterator[Run]:
        """Plain LoRA on all members but those of fold k, for every k in turn: the caller trains
        each before it asks for the next.

        In the end the adapter is as it was, and `teachers` holds the weights of each.
        """
        start = weights_of(self.adapter)
        for k in range(self.settings.teachers):
            hold(self.adapter, start)
            own = torch.get_rng_state()  # the student's stream is not theirs
            yield self.teacher(k)
            torch.set_rng_state(own)  # not where the caller went away
            self.teachers.append(weights_of(self.adapter))
        hold(self.adapter, start)

    def teacher(self, k: int) -> Run:
        """The run of one teacher, of this run's class but for the student in it."""
        s, out = self.settings, set(self.folds[k])
        roles = {f"member_{part}": self.data.roles[f"member_{part}"] for part in PARTS}
        left = {role: [i for i in index if i not in out] for role, index in roles.items()}
        seed = s.seed + (k + 1) * APART
        settings = replace(s, method="lora", steps=s.teacher_steps, seed=seed)
        data = replace(self.data, roles=self.data.roles | left)
        shared = {name: getattr(self, name) for name in SHARED if hasattr(self, name)}
        kinds = tuple(c for c in type(self).__bases__ if not issubclass(c, Student))
        return type("Teacher", kinds, {})(settings, self.base, data, self.adapter, **shared)

    def untrained(self) -> None:
        """Let all teachers be as they begin, for a dry run."""
        self.teachers = [weights_of(self.adapter)] * self.settings.teachers


# --------------------------------------------------------------------------------------------------
# Weights of an adapter


def weights_of(adapter: Adapter) -> list[torch.Tensor]:
    """Copies of A and B of every layer."""
    return [p.detach().clone() for p in adapter.parameters()]


@torch.no_grad()
def hold(adapter: Adapter, weights: list[torch.Tensor]) -> None:
    """Copy the weights into an adapter."""
    for parameter, weight in zip(adapter.parameters(), weights, strict=True):
        parameter.copy_(weight)


@contextmanager
def held(adapter: Adapter, weights: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the adapter is one with these weights; nothing is copied."""
    own = [p.data for p in adapter.parameters()]
    exchange(adapter, weights)
    try:
        yield
    finally:
        exchange(adapter, own)


def exchange(adapter: Adapter, weights: list[torch.Tensor]) -> None:
    """Let the parameters be these tensors."""
    for parameter, weight in zip(adapter.parameters(), weights, strict=True):
        parameter.data = weight
