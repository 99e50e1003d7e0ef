"""run/cost.py and --device auto: what a run says of its costs is what it then costs."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from diffusion import Encoded
from files.bases import resolve_device, resolve_dtype
from run import cost as plan
from run import pictures, state
from run import prepare as prepared
from run import watch as monitor
from run.folder import RunFolder
from run.processes import Processes
from run.resolve import resolve
from settings import PAPER, Settings

GRID = pictures.sample_grid
SMALL = {"members": 20, "rank": 2, "alpha": 4.0, "batch_size": 4, "target": "attention"}
SMALL |= {"lr": 0.01, "attacker_lr": 0.01, "method": "smp", "proxy": "pooled", "samples": 1}


@pytest.fixture
def small(tiny_base, image_folder, tmp_path, monkeypatch):
    """Settings of a small run, changed by keywords; pictures take most of a tiny run's time."""
    monkeypatch.setattr(pictures, "sample_grid", lambda *_: None)
    monkeypatch.setattr(pictures, "training_curves", lambda *_: None)
    common = {"model": tiny_base, "data": image_folder, "out": str(tmp_path / "run")}
    return lambda **more: Settings(**common | SMALL | more)


# ---- when something is written ----


def test_what_is_saved_when():
    """A first adapter within five per cent, at most ten adapters, the last one; what is asked for
    is kept to.
    """
    for steps in (20, 72, 100, 400, 7_000, 160_000):
        s = Settings(steps=steps)
        saved = [k for k in range(1, steps + 1) if plan.saves(s, k)]
        assert saved[0] <= steps / 20 and saved[-1] == steps and len(saved) <= 11
    assert [k for k in range(1, 4) if plan.saves(Settings(steps=3), k)] == [1, 2, 3]
    s = Settings(steps=10, save_every=4, sample_every=5)
    assert [k for k in range(1, 11) if plan.saves(s, k)] == [4, 8, 10]


def test_states_come_by_the_clock(monkeypatch):
    """Every five minutes, whatever a step takes; by steps where --state-every says so."""
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    for seconds in (0.5, 7.0, 400.0):
        clock, saved = train.Clock(), []
        for step in range(1, 2001):
            now[0] += seconds
            if clock.due(Settings(), step, False):
                saved.append(step)
        gap = -(-plan.STATE_SECONDS // seconds)
        assert saved[:3] == [gap, 2 * gap, 3 * gap] and len(saved) == 2000 // gap
    clock = train.Clock()
    assert [k for k in range(1, 8) if clock.due(Settings(state_every=3), k, k == 7)] == [3, 6, 7]


def test_states_by_the_clock_change_nothing(small, tmp_path, monkeypatch):
    """A run that saves after every step, stopped and gone on with, ends in the bits of one that
    saves nothing before its end.
    """
    monkeypatch.setattr(monitor, "verdict", lambda *_: (0.5, (0.0, 1.0)))
    monkeypatch.setattr(plan, "forward_seconds", lambda run: 1.0)
    train.train(small(steps=6, out=str(tmp_path / "whole")))
    monkeypatch.setattr(plan, "STATE_SECONDS", 0.0)
    record = train.record

    def stop(run, learner, row, *rest):
        record(run, learner, row, *rest)
        if row["step"] == 3:
            raise KeyboardInterrupt  # as a kill would, between two steps

    monkeypatch.setattr(train, "record", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(small(steps=6))
    steps = [path.stem for path in state.files(tmp_path / "run" / "state")]
    assert steps == ["step-000002", "step-000003"]  # --keep
    monkeypatch.setattr(train, "record", record)
    train.train(Settings(out=str(tmp_path / "run"), resume=True))
    rows = []
    for name in ("whole", "run"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) | {"seconds": 0} for line in lines])
    assert rows[0] == rows[1] and len(rows[0]) == 7


# ---- what it costs ----


@pytest.mark.parametrize("more", [{"method": "lora", "format": "kohya"}, {"ema": 0.9}])
def test_gigabytes_are_those_on_the_disk(small, tmp_path, capsys, monkeypatch, more):
    """Against the files of a run, while it lasts and at its end."""
    seen, finish = {}, monitor.finish

    def look(run, learner, *rest):
        states = state.files(run.folder.state)
        seen.update(plan.gigabytes(run, learner), states=[p.stat().st_size for p in states])
        return finish(run, learner, *rest)

    monkeypatch.setattr(monitor, "finish", look)
    train.train(small(steps=8, state_every=1, rank=32, target="all", **more))
    files = list((tmp_path / "run").rglob("*lora_weights.safetensors"))
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) == pytest.approx(seen["adapter"] * 1e9, rel=0.1)
    assert len(seen["states"]) == 2
    assert max(seen["states"]) == pytest.approx(seen["state"] * 1e9, rel=0.1)
    at_most = sum(sizes) + sum(seen["states"]) + max(seen["states"])
    assert seen["total"] * 1e9 == pytest.approx(at_most, rel=0.1)
    printed = capsys.readouterr().out
    assert f"{len(files) - 1 - ('format' in more)} adapters of" in printed
    assert re.search(r"^time: +about \d+ s: ", printed, re.M)


