"""The released code's differences: the steps of each against the same steps written out by hand."""

import pytest
import torch
from torch.nn import functional as F

from algorithm import Run, algorithm_1
from attacker import MEMBER, NONMEMBER
from diffusion import draw_noise, squared_error
from methods.assembly import assemble
from run import prepare
from run.processes import Processes
from run.resolve import resolve
from settings import Settings
from studies.as_released import Dropout, Forward, Order

FLAGS = {"members": 20, "batch_size": 4, "target": "attention", "rank": 2, "alpha": 4.0}
FLAGS |= {"lr": 0.01, "attacker_lr": 0.01, "proxy": "raw", "clip": 1e6, "norms_every": 10**9}
FLAGS |= {"lam": 3.0}
STEPS = 3


@pytest.fixture
def started(tiny_base, image_folder):
    """A function: the run before its first step, made of these classes and flags."""

    def start(*extra, **flags) -> Run:
        given = {"model": tiny_base, "data": image_folder, "out": "/nowhere", **FLAGS, **flags}
        processes = Processes()
        s, base, data = prepare.load(resolve(Settings(**given)), processes)
        return assemble(s, base, data, processes, extra)

    return start


def by_program(run) -> dict[str, torch.Tensor]:
    """The adapter's tensors after STEPS steps of algorithm_1."""
    for _ in algorithm_1(run, range(1, STEPS + 1)):
        pass
    return {k: v.clone() for k, v in run.adapter.tensors().items()}


def by_hand(run, extra=()) -> dict[str, torch.Tensor]:
    """The same as the released code goes about it: cross entropies, one loop, plain backward."""
    h, base, data = run.h, run.base, run.data
    adapter = torch.optim.AdamW(run.parameters, lr=0.01, weight_decay=0.01)
    attacker = torch.optim.Adam(h.parameters(), lr=0.01)

    def errors(index, stream):
        t, noise = draw_noise(base, len(index), stream)
        return squared_error(base, data.latents[index], data.text[index], t, noise), t

    def cross_entropy(e, t, side):
        return F.nll_loss(h(e, t), torch.full((len(e),), side))

    def attack(learns=True):
        index = torch.cat([D.draw() for D in (run.D_m, run.D_n)])
        with torch.no_grad():
            e, t = errors(index, run.inner)
        h.train()
        attacker.zero_grad()
        # members, then the others: so the masks of dropout are drawn in the same order
        pair = zip(e.chunk(2), t.chunk(2), (MEMBER, NONMEMBER), strict=True)
        (sum(cross_entropy(*half, side) for *half, side in pair) / 2).backward()
        if learns:
            attacker.step()
        h.eval()

    def adapt():
        index = run.D_tr.draw()
        e, t = errors(index, run.outer)
        loss = e.mean()
        if Forward in extra:
            e, t = errors(index, run.outer)
        h.train(Dropout in extra)
        total = loss / (1 + run.settings.lam / 2 * cross_entropy(e, t, MEMBER) + 1e-5)
        h.eval()
        adapter.zero_grad()
        total.backward()
        adapter.step()

    if Order in extra:
        attack(learns=False)  # the program draws here, too
    for _ in range(STEPS):
        for turn in (adapt, attack) if Order in extra else (attack, adapt):
            turn()
    return {k: v.clone() for k, v in run.adapter.tensors().items()}


def close(one, two):
    # Adam divides by gradients' sizes: rounding of a tiny one is a part of a step of 0.01
    return all((one[k] - two[k]).abs().max() < 2e-4 for k in two)


def far(one, two):
    return max((one[k] - two[k]).abs().max().item() for k in two) > 1e-3


@pytest.mark.parametrize("extra", [(), (Order,), (Forward,), (Dropout,), (Order, Forward, Dropout)])
def test_differences_by_hand(started, extra):
    """Each alone and together; none of them is the paper's steps again."""
    found = by_program(started(*extra))
    assert close(found, by_hand(started(), extra))
    assert not extra or far(found, by_program(started()))


def test_a_second_noise_in_parts_is_that_in_one(started):
    """--accumulate: micro-batches of the doubled batch give its gradients."""
    whole = by_program(started(Forward))
    assert close(by_program(started(Forward, batch_size=2, accumulate=2)), whole)


def test_the_attacker_waits_for_the_adapter(started):
    """Order: h is as it began in the first outer step, and learns in the second."""
    run = started(Order)
    before = {k: v.clone() for k, v in run.h.state_dict().items()}
    steps = algorithm_1(run, range(1, 3))
    next(steps)
    assert all(torch.equal(v, before[k]) for k, v in run.h.state_dict().items())
    next(steps)
    assert not all(torch.equal(v, before[k]) for k, v in run.h.state_dict().items())
