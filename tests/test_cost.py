"""run/cost.py, run/due.py and --device auto: what a run says of its costs is what it then costs."""

import json
import re
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_run

import train
from diffusion import Encoded, ignore
from files.bases import load_base
from files.devices import resolve_device, resolve_dtype
from files.encode import FEW
from run import cost, due, keeper, pictures, prepare, state, watch
from run.folder import RunFolder
from run.resolve import resolve
from settings import PAPER, Settings

GRID = pictures.sample_grid
pytestmark = pytest.mark.usefixtures("no_pictures")


# ---- when something is written ----


def test_what_is_saved_when():
    """A first adapter within five per cent, at most ten adapters, the last one; what is asked for
    is kept to.
    """
    for steps in (20, 72, 100, 400, 7_000, 160_000):
        s = Settings(steps=steps)
        saved = [k for k in range(1, steps + 1) if due.saves(s, k)]
        assert saved[0] <= steps / 20 and saved[-1] == steps and len(saved) <= 11
    assert [k for k in range(1, 4) if due.saves(Settings(steps=3), k)] == [1, 2, 3]
    s = Settings(steps=10, save_every=4)
    assert [k for k in range(1, 11) if due.saves(s, k)] == [4, 8, 10]


def test_states_come_by_the_clock(monkeypatch):
    """Every five minutes, whatever a step takes; by steps where --state-every says so."""
    now = [0.0]
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keeper.snapshot, "tensors_of", lambda run: {})
    monkeypatch.setattr(keeper.state, "save", lambda *_: None)

    def saved(steps, seconds, **flags):
        kept = keeper.Keeper(SimpleNamespace(settings=Settings(out="run", **flags)), None)
        for step in range(1, steps + 1):
            now[0] += seconds
            if kept.state_due(step, step == steps):
                kept.save_state(None, None, step, 2)
                yield step

    for seconds in (0.5, 7.0, 400.0):
        gap = -(-due.STATE_SECONDS // seconds)
        assert list(saved(2001, seconds))[:3] == [gap, 2 * gap, 3 * gap]
    assert list(saved(7, 1.0, state_every=3)) == [3, 6, 7]


def test_states_by_the_clock_change_nothing(small, tmp_path, monkeypatch, stopped_and_gone_on_with):
    """A run that saves after every step, stopped and gone on with, ends in the bits of one that
    saves nothing before its end.
    """
    train.train(small(tmp_path / "whole", steps=6))
    monkeypatch.setattr(due, "STATE_SECONDS", 0.0)

    def begin(folder):
        try:
            train.train(small(folder, steps=6))
        finally:
            kept = [path.stem for path in state.files(folder / "state")]
            assert kept == ["step-000002", "step-000003"]

    stopped_and_gone_on_with(begin, tmp_path / "run", 4)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


# ---- what it costs ----


def test_gigabytes_are_those_on_the_disk(small, tmp_path, capsys, monkeypatch):
    """Against the files of a run, while it lasts and at its end."""
    seen, finish = {}, watch.finish

    def look(run, folder, *rest):
        states = state.files(folder.state)
        seen.update(cost.gigabytes(run), states=[p.stat().st_size for p in states])
        return finish(run, folder, *rest)

    monkeypatch.setattr(watch, "finish", look)
    more = {"state_every": 1, "rank": 32, "target": "all", "save_every": None}
    train.train(small(tmp_path / "run", steps=8, **more))
    files = list((tmp_path / "run").rglob("*lora_weights.safetensors"))
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) == pytest.approx(seen["adapter"] * 1e9, rel=0.1)
    assert len(seen["states"]) == 2
    assert max(seen["states"]) == pytest.approx(seen["state"] * 1e9, rel=0.1)
    at_most = sum(sizes) + sum(seen["states"]) + max(seen["states"])
    assert seen["total"] * 1e9 == pytest.approx(at_most, rel=0.1)
    printed = capsys.readouterr().out
    assert f"{len(files) - 1} adapters of" in printed
    assert re.search(r"^time: +about \d+ s: ", printed, re.M)


def test_forwards_are_counted(small, tmp_path, monkeypatch):
    """Against what a run sends through the UNet without gradient."""
    count, honest = [0], watch.loss_grid

    def counting(base, latents, text, timesteps=(1, 2, 3, 4), draws=4, done=ignore):
        count[0] += len(latents) * len(timesteps) * draws
        return honest(base, latents, text, timesteps, draws, done)

    def drawing(base, text, empty, noise, steps, done):
        count[0] += 2 * len(text) * steps  # with and without the caption
        return np.zeros((len(text), base.size, base.size, 3), np.uint8)

    def begun(run):
        count.append(cost.forwards(run))
        return ""

    monkeypatch.setattr(watch, "loss_grid", counting)
    monkeypatch.setattr(pictures, "sample_grid", GRID)
    monkeypatch.setattr(pictures, "sample", drawing)
    monkeypatch.setattr(cost, "steps_line", begun)
    more = {"save_every": None, "samples": 3, "prompt": ["a red thing"]}
    train.train(small(tmp_path / "run", steps=9, method="lora", **more))
    assert count[0] == count[1] > 0


