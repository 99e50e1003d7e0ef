"""--as-released: the steps of every switch against the same steps written out by hand."""

import pytest
import torch
from run.learner import Learner
from run.released import NAMES, chosen
from torch.nn import functional as F

import train
from command.errors import UserError
from diffusion import draw_noise, squared_error
from run.prepare import prepare
from run.processes import Processes
from run.resolve import resolve
from settings import METHODS, Settings

FLAGS = {"members": 20, "batch_size": 4, "target": "attention", "rank": 2, "alpha": 4.0}
FLAGS |= {"lr": 0.01, "attacker_lr": 0.01, "proxy": "raw", "clip": 1e6, "norms_every": 10**9}
STEPS, LAM = 3, 3.0


def settings(tiny_base, image_folder, **flags):
    given = {"model": tiny_base, "data": image_folder, "out": "/nowhere", **FLAGS, **flags}
    return resolve(Settings(**given))


def started(tiny_base, image_folder, **flags):
    """(run, learner) before the first step."""
    run = prepare(settings(tiny_base, image_folder, **flags), Processes())
    return run, Learner(run)


def by_program(tiny_base, image_folder, **flags):
    """The adapter's tensors after STEPS steps of algorithm_1, and its rows."""
    run, learner = started(tiny_base, image_folder, **flags)
    rows = list(train.algorithm_1(run, learner, range(1, STEPS + 1)))
    return {k: v.clone() for k, v in run.adapter.state_dict().items()}, rows


def by_hand(tiny_base, image_folder, order=(), half=(), forward=(), dropout=(), lam=LAM):
    """The same as the released code goes about it: cross entropies, one loop, plain backward; each
    switch is given by being true.
    """
    run, learner = started(tiny_base, image_folder)
    h, base, data = learner.attacker, run.base, run.data
    adapter = torch.optim.AdamW(learner.parameters, lr=0.01, weight_decay=0.01)
    attacker = torch.optim.Adam(h.parameters(), lr=0.01)

    def errors(index, stream):
        t, noise = draw_noise(base, len(index), stream)
        return squared_error(base, data.latents[index], data.text[index], t, noise), t

    def cross_entropy(e, t, is_member):
        return F.nll_loss(h(e, t), is_member)

    def attack():
        index = torch.cat([batches.draw() for batches in learner.aux])
        with torch.no_grad():
            e, t = errors(index, learner.inner)
        h.train()
        attacker.zero_grad()
        # members, then the others: so the masks of dropout are drawn in the same order
        pair = zip(e.chunk(2), t.chunk(2), (1, 0), strict=True)
        (sum(cross_entropy(*half, torch.full((4,), side)) for *half, side in pair) / 2).backward()
        attacker.step()
        h.eval()

    def adapt():
        index = learner.private.draw()
        e, t = errors(index, learner.outer)
        loss = e.mean()
        if forward:
            e, t = errors(index, learner.outer)
        h.train(bool(dropout))
        alpha = lam if half else lam / 2
        total = loss / (1 + alpha * cross_entropy(e, t, torch.ones(4, dtype=torch.long)) + 1e-5)
        h.eval()
        adapter.zero_grad()
        total.backward()
        adapter.step()

    for _ in range(STEPS):
        for turn in (adapt, attack) if order else (attack, adapt):
            turn()
    return {k: v.clone() for k, v in run.adapter.state_dict().items()}


def close(one, two):
    # Adam divides by gradients' sizes: rounding of a tiny one is a part of a step of 0.01
    assert all((one[k] - two[k]).abs().max() < 2e-4 for k in two)


def far(one, two):
    return max((one[k] - two[k]).abs().max().item() for k in two) > 1e-3


@pytest.fixture(scope="module")
def paper(tiny_base, image_folder):
    """What the paper's steps give."""
    return by_program(tiny_base, image_folder, lam=LAM)[0]


def test_the_papers_steps_by_hand(tiny_base, image_folder, paper):
    close(paper, by_hand(tiny_base, image_folder))


