"""Is it the leaving out?  Leave-out distillation with one part of it changed: two rows of
studies/defences.py that no flag of train.py makes.

    python -m studies.defences distill-private-flip distill-seen distill-soup --adapters 16

    distill-seen    each image has a teacher that HAS seen it: the one of the next fold
    distill-soup    no student: the mean of the teachers' weights (Wortsman et al. 2022)

Everything else is as in methods/distill.py.  Tested in tests/test_leaving_out.py.
"""

from collections.abc import Iterator

import torch

from algorithm import algorithm_1
from diffusion import Base, Encoded
from lora import Adapter, remove
from methods.assembly import assemble
from methods.distill import Student, hold
from run.processes import Processes
from settings import Settings
from train import train_adapter


class Seen(Student):
    """A student whose target for an image is what the teacher of the next fold answers."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.left_out = {i: (k + 1) % len(self.folds) for i, k in self.left_out.items()}


def train_seen(base: Base, data: Encoded, s: Settings) -> Iterator[tuple[int, Adapter]]:
    """As train.train_adapter, with `Seen`."""
    return train_adapter(base, data, s, (Seen,))


def train_soup(base: Base, data: Encoded, s: Settings) -> Iterator[tuple[int, Adapter]]:
    """The teachers of `s`, and then their mean at every step; see train.train_adapter.

    Teachers start from the same A, so their A and B are averaged each.
    """
    torch.manual_seed(s.seed)
    run = assemble(s, base, data, Processes(str(base.device)))
    try:
        for teacher in run.lessons():
            for _ in algorithm_1(teacher, range(1, teacher.settings.steps + 1)):
                pass
        hold(run.adapter, [torch.stack(same).mean(0) for same in zip(*run.teachers, strict=True)])
        for step in range(1, run.settings.steps + 1):
            yield step, run.adapter
    finally:
        remove(base.unet, run.adapter)
