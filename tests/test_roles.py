"""files/roles.py: splits that keep members apart, how many members serve, and --nonmembers."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command.errors import UserError
from files.images import FOLDERS, ROLES, Images, load_images
from files.roles import (
    LEAST,
    OUTSIDE_TEST,
    half_width,
    missing,
    most_members,
    only_dealt,
    say,
    shortage,
    split,
)


def numbered(n: int, folders: dict[str, list[int]] | None = None) -> Images:
    """n images of 4 x 4 black and white noise, far from one another."""
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (n, 4, 4, 3), dtype=np.uint8)
    return Images([f"{i}.png" for i in range(n)], ["x"] * n, pixels, folders)


def check_disjoint(roles: dict[str, list[int]], n: int) -> None:
    assert tuple(roles) == ROLES
    dealt = [i for role in roles.values() for i in role]
    assert len(dealt) == len(set(dealt)) and set(dealt) <= set(range(n))
    assert all(role == sorted(role) for role in roles.values())
    assert all(type(i) is int for i in dealt)  # json cannot write numpy's


@settings(max_examples=30, deadline=None)
@given(n=st.integers(12, 300), members=st.integers(5, 150), seed=st.integers(0, 2**32))
def test_default_split(n, members, seed):
    """Sizes as the docstring says them, for any number of images."""
    try:
        roles = split(numbered(n), seed, members)
    except UserError:
        assert n < 1.8 * members + 5  # members + aux + 2 val + 2 <= 1.7 members + rounding
        return
    check_disjoint(roles, n)
    sizes = {role: len(indices) for role, indices in roles.items()}
    assert sum(sizes.values()) == n
    assert sizes["member_aux"] + sizes["member_val"] + sizes["member_test"] == members
    assert sizes["member_aux"] == sizes["nonmember_aux"] == members // 2
    assert abs(sizes["member_val"] - (members - members // 2) / 5) <= 0.5
    assert sizes["nonmember_val"] == 2 * sizes["member_val"] >= 2
    assert abs(sizes["fresh"] - (sizes["fresh"] + sizes["nonmember_test"]) / 5) <= 0.5
    assert (
        min(
            sizes[role] for role in ("member_aux", "member_test", "nonmember_aux", "nonmember_test")
        )
        >= 2
    )


def test_split_follows_the_seed():
    images = numbered(100)
    assert split(images, 0, 20) == split(images, 0, 20)
    assert split(images, 0, 20) != split(images, 1, 20)
    assert split(images, 0, 20)["member_aux"] != list(range(10))


@pytest.mark.parametrize(
    "members, needed", [(5, 11), (20, 36)]
)  # 5 + 2 + 2*1 + 2 and 20 + 10 + 2*2 + 2
def test_too_few_images(members, needed):
    split(numbered(needed), 0, members)
    with pytest.raises(
        UserError,
        match=rf"^[^\n]*at least {needed} .*there are {needed - 1}: .*--(non)?members[^\n]*$",
    ):
        split(numbered(needed - 1), 0, members)


@pytest.mark.parametrize("members", [-1, 0, 4])
def test_too_few_members(members):
    with pytest.raises(UserError, match=f"--members must be at least 5, .*not {members}"):
        split(numbered(50), 0, members)


def test_pokemon_preset():
    sizes = (180, 20, 200, 180, 20, 233)
    for n in (833, 900):
        roles = split(numbered(n), 0, 0, "pokemon")
        check_disjoint(roles, n)
        assert tuple(map(len, roles.values())) == (*sizes, n - 833)
    with pytest.raises(UserError, match=r"at least 833 .* there are 832: .*--members"):
        split(numbered(832), 0, 0, "pokemon")
    with pytest.raises(UserError, match='no preset "poke"'):
        split(numbered(900), 0, 0, "poke")


@pytest.mark.parametrize("seed", range(10))
def test_copies_stay_on_one_side(capsys, seed):
    images = numbered(60)
    images.pixels = np.concatenate(
        [images.pixels[:40], images.pixels[:20]]
    )  # image 40 + i is a copy of image i
    roles = split(images, seed, 10)
    check_disjoint(roles, 60)
    assert sorted(i for role in roles.values() for i in role) == list(range(40))
    note = capsys.readouterr().out
    assert note.count("\n") == 1 and "20 of 60" in note and "40.png = 0.png" in note
    split(numbered(60), seed, 10)
    assert capsys.readouterr().out == ""


def paper_folders(*sizes: int) -> Images:
    ends = np.cumsum(sizes)
    folders = {p: list(range(e - s, e)) for p, s, e in zip(FOLDERS, sizes, ends, strict=True)}
    return numbered(int(ends[-1]), folders)


def test_split_follows_the_papers_folders():
    images = paper_folders(40, 5, 30, 6)
    roles = split(images, 0, 10_000)
    check_disjoint(roles, 81)
    assert sorted(roles["member_aux"] + roles["member_val"]) == images.folders["D^m_aux"]
    assert sorted(roles["nonmember_aux"] + roles["nonmember_val"]) == images.folders["D^nm_aux"]
    assert (
        roles["member_test"] == images.folders["D^m_te"]
        and roles["nonmember_test"] == images.folders["D^nm_te"]
    )
    assert (len(roles["member_val"]), len(roles["nonmember_val"]), roles["fresh"]) == (4, 3, [])
    assert roles == split(images, 0, 10) != split(images, 1, 10)


def test_copy_across_the_papers_folders_stays_a_member(capsys):
    images = paper_folders(5, 5, 5, 5)
    images.folders = dict(
        zip(FOLDERS, reversed(images.folders.values()), strict=True)
    )  # members have the higher indices
    member, nonmember = images.folders["D^m_te"][0], images.folders["D^nm_te"][2]
    assert nonmember < member
    images.pixels[nonmember] = images.pixels[member]
    roles = split(images, 0, 10)
    assert member in roles["member_test"]
    assert roles["nonmember_test"] == [i for i in images.folders["D^nm_te"] if i != nonmember]
    note = capsys.readouterr().out
    assert "1 of 20 images" in note and f"{nonmember}.png = {member}.png" in note


@pytest.mark.parametrize("sizes, part", [((2, 2, 3, 2), "D^m_aux"), ((3, 2, 3, 1), "D^nm_te")])
def test_too_few_images_in_a_paper_folder(sizes, part):
    split(paper_folders(3, 2, 3, 2), 0, 10)
    with pytest.raises(UserError) as caught:
        split(paper_folders(*sizes), 0, 10)
    assert f"{part} holds {sizes[list(FOLDERS).index(part)]} " in str(
        caught.value
    ) and "--members" in str(caught.value)


# ---- how many members serve ----


def test_members_left_out():
    """The largest number that leaves no fewer test non-members than test members, counted out for
    all numbers; 40 images simply work.
    """
    for n in (11, 12, 13, 40, 90, 171, 172, 400, 1450):
        fitting = [LEAST]
        for members in range(LEAST, min(100, n) + 1):
            aux, val = members // 2, round((members - members // 2) / 5)
            left = n - members - aux - 2 * val
            if left - round(left / 5) >= members - aux - val:
                fitting.append(members)
        assert most_members(n, 100) == max(fitting), n
    for n in (11, 40):
        roles = split(numbered(n), 0, None)
        assert roles == split(numbered(n), 0, most_members(n, 100))
        assert all(roles[role] for role in ROLES[:6])
    assert [len(roles[role]) for role in ROLES] == [9, 2, 7, 9, 4, 7, 2]
    assert most_members(10_000, 400) == 400 and most_members(833, 400) == 378
    with pytest.raises(UserError, match="at least 11 distinct images, but there are 10"):
        split(numbered(10), 0, None)


def test_half_width_of_an_auc():
    """Against the deviation of the AUC of noise, drawn many times."""
    rng = np.random.default_rng(0)
    for m, n in ((7, 7), (16, 200), (40, 200)):
        scores = rng.normal(size=(4000, m + n))
        areas = (scores[:, :m, None] > scores[:, None, m:]).mean((1, 2))
        assert half_width(m, n) == pytest.approx(1.96 * areas.std(), rel=0.05), (m, n)


def test_how_many_are_missing(capsys):
    """As many as bring the interval below .1 and not one fewer; one note, or none."""
    for m, n in ((7, 7), (2, 7), (16, 200), (300, 2), (39, 200), (5, 64)):
        more, others = missing(m, n)
        assert half_width(m + more, n + others) <= 0.1
        assert min(more, others) == 0 or abs((m + more) - (n + others)) <= 1
        for fewer in ((more - 1, others), (more, others - 1)):
            if min(fewer) >= 0:
                assert half_width(m + fewer[0], n + fewer[1]) > 0.1, (m, n)
    roles = split(numbered(40), 0, None)
    say(roles, None)
    lines = capsys.readouterr().out.splitlines()
    members, others = "18 members (9 aux, 2 val, 7 test)", "20 non-members (9 aux, 4 val, 7 test)"
    assert lines[0] == f"images:   {members}, {others}, 2 fresh"
    assert len(lines) == 2 and "add 58 test members and 58 test non-members" in lines[1]
    assert missing(7, 7) == (58, 58) and shortage(split(numbered(400), 0, 100)) is None


# ---- --nonmembers ----


def beside(own: int, others: int) -> Images:
    images = numbered(own + others)
    images.private = own
    return images


def test_others_are_the_non_members():
    """All of one's own are members; what is left of the others is not even encoded."""
    images = beside(40, 400)
    roles = split(images, 0, None)
    check_disjoint(roles, 440)
    sizes = [len(roles[role]) for role in ROLES]
    assert sizes == [20, 4, 16, 20, 8, OUTSIDE_TEST, 0]
    members = [i for role in ROLES[:3] for i in roles[role]]
    assert sorted(members) == list(range(40)) and min(roles["nonmember_aux"]) >= 40
    fewer, moved = only_dealt(images, roles)
    assert len(fewer.names) == 40 + 28 + OUTSIDE_TEST == len(fewer.pixels) and fewer.private == 40
    for role, index in roles.items():
        assert [fewer.names[i] for i in moved[role]] == [images.names[i] for i in index]
        assert (fewer.pixels[moved[role]] == images.pixels[index]).all()