def test_hours(monkeypatch):
    """Steps, and what is only looked at, in words."""
    roles = {f"{side}_{part}": [0] for side in ("member", "nonmember") for part in ("aux", "val")}
    data, s = Encoded(*[None] * 5, roles), Settings(steps=160_000, samples=0, method="lora")
    run = SimpleNamespace(settings=s, base=None, data=data)
    monkeypatch.setattr(cost, "forward_seconds", lambda base, data: 100.0)
    looking = 100 * (10 * 2 * 8 + 4 * 16) / 3600  # nine saved steps, the base; the attack
    losses = f"{looking:.0f} h of held-out losses and pictures"
    assert cost.hours(run, 0.7) == f"about 37 h: 31 h of steps at 0.7 s, {losses}"
    words = {20: "20 s", 89.4: "89 s", 600: "10 min", 7200: "2 h", 40 * 86400: "40 days"}
    assert {s: cost.duration(s) for s in words} == words


# ---- a dry run ----


def test_paper_defaults_are_said_beforehand(small, tmp_path, capsys, monkeypatch):
    """400 passes over the members, their steps, adapters, gigabytes and hours, from a dry run that
    encodes a few images only.
    """
    encode, seen = prepare.encode, []

    def looked_at(base, images, roles, few):
        data = encode(base, images, roles, few)
        seen.append(len(data.latents.flatten(1).unique(dim=0)))
        return data

    monkeypatch.setattr(prepare, "encode", looked_at)
    left_out = dict.fromkeys(("members", "batch_size", "rank", "alpha", "steps", "save_every"))
    found = train.train(small(tmp_path / "run", dry_run=True, **left_out))
    assert seen == [FEW]
    members = 18
    steps = PAPER["epochs"] * members
    assert found["plan"].startswith(f"{steps:,} steps of 1 image, 400 passes; 9 adapters of ")
    printed = capsys.readouterr().out
    assert f"images:   {members} members" in printed and "too few images" in printed
    assert found["plan"] in printed and found["time"] in printed


@pytest.mark.parametrize(
    "more",
    [
        {"method": "lora"},
        {"method": "smp", "accumulate": 2, "batch_size": 2, "proxy": "calibrated"},
        {"method": "distill", "teachers": 3, "teacher_steps": 40, "flip": True},
    ],
    ids=lambda more: more["method"],
)
def test_dry_run_says_and_writes_nothing(small, tiny_base, tmp_path, capsys, more):
    """Counts, parameters, steps, time and memory; no folder, and no lock is taken."""
    found = train.train(small(tmp_path / "new" / "run", dry_run=True, steps=100, **more))
    text = capsys.readouterr().out
    assert "20 members (10 aux" in text and "nothing was written" in text
    assert found["plan"].startswith("100 steps of 4 images, 20 passes; 1 adapter of ")
    modules = load_base(tiny_base).unet.named_modules()
    layers = sum(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name, _ in modules)
    assert found["adapter"].endswith(f"in {layers} layers")
    assert float(found["memory"].split()[0]) > 0.1 and not list(tmp_path.iterdir())
    teachers = found.get("teachers", "")
    assert teachers.startswith("3 of 40 steps" if more["method"] == "distill" else "")


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


def test_the_device_is_on_record(small, tmp_path, capsys, monkeypatch, unfinished):
    """As what "auto" stood for; a run that is gone on with elsewhere says so."""
    unfinished(small(tmp_path / "run", steps=2))
    config = RunFolder(tmp_path / "run").config()
    assert (config["settings"]["device"], config["settings"]["dtype"]) == ("cpu", "float32")
    assert "plan:     2 steps of 4 images" in capsys.readouterr().out
    config["settings"]["device"] = "cuda"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    train.train(Settings(out=str(tmp_path / "run"), resume=True))
    assert "was started on cuda, which is not here: it continues on cpu" in capsys.readouterr().out


def test_the_small_model_is_in_full_precision_everywhere():
    """Half precision would turn the pooled attacker's gradient (docs/reference.md)."""
    assert resolve(Settings(out="/nowhere")).dtype == "float32"
    assert resolve(Settings(out="/nowhere", model="owner/sd")).dtype == "auto"
    assert resolve(replace(Settings(out="/nowhere"), dtype="bfloat16")).dtype == "bfloat16"


def test_memory_where_the_system_does_not_tell_it(monkeypatch):
    """Windows has no module `resource`."""
    assert float(cost.peak_memory(torch.device("cpu")).removesuffix(" GiB")) > 0.1
    monkeypatch.setitem(sys.modules, "resource", None)
    without = runpy.run_path(cost.__file__)
    assert "unknown" in without["peak_memory"](torch.device("cpu"))
