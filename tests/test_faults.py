"""What users and machines do to a run: bad adapters, full disks, numbers that blow up;
and reuse elsewhere.
"""

import errno
import fcntl
import importlib
import json
import os
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assembled
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import train
from algorithm import Run
from command.errors import UserError, one_line_errors
from diffusion import encode_captions
from files import adapters, lora_files
from files.bases import load_base
from files.images import load_images
from run import lock, pictures, state, watch
from run.folder import RunFolder
from run.keeper import Keeper
from run.precheck import precheck
from run.processes import Processes

ROOT = Path(train.__file__).parent
few = hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def small(small, tmp_path):
    """Settings of a small run of plain LoRA, changed by keywords."""

    def make(**more):
        return small(**{"out": tmp_path / "run", "method": "lora"} | more)

    return make


def refused(capsys, settings, *words):
    """Assert one line on stderr with `words` and exit code 2."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train.train(settings)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]


# ---- a run that goes wrong ----


def nan_loss(error):
    return error * float("nan")


def nan_gradient(error):
    return error + torch.sqrt(error * 0)  # + 0, with an infinite slope


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_numbers_that_blow_up_stop_the_run(capsys, small, tmp_path, monkeypatch, poison):
    """The step is named, no weight has taken the bad step, and the state before it is whole."""
    calls, honest = [], Run.error

    def poisoned(*inputs):
        calls.append(1)
        return poison(honest(*inputs)) if len(calls) == 5 else honest(*inputs)

    monkeypatch.setattr(Run, "error", poisoned)
    refused(capsys, small(steps=8, state_every=1), "no longer finite at step 5", "--lr")
    assert not (tmp_path / "run" / "adapter").exists()
    files = list((tmp_path / "run" / "state").iterdir())
    assert [f.name for f in sorted(files)] == ["step-000003.safetensors", "step-000004.safetensors"]
    kept = [t for f in files for t in load_file(f).values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in kept)
    train.train(small(steps=8, resume=True))  # the cause gone, it can go on
    assert (tmp_path / "run" / "adapter").exists()


def test_full_disk(capsys, small, tmp_path):
    """A write that does not fit: one line that names the file, and nothing of it left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        words = ("cannot write", "step-000001.safetensors")
        refused(capsys, small(state_every=1, target="all", rank=8), *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [path.suffix for path in (tmp_path / "run").rglob("*.*")]
    assert ".json" in left and ".tmp" not in left and ".safetensors" not in left


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no folder refuses root here")
def test_read_only_folder(capsys, small):
    refused(capsys, small(out="/sys/kernel/run"), "cannot write", "/sys/kernel/run")


def test_resume_refuses_other_images(capsys, small, image_folder, tmp_path, unfinished):
    """An image gone or new would deal the roles anew, and members would become non-members."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    unfinished(small(data=str(folder)))
    (folder / "00.png").unlink()
    refused(capsys, small(data=str(folder), resume=True), "no longer holds the images")


def test_resume_of_nothing_begins(small, tmp_path):
    """So that one command line serves the first start and every later one."""
    train.train(small(resume=True))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "summary" in config and config["settings"]["resume"] is False


def test_one_writer_per_folder(capsys, small, tmp_path, monkeypatch):
    """A second training into a folder is refused before it loads anything, a resuming one too; the
    lock is gone with the run, and a killed process leaves none.
    """
    out, honest, seen = tmp_path / "run", train.learn, []

    def meanwhile(settings, extra):
        seen.append(1)
        assert len(seen) == 1, "the second was let in"
        for second in (small(), small(resume=True)):
            refused(capsys, second, "another process is writing into", str(out))
        return honest(settings, extra)

    monkeypatch.setattr(train, "learn", meanwhile)
    train.train(small())
    assert seen and (out / "adapter").exists() and not (out / lock.NAME).exists()
    pid = os.fork()
    if pid == 0:
        with lock.held(out):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (out / lock.NAME).exists()
    with lock.held(out):
        pass
    assert not (out / lock.NAME).exists()


def test_a_refused_run_leaves_no_folder(capsys, small, tmp_path):
    """Also not the folders above it; one that was there stays."""
    (tmp_path / "images").mkdir()
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "a" / "b" / "c", tmp_path / "there" / "d"):
        refused(capsys, small(out=str(out), data=str(tmp_path / "images")), "images")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "there"]
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(capsys, tmp_path, monkeypatch, number):
    """One line, and the run goes on."""

    def flock(*_):
        raise OSError(number, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path / "run"):
        assert "cannot be locked" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_told_at_once(capsys, small, tmp_path, monkeypatch):
    """By names alone, before anything is loaded."""
    for flag, words in (("model", "base model"), ("data", "folder"), ("init", "adapter file")):
        missing = str(tmp_path / "no" / "such")
        with pytest.raises(UserError, match=f"there is no {words} {missing}"):
            precheck(small(**{flag: missing}))
    precheck(small(model="owner/a-model"))  # a name on the hub may be there
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        precheck(small())
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused(capsys, small(out=str(tmp_path / "other")), "WORLD_SIZE in the environment is 'two'")


@pytest.fixture
def half(small, tmp_path, monkeypatch, unfinished):
    """The folder of a run of four steps that was stopped before its finish, with two states."""
    monkeypatch.setattr(watch, "verdict", lambda *_: (0.5, (0.0, 1.0)))
    unfinished(small(steps=4, state_every=1, method="smp"))
    return tmp_path / "run"


HALF = {"steps": 4, "method": "smp", "resume": True}  # resumes the run of `half`


def test_resumed_by_another_number_of_processes(capsys, small, half, monkeypatch):
    """Before anything is loaded; the sentence says both numbers."""
    monkeypatch.setattr(train, "learn", None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capsys, small(**HALF), "started by 1 processes", "continued by 3")


def rewrite(path, change):
    """Write a state anew as `change(tensors, facts)` leaves it, with a checksum that fits."""
    step, tensors, facts = state.load(path.parent)
    change(tensors, facts)
    facts = {"step": step} | facts
    facts |= {"checksum": state.checksum(tensors, facts)}
    save_file(tensors, path, {"state": json.dumps(facts)})


def without(name):
    return lambda tensors, facts: (facts if name in facts else tensors).pop(name)


def put(name, value):
    def change(tensors, facts):
        (facts if name in facts else tensors).update({name: value})

    return change


STATES = {
    "seconds": without("seconds"),
    "seconds a word": put("seconds", "many"),
    "step a word": lambda tensors, facts: facts.update(step="four"),
    "a moment": without("optimizer/3.exp_avg"),
    "all moments of a weight": lambda tensors, facts: [
        tensors.pop(f"attacker_optimizer/0.{name}") for name in ("step", "exp_avg", "exp_avg_sq")
    ],
    "a stream": without("random/inner"),
    "a queue": without("queue/2"),
    "a shape": put("attacker/layers.0.bias", torch.zeros(1)),
    "a dtype": put("random/cpu", torch.zeros(5056)),
    "one more": put("adapter/other", torch.zeros(1)),
}


def test_states_that_do_not_fit(capsys, small, half):
    """The state before is taken, with a note; if none is left, one sentence."""
    newest = state.files(half / "state")[-1]
    whole = newest.read_bytes()
    run = assembled(small(**HALF))
    for name, change in STATES.items():
        newest.write_bytes(whole)
        rewrite(newest, change)
        keeper = Keeper(run, Processes())
        assert keeper.start() == 4 and 0 < keeper.before < 100, name
        assert "step-000004.safetensors is damaged" in capsys.readouterr().out, name
    header = int.from_bytes(whole[:8], "little")
    for cut in (whole[:5], whole[: header // 2], whole[:8] + b"x" + whole[9:], b""):
        newest.write_bytes(cut)
        assert state.load(half / "state")[0] == 3
    flipped = bytearray(whole)
    flipped[-3] ^= 16
    newest.write_bytes(flipped)
    assert state.load(half / "state")[0] == 3 and "checksum" in capsys.readouterr().out
    for file in state.files(half / "state"):
        file.write_bytes(b"")
    (half / "state" / "step-x.safetensors").write_bytes(b"")
    refused(capsys, small(**HALF), "no training state in", "is whole")
    shutil.rmtree(half / "state")
    (half / "state").write_text("")
    refused(capsys, small(**HALF), "state is a file", "remove it")


@pytest.mark.parametrize("broken", [(pictures, "sample_grid"), (watch, "verdict")])
def test_a_failing_finish_loses_nothing(capsys, small, half, monkeypatch, broken):
    """Adapter and state stay, --resume does the rest, and no step is trained again."""

    def fail(*_):
        raise RuntimeError("no ink\nleft")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*broken, fail)
        words = ("training is finished", str(half / "adapter"), "no ink", "--resume makes them")
        refused(capsys, small(**HALF), *words)
    adapter = load_file(half / "adapter" / "pytorch_lora_weights.safetensors")
    assert state.files(half / "state") and "summary" not in RunFolder(half).config()
    rows = RunFolder(half).rows()
    assert train.train(small(**HALF))["held_out_loss"] == rows[-1]["nonmember_val_loss"]
    assert "summary" in RunFolder(half).config() and not (half / "state").exists()
    after = load_file(half / "adapter" / "pytorch_lora_weights.safetensors")
    assert rows == RunFolder(half).rows() and all(torch.equal(adapter[k], after[k]) for k in after)


def test_failing_pictures_do_not_stop_a_run(capsys, small, tmp_path, monkeypatch):
    """Those on the way are only looked at."""
    honest = pictures.sample_grid

    def fail(run, step, few=None):
        return honest(run, step, few) if step == 3 else run.no_such_thing

    monkeypatch.setattr(pictures, "sample_grid", fail)
    train.train(small(save_every=1))
    assert "note: no pictures of step 2 (AttributeError" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter").exists()


def test_resume_refuses_other_contents(capsys, small, image_folder, tmp_path, unfinished):
    """A picture or caption replaced under its name; a run from before contents were kept goes by
    names.
    """
    folder, run = Path(shutil.copytree(image_folder, tmp_path / "images")), tmp_path / "run"
    unfinished(small(data=str(folder)))
    images = load_images(str(folder), 32)
    kept = json.loads((run / "images.json").read_text())
    assert kept == RunFolder(run).images() == dict(zip(images.names, images.hashes(), strict=True))
    changed = {"07.txt": b"another caption", "11.png": b""}
    with Image.open(folder / "11.png") as image:
        ImageOps.invert(image.convert("RGB")).save(tmp_path / "inverted.png")
    changed["11.png"] = (tmp_path / "inverted.png").read_bytes()
    for name, content in changed.items():
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        picture = name.replace("txt", "png")
        refused(capsys, small(data=str(folder), resume=True), picture, "put it back")
        (folder / name).write_bytes(before)
    (run / "images.json").write_text("[]")
    refused(capsys, small(data=str(folder), resume=True), "images.json is damaged")
    (run / "images.json").unlink()
    assert RunFolder(run).images() is None
    train.train(small(data=str(folder), resume=True))
    assert (run / "adapter").exists()


def test_damaged_files_of_a_run(half):
    """Cut anywhere, missing or something else: one line, however the run is looked at."""
    run, junk = RunFolder(half), (b"[1]\n", b"\xff\n", b"[" * 9999, None)

    def put(path, content):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)

    for name, read in (("splits.json", RunFolder.splits), ("metrics.jsonl", RunFolder.rows)):
        whole = (half / name).read_bytes()
        for content in (whole[:-9], whole[: len(whole) // 2], *junk):
            put(half / name, content)
            with pytest.raises(UserError, match=re.escape(name)):
                read(run)
        put(half / name, whole)
    for content in (*junk, b"{}\n"):
        put(half / "metrics.jsonl", content)
        with pytest.raises(UserError, match="does not hold every step"):
            run.cut(3)
    put(half / "metrics.jsonl", whole)
    for at in ("9", "-1", "\u00b2", "9" * 5000, ""):
        with pytest.raises(UserError, match="no adapter of step"):
            run.adapter(at)


# ---- numbers that are not finite before training ----


def test_the_first_step_is_not_the_learning_rate(capsys, small, tmp_path, monkeypatch):
    """No weight has moved: the sentence says what was looked at."""
    honest = Run.error
    monkeypatch.setattr(Run, "error", lambda *given: honest(*given) * float("nan"))
    with pytest.raises(UserError, match=r"first step.*held-out losses") as caught:
        train.train(small())
    assert "--lr is not the cause" in str(caught.value) and "lower" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(UserError, match="gain: lower --attacker-lr"):
        train.train(small(method="smp", attacker_lr=1e37, out=str(tmp_path / "b"), proxy="raw"))


def test_what_is_not_finite_before_training_is_named(small, tmp_path):
    """The adapter in --init, the base or an image; no folder is left behind."""
    run = assembled(small(method="lora"))
    weight, plain = run.parameters[1], run.settings
    run.settings = replace(plain, init="theirs.safetensors")
    with torch.no_grad():
        weight.fill_(1e38)
        with pytest.raises(UserError, match=r"the adapter theirs.safetensors is the cause"):
            watch.base_row(run)
        weight.zero_()
        run.base.unet.conv_in.weight[0] = float("nan")
    for settings in (run.settings, plain):
        run.settings = settings
        with pytest.raises(UserError, match=r"the base model .* is the cause"):
            watch.base_row(run)
    run.data.latents[7] = float("inf")
    with pytest.raises(UserError, match=r"07.png to numbers that are not finite \(1 of 40"):
        watch.base_row(run)
    assert not (tmp_path / "run").exists()


def test_precision_of_accelerate_is_not_used(capsys, monkeypatch):
    """A note, where a user would wait for it."""
    Processes()
    assert not capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    Processes()
    assert "mixed precision fp16 is not used; --dtype is" in capsys.readouterr().out


# ---- captions ----


@few
@given(
    caption=st.text(
        alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=300
    ).filter(lambda text: any(c.isprintable() and c != " " for c in text)),
    stem=st.text(
        alphabet=st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"),
        min_size=1,
        max_size=40,
    ).filter(lambda s: s[0] != "." and len(s.encode()) < 200),
)
def test_fuzz_captions_and_file_names(tiny_base_loaded, tmp_path, caption, stem):
    """Any Unicode caption and file name goes through to an embedding of the usual shape."""
    folder = tmp_path / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / f"{stem}.png")
    (folder / f"{stem}.png").with_suffix(".txt").write_bytes(caption.encode())
    images = load_images(str(folder), 8)
    assert images.names == [f"{stem}.png"]
    assert images.captions == [" ".join(caption.removeprefix("\ufeff").replace("\r", "\n").split())]
    text = encode_captions(tiny_base_loaded, images.captions)
    assert text.shape[0] == 1 and text.isfinite().all()


@pytest.fixture(scope="module")
def tiny_base_loaded(tiny_base):
    return load_base(tiny_base)


# ---- reuse ----


@pytest.fixture
def first(small, tmp_path):
    """The folder of a run to start from, with a second form of its adapter in kohya/."""
    train.train(small(out=str(tmp_path / "first")))
    adapter = lora_files.load(load_base(small().model).unet, tmp_path / "first" / "adapter")[0]
    adapters.save(adapter, tmp_path / "first" / "kohya", kohya=True)
    return tmp_path / "first"


def test_starting_from_either_form(small, first, tmp_path):
    """--init starts at exactly that adapter, with its rank and alpha."""
    one = lora_files.read(first / "adapter")[0]
    for path in (first / "adapter", first / "kohya" / lora_files.KOHYA_NAME):
        run = assembled(small(init=str(path), rank=16, alpha=1.0, target="all"))
        got = run.settings
        assert (got.rank, got.alpha, got.target) == (2, 4.0, "attention")
        assert run.adapter.layers.keys() == one.keys()
        for name, layer in run.adapter.layers.items():
            assert torch.equal(one[name][0], layer.lora_A.weight)
            assert torch.equal(one[name][1], layer.lora_B.weight)
    train.train(small(init=str(first / "adapter"), rank=16, steps=1))
    assert RunFolder(tmp_path / "run").config()["settings"]["rank"] == 2
    moved = lora_files.read(tmp_path / "run" / "adapter")[0]
    assert moved.keys() == one.keys() and not torch.equal(moved[name][1], one[name][1])


def test_init_refuses_a_pickle(capsys, small, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter.safetensors")
    pickled = small(init=str(tmp_path / "adapter.safetensors"))
    refused(capsys, pickled, "adapter.safetensors", "pickles are not read")
    refused(capsys, small(init=str(tmp_path / "nothing")), "there is no adapter file")
    assert not (tmp_path / "run").exists()


def test_readme_snippet_loads_the_adapter(tiny_base, first):
    """The README's lines of diffusers code, run with our folders in place of theirs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    snippet = next(b for b in blocks if "load_lora_weights" in b)
    for name in ("SD15_FOLDER", "base"):
        snippet = snippet.replace(f'"{name}"', repr(tiny_base))
    snippet = re.sub(r'"runs/[^"]*"', repr(str(first / "adapter")), snippet)
    before = load_base(tiny_base).unet
    names: dict = {}
    exec(snippet, names)
    pipe = next(v for v in names.values() if hasattr(v, "unet"))
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 32)
    with torch.no_grad():
        got, plain = pipe.unet(x, t, c)[0], before(x, t, c)[0]
        lora_files.load(before, first / "adapter")
        torch.testing.assert_close(got, before(x, t, c)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-6)


# ---- dashboards ----


def test_tensorboard_shows_the_metrics(small, tmp_path):
    """What the dashboard reads is what metrics.jsonl says."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    train.train(small(track="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = RunFolder(tmp_path / "run").rows()[1:]
    got = [(e.step, e.value) for e in events.Scalars("adaptation_loss")]
    assert [s for s, _ in got] == [1, 2, 3]
    assert [v for _, v in got] == pytest.approx([r["adaptation_loss"] for r in rows])
