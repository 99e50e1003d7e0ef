"""Flags that keep an adapter from memorising: schedule, weight decay, running mean, caption dropout
and mirrored images, each against a second way to have it."""

from dataclasses import replace

import pytest
import torch
from run.learner import Learner, share_of_rate
from safetensors.torch import load_file

import train
from attacks.target import kind, read_run
from command.errors import UserError
from diffusion import encode_captions, encode_images
from objectives import clip_, norm
from run import watch as monitor
from run.folder import RunFolder
from run.prepare import Batch, assemble
from run.processes import Processes
from run.resolve import resolve
from settings import Settings


def settings(tiny_base, **flags):
    """Of six small steps of plain LoRA."""
    small = {"rank": 2, "alpha": 2.0, "target": "attention", "batch_size": 4, "lr": 0.01}
    small |= {"method": "lora", "model": tiny_base, "steps": 6, "norms_every": 10**6}
    return resolve(Settings(out="/nowhere/run", **(small | flags)))


def weights(subject, s):
    """A copy of the adapter's parameters after every step."""
    steps = train.train_adapter(*subject, s)
    return [[p.detach().clone() for p in adapter.parameters()] for _, adapter in steps]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7)),
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=7)),
        ("constant", lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_are_torchs(schedule, reference):
    """Step by step; the rate would be 0 at the step after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = reference(optimizer)
    for step in range(1, 8):
        wanted = optimizer.param_groups[0]["lr"]
        assert 0.3 * share_of_rate(schedule, step, 7) == pytest.approx(wanted, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_schedule_reaches_the_optimizer(subject, tiny_base):
    """The first steps are equal, since both begin at --lr; the later ones are smaller."""
    plain, cosine = (
        weights(subject, settings(tiny_base, schedule=k)) for k in ("constant", "cosine")
    )
    assert all(torch.equal(a, b) for a, b in zip(plain[0], cosine[0], strict=True))
    moved = [
        sum((b - a).abs().sum().item() for a, b in zip(run[4], run[5], strict=True))
        for run in (plain, cosine)
    ]
    assert moved[1] < 0.3 * moved[0]


def test_weight_decay_is_adamws(subject, tiny_base):
    """One step from the same start differs by lr * decay * weight and nothing else."""
    none, some = (
        weights(subject, settings(tiny_base, weight_decay=d, steps=1)) for d in (0.0, 0.5)
    )
    base, data = subject
    start = assemble(settings(tiny_base), base, data, Processes())
    for before, a, b in zip(start.adapter.parameters(), none[0], some[0], strict=True):
        torch.testing.assert_close(a - b, 0.01 * 0.5 * before.detach(), atol=1e-7, rtol=1e-4)
    train.remove(base.unet, start.adapter)


def test_the_mean_is_what_is_yielded_and_does_not_steer(subject, tiny_base):
    """Against the recursion by hand on the weights of a run without --ema."""
    plain, means = (weights(subject, settings(tiny_base, ema=e)) for e in (0.0, 0.5))
    base, data = subject
    start = assemble(settings(tiny_base), base, data, Processes())
    mean = [p.detach().clone() for p in start.adapter.parameters()]
    train.remove(base.unet, start.adapter)
    for step, (raw, found) in enumerate(zip(plain, means, strict=True), start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = [decay * m + (1 - decay) * p for m, p in zip(mean, raw, strict=True)]
        for a, b in zip(mean, found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_dropped_captions_and_mirrored_images(subject, tiny_base):
    """The error of a draw is that of the empty caption, or of the mirrored picture, where it says
    so, and the draw's own elsewhere.
    """
    base, data = subject
    run = assemble(settings(tiny_base, flip=True, caption_dropout=0.5), base, data, Processes())
    try:
        noise = torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))
        batch = Batch(torch.tensor([0, 1, 2]), torch.tensor([10, 200, 500]), noise)
        plain = run.errors(batch)
        batch.bare, batch.mirrored = (
            torch.tensor([True, False, False]),
            torch.tensor([False, True, False]),
        )
        changed = run.errors(batch)
        pixels = data.pixels.copy()
        pixels[1] = pixels[1][:, ::-1]
        text = data.text.clone()
        text[0] = encode_captions(base, [""])[0]
        other = replace(data, latents=encode_images(base, pixels), text=text)
        wanted = replace(run, data=other).errors(replace(batch, bare=None, mirrored=None))
        torch.testing.assert_close(changed, wanted)
        assert torch.equal(changed[2], plain[2])
        assert not torch.equal(changed[0], plain[0]) and not torch.equal(changed[1], plain[1])
    finally:
        train.remove(base.unet, run.adapter)


def test_dropout_is_that_of_torch_on_what_each_a_is_given(subject, tiny_base):
    """Against a layer by hand under the same stream; nothing is dropped outside."""
    base, data = subject
    run = assemble(settings(tiny_base, dropout=0.3), base, data, Processes())
    layer = next(iter(run.adapter.layers.values()))
    x = torch.randn(5, layer.base.in_features)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    with run.adapter.dropping(0.3):
        torch.manual_seed(3)
        found = layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.3)
    low = dropped @ layer.lora_A.weight.T @ layer.lora_B.weight.T * layer.alpha / layer.rank
    torch.testing.assert_close(found, layer.base(x) + low)
    assert 0 < (dropped == 0).float().mean() < 0.7 and layer.dropout == 0
    train.remove(base.unet, run.adapter)


@pytest.mark.parametrize("size", [4, 2])
def test_a_batch_has_its_own_masks_whenever_it_is_sent_through(subject, tiny_base, size):
    """Micro-batches go through twice; torch's own stream, the attacker's, does not move."""
    base, data = subject
    s = settings(tiny_base, dropout=0.5, batch_size=size, accumulate=4 // size)
    run = assemble(s, base, data, Processes())
    with torch.no_grad():
        for p in run.adapter.parameters():
            p.normal_(std=0.2)
    learner, stream = Learner(run), torch.get_rng_state()
    batch = learner.member_batch()
    first, again = (
        torch.cat([run.errors(batch, part) for part in run.parts(batch)]).detach() for _ in range(2)
    )
    assert torch.equal(first, again) and torch.equal(stream, torch.get_rng_state())
    assert not torch.equal(first, run.errors(replace(batch, dropped=None)))
    other = run.errors(replace(batch, dropped=batch.dropped + 99))
    assert not torch.equal(first, other)
    forward = learner.through(batch)
    torch.testing.assert_close(forward.error, first)
    want = [torch.zeros_like(p) for p in run.adapter.parameters()]
    for part in run.parts(batch):
        value = run.errors(batch, part).sum() / first.numel()
        for total, g in zip(
            want, torch.autograd.grad(value, run.adapter.parameters()), strict=True
        ):
            total += g
    for a, b in zip(forward.gradients(forward.error.mean(), last=True), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    train.remove(base.unet, run.adapter)


def test_normalised_gradients_have_the_norm_of_the_limit():
    """Small ones and large ones; zero stays zero; without the flag small ones stay small."""
    for size in (1e-3, 1.0, 50.0):
        gradient = [torch.full((4,), size), torch.full((5,), -size)]
        assert clip_(gradient, 0.5, normalise=True) == pytest.approx(3 * size)
        assert norm(gradient) == pytest.approx(0.5)
    zero = [torch.zeros(3)]
    assert clip_(zero, 0.5, normalise=True) == 0 and not zero[0].any()
    small = [torch.full((4,), 0.01)]
    clip_(small, 0.5)
    assert norm(small) == pytest.approx(0.02)


def test_normalise_reaches_the_step(subject, tiny_base, monkeypatch):
    """AdamW is given gradients of the norm of --clip."""
    seen, honest = [], Learner.descend

    def descend(self, gradients, step):
        seen.append(norm(gradients))
        honest(self, gradients, step)

    monkeypatch.setattr(Learner, "descend", descend)
    weights(subject, settings(tiny_base, normalise=True, clip=0.7))
    assert seen == pytest.approx([0.7] * 6, rel=1e-4)


def test_shares_of_draws(subject, tiny_base):
    """About the share that was asked for; without the flags nothing is drawn from the stream."""
    base, data = subject
    run = assemble(
        settings(tiny_base, flip=True, caption_dropout=0.2, batch_size=500), base, data, Processes()
    )
    train.remove(base.unet, run.adapter)
    batch = Learner(run).member_batch()
    assert 0.42 < batch.mirrored.float().mean() < 0.58 and 0.13 < batch.bare.float().mean() < 0.27
    off = Learner(replace(run, settings=replace(run.settings, flip=False, caption_dropout=0.0)))
    first = off.member_batch()
    assert first.mirrored is None and torch.equal(first.noise, batch.noise)


def test_accumulated_batches_are_one(subject, tiny_base):
    """Who is mirrored or bare is drawn for the whole batch."""
    flags = {"flip": True, "caption_dropout": 0.3, "steps": 2}
    whole = weights(subject, settings(tiny_base, batch_size=4, **flags))
    parts = weights(subject, settings(tiny_base, batch_size=2, accumulate=2, **flags))
    for a, b in zip(whole[-1], parts[-1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "flags", [{"ema": 1.0}, {"ema": -0.1}, {"caption_dropout": 1.5}, {"dropout": 1.0}]
)
def test_out_of_range(tiny_base, flags):
    """One sentence with the flag."""
    with pytest.raises(UserError, match="must be"):
        settings(tiny_base, **flags)


def test_dropout_with_checkpointing_is_refused(tiny_base):
    """Layers that are computed again would draw other masks."""
    with pytest.raises(UserError, match="other masks"):
        settings(tiny_base, dropout=0.1, gradient_checkpointing=True)


def test_stop_best_leaves_the_adapter_of_the_best_step(
    tiny_base, image_folder, tmp_path, capsys, monkeypatch
):
    """Of held-out losses that fall and rise again; what is left, what is said and what is evaluated
    are that step's; runs of other seeds are of its kind whatever their steps.
    """
    losses = iter([1.0, 0.5, 0.3, 0.6, 0.9])  # of the base, and after 2, 4, 6 and 8 steps
    monkeypatch.setattr(monitor, "held_out", lambda _: {"nonmember_val_loss": next(losses)})
    out, small = tmp_path / "run", {"members": 20, "rank": 2, "alpha": 4.0, "target": "attention"}
    small |= {"batch_size": 4, "samples": 1, "steps": 8, "save_every": 2, "lr": 0.01}
    flags = {"method": "lora", "model": tiny_base, "data": image_folder, "stop": "best"}
    summary = train.train(Settings(out=str(out), **small, **flags))
    folder, step = RunFolder(out), 4
    assert summary["held_out_loss"] == 0.3
    assert "0.3000 at step 4 of 8" in capsys.readouterr().out
    left, best = (
        load_file(next(p.glob("*.safetensors"))) for p in (out / "adapter", folder.checkpoint(step))
    )
    assert left.keys() == best.keys() and all(torch.equal(left[k], best[k]) for k in left)
    assert (out / "samples" / f"step-{step:06d}.png").is_file()
    target = read_run(str(out))
    assert target.step == step and folder.adapter("last") == (out / "adapter", step)
    assert kind(target) == kind(replace(target, step=8)) != kind(replace(target, at="2", step=2))
