"""Leave-out distillation: the adapter learns each image from a teacher that never saw it.

The members are cut into K folds.  Teacher k is plain LoRA, trained for few steps on all folds but
k.  The student, a fresh adapter that starts where they started, minimises

    E || f_student(z_t, t, c) - f_teacher(fold of x)(z_t, t, c) ||^2

on the members x, and on as many public pictures beside them, whose teacher is drawn.  So no target
for an image comes from weights that have seen it.  The teachers are thrown away.

This is SELENA (Tang et al. 2022, arXiv 2110.08324), which is for classifiers, carried to the
prediction of noise; with K = 2 it is close to DistillMD (Tran et al. 2024).  It proves nothing: a
student imitates more exactly where it was trained, and an attacker with shadows sees that.  The
public pictures were to close this gap; with --flip it is as small without them (docs/results.md,
Audits).  Tested in tests/test_distill.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from command.errors import UserError
from files.images import PARTS
from lora import Adapter
from run.learner import Batches, Learner
from run.prepare import Batch, Run

SEED = 31  # of the folds, beside the run's own
# (run, learner, steps) -> a row after every step: Algorithm 1
Algorithm = Callable[[Run, Learner, range], Iterator[dict]]
# (teacher, learner) -> steps behind it: takes up what a killed run has left
TakeUp = Callable[[int, Learner], int]


def folds(members: list[int], count: int, seed: int) -> list[list[int]]:
    """`members` in `count` random disjoint parts whose sizes differ by one at most."""
    order = np.random.default_rng([seed, SEED]).permutation(members).tolist()
    return [sorted(order[k::count]) for k in range(count)]


@dataclass
class Teachers:
    """K adapters in turn: where the adapter of the run is trained as each of them."""

    run: Run
    weights: list[list[torch.Tensor]] = field(default_factory=list)  # of those that are trained

    def __post_init__(self):
        count, members = self.run.settings.teachers, len(self.run.data.members())
        if count > members:
            raise UserError(f"--teachers {count} is more than the {members} members: lower it")

    @property
    def folds(self) -> list[list[int]]:
        """Positions of the members that each teacher never sees."""
        s = self.run.settings
        return folds(self.run.data.members(), s.teachers, s.seed)

    def as_run(self, k: int) -> Run:
        """Plain LoRA on all members but those of fold k, without the public pictures."""
        run, s, out = self.run, self.run.settings, set(self.folds[k])
        roles = {f"member_{part}": run.data.roles[f"member_{part}"] for part in PARTS}
        left = {role: [i for i in index if i not in out] for role, index in roles.items()}
        settings = replace(s, method="lora", steps=s.teacher_steps, seed=(k + 1) * 2**32 + s.seed)
        return replace(run, settings=settings, data=replace(run.data, roles=run.data.roles | left))

    def train(
        self, algorithm: Algorithm, take_up: TakeUp = lambda *_: 0
    ) -> Iterator[tuple[int, int, Learner]]:
        """Train all of them: (teacher, step, learner) after every step.

        In the end the adapter is as it was, and `weights` holds those of the teachers.
        """
        start = weights_of(self.run.adapter)
        for k in range(self.run.settings.teachers):
            teacher = self.as_run(k)
            hold(self.run.adapter, start)
            with torch.random.fork_rng(devices=[]):  # the student's stream is not theirs
                learner = Learner(teacher)
                begun = take_up(k, learner)
                for row in algorithm(
                    teacher, learner, range(begun + 1, teacher.settings.steps + 1)
                ):
                    yield k, row["step"], learner
            with learner.averaged():
                self.weights.append(weights_of(self.run.adapter))
        hold(self.run.adapter, start)

    def untrained(self) -> "Teachers":
        """All of them as they begin, for a dry run."""
        self.weights = [weights_of(self.run.adapter)] * self.run.settings.teachers
        return self


class Student(Learner):
    """The learner of the student: its batches come with what a teacher would answer."""

    def __init__(self, run: Run, teachers: Teachers):
        super().__init__(run)
        self.teachers = teachers
        self.left_out = {i: k for k, fold in enumerate(teachers.folds) for i in fold}
        self.public = [Batches(run.public, run.batch, self.outer)] if run.public else []
        self.queues = [*self.queues, *self.public]

    def member_batch(self) -> Batch:
        """Members and behind them public pictures, with residuals of each one's teacher: of a
        member the one that never saw it, of a public picture any.
        """
        private, public = self.private.draw(), [b.draw() for b in self.public]
        by = [self.left_out[i] for i in private.tolist()]
        for index in public:
            by += torch.randint(
                len(self.teachers.weights), index.shape, generator=self.outer
            ).tolist()
        batch = self.noised(torch.cat([private, *public]))
        return replace(batch, taught=self.residuals(batch, torch.tensor(by)))

    @torch.no_grad()
    def residuals(self, batch: Batch, by: torch.Tensor) -> torch.Tensor:
        """eps - f of teacher by (B,) of each image, (B, C, h, w); zero where another process
        answers.
        """
        found = torch.zeros_like(batch.noise)
        mine = [i for part in self.run.parts(batch) for i in range(part.start, part.stop)]
        for k, weights in enumerate(self.teachers.weights):
            index = [i for i in mine if by[i] == k]
            if index:
                with held(self.run.adapter, weights):
                    found[index] = self.run.residuals(batch, index)
        return found


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