SWITCHES = ["order", "half", "forward", "dropout"]


@pytest.mark.parametrize("names", [*SWITCHES, ",".join(SWITCHES)])
def test_switches_by_hand(tiny_base, image_folder, paper, names):
    """Each alone and together; none of them is the paper's steps again."""
    found, rows = by_program(tiny_base, image_folder, lam=LAM, as_released=names)
    close(found, by_hand(tiny_base, image_folder, **dict.fromkeys(names.split(","), True)))
    assert far(found, paper)
    assert ("attacker_loss" in rows[0]) == ("order" not in names) and "attacker_loss" in rows[1]


def test_lambda_is_one_and_with_half_the_papers_two(tiny_base, image_folder):
    """alpha = beta = 1 in L / (beta + alpha CE + delta)."""
    found, rows = by_program(tiny_base, image_folder, as_released="lambda,half")
    close(found, by_hand(tiny_base, image_folder, half=True, lam=1.0))
    two, same = by_program(tiny_base, image_folder, lam=2.0)
    assert all(torch.equal(found[k], two[k]) for k in two)
    drop = [{k: v for k, v in row.items() if k != "seconds"} for row in rows + same]
    assert drop[:STEPS] == drop[STEPS:]
    one, _ = by_program(tiny_base, image_folder, as_released="lambda")
    close(one, by_hand(tiny_base, image_folder, lam=1.0))


def test_a_second_noise_in_parts_is_that_in_one(tiny_base, image_folder):
    """--accumulate: micro-batches of the doubled batch give its gradients."""
    flags = {"lam": LAM, "as_released": "forward"}
    whole, _ = by_program(tiny_base, image_folder, **flags)
    parts, _ = by_program(tiny_base, image_folder, batch_size=2, accumulate=2, **flags)
    close(parts, whole)


def test_off_changes_no_bit(tiny_base, image_folder, paper, monkeypatch):
    """Against the steps as they were written before there were switches."""

    def before(run, learner, steps):
        s, h = run.settings, learner.attacker
        for step in steps:
            pair = train.auxiliary_batch(run, learner)
            train.attacker_step(h, learner.attacker_optimizer, *pair)
            batch = learner.member_batch()
            forward = learner.through(batch)
            loss = train.adaptation_loss(forward.error)
            gain = train.mi_gain(h, forward.error, batch.timesteps)
            terms = train.objective(s.objective, loss, gain, s.lam, s.delta)
            if step == 1:
                train.gradient_norms(terms, forward.gradients)
            gradients = forward.gradients(terms.total, last=True)
            train.clip_(gradients, s.clip, s.normalise)
            learner.descend(gradients, step)
            yield {"step": step}

    monkeypatch.setattr(train, "algorithm_1", before)
    found, _ = by_program(tiny_base, image_folder, lam=LAM)
    assert all(torch.equal(found[k], paper[k]) for k in paper)


WRONG = [
    ({"as_released": "order,halves"}, "no halves"),
    ({"as_released": "order", "method": "lora"}, "--method lora has not"),
    ({"as_released": "lambda", "lam": 3.0}, "--lam"),
    ({"as_released": "dropout", "proxy": "pooled"}, "--proxy raw"),
    ({"as_released": "forward", "attacker_members": "reused"}, "reused"),
    ({"as_released": "text-encoder", "target": "full"}, "full"),
    ({"as_released": "text-encoder", "method": "dp"}, "dp"),
]


@pytest.mark.parametrize("flags, words", WRONG)
def test_what_cannot_be_is_refused(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        resolve(Settings(out=str(tmp_path), **flags))


def test_all_is_every_name(tmp_path):
    """Also with an attacker that has no dropout, and again for settings that are complete."""
    s = resolve(Settings(out=str(tmp_path), as_released="all"))
    assert chosen("all") == NAMES and all(s.released(name) for name in NAMES) and s.lam == 1
    assert s.proxy == "pooled" and s.weight == 2 and resolve(s) == s
    assert not any(Settings().released(name) for name in NAMES) and "smp" in METHODS
