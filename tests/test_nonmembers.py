"""--nonmembers through a run: training, --resume, evaluation, where the other set lies later, and
who refuses it.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps

import evaluate
import train
from attacks import audit_tasks, shadows
from attacks.examination import prepare
from attacks.target import read_run, sources, targets
from command.errors import UserError
from files.images import load_images
from run import watch
from run.precheck import precheck
from settings import Settings


@pytest.fixture(scope="module")
def others(image_folder, tmp_path_factory):
    """A folder of the same pictures in other colours, and one that is a copy of a private one."""
    folder = tmp_path_factory.mktemp("others")
    for file in sorted(Path(image_folder).glob("*.png")):
        with Image.open(file) as image:
            ImageOps.invert(image.convert("RGB")).save(folder / file.name)
        shutil.copy(file.with_suffix(".txt"), folder)
    shutil.copy(Path(image_folder) / "05.png", folder / "copy.png")
    (folder / "copy.txt").write_text("a copy")
    return folder


@pytest.fixture(scope="module")
def run(small, others, tmp_path_factory):
    """(settings, run folder) of a run that was killed after its steps, and then went on."""
    out = tmp_path_factory.mktemp("runs") / "run"
    s = small(out, nonmembers=str(others), members=10, samples=0, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "finish", lambda *_: {})
        train.train(s)
        changed = others / "07.txt"
        before = changed.read_text()
        changed.write_text("another caption")
        with pytest.raises(UserError, match=rf"nonmembers/07.png in .* or {others}"):
            train.train(Settings(out=str(out), resume=True))
        changed.write_text(before)
    train.train(Settings(out=str(out), resume=True))
    return s, out


def test_who_is_a_member(run, image_folder, others):
    """Members are one's own, non-members the others', the copy is neither; all are on record by
    content.
    """
    _, out = run
    splits = json.loads((out / "splits.json").read_text())
    hashes = json.loads((out / "images.json").read_text())
    own, beside = (load_images(str(folder), 32) for folder in (image_folder, others))
    known = dict(zip(own.names, own.hashes(), strict=True))
    known |= {f"nonmembers/{n}": h for n, h in zip(beside.names, beside.hashes(), strict=True)}
    for role, names in splits.items():
        assert all(n.startswith("nonmembers/") == role.startswith("nonmember_") for n in names)
        assert all(hashes[name] == known[name] for name in names)
    dealt = [name for names in splits.values() for name in names]
    assert len(set(dealt)) == len(dealt) and "nonmembers/copy.png" not in hashes
    sizes = [len(splits[role]) for role in ("member_aux", "member_val", "member_test", "fresh")]
    assert sizes == [5, 1, 4, 30] and len(splits["nonmember_test"]) == 40 - 5 - 2


def test_it_is_evaluated_from_the_same_images(run, others, tmp_path):
    """From what the run says, and from where the other set lies now."""
    _, out = run
    found = read_run(str(out))
    subject = prepare(found)
    moved = Path(shutil.copytree(others, tmp_path / "moved"))
    (moved / "03.png").rename(moved / "three.png")
    (moved / "03.txt").rename(moved / "three.txt")
    there = read_run(str(out), nonmembers=str(moved))
    again = prepare(there)
    assert subject.content == again.content and sources(found) != sources(there)
    assert subject.data.roles == again.data.roles
    names = {subject.data.names[i] for i in subject.data.roles["nonmember_test"]}
    assert names <= {f"nonmembers/{k:02d}.png" for k in range(40)}
    (moved / "11.png").unlink()
    (moved / "11.txt").unlink()
    with pytest.raises(UserError, match=rf"{moved} no longer holds .*11.png.* with --nonmembers"):
        prepare(there)
    planned = shadows.plan(found, subject, 10, "cpu")
    _, data = audit_tasks.subject(planned)
    assert data.names == subject.data.names  # the shadows find both sets


def test_the_flag_of_evaluate(run, others):
    """Checked with the other paths; refused where there is nothing that it could name."""
    _, out = run
    targets(evaluate.Settings(runs=[str(out)]))
    targets(evaluate.Settings(runs=[str(out)], nonmembers=str(others)))
    with pytest.raises(UserError, match="there is no folder /gone of non-members"):
        targets(evaluate.Settings(runs=[str(out)], nonmembers="/gone"))
    with pytest.raises(UserError, match="--members and --nonmembers go together"):
        targets(evaluate.Settings(adapter="x", model="y", data="z", nonmembers=str(others)))


def test_a_folder_that_is_not_there(image_folder, tmp_path):
    """Refused by its name, where a set that comes with the code is taken."""
    common = {"data": image_folder, "out": str(tmp_path / "x")}
    precheck(Settings(nonmembers="openmoji", **common))
    with pytest.raises(UserError, match="there is no folder /gone: give --nonmembers"):
        precheck(Settings(nonmembers="/gone", **common))


@pytest.mark.parametrize("flag", ["data", "nonmembers"])
def test_a_run_inside_its_images_is_refused(image_folder, tmp_path, flag):
    """Its pictures would be among them the next time."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    given = {"data": image_folder, flag: str(folder), "out": f"{folder}/../images"}
    with pytest.raises(UserError, match=f"is the folder of --{flag}: give another"):
        precheck(Settings(**given))
