"""evaluate.py where something is wrong or was interrupted: flags that cannot work, images that were
moved or changed, scores that are stale, cut or damaged.
"""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import evaluate
import train
from attacks import examination, model, shadows
from attacks.examination import dealt, prepare
from attacks.store import Store
from attacks.target import kind, read_run, targets
from command.errors import UserError
from files import contents
from files.images import load_images
from run.folder import read_splits
from settings import Settings

ROOT = Path(__file__).parent.parent
FLAGS = {"pictures": 2, "sampling_steps": 1, "test_nonmembers": 4}


@pytest.fixture(scope="module")
def run(tiny_base, image_folder, tmp_path_factory):
    """A run of two steps over few images, beside no other."""
    out = str(tmp_path_factory.mktemp("runs") / "lora")
    small = {"members": 6, "rank": 2, "alpha": 4, "batch_size": 2, "samples": 0, "lr": 0.01}
    train.train(
        Settings(method="lora", model=tiny_base, data=image_folder, out=out, steps=2, **small)
    )
    return out


@pytest.fixture(scope="module")
def renamed(image_folder, tmp_path_factory):
    """The images under other names, in the reverse order."""
    folder = tmp_path_factory.mktemp("moved") / "images"
    folder.mkdir()
    for i, picture in enumerate(sorted(Path(image_folder).glob("*.png"), reverse=True)):
        shutil.copy(picture, folder / f"x{i:02d}.png")
        shutil.copy(picture.with_suffix(".txt"), folder / f"x{i:02d}.txt")
    return str(folder)


# --------------------------------------------------------------------------------------------------
# Flags and run folders that cannot work


