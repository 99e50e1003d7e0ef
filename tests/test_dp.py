"""DP-LoRA: clipped gradients against a loop over images, noise against its deviation, epsilon
against closed forms, and a run that is stopped and gone on with."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lora
import train
from command.errors import UserError
from methods import dp
from methods.dp import PrivateLearner
from run.folder import RunFolder
from run.prepare import assemble
from run.processes import Processes
from run.resolve import resolve
from settings import Settings


def settings(tiny_base, **flags):
    """Of six steps; every kind of layer is adapted."""
    small = {"rank": 2, "alpha": 2.0, "target": "all", "batch_size": 4, "lr": 0.01, "steps": 6}
    small |= {"method": "dp", "model": tiny_base, "norms_every": 10**6, "out": "/nowhere/run"}
    return resolve(Settings(**(small | flags)))


@pytest.fixture
def learner(subject, tiny_base, request):
    """A learner with the given flags on a trained adapter, whose B is no longer zero."""
    base, data = subject
    run = assemble(settings(tiny_base, **getattr(request, "param", {})), base, data, Processes())
    with torch.no_grad():
        for i, p in enumerate(run.adapter.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp, "secret", lambda: 5)
        found = PrivateLearner(run)
    yield found
    lora.remove(base.unet, run.adapter)


def one_by_one(learner, batch):
    """Gradients of every image's mean loss over its draws, by autograd, clipped and summed."""
    run, s = learner.run, learner.run.settings
    sums = [torch.zeros_like(p) for p in run.adapter.parameters()]
    for i in range(batch.counted):
        part = slice(i * s.draws, (i + 1) * s.draws)
        gradient = torch.autograd.grad(run.errors(batch, part).mean(), run.adapter.parameters())
        norm = math.sqrt(sum(g.square().sum().item() for g in gradient))
        for total, g in zip(sums, gradient, strict=True):
            total += g * min(1.0, s.image_clip / norm)
    return sums


CASES = [
    {"draws": 1, "image_clip": 0.02},
    {"draws": 3, "image_clip": 0.02},
    {"draws": 2, "image_clip": 1e9, "batch_size": 1, "accumulate": 4},
    {"draws": 2, "image_clip": 0.02, "batch_size": 2, "flip": True, "caption_dropout": 0.5},
]


@pytest.mark.parametrize("learner", CASES, indirect=True, ids=str)
def test_clipped_gradients_equal_the_loop_over_images(learner):
    """In micro-batches, with several draws, at a limit that clips all of them and one that clips
    none.
    """
    batch = next(b for b in iter(learner.member_batch, None) if b.counted > 2)
    found = learner.through(batch).gradients(None)
    for got, want in zip(found, one_by_one(learner, batch), strict=True):
        want = want / learner.run.batch
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-5 * want.abs().max().item() + 1e-9)


@pytest.mark.parametrize("learner", [{"image_clip": 0.02}], indirect=True)
def test_no_image_moves_the_sum_by_more_than_the_limit(learner):
    """One image more or less, whatever it is: here one of enormous latents."""
    batch = learner.member_batch()
    learner.run.data.latents[batch.index[0]] *= 1e3
    sums = learner.through(batch).sums
    without = learner.through(replace(batch, counted=batch.counted - 1)).sums
    moved = math.sqrt(
        sum((a - b).square().sum().item() for a, b in zip(sums, without, strict=True))
    )
    assert 0 < moved <= 0.02 * (1 + 1e-4)
    learner.run.data.latents[batch.index[0]] /= 1e3


@pytest.mark.parametrize(
    "learner",
    [{"noise_multiplier": 0.0, "image_clip": 1e9, "batch_size": 12}],
    indirect=True,
)
def test_without_noise_and_limit_it_is_plain_lora(learner):
    """All members in one batch: the gradient of the adaptation loss."""
    batch = learner.member_batch()
    assert sorted(batch.index.tolist()) == learner.run.data.members()
    forward = learner.through(batch)
    error = learner.run.errors(batch)
    want = torch.autograd.grad(error.mean(), learner.run.adapter.parameters())
    torch.testing.assert_close(forward.error, error, rtol=1e-5, atol=1e-6)
    for a, b in zip(forward.gradients(None, last=True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item() + 1e-9)


@pytest.mark.parametrize("learner", [{"noise_multiplier": 2.0, "image_clip": 0.5}], indirect=True)
def test_noise_has_the_deviation_that_is_promised(learner):
    """sigma C / B on every number; none in the norms that are logged."""
    forward = learner.through(learner.member_batch())
    exact, again = forward.gradients(None), forward.gradients(None)
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    noised = forward.gradients(None, last=True)
    noise = torch.cat([(a - b).flatten() for a, b in zip(noised, exact, strict=True)])
    assert len(noise) > 5000
    assert noise.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.05)
    assert abs(noise.mean().item()) < 0.02


@pytest.mark.parametrize("learner", [{"batch_size": 3, "draws": 2}], indirect=True)
def test_every_member_is_in_with_the_same_probability(learner):
    """B / N, whoever else is in; the batch varies in size, and an empty one moves nothing."""
    sizes, times = [], torch.zeros(24)
    for _ in range(400):
        batch = learner.member_batch()
        sizes.append(batch.counted)
        inside = batch.index[: 2 * batch.counted]
        assert inside[0::2].equal(inside[1::2]) and len(batch) == max(2, 2 * batch.counted)
        times[inside[0::2]] += 1
        if not batch.counted:
            assert not any(t.any() for t in learner.through(batch).sums)
    assert not times[12:].any() and (times[:12] / 400 - 0.25).abs().max() < 0.1
    assert min(sizes) == 0 and max(sizes) > 5


