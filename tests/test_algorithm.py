"""Algorithm 1 against steps written out by hand, and every pair of what attaches to it."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import lora
import smoothness
import train
from algorithm import Diverged, Run, Shuffled, algorithm_1
from attacker import MEMBER, NONMEMBER, PROXIES
from diffusion import draw_noise, squared_error
from methods.assembly import assemble
from run.processes import Parallel, Processes
from run.resolve import resolve
from settings import Settings

LAM = 0.5


def settings(tiny_base, **flags):
    """Three steps of four images, norms in each."""
    small = {"rank": 2, "alpha": 2.0, "target": "attention", "batch_size": 4, "lr": 0.01}
    small |= {"steps": 3, "norms_every": 1, "lam": LAM, "attacker_lr": 0.01, "proxy": "raw"}
    small |= {"model": tiny_base, "out": "/nowhere/run", "schedule": "constant"}
    return resolve(Settings(**(small | flags)))


def trained(subject, s, extra=()):
    """(rows, adapter tensors, attacker tensors, class) of a run that has trained to its end."""
    base, data = subject
    torch.manual_seed(s.seed)
    run = assemble(s, base, data, Processes(), extra)
    try:
        for teacher in run.lessons() if s.method == "distill" else ():
            for _ in algorithm_1(teacher, range(1, teacher.settings.steps + 1)):
                pass
        rows = list(algorithm_1(run, range(1, run.settings.steps + 1)))
        tensors = {k: v.clone() for k, v in run.adapter.state_dict().items()}
        attacker = {k: v.clone() for k, v in run.h.state_dict().items()}
        return rows, tensors, attacker, type(run)
    finally:
        lora.remove(base.unet, run.adapter)


def by_hand(subject, s):
    """Three steps of Algorithm 1 as the paper writes them, with torch alone: (L, G, J, |g|) of each
    and the weights at the end.
    """
    base, data = subject
    torch.manual_seed(s.seed)
    generator = torch.Generator().manual_seed(s.seed)
    adapter = lora.inject(base.unet, s.target, s.rank, s.alpha, generator)
    outer, inner = (torch.Generator().manual_seed(s.seed * 2 + k) for k in (1, 2))
    members, m_aux, n_aux = (
        Shuffled(index, 4, stream)
        for index, stream in (
            (data.members(), outer),
            (data.roles["member_aux"], inner),
            (data.roles["nonmember_aux"], inner),
        )
    )
    h = PROXIES["raw"](base.latent_shape)
    omega = torch.optim.Adam(h.parameters(), lr=s.attacker_lr)
    weights = adapter.parameters()
    descent, found = torch.optim.AdamW(weights, lr=s.lr), []

    def error(index, stream):
        t, noise = draw_noise(base, len(index), stream)
        return squared_error(base, data.latents[index], data.text[index], t, noise), t

    for _ in range(3):
        if s.method != "lora":
            index = torch.cat([m_aux.draw(), n_aux.draw()])
            with torch.no_grad():
                e, t = error(index, inner)
            h.train()
            members_say, others_say = h(e[:4], t[:4]), h(e[4:], t[4:])
            gain = members_say[:, MEMBER].mean() / 2 + others_say[:, NONMEMBER].mean() / 2
            omega.zero_grad()
            (-gain).backward()
            omega.step()
            h.eval()
        e, t = error(members.draw(), outer)
        loss = e.mean()
        gain = h(e, t)[:, MEMBER].mean() / 2
        divisor = 1 - LAM * gain + 1e-5
        value = {
            "lora": loss,
            "mp": loss + LAM * gain,
            "smp": loss / divisor,
            "smp-detached": loss / divisor.detach(),
        }[s.method]
        for weight in weights:
            weight.grad = None
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, s.clip)
        descent.step()
        found.append((loss.item(), gain.item(), value.item(), norm.item()))
    tensors = {k: v.clone() for k, v in adapter.state_dict().items()}
    lora.remove(base.unet, adapter)
    return found, tensors


@pytest.mark.parametrize("method", ["lora", "mp", "smp", "smp-detached"])
def test_three_steps_written_out_by_hand(subject, tiny_base, method):
    """The same draws, losses, gains, objectives, gradient norms and weights."""
    s = settings(tiny_base, method=method)
    rows, tensors, _, kind = trained(subject, s)
    assert kind.__mro__[1] is Run  # nothing is attached
    wanted, weights = by_hand(subject, s)
    for row, (loss, gain, value, norm) in zip(rows, wanted, strict=True):
        assert row["adaptation_loss"] == pytest.approx(loss, rel=1e-5)
        assert row["objective"] == pytest.approx(value, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        if method == "lora":
            assert row["mi_gain"] is None and "attacker_loss" not in row
        else:
            assert row["mi_gain"] == pytest.approx(gain, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(tensors[name], weight, atol=2e-5, rtol=1e-4)


def test_the_gradient_of_the_gain_reaches_the_adapter_and_not_the_attacker(subject, tiny_base):
    """dG / d(A, B) is not zero; after a step no weight of h has a gradient."""
    base, data = subject
    run = assemble(settings(tiny_base, method="smp"), base, data, Processes())
    rows = list(algorithm_1(run, range(1, 3)))
    assert all(row["grad_norm_gain"] > 0 for row in rows)
    assert all(p.grad is None for p in run.h.parameters())
    lora.remove(base.unet, run.adapter)


def test_numbers_that_are_not_finite_move_no_weight(subject, tiny_base):
    """Diverged, with the row of the step."""
    base, data = subject
    broken = replace(data, latents=data.latents * float("inf"))
    run = assemble(settings(tiny_base, method="lora"), base, broken, Processes())
    before = [p.detach().clone() for p in run.parameters]
    with pytest.raises(Diverged) as caught:
        list(algorithm_1(run, range(1, 3)))
    assert caught.value.row["step"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    lora.remove(base.unet, run.adapter)


# --------------------------------------------------------------------------------------------------
# What attaches, alone and in pairs

EXTRAS = {
    "mirrored": {"flip": True},
    "scheduled": {"schedule": "cosine"},
    "calibrated": {"proxy": "calibrated"},
    "curved": {"hessian_every": 2},
    "parts": {"batch_size": 2, "accumulate": 2},
    "distilled": {"method": "distill", "teachers": 3, "teacher_steps": 1},
}
# a student has no attacker, and its curvature is not measured
PAIRS = [
    pair
    for pair in itertools.combinations(EXTRAS, 2)
    if "distilled" not in pair or not {"calibrated", "curved"} & set(pair)
]


@pytest.fixture(scope="module")
def alone(subject, tiny_base):
    """A function: rows and tensors of a run with one extra, trained once."""
    found = {}

    def of(name):
        if name not in found:
            s = settings(tiny_base, **{"method": "smp", "steps": 2} | EXTRAS[name])
            found[name] = trained(subject, s)[:2]
        return found[name]

    return of


@pytest.fixture(autouse=True)
def few_products(monkeypatch):
    """Of Hessians: whether they are right is test_smoothness.py's."""
    quick = partial(smoothness.measure, iterations=2)
    monkeypatch.setattr(smoothness, "measure", quick)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_compose(subject, tiny_base, pair, alone):
    """Each of a pair does with the other what it does alone: its class is there, and leaving it out
    changes the numbers.  Micro-batches and measurements change none.
    """
    flags = {"method": "smp", "steps": 2} | EXTRAS[pair[0]] | EXTRAS[pair[1]]
    s = settings(tiny_base, **flags)
    rows, tensors, _, _ = trained(subject, s)
    assert len(rows) == 2 and all(torch.isfinite(t).all() for t in tensors.values())
    for left_out, kept in (pair, pair[::-1]):
        other_rows, other = alone(kept)
        gaps = [(tensors[k] - other[k]).abs().max().item() for k in tensors]
        if left_out in ("parts", "curved"):
            assert max(gaps) < 2e-4
            assert rows[0]["objective"] == pytest.approx(other_rows[0]["objective"], rel=1e-4)
        else:
            assert max(gaps) > 1e-4, left_out


