"""Flags that keep an adapter from memorising: a schedule, mirrored images, crops, gradients of one
norm, --stop best; each against a second way to have it.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from algorithm import Run
from attacks.target import kind, read_run
from diffusion import encode_images
from files.bases import load_base
from lora import remove
from methods.assembly import assemble
from objectives import clip_, norm
from run import watch
from run.folder import RunFolder
from run.processes import Processes
from run.regularised import CROPS, share_of_rate, view
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


def test_half_of_the_members_draws_are_mirrored(subject, tiny_base, tiny_base_v):
    """Latents and target are those of the mirrored picture where it is mirrored and the draw's own
    elsewhere; all else of the batch is that of a run without --flip, and so are the attacker's
    batches.
    """
    _, data = subject
    base = load_base(tiny_base_v)  # its target is v, which the latents are in
    flags = {"method": "smp", "proxy": "pooled", "lam": 1.0, "batch_size": 300}
    found = {}
    for flip in (True, False):
        run = assemble(settings(tiny_base, flip=flip, **flags), base, data, Processes())
        found[flip] = run.batch(run.D_tr), run.batch(run.D_m, run.D_n)
        remove(base.unet, run.adapter)
    b, plain = found[True][0], found[False][0]
    for name in ("index", "c", "t", "eps"):
        assert torch.equal(getattr(b, name), getattr(plain, name)), name
    mirror = torch.cat([encode_images(base, data.pixels[[i], :, ::-1].copy()) for i in b.index])
    mirrored = (b.z0 != plain.z0).flatten(1).any(1)
    assert 0.42 < mirrored.float().mean() < 0.58 and base.prediction == "v_prediction"
    z0 = torch.where(mirrored.view(-1, 1, 1, 1), mirror, plain.z0)
    assert torch.equal(b.z0, z0) and torch.equal(b.target[~mirrored], plain.target[~mirrored])
    v = base.pipeline.scheduler.get_velocity(z0, b.eps, b.t)
    torch.testing.assert_close(b.target, v, atol=1e-5, rtol=1e-5)
    theirs, others = found[True][1], found[False][1]
    assert all(
        torch.equal(x, y) for x, y in zip(vars(theirs).values(), vars(others).values(), strict=True)
    )


def test_a_view_is_a_part_of_the_picture():
    """Enlarged, of 70 to 100 % of its area, anywhere; always the same one; every other one mirrored
    with --flip, and without --crop that is all.
    """
    ramp = np.zeros((48, 48, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(48), np.arange(48)[:, None]  # rightwards, downwards
    crops = [view(ramp, k, True, True) for k in range(60)]
    assert all(c.shape == (48, 48, 3) and c.dtype == np.uint8 for c in crops)
    for k, c in enumerate(crops):
        across, down = (c[20, -1, 0] * 1.0 - c[20, 0, 0], c[-1, 20, 1] * 1.0 - c[0, 20, 1])
        assert (across < 0) == (k % 2 == 0)
        assert 0.7**0.5 * 47 - 3 < down <= 47 and abs(abs(across) - down) <= 2
        unmirrored = view(ramp, k, False, True)
        np.testing.assert_array_equal(unmirrored, c[:, ::-1] if k % 2 == 0 else c)
    corners = {c[0, 0, 1].item() for c in crops}
    assert min(corners) <= 1 and max(corners) >= 5  # at the top, and further down
    other = ramp.copy()
    other[0, 0, 2] = 1
    assert not np.array_equal(crops[1][:, :, :2], view(other, 1, True, True)[:, :, :2])
    np.testing.assert_array_equal(view(ramp, 0, True, False), ramp[:, ::-1])
    np.testing.assert_array_equal(view(ramp, 1, True, False), ramp)


def test_a_cropped_run_shows_crops_of_members(subject, tiny_base):
    """By chance, with the target of what it shows; the attacker's batches are of whole images, and
    all else of a batch is that of a run without --crop.
    """
    flags = {"method": "smp", "proxy": "pooled", "lam": 1.0, "batch_size": 300}
    base, data = subject
    found = []
    for crop in (False, True):
        run = assemble(settings(tiny_base, crop=crop, **flags), base, data, Processes())
        found.append(run.batch(run.D_tr))
        remove(base.unet, run.adapter)
    other, b = found
    for name in ("index", "c", "t", "eps"):
        assert torch.equal(getattr(b, name), getattr(other, name)), name
    for z0, i in zip(b.z0, b.index.tolist(), strict=True):
        assert any(torch.equal(z0, run.views[key]) for key in run.views if key[0] == i)
    assert {k for _, k in run.views} == set(range(CROPS))
    for (i, k), z0 in run.views.items():
        pixels = view(data.pixels[i], k, False, True)
        assert torch.equal(z0, encode_images(base, pixels[None])[0])
    assert torch.equal(b.target, b.eps)
    whole = run.batch(run.D_m, run.D_n)
    assert torch.equal(whole.z0, data.latents[whole.index])


def test_a_dry_run_encodes_no_views(subject, tiny_base):
    """Its steps take what most steps of a run take; the images stand for their views."""
    base, data = subject
    run = assemble(settings(tiny_base, crop=True, flip=True, dry_run=True), base, data, Processes())
    remove(base.unet, run.adapter)
    b = run.batch(run.D_tr)
    assert not run.views and torch.equal(b.z0, data.latents[b.index])


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
    seen, honest = [], Run.descend

    def descend(self, gradients, step):
        seen.append(norm(gradients))
        honest(self, gradients, step)

    monkeypatch.setattr(Run, "descend", descend)
    weights(subject, settings(tiny_base, normalise=True, clip=0.7))
    assert seen == pytest.approx([0.7] * 6, rel=1e-4)


def test_accumulated_batches_are_one(subject, tiny_base):
    """Who is mirrored is drawn for the whole batch."""
    flags = {"flip": True, "steps": 2}
    whole = weights(subject, settings(tiny_base, batch_size=4, **flags))
    parts = weights(subject, settings(tiny_base, batch_size=2, accumulate=2, **flags))
    for a, b in zip(whole[-1], parts[-1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_stop_best_leaves_the_adapter_of_the_best_step(small, tmp_path, capsys, monkeypatch):
    """Of held-out losses that fall and rise again; what is left, what is said and what is evaluated
    are that step's; runs of other seeds are of its kind whatever their steps.
    """
    losses = iter([1.0, 0.5, 0.3, 0.6, 0.9])  # of the base, and after 2, 4, 6 and 8 steps
    monkeypatch.setattr(watch, "held_out", lambda _: {"nonmember_val_loss": next(losses)})
    out = tmp_path / "run"
    summary = train.train(small(out, method="lora", stop="best", steps=8, save_every=2))
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
    older = target.config | {"ema": 0.0, "threads": 3, "epochs": 9}  # as versions before wrote them
    assert kind(target) == kind(replace(target, config=older))
    assert kind(target) != kind(replace(target, config=older | {"ema": 0.9}))
