"""The attacker that also reads the base's errors."""

import pytest
import torch

import lora
from attacker import MEMBER, PooledProxy, ascend, attacker_gain
from diffusion import squared_error
from methods.assembly import assemble
from methods.calibrated import CalibratedProxy
from run.processes import Processes
from run.resolve import resolve
from settings import Settings

SHAPE = (4, 8, 8)


def test_it_reads_the_pooled_statistics_and_how_far_they_are_below_the_bases():
    """The input of its first layer, against the pooled proxy's features."""
    torch.manual_seed(0)
    proxy, pooled, seen = CalibratedProxy(SHAPE), PooledProxy(SHAPE), []
    proxy.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    own, base, t = torch.rand(3, *SHAPE), torch.rand(3, *SHAPE), torch.tensor([1, 500, 999])
    answer = proxy(torch.cat([own, base], dim=1), t)
    assert answer.shape == (3, 2) and torch.allclose(answer.exp().sum(1), torch.ones(3))
    mine, theirs = pooled.features(own, t), pooled.features(base, t)
    less = 10 * (mine - theirs)[:, : 1 + 4 + 5]
    torch.testing.assert_close(seen[0], torch.cat([mine, less], dim=1))


def test_it_tells_apart_by_what_the_adapter_changed():
    """Images differ a thousandfold in difficulty and members are 5 % below the base: the pooled
    proxy stays near guessing, this one is nearly always right.
    """

    def images(seed):
        g = torch.Generator().manual_seed(seed)
        t = torch.randint(0, 1000, (256,), generator=g)
        hard = 10 ** (3 * torch.rand(256, 1, 1, 1, generator=g) - 2)
        base = hard * (0.5 + torch.rand(256, *SHAPE, generator=g))
        factor = torch.where(torch.arange(256) < 128, 0.95, 1.0).view(-1, 1, 1, 1)
        return factor * base, base, t

    found = {}
    for kind in (CalibratedProxy, PooledProxy):
        torch.manual_seed(0)
        attacker = kind(SHAPE)
        optimizer = torch.optim.Adam(attacker.parameters(), lr=3e-3)
        for step in range(61):
            own, base, t = images(0 if step < 60 else 1)  # the last ones are new
            log = attacker(torch.cat([own, base], 1) if kind is CalibratedProxy else own, t)
            gain, found[kind] = attacker_gain(log[:128], log[128:])
            ascend(optimizer, gain)
    assert found[CalibratedProxy] > 0.97 and found[PooledProxy] < 0.65


@pytest.mark.parametrize("flags", [{}, {"batch_size": 2, "accumulate": 2}], ids=str)
def test_the_base_is_asked_with_the_same_noise(subject, tiny_base, flags):
    """What the attacker is shown behind e: errors of the base alone, by hand."""
    small = {"rank": 2, "alpha": 2.0, "target": "attention", "batch_size": 4, "steps": 2}
    small |= {"method": "smp", "proxy": "calibrated", "model": tiny_base, "out": "/nowhere/run"}
    base, data = subject
    run = assemble(resolve(Settings(**(small | flags))), base, data, Processes())
    with torch.no_grad():
        for p in run.parameters:
            p.add_(0.1)
    shown = []
    run.h.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    b = run.batch(run.D_tr)
    e = run.error(b)
    says = run.log_h(e, b)
    lora.remove(base.unet, run.adapter)
    with torch.no_grad():
        want = squared_error(base, b.z0, b.c, b.t, b.eps)
    torch.testing.assert_close(shown[0][:, :4], e)
    torch.testing.assert_close(shown[0][:, 4:], want, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(e, want, rtol=1e-2) and says[:, MEMBER].shape == (4,)