def test_the_classes_stand_in_one_order(tiny_base, subject):
    """Whatever is asked for; what draws a batch stands before what sends it through."""
    flags = EXTRAS["mirrored"] | EXTRAS["scheduled"] | EXTRAS["parts"] | EXTRAS["distilled"]
    base, data = subject
    run = assemble(settings(tiny_base, **flags), base, data, Processes())
    lora.remove(base.unet, run.adapter)
    names = [kind.__name__ for kind in type(run).__mro__[1:-1]]
    assert names == ["Student", "Views", "Scheduled", "Parallel", "Run"]
    assert isinstance(run, Parallel)


def test_an_extra_class_of_the_caller_comes_first(subject, tiny_base):
    """As a study attaches its own."""

    class Half(Run):
        def log_h(self, e, b):
            return super().log_h(e / 2, b)

    s = settings(tiny_base, method="mp")
    rows, _, _, kind = trained(subject, s, (Half,))
    assert kind.__mro__[1] is Half
    plain, _, _, _ = trained(subject, s)
    assert rows[0]["adaptation_loss"] == plain[0]["adaptation_loss"]
    assert rows[0]["mi_gain"] != plain[0]["mi_gain"]
    base, data = subject
    steps = [step for step, _ in train.train_adapter(base, data, s, (Half,))]
    assert steps == [1, 2, 3]
