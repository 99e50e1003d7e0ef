"""What users and machines do to a run: bad adapters, full disks, numbers that blow up;
and reuse elsewhere."""

import importlib
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import cli
import lora_files
import train
from base_files import load_base
from cli import UserError, one_line_errors
from data import load_images
from diffusion import encode_captions
from settings import Settings, resolve
from training import monitor
from training import run as prepared
from training.processes import Processes

ROOT = Path(train.__file__).parent
few = hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of a tiny run's time."""
    monkeypatch.setattr(monitor, "sample_grid", lambda *_: None)
    monkeypatch.setattr(monitor.plots, "training_curves", lambda *_: None)


@pytest.fixture
def small(tiny_base, image_folder, tmp_path):
    """Settings of a small run, changed by keywords."""

    def make(**more):
        return Settings(
            **{
                "model": tiny_base,
                "data": image_folder,
                "out": str(tmp_path / "run"),
                "members": 20,
                "rank": 2,
                "alpha": 4.0,
                "batch_size": 4,
                "target": "attention",
                "proxy": "pooled",
                "lr": 0.01,
                "attacker_lr": 0.01,
                "steps": 3,
                "save_every": 1000,
                "method": "lora",
                **more,
            }
        )

    return make


def refused(capsys, settings, *words):
    """Assert one line on stderr with `words` and exit code 2."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train.train(settings)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]


# ---- settings ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": 0},
        {"size": 20},
        {"state_every": 0},
        {"keep": 0},
        {"threads": -1},
        {"alpha": float("inf")},
        {"lr": float("nan")},
    ],
)
def test_refuses_numbers_out_of_range(capsys, small, wrong):
    flag = "not a multiple" if "size" in wrong else "--" + next(iter(wrong)).replace("_", "-")
    refused(capsys, small(**wrong), flag)


def test_out_below_a_file(small, tmp_path):
    (tmp_path / "note").write_text("x")
    with pytest.raises(UserError, match="note is a file"):
        resolve(small(out=str(tmp_path / "note" / "runs" / "a")))


# ---- a run that goes wrong ----


def nan_loss(error):
    return error * float("nan")


def nan_gradient(error):
    return error + torch.sqrt(error * 0)  # + 0, with an infinite slope


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_numbers_that_blow_up_stop_the_run(capsys, small, tmp_path, monkeypatch, poison):
    """The step is named, no weight has taken the bad step, and the state before it is whole."""
    calls, honest = [], prepared.squared_error

    def poisoned(*inputs):
        calls.append(1)
        return poison(honest(*inputs)) if len(calls) == 5 else honest(*inputs)

    monkeypatch.setattr(prepared, "squared_error", poisoned)
    refused(capsys, small(steps=8, state_every=1), "no longer finite at step 5", "--lr")
    assert not (tmp_path / "run" / "adapter").exists()
    files = list((tmp_path / "run" / "state").iterdir())
    assert [f.name for f in sorted(files)] == ["step-000003.safetensors", "step-000004.safetensors"]
    assert all(
        t.isfinite().all() for f in files for t in load_file(f).values() if t.is_floating_point()
    )
    train.train(
        small(out=str(tmp_path / "run"), steps=8, resume=True)
    )  # the cause gone, it can go on
    assert (tmp_path / "run" / "adapter").exists()


def test_full_disk(capsys, small, tmp_path):
    """A write that does not fit: one line that names the file, and nothing of it left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        refused(
            capsys,
            small(state_every=1, target="all", rank=8),
            "cannot write",
            "step-000001.safetensors",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").rglob("*.tmp")) and not list(
        (tmp_path / "run").rglob("*.safetensors")
    )


@pytest.mark.skipif(
    not Path("/sys/kernel").is_dir(), reason="wants a folder that not even root may write to"
)
def test_read_only_folder(capsys, small):
    refused(capsys, small(out="/sys/kernel/run"), "cannot write", "/sys/kernel/run")


def test_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A failure between writing and renaming changes nothing."""
    path = tmp_path / "a.json"
    cli.write_whole(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.os, "replace", fail)
    with pytest.raises(OSError) as caught:
        cli.write_whole(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_resume_refuses_other_images(capsys, small, image_folder, tmp_path, monkeypatch):
    """An image gone or new would deal the roles anew, and members would become non-members."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    monkeypatch.setattr(monitor, "finish", lambda *_: {})  # as if killed before it
    train.train(small(data=str(folder)))
    (folder / "00.png").unlink()
    refused(capsys, small(data=str(folder), resume=True), "no longer holds the images")


