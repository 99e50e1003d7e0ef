"""studies/copies.py: sets in which every image has an edited copy, and what is told of them."""

import numpy as np
import pytest

from attacks.lira import HEADLINE
from command.errors import UserError
from studies import copies


def test_a_copy_is_the_image_without_two_of_its_sides():
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[:42, :42] = 200  # what the copy shows
    assert np.array_equal(copies.copy_of(pixels), np.full_like(pixels, 200))


def test_an_image_and_its_copy_find_each_other():
    names = ["000001.png", "000002-copy.png", "000001-copy.png", "000003.png"]
    assert copies.twins(names).tolist() == [2, -1, 0, -1]


def test_the_set_has_both_under_one_caption(tmp_path):
    folder = copies.with_copies(copies.Study(images=5), tmp_path)
    stems = sorted(file.stem for file in folder.glob("*.png"))
    assert len(stems) == 10
    for stem in stems[::2]:
        captions = [(folder / f"{s}.txt").read_text() for s in (stem, stem + copies.COPY)]
        assert captions[0] == captions[1]
    assert copies.with_copies(copies.Study(images=5), tmp_path) == folder  # a second time
    other = copies.with_copies(copies.Study(images=4), tmp_path)  # not what is there already
    assert len(list(other.glob("*.png"))) == 8
    with pytest.raises(UserError, match="--images must be 1 to"):
        copies.with_copies(copies.Study(images=10_000), tmp_path)


def test_the_table_tells_a_leak_through_the_copy():
    names = [f"{i:06d}{mark}.png" for i in range(30) for mark in ("", copies.COPY)]
    names += [f"{i:06d}.png" for i in range(30, 60)]
    rng = np.random.default_rng(0)
    member = rng.random((6, len(names))) < 0.5
    at = copies.twins(names)
    noise = rng.normal(size=member.shape)
    own, through = np.where(at < 0, member, 0), np.where(at >= 0, member[:, at], 0)
    given = {"names": np.array(names), "member": member, f"50/{HEADLINE}": 9 * own + 9 * through}
    given[f"50/{HEADLINE}"] = given[f"50/{HEADLINE}"] + noise
    lines = [line.split(" | ") for line in copies.table(given).splitlines()[2:]]
    alone, copied, through = (float(line[3].split()[0]) for line in lines)
    assert alone > 0.99 and through > 0.99 and 0.4 < copied < 0.6
    assert [line[2] for line in lines] == ["30", "60", "60"]
