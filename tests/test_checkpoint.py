"""run/state.py and --resume: killed twenty times at random moments, a run ends in the same bits as
one left alone.
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_same_run
from safetensors.torch import load_file

import train
from command.errors import UserError
from files.bases import load_base
from files.encode import encode
from files.images import load_images
from run import pictures, prepare, snapshot, state
from run.folder import RunFolder
from run.keeper import ENDING, INSISTENT, stop_signals
from run.precheck import going_on, stored
from settings import Settings

STEPS, KILLS = 30, 20
ASKED = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def life(settings):
    """The process id of a run in a fork of this process, which has loaded and encoded what runs
    work on.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train.train(settings)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return pid


def end(pid):
    """The exit code of a life, minus the signal's number if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest(out):
    """Step of the newest training state, 0 without one."""
    found = state.files(Path(out) / "state")
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def until(step, out, pid):
    """Wait until the run has saved a state of `step` or later."""
    while newest(out) < step:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended before it could be stopped"
        time.sleep(0.002)


def lives(model, images, tmp):
    """In a process of its own: one run left alone, one killed KILLS times, one told to stop by
    signals.
    """
    torch.set_num_threads(1)
    rng, base, images_once = random.Random(0), load_base(model), load_images(images, 32)
    encoded = encode(base, images_once, {})
    prepare.load_base, prepare.load_images = lambda *_: base, lambda *_: images_once
    prepare.encode = lambda base, images, roles, few: replace(encoded, roles=roles)
    pictures.sample_grid = pictures.training_curves = lambda *_: None

    def settings(out, resume=False):
        often = {"steps": STEPS, "state_every": 2, "save_every": 15, "norms_every": 7}
        small = SMALL | often | {"batch_size": 2, "proxy": "raw"}
        return Settings(model=model, data=images, out=f"{tmp}/{out}", resume=resume, **small)

    codes = {"alone": end(life(settings("alone"))), "killed": [], "kept": 0}
    for k in range(KILLS):
        pid = life(settings("killed", resume=k > 0))
        if k:  # the first life is killed while it begins its folder
            until(k + 1, f"{tmp}/killed", pid)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        codes["killed"].append(end(pid))
        codes["kept"] = max(codes["kept"], len(state.files(Path(tmp, "killed", "state"))))
    codes["killed"].append(end(life(settings("killed", resume=True))))
    codes["asked"] = []
    for k, number in enumerate(ASKED):
        pid = life(settings("asked", resume=k > 0))
        until(4 + 8 * k, f"{tmp}/asked", pid)
        os.kill(pid, number)
        codes["asked"].append(end(pid))
    codes["asked"].append(end(life(settings("asked", resume=True))))
    Path(tmp, "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def three_runs(tiny_base, image_folder, tmp_path_factory):
    """Folder of the runs alone, killed and asked, and their exit codes."""
    tmp = tmp_path_factory.mktemp("lives")
    process = multiprocessing.get_context("spawn").Process(
        target=lives, args=(tiny_base, image_folder, str(tmp))
    )
    process.start()
    process.join(200)
    if process.is_alive():
        process.kill()
    return tmp, json.loads((tmp / "codes.json").read_text())


def same(a, b):
    """Assert that two run folders hold the same numbers, bit for bit, also on the way."""
    assert_same_run(a, b, STEPS)
    files = sorted(path.relative_to(a) for path in a.glob("checkpoints/*/*.safetensors"))
    assert len(files) == 2
    for name in files:
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


def test_killed_twenty_times(three_runs):
    """Data order, noise, dropout, both optimisers and both models go on as if nothing had
    happened.
    """
    tmp, codes = three_runs
    assert codes["alone"] == 0 and codes["killed"] == [-signal.SIGKILL] * KILLS + [0]
    # a kill may fall between the new state and the end of the oldest
    assert 2 <= codes["kept"] <= 3
    same(tmp / "alone", tmp / "killed")
    assert not (tmp / "killed" / "state").exists() and not list((tmp / "killed").rglob("*.tmp"))


def test_signals_save_and_exit(three_runs):
    """Signals end a run after its step, with the usual exit codes; nothing is lost."""
    tmp, codes = three_runs
    assert codes["asked"] == [*(128 + number for number in ASKED), 0]
    same(tmp / "alone", tmp / "asked")


@pytest.mark.parametrize("name", ENDING)
def test_every_signal_that_would_end_the_process_is_noted(name):
    """One that is ignored stays ignored; afterwards all are what they were."""
    if not (number := getattr(signal, name, None)):
        pytest.skip("this system has no such signal")
    caught, found = [], signal.signal(number, signal.SIG_DFL)
    try:
        with stop_signals(caught):
            os.kill(os.getpid(), number)
            assert caught == [number]
            assert (signal.getsignal(number) == signal.SIG_DFL) == (name in INSISTENT)
        assert signal.signal(number, signal.SIG_IGN) == signal.SIG_DFL
        with stop_signals(caught):
            os.kill(os.getpid(), number)
        assert caught == [number]
    finally:
        signal.signal(number, found)


def test_one_failure_of_the_disk_is_a_note(small, tmp_path, monkeypatch, no_pictures, capsys):
    """Of an adapter or a state on the way the next one is written; the last one must be."""
    failing, replace = ["checkpoints/step-000001", "state/step-000001"], os.replace

    def sometimes(source, target):
        if any(name in str(target) for name in failing):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    options = {"method": "lora", "steps": 2, "save_every": 1, "state_every": 1}
    train.train(small(tmp_path / "first", **options))
    out = capsys.readouterr().out
    for what in ("adapter", "training state"):
        assert f"note: no {what} of step 1 (" in out
    assert list(RunFolder(tmp_path / "first").held_out()) == [2]
    for failing in (["checkpoints/step-000002"], ["state/step-000002"]):
        with pytest.raises(OSError, match=f"Input/output error: .*{failing[0]}"):
            train.train(small(tmp_path / failing[0], **options))


def test_resume_of_a_finished_run_does_nothing(three_runs, capsys):
    """For loops that start a run again until it is done."""
    tmp, _ = three_runs
    before = {path: path.stat().st_mtime_ns for path in (tmp / "alone").rglob("*")}
    summary = train.train(Settings(out=str(tmp / "alone"), resume=True))
    assert summary["held_out_loss"] > 0 and "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp / "alone").rglob("*")}


def test_resume_takes_the_settings_of_the_run(three_runs):
    """Flags left out are the run's; one that says something else is refused, one that may change is
    taken.
    """
    out = str(three_runs[0] / "alone")
    settings, _ = stored(Settings(out=out, resume=True, state_every=5))
    assert (settings.steps, settings.rank, settings.proxy) == (STEPS, 2, "raw")
    assert settings.state_every == 5
    with pytest.raises(UserError, match="started with --rank 2, not 4"):
        stored(Settings(out=out, resume=True, rank=4))
    with pytest.raises(UserError, match="started with --method smp, not lora"):
        stored(Settings(out=out, resume=True, method="lora"))


def test_the_command_that_goes_on(three_runs, monkeypatch, tmp_path):
    """Of a run that has begun --resume, with the flags that its folder does not keep; else the same
    again.
    """
    out = str(three_runs[0] / "alone")
    s = Settings(out=out, method="smp", rank=2, state_every=5, track="tensorboard", device="cpu")
    flags = "--device cpu --state-every 5 --track tensorboard --resume"
    words = going_on(s).split()
    assert words[:4] == ["python", "train.py", "--out", out]
    assert sorted(words[4:]) == sorted(flags.split()) and words[-1] == "--resume"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert going_on(s).startswith("accelerate launch --num_processes 2 train.py --out ")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(sys, "argv", ["train.py", "--rank", "2", "--out", "a b"])
    again = "python train.py --rank 2 --out 'a b'"
    assert going_on(replace(s, out=str(tmp_path / "new"))) == again
    assert going_on(replace(s, dry_run=True)) == again


def test_newest_whole_state(tmp_path, capsys):
    """At most K files are kept, and in place of a damaged one the one before it is taken."""
    for step in range(1, 6):
        state.save(tmp_path, step, {"x": torch.full((3,), float(step))}, {"seconds": 1.5}, keep=3)
    names = [f"step-00000{k}.safetensors" for k in (3, 4, 5)]
    assert [p.name for p in state.files(tmp_path)] == names
    newest = state.files(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    step, tensors, facts = state.load(tmp_path)
    assert step == 4 and tensors["x"].tolist() == [4.0] * 3 and facts == {"seconds": 1.5}
    assert "step-000005" in capsys.readouterr().out
    state.save(tmp_path, 5 - 1, {"x": torch.ones(3)}, {}, keep=1)
    assert [p.name for p in state.files(tmp_path)] == names[1:2]  # not the damaged one alone
    state.clear(tmp_path)
    assert not tmp_path.exists() and state.load(tmp_path) is None


def test_optimizer_goes_on():
    """Adam continued from tensors takes the steps that it would have taken."""
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([w], lr=0.1) for w in weights]

    def step(k, x):
        weights[k].grad = torch.arange(4.0) + x
        optimizers[k].step()

    for x in range(3):
        step(0, x)
    with torch.no_grad():
        weights[1].copy_(weights[0])
    tensors = {name: t.clone() for name, t in snapshot.optimizer_tensors(optimizers[0]).items()}
    snapshot.restore_optimizer(optimizers[1], tensors)
    for k in (0, 1):
        step(k, 5)
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones(4))
