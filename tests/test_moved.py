"""A stopped run goes on where its model and its images lie now, if they are what they were."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import assert_same_run

import train
from command.errors import UserError
from command.whole_files import read_json, write_json
from run.folder import RunFolder
from run.precheck import stored
from settings import DIRECTIONS, EMBEDDED, Settings

pytestmark = pytest.mark.usefixtures("no_pictures")
FLAGS = {"method": "distill", "teachers": 2, "teacher_steps": 1, "steps": 2}


@pytest.fixture(scope="module")
def places(tiny_base, image_folder, tmp_path_factory):
    """Copies of the model and the images, by flag."""
    folder = tmp_path_factory.mktemp("places")
    for name, source in {"model": tiny_base, "data": image_folder}.items():
        shutil.copytree(source, folder / name)
    for path in (folder / "data").glob("3*"):
        path.unlink()
    return folder


def named(folder):
    """The flags that name what is in a folder."""
    return {name: str(folder / name) for name in ("model", "data")}


def test_moved_and_spelled_otherwise(
    small, places, tmp_path, monkeypatch, stopped_and_gone_on_with
):
    """Renamed folders, and relative paths: the same bits, and the new places are kept."""
    flags = FLAGS | {"members": 14, "init": None}
    train.train(small(tmp_path / "whole", **flags, **named(places)))
    moved = tmp_path / "moved"
    monkeypatch.chdir(tmp_path)

    def begin(folder):
        shutil.copytree(places, tmp_path / "places")
        try:
            train.train(small(folder, **flags, **named(tmp_path / "places")))
        finally:
            (tmp_path / "places").rename(moved)

    now = named(Path("moved"))
    stopped_and_gone_on_with(begin, tmp_path / "part", 3, **now)
    assert_same_run(tmp_path / "whole", tmp_path / "part", 2)
    kept = RunFolder(tmp_path / "part").config()["settings"]
    assert {name: kept[name] for name in now} == now


def test_what_never_was_cannot_have_moved(small, tmp_path, image_folder, unfinished):
    """Nor what a run from before its content was kept."""
    unfinished(small(tmp_path, method="lora", steps=1))
    with pytest.raises(UserError, match="started with --nonmembers None, not "):
        stored(Settings(out=str(tmp_path), resume=True, nonmembers=image_folder))
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {k: v for k, v in config.items() if k != "identity"})
    with pytest.raises(UserError, match=r"started with --model .*: remove --model"):
        stored(Settings(out=str(tmp_path), resume=True, model="elsewhere"))
    settings, _ = stored(Settings(out=str(tmp_path), resume=True, data="elsewhere"))
    assert settings.data == "elsewhere"


@pytest.mark.parametrize("identity", [True, False])
def test_the_checkout_was_moved(tmp_path, identity):
    """The files in it are found in the new one, where their content is compared."""
    before = {"model": "/nowhere/base", "directions": "/nowhere/embedded/directions.safetensors"}
    more = {"identity": {}} if identity else {}
    write_json(tmp_path / "config.json", {"settings": before} | more)
    now = {"model": EMBEDDED, "directions": DIRECTIONS} if identity else before
    assert RunFolder(tmp_path).config()["settings"] == now
    there = {"model": str(tmp_path / "base")}
    os.mkdir(there["model"])
    write_json(tmp_path / "config.json", {"settings": there} | more)
    assert RunFolder(tmp_path).config()["settings"] == there