def test_forwards_are_counted(small, monkeypatch):
    """Against what a run sends through the UNet without gradient."""
    count, honest = [0], plan.loss_grid

    def counting(base, latents, text, timesteps=(1, 2, 3, 4), draws=4):
        count[0] += len(latents) * len(timesteps) * draws
        return honest(base, latents, text, timesteps, draws)

    def drawing(base, text, empty, noise, steps):
        count[0] += 2 * len(text) * steps  # with and without the caption
        return np.zeros((len(text), base.size, base.size, 3), np.uint8)

    def begun(run, learner):
        count.append(plan.forwards(run))

    monkeypatch.setattr(monitor, "loss_grid", counting)
    monkeypatch.setattr(pictures, "sample_grid", GRID)
    monkeypatch.setattr(pictures, "sample", drawing)
    monkeypatch.setattr(plan, "say", begun)
    train.train(small(steps=9, method="lora", samples=3, prompt=["a red thing"]))
    assert count[0] == count[1] > 0


def test_hours(monkeypatch):
    """Steps, and what is only looked at, in words."""
    roles = {f"{side}_{part}": [0] for side in ("member", "nonmember") for part in ("aux", "val")}
    data = Encoded(*[None] * 5, roles)
    s = Settings(steps=160_000, samples=0, method="lora")
    run = prepared.Run(s, None, data, None, Processes())
    monkeypatch.setattr(plan, "forward_seconds", lambda run: 100.0)
    looking = 100 * (10 * 2 * 8 + 4 * 16) / 3600  # nine saved steps, the base; the attack
    losses = f"{looking:.0f} h of held-out losses and pictures"
    assert plan.hours(run, 0.7) == f"about 37 h: 31 h of steps at 0.7 s, {losses}"
    words = {20: "20 s", 89.4: "89 s", 600: "10 min", 7200: "2 h", 40 * 86400: "40 days"}
    assert {s: plan.lasting(s) for s in words} == words


def test_paper_defaults_are_said_beforehand(small, capsys):
    """400 passes over the members, their steps, adapters, gigabytes and hours, from a dry run that
    encodes a few images only.
    """
    s = small(members=None, batch_size=None, rank=None, alpha=None, dry_run=True)
    encode, seen = prepared.encode, []

    def few(base, images, roles):
        seen.append(len(images.names))
        return encode(base, images, roles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "encode", few)
        found = train.train(s)
    assert seen == [prepared.FEW]
    members = 18
    steps = PAPER["epochs"] * members
    assert found["plan"].startswith(f"{steps:,} steps of 1 image, 400 passes; 9 adapters of ")
    printed = capsys.readouterr().out
    assert f"images:   {members} members" in printed and "are missing" in printed
    assert found["plan"] in printed and found["time"] in printed


# ---- --device auto ----


@pytest.mark.parametrize(
    ("cuda", "mps", "before", "found"),
    [
        (True, True, None, "cuda"),
        (False, True, None, "mps"),
        (False, False, None, "cpu"),
        (True, False, "cpu", "cpu"),
        (True, False, "cuda:1", "cuda:1"),
        (False, False, "cuda", "cpu"),
        (True, False, "mps", "cuda"),
    ],
)
def test_auto_is_what_there_is(monkeypatch, cuda, mps, before, found):
    """cuda, mps, cpu in this order; with --resume that of the run, if it is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto", before) == found
    assert resolve_device("cpu", "cuda") == "cpu" and resolve_device("cuda:3") == "cuda:3"
    if not cuda:
        assert resolve_dtype("auto", "auto") == "float32"


def test_the_device_is_on_record(small, tmp_path, capsys, monkeypatch):
    """As what "auto" stood for; a run that is gone on with elsewhere says so."""
    monkeypatch.setattr(monitor, "finish", lambda *_: {})  # as if killed before it
    train.train(small(steps=2))
    config = RunFolder(tmp_path / "run").config()
    assert (config["settings"]["device"], config["settings"]["dtype"]) == ("cpu", "float32")
    assert "plan:     2 steps of 4 images" in capsys.readouterr().out
    config["settings"]["device"] = "cuda"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    train.train(Settings(out=str(tmp_path / "run"), resume=True))
    assert "was begun on cuda, which is not here: it goes on on cpu" in capsys.readouterr().out


def test_the_small_model_is_in_full_precision_everywhere():
    """Half precision would turn the pooled attacker's gradient (docs/reference.md)."""
    assert resolve(Settings(out="/nowhere")).dtype == "float32"
    assert resolve(Settings(out="/nowhere", model="owner/sd")).dtype == "auto"
    assert resolve(replace(Settings(out="/nowhere"), dtype="bfloat16")).dtype == "bfloat16"