def test_members_of_many_beside_others():
    roles = split(beside(150, 80), 0, None, most=100)
    assert [len(roles[role]) for role in ROLES] == [50, 10, 40, 50, 20, 10, 50]
    assert max(roles["fresh"]) < 150
    assert len(split(beside(150, 120), 0, 150)["member_aux"]) == 75


def test_copies_of_ones_own_are_left_out(capsys):
    """Wherever a picture stands in the other set: it stays a member."""
    images = beside(20, 40)
    images.pixels[[25, 59]] = images.pixels[[3, 7]]
    roles = split(images, 0, None)
    dealt = {i for index in roles.values() for i in index}
    assert {3, 7} <= dealt and not {25, 59} & dealt
    assert "left out 2 of 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "others", "members", "words"),
    [
        (4, 90, None, "5 members need as many distinct images, but there are 4: add images"),
        (40, 90, 41, "41 members need .* there are 40: .* lower --members"),
        (40, 90, 3, "at least 5, .*not 3"),
        (40, 29, None, "need at least 30 non-members, but --nonmembers holds 29"),
    ],
)
def test_too_few_beside_others(own, others, members, words):
    with pytest.raises(UserError, match=words):
        split(beside(own, others), 0, members)


def test_images_of_two_sets(tmp_path, image_folder):
    """One set behind the other, told apart by their names; a folder that comes split is refused."""
    images = load_images(image_folder, 16, nonmembers=image_folder)
    assert images.private == 40 and images.names[40:] == [
        f"nonmembers/{n}" for n in images.names[:40]
    ]
    assert (images.pixels[:40] == images.pixels[40:]).all()
    with pytest.raises(UserError, match="holds 0 distinct images"):
        split(images, 0, None)
    for part in FOLDERS:
        (tmp_path / part).mkdir()
        for name in ("00.png", "00.txt"):
            shutil.copy(f"{image_folder}/{name}", tmp_path / part)
    with pytest.raises(UserError, match=r"has non-members of its own: leave --nonmembers out"):
        load_images(str(tmp_path), 16, nonmembers=image_folder)


def test_a_person_is_told_how_many_images_are_learned(capsys):
    """Of one's own, where some are kept apart; not with others' as non-members."""
    dealt = {role: list(range(3)) for role in ROLES}
    for others, own, told in ((None, True, True), (None, False, False), ("others", True, False)):
        say(dealt, others, own)
        said = capsys.readouterr().out
        assert ("the adapter trains on 9 of 21 images" in said) == told