@pytest.mark.parametrize("learner", [{"image_clip": 0.02, "draws": 2}], indirect=True)
def test_two_processes_have_the_sum_of_one(learner):
    """Each sends its share; a batch that cannot be shared is filled with images of no weight."""
    processes = learner.run.processes
    for _ in range(4):
        whole = learner.member_batch()
        if whole.counted % 2:
            break
    filled = replace(
        whole,
        index=torch.cat([whole.index, whole.index[:2]]),
        timesteps=torch.cat([whole.timesteps, whole.timesteps[:2]]),
        noise=torch.cat([whole.noise, whole.noise[:2]]),
    )
    assert whole.counted % 2
    want, shares = learner.through(whole).sums, []
    processes.gather = lambda mine: mine
    processes.sum = lambda tensors: tensors
    processes.count = 2
    for processes.rank in (0, 1):
        shares.append(learner.through(filled).sums)
    for a, b, c in zip(want, *shares, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What is promised


def test_epsilon_against_closed_forms():
    """One step with all images is the Gaussian mechanism, whose exact epsilon solves
    Phi(1/(2s) - e s) - exp(e) Phi(-1/(2s) - e s) = delta (Balle & Wang 2018); the accountant may
    only be above it, and not by much.
    """

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for sigma in (1.0, 3.0):
        found = dp.epsilon(sigma, 1.0, 1, 1e-5)
        low, high = 0.0, 50.0
        for _ in range(100):
            e = (low + high) / 2
            delta = phi(0.5 / sigma - e * sigma) - math.exp(e) * phi(-0.5 / sigma - e * sigma)
            low, high = (e, high) if delta > 1e-5 else (low, e)
        assert low <= found <= 1.2 * low
    assert dp.epsilon(1.0, 0.1, 100, 1e-5) < dp.epsilon(1.0, 0.2, 100, 1e-5)
    assert dp.epsilon(1.0, 0.1, 100, 1e-5) < dp.epsilon(1.0, 0.1, 200, 1e-5)
    # n steps of sigma sqrt(n) with all images are one of sigma
    assert dp.epsilon(6.0, 1.0, 36, 1e-5) == pytest.approx(dp.epsilon(1.0, 1.0, 1, 1e-5))
    assert dp.epsilon(0.0, 0.1, 100, 1e-5) == math.inf


def test_a_vacuous_epsilon_is_called_so():
    """And a real one says what it means for an attacker: exp(epsilon) FPR + delta."""
    assert "vacuous" in str(dp.Guarantee(69.0, 1e-3, 0.5))
    assert "vacuous" in str(dp.Guarantee(math.inf, 1e-3, 0.0))
    assert dp.Guarantee(math.inf, 1e-3, 0.0).facts()["epsilon"] is None
    text = str(dp.Guarantee(1.5, 1e-3, 4.0))
    assert "vacuous" not in text and "more than 5% of the members" in text  # 0.0448 + 0.001


@pytest.mark.parametrize("learner", [{}], indirect=True)
def test_the_default_noise_is_a_share_of_a_clipped_gradient(learner):
    """rho = sigma sqrt(d) / B."""
    numbers = sum(p.numel() for p in learner.run.adapter.parameters())
    assert learner.sigma * math.sqrt(numbers) / learner.run.batch == pytest.approx(dp.RHO)


def test_stopped_and_gone_on_with(tiny_base, image_folder, tmp_path, monkeypatch, capsys):
    """The same adapter and rows; the end says what is promised."""
    flags = {"data": image_folder, "members": 12, "samples": 0, "state_every": 2, "draws": 2}
    s = settings(tiny_base, noise_multiplier=0.7, target="attention", **flags)
    honest = train.record

    def record(run, learner, row, *rest):
        honest(run, learner, row, *rest)
        if row["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(dp, "secret", lambda: 5)
    whole, part = tmp_path / "whole", tmp_path / "part"
    train.train(replace(s, out=str(whole)))
    assert "promise:" in capsys.readouterr().out
    monkeypatch.setattr(train, "record", record)
    with pytest.raises(KeyboardInterrupt):
        train.train(replace(s, out=str(part)))
    monkeypatch.undo()  # the state has the secret
    train.train(Settings(out=str(part), resume=True))
    one, two = (
        load_file(p / "adapter" / "pytorch_lora_weights.safetensors") for p in (whole, part)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    summary = RunFolder(whole).config()["summary"]
    assert summary["noise_multiplier"] == 0.7 and summary["epsilon"] > 0
    assert summary["delta"] == pytest.approx(0.1 / 12)


def test_the_seed_does_not_tell_the_noise(subject, tiny_base):
    """It stands in the adapter's file: two runs of one seed have other batches and other noise,
    and what starts from the seed, the adapter, is the same.
    """
    base, data = subject
    found = []
    for _ in range(2):
        steps = train.train_adapter(base, data, settings(tiny_base, batch_size=12, steps=1))
        ((_, adapter),) = ((step, a) for step, a in steps)
        found.append([p.detach().clone() for p in adapter.parameters()])
    assert not any(torch.equal(a, b) for a, b in zip(*found, strict=True))
    run = assemble(settings(tiny_base), base, data, Processes())
    noises = [PrivateLearner(run).member_batch().noise[0] for _ in range(2)]
    lora.remove(base.unet, run.adapter)
    assert not torch.equal(*noises)


def test_checkpointing_is_refused(subject, tiny_base):
    """It computes the layers twice, where a layer's gradient could not be told."""
    base, data = subject
    run = assemble(settings(tiny_base, gradient_checkpointing=True), base, data, Processes())
    lora.remove(base.unet, run.adapter)
    base.unet.disable_gradient_checkpointing()
    with pytest.raises(UserError, match="no checkpointing"):
        PrivateLearner(run)