def test_resume_of_nothing_begins(small, tmp_path):
    """So that one command line serves the first start and every later one."""
    train.train(small(resume=True))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "summary" in config and config["settings"]["resume"] is False


def test_resume_refuses_a_torn_config(capsys, small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"settings": {')
    refused(capsys, small(resume=True), "config.json", "not a run's config")


# ---- captions ----


@few
@given(
    caption=st.text(
        alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300
    ).filter(str.strip),
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
def kohya_run(small, tmp_path):
    """A run that wrote both forms, and its folder."""
    train.train(small(out=str(tmp_path / "first"), format="kohya"))
    return tmp_path / "first"


def test_both_forms_and_starting_from_either(small, kohya_run, tmp_path):
    """--format kohya adds a file that says the same; --init starts at exactly that adapter, with
    its rank and alpha."""
    one = lora_files.read(kohya_run / "adapter")[0]
    two = lora_files.read(kohya_run / "kohya" / lora_files.KOHYA_NAME)[0]
    assert {k.replace(".", "_") for k in one} == set(two)
    for name, (a, b, alpha) in one.items():
        x, y, scale = two[name.replace(".", "_")]
        assert torch.equal(a, x) and torch.equal(b, y) and alpha == scale == 4.0
    for path in (kohya_run / "adapter", kohya_run / "kohya" / lora_files.KOHYA_NAME):
        settings = small(init=str(path), rank=16, alpha=1.0, target="all")
        run = train.prepare(settings, Processes())
        got = run.settings
        assert (got.rank, got.alpha, got.target) == (2, 4.0, "attention")
        assert all(
            torch.equal(one[n][1], layer.lora_B.weight) for n, layer in run.adapter.layers.items()
        )
    train.train(small(init=str(kohya_run / "adapter"), rank=16, steps=1))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["rank"] == 2
    moved = lora_files.read(tmp_path / "run" / "adapter")[0]
    assert moved.keys() == one.keys() and not torch.equal(moved[name][1], one[name][1])


def test_init_refuses_a_pickle(capsys, small, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter.safetensors")
    refused(
        capsys,
        small(init=str(tmp_path / "adapter.safetensors")),
        "adapter.safetensors",
        "pickles are not read",
    )
    refused(capsys, small(init=str(tmp_path / "nothing")), "there is no adapter file")
    assert not (tmp_path / "run").exists()


def test_readme_snippet_loads_the_adapter(tiny_base, kohya_run, monkeypatch):
    """The README's lines of diffusers code, run with our folders in place of theirs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    snippet = next(b for b in blocks if "load_lora_weights" in b)
    for name in ("SD15_FOLDER", "base"):
        snippet = snippet.replace(f'"{name}"', repr(tiny_base))
    snippet = re.sub(r'"runs/[^"]*"', repr(str(kohya_run / "adapter")), snippet)
    before = load_base(tiny_base).unet
    names: dict = {}
    exec(snippet, names)
    pipe = next(v for v in names.values() if hasattr(v, "unet"))
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 32)
    with torch.no_grad():
        got, plain = pipe.unet(x, t, c)[0], before(x, t, c)[0]
        lora_files.load(before, kohya_run / "adapter")
        torch.testing.assert_close(got, before(x, t, c)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-6)


# ---- looking first, and dashboards ----


@pytest.mark.parametrize("method", ["lora", "smp"])
def test_dry_run_says_and_writes_nothing(small, tiny_base, tmp_path, capsys, method):
    """Counts, parameters, steps, time and memory; no folder."""
    plan = train.train(small(method=method, dry_run=True, steps=100))
    text = capsys.readouterr().out
    assert "member_aux 10" in text and "nothing was written" in text
    assert plan["steps"].startswith("100 of 4 images, 20.0 passes")
    unet = load_base(tiny_base).unet
    layers = sum(
        name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name, _ in unet.named_modules()
    )
    assert plan["adapter"].endswith(f"in {layers} layers")
    assert float(plan["memory"].split()[0]) > 0.1 and not (tmp_path / "run").exists()


def test_tensorboard_shows_the_metrics(small, tmp_path):
    """What the dashboard reads is what metrics.jsonl says."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    train.train(small(track="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ][1:]
    got = [(e.step, e.value) for e in events.Scalars("adaptation_loss")]
    assert [s for s, _ in got] == [1, 2, 3]
    assert [v for _, v in got] == pytest.approx([r["adaptation_loss"] for r in rows])