def spoilt(run, folder):
    """(name of what is wrong, copy of the run folder, words of the message)."""
    splits = json.loads(Path(run, "splits.json").read_text())
    config = json.loads(Path(run, "config.json").read_text())
    twice = splits | {"fresh": splits["member_aux"][:1]}
    without = config | {"settings": {k: v for k, v in config["settings"].items() if k != "model"}}
    typed = config | {"settings": config["settings"] | {"data": 5}}
    odd = {"size": "48", "seed": -1, "lam": [1]}
    odd = {
        k: json.dumps(config | {"settings": config["settings"] | {k: v}}) for k, v in odd.items()
    }
    losses = [json.dumps({"step": 2, "nonmember_val_loss": x}) for x in (None, "1", [1], math.nan)]
    gone = config | {"settings": config["settings"] | {"model": "/gone/model"}}
    text = Path(run, "splits.json").read_text()
    changes = [
        ("splits.json", text[:1], "splits.json"),
        ("splits.json", text[: len(text) // 2], "splits.json"),
        ("splits.json", "[1]", "not an object of role"),
        ("splits.json", '{"member_aux": "00.png"}', "not an object of role"),
        ("splits.json", json.dumps(twice), f"names {splits['member_aux'][0]} twice"),
        ("splits.json", json.dumps(splits | {"members": []}), "unknown role members"),
        ("splits.json", json.dumps(splits | {"member_val": []}), "for the role member_val"),
        ("splits.json", None, "splits.json"),
        ("config.json", None, "not a run folder"),
        ("config.json", b"\xff", "config.json"),
        ("config.json", "[]", "no settings"),
        ("config.json", json.dumps(without), "lack model"),
        ("config.json", json.dumps(typed), "data must be a text"),
        ("config.json", odd["size"], "size must be a whole number"),
        ("config.json", odd["seed"], "--seed must be 0 or more"),
        ("config.json", odd["lam"], "lam must be a number"),
        *[("metrics.jsonl", row, "the held-out loss of step 2 is") for row in losses],
        *[(f"{name}.json", "a pipe", "a pipe") for name in ("images", "splits")],
        ("metrics.jsonl", "a pipe", "a pipe"),
        ("config.json", json.dumps(gone), "there is no base model /gone/model"),
        ("metrics.jsonl", None, "not a complete run"),
        ("metrics.jsonl", '{"step": 0}\n{"st', "not a complete run"),
        ("metrics.jsonl", "3\n", "not every line is an object"),
        ("adapter", None, "did not finish"),
    ]
    for i, (name, content, words) in enumerate(changes):
        copy = folder / f"{i}"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
        if content is None and name == "adapter":
            shutil.rmtree(copy / name)
        elif content is None:
            (copy / name).unlink()
        elif content == "a pipe":
            (copy / name).unlink()
            os.mkfifo(copy / name)
        else:
            (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        yield f"{i} {name}", str(copy), words


def test_what_cannot_work_is_told_by_the_flags_alone(run, tiny_base, image_folder, tmp_path):
    """Numbers out of range, flags that do not go together, paths that lead nowhere."""
    splits = tmp_path / "splits.json"
    splits.write_text("[]")
    other = {"model": tiny_base, "adapter": f"{run}/adapter", "data": image_folder}
    cases = [
        ({"runs": [run], name: value}, f"--{name.replace('_', '-')} must be")
        for name, value in (
            ("pictures", -1), ("pictures", 1), ("test_nonmembers", -1),
            ("sampling_steps", 0), ("sampling_steps", 1000), ("shadow", -1), ("shadow", 2),
            ("shadow", 7), ("jobs", 0),
            ("at", "nonsense"), ("at", ""), ("at", "-3"), ("device", "cud"),
        )
    ]  # fmt: skip
    cases += [
        ({"runs": [run], flag: "x"}, f"--{flag} is for an adapter without a run folder")
        for flag in ("adapter", "members", "splits", "caption", "out")
    ]
    cases += [
        ({"runs": [run], "data": "/gone"}, "there is no folder /gone"),
        ({"runs": [run], "model": "/gone"}, "there is no base model /gone"),
        ({"runs": [run, str(tmp_path)]}, "not a run folder"),
        ({}, "--adapter is missing"),
        (other | {"data": None}, "--members is missing"),
        (other | {"members": image_folder}, "--members and --nonmembers go together"),
        (other | {"members": "/x", "nonmembers": "/y"}, "remove --data and --splits"),
        (other | {"data": "/gone"}, "there is no folder /gone"),
        (other | {"model": "gone.safetensors"}, "there is no base model"),
        (other | {"adapter": "/gone"}, "there is no adapter /gone"),
        (other | {"splits": str(splits)}, "not an object of role"),
        (other | {"splits": str(tmp_path)}, "a folder, not a file"),
        (other | {"at": "best"}, "--at needs a run folder"),
        (other | {"shadow": 8}, "name a --trained-with"),
        (other | {"out": str(splits)}, "is not a folder"),
        (other | {"out": f"{splits}/below/it"}, "is not a folder"),
    ]
    for flags, words in cases:
        with pytest.raises(UserError, match=words):
            targets(evaluate.Settings(**flags))
    targets(evaluate.Settings(**other, pictures=0, out=str(tmp_path / "new" / "folder")))
    targets(evaluate.Settings(**other | {"model": "owner/name"}))


def test_unusable_runs_are_told_by_their_small_files(run, tmp_path):
    """A run folder that lacks a file, or has one cut, damaged or of another kind."""
    targets(evaluate.Settings(runs=[run]))
    for name, folder, words in spoilt(run, tmp_path):
        with pytest.raises(UserError, match=words) as told:
            targets(evaluate.Settings(runs=[folder]))
        assert "\n" not in str(told.value), name
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    with pytest.raises(UserError, match="not a file"):
        read_splits(tmp_path / "pipe")


def test_typos_are_told_before_the_heavy_imports(run):
    """One line and exit code 2 from the command line, without torch."""
    cases = [["/nowhere"], [run, "--shadow", "3"], [run, "--data", "/gone"], [run, "--at", "x"]]
    code = f"""
import contextlib, io, runpy, sys
for arguments in {cases!r}:
    sys.argv = ["evaluate.py", *arguments]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            runpy.run_path("evaluate.py", run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 2
        else:
            raise AssertionError(arguments)
    lines = errors.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not {{"torch", "diffusers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_flags_that_say_where_a_run_lies_now_are_honoured(run, renamed, monkeypatch):
    """--model and --dtype reach the base, --data the images, and nothing else of the run moves."""

    class Seen(Exception):
        pass

    def seen(*arguments):
        raise Seen(*arguments)

    monkeypatch.setattr(examination, "load_base", seen)
    settings = evaluate.Settings(runs=[run], model=renamed, data=renamed, dtype="float16", **FLAGS)
    with pytest.raises(Seen) as found:
        evaluate.evaluate(settings)
    assert found.value.args[:3] == (renamed, "cpu", "float16")
    as_is, moved = read_run(run), read_run(run, data=renamed)
    assert moved.config == as_is.config | {"data": renamed}


# --------------------------------------------------------------------------------------------------
# Images are what they show and say


def test_images_are_found_by_content(run, renamed, image_folder):
    """Under other names and in another order, the same pictures and captions in every role."""
    found = []
    for folder in (image_folder, renamed):
        images = load_images(folder, 32)
        hashes = images.hashes()
        roles = dealt(read_run(run, data=folder), images)
        found.append({role: [hashes[i] for i in index] for role, index in roles.items()})
    assert found[0] == found[1]
    assert len({digest for of_role in found[0].values() for digest in of_role}) == 40


def test_changed_images_are_refused_by_name(run, image_folder, tmp_path):
    """Pixels or a caption changed under the name that a run knows, two exchanged, one gone; runs
    that hold no hashes go by name.
    """
    names = json.loads(Path(run, "splits.json").read_text())["member_test"]
    images, victim = tmp_path / "images", Path(names[0]).stem

    def told(change, words, of=run):
        shutil.rmtree(images, ignore_errors=True)
        shutil.copytree(image_folder, images)
        change()
        moved = read_run(of, data=str(images))
        if words is None:
            return dealt(moved, load_images(str(images), 32))
        with pytest.raises(UserError, match=words) as error:
            dealt(moved, load_images(str(images), 32))
        assert names[0] in str(error.value) and "--data" in str(error.value)

    def caption():
        (images / f"{victim}.txt").write_text("something else")

    def pixel():
        picture = Image.open(images / names[0])
        picture.putpixel((3, 3), (1, 2, 3))
        picture.save(images / names[0])

    def gone():
        (images / names[0]).unlink()
        (images / f"{victim}.txt").unlink()

    told(caption, "the pixels or the caption of")
    told(pixel, "the pixels or the caption of")
    told(gone, "no longer holds")
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (old / "images.json").unlink()
    roles = told(pixel, None, str(old))
    told(gone, "no longer holds", str(old))
    position = sorted(p.name for p in Path(image_folder).glob("*.png")).index
    assert roles["member_test"] == [position(name) for name in names]
    (old / "images.json").write_text("{}")
    with pytest.raises(UserError, match=r"images\.json .* is damaged"):
        read_run(str(old))


# --------------------------------------------------------------------------------------------------
# Kept scores


def test_killed_and_called_again_and_moved(run, renamed, tmp_path, monkeypatch):
    """Killed in the middle and called again, an evaluation gives the figures of one that never
    stopped, on the same images under other names; nothing that was asked is asked again.
    """
    settings = evaluate.Settings(runs=[run], **FLAGS)
    asked, real = [], model.single.gradient_features

    def killed(*arguments):
        asked.append(arguments)
        if len(asked) == 2:  # the first was the base's
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(model.single, "gradient_features", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(settings)
    assert not Path(run, "eval.json").exists()
    (again,) = evaluate.evaluate(settings)
    assert len(asked) == 3
    copy = shutil.copytree(run, tmp_path / "lora", ignore=shutil.ignore_patterns("scores"))
    (moved,) = evaluate.evaluate(replace(settings, runs=[str(copy)], data=renamed))
    assert len(asked) == 5
    names = ("images", "adapted", "base", "blind")
    assert {k: moved[k] for k in names} == {k: again[k] for k in names}
    monkeypatch.setattr(model, "loss_grid", None)
    monkeypatch.setattr(model.paper, "draw", None)
    (kept,) = evaluate.evaluate(replace(settings, data=renamed))
    assert {k: kept[k] for k in names} == {k: again[k] for k in names}
    assert len(asked) == 5


def test_stale_and_damaged_arrays_are_computed_again(tmp_path):
    """Of another key, cut anywhere, with any byte changed, or a pickle: never taken for fresh."""
    value, calls = np.arange(6.0).reshape(2, 3), []

    def ask(store, result=value):
        found = store.get("a", lambda: calls.append(1) or {"x": result})
        np.testing.assert_array_equal(found["x"], result)
        return len(calls)

    first, second = Store(tmp_path, "one"), Store(tmp_path, "two")
    assert ask(first) == ask(first) == 1
    assert ask(second, -value) == 2  # the other's array is not taken
    assert ask(first) == 3  # nor does the other lose by it
    path = tmp_path / "a.npz"
    content = path.read_bytes()
    with np.load(path) as arrays:  # as a person would look into it
        np.testing.assert_array_equal(arrays["x"], value)
    damaged = [content[:n] for n in (0, 1, 31, 32, 100, len(content) - 32, len(content) - 1)]
    damaged += [content + b"x", b"\0" * len(content), pickle.dumps(value)]
    for i in range(0, len(content), 7):
        damaged.append(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
    before = len(calls)
    for n, bad in enumerate(damaged, 1):
        path.write_bytes(bad)
        assert ask(first) == before + n
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_kept_scores_depend_on_content(run, tmp_path):
    """Images and adapter count by what they hold: a copy elsewhere is the same, another
    weight of the same size and time is not.
    """
    found, settings = read_run(run), evaluate.Settings()

    def key(found=found, content="abc", **flags):
        return examination.fingerprint(found, content, replace(settings, **flags))

    elsewhere = replace(found, config=found.config | {"data": "/other"}, splits=None)
    assert key() == key(elsewhere) == key(jobs=5)
    halves = replace(found, config=found.config | {"dtype": "float16"})
    others = {key(halves), key(features="inception"), key(content="abd")}
    assert len(others | {key()}) == 4

    copy = Path(shutil.copytree(found.adapter, tmp_path / "adapter"))
    assert contents.of_adapter(copy) == contents.of_adapter(found.adapter)
    (file,) = copy.glob("*.safetensors")
    before, tensors = file.stat(), load_file(file)
    tensors[min(tensors)][0, 0] += 1
    save_file(tensors, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents.of_adapter(copy) != contents.of_adapter(found.adapter)


def test_what_the_images_decide_is_computed_once(run, tmp_path, monkeypatch):
    """Crops and features of real pictures: the next run over the same images finds them, equal to
    the last bit; another key does not.
    """
    images, calls = prepare(read_run(run), nonmembers=4), []
    encode = examination.encode_images
    monkeypatch.setattr(examination, "encode_images", lambda *a: calls.append(1) or encode(*a))
    images.network = lambda x: calls.append(1) or x.float().mean((2, 3))

    def ask(key):
        images.store = Store(tmp_path, key)
        found = images.crops(), images.features("few", images.held_out)
        return len(calls), found

    first, values = ask("one")
    assert first > len(examination.CROPS)
    again, kept = ask("one")
    other, _ = ask("two")
    assert (again, other) == (first, 2 * first)
    for one, two in zip(kept, values, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_content_of_a_subject(run, renamed, image_folder, monkeypatch):
    """It is that of the images in their roles: other names do not matter, another caption does."""

    def content(folder):
        return prepare(read_run(run, data=folder), nonmembers=4).content

    before, load = content(image_folder), examination.load_images
    assert content(renamed) == before

    def changed(*arguments):
        images = load(*arguments)
        images.captions[0] += "!"
        return images

    monkeypatch.setattr(examination, "load_images", changed)
    old = replace(read_run(run), images=None)  # goes by name
    assert prepare(old, nonmembers=4).content != before


def test_runs_of_before_and_now_are_of_one_kind(run):
    """A flag that is gone, at the value that changed nothing, and one that is new, left out."""
    now = read_run(run)
    old = {k: v for k, v in now.config.items() if k != "attacker_members"}
    before = replace(now, config=old | {"attacker_every": 1, "seed": 5})
    assert kind(before) == kind(now)
    for flag, value in (("attacker_every", 2), ("rank", 3)):
        other = replace(before, config=before.config | {flag: value})
        assert kind(other) != kind(now)


def test_shadows_go_by_where_the_images_lie_and_what_they_hold(run, renamed, image_folder):
    """Shadows train on the moved images; those of changed images are others."""
    moved = read_run(run, data=renamed)
    planned = shadows.plan(moved, prepare(moved), 12, "cpu")
    assert planned.settings.data == renamed
    changed = prepare(moved)
    changed.data = replace(changed.data, captions=["another one", *changed.data.captions[1:]])
    assert shadows.plan(moved, changed, 12, "cpu").out != planned.out
    assert shadows.plan(moved, prepare(moved), 12, "cpu").out == planned.out
