"""settings.py: defaults by model, limits, the run folder, and the settings of a stored run."""

import json
from dataclasses import asdict, fields, replace

import pytest

from command.errors import UserError
from command.flags import parse
from command.whole_files import write_json
from run.precheck import stored
from run.resolve import resolve
from settings import (
    ABOVE_ZERO,
    EMBEDDED,
    FAST,
    FREE,
    FROM_ZERO,
    LOOKS,
    PAPER,
    Settings,
    most_members,
)


def flags(*argv):
    return parse(Settings, "", argv=[str(a) for a in argv])


# ---- defaults ----


@pytest.mark.parametrize(
    "model, table",
    [(EMBEDDED, FAST), (f"{EMBEDDED}/../base/", FAST), ("SD15", PAPER), ("nobody/sd", PAPER)],
)
def test_flags_left_out_depend_on_the_model(tmp_path, model, table):
    settings = Settings(model=model, out=str(tmp_path))
    found = resolve(settings)
    by_images = {"members": None}  # how many serve is seen later
    assert {k: getattr(found, k) for k in table} == table | by_images
    assert most_members(settings) == table["members"]
    kept = resolve(Settings(model=model, out=str(tmp_path), rank=3, lam=0.0))
    assert (kept.rank, kept.lam, kept.lr) == (3, 0.0, table["lr"])


def test_paper_values():
    """Those of Luo et al. 2025 for Stable Diffusion."""
    expected = {"lam": 0.05, "lr": 1e-4, "attacker_lr": 1e-5, "epochs": 400, "rank": 64}
    assert PAPER | expected == PAPER
    assert PAPER.keys() == FAST.keys()


def test_resolve_leaves_its_argument_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(method="mp")
    found = resolve(settings)
    assert settings == Settings(method="mp") and found.out == "runs/mp" and found.lr == FAST["lr"]
    assert resolve(found) == found


def test_vocabulary():
    names = {f.name for f in fields(Settings)}
    assert {*FREE, *LOOKS, *PAPER, *ABOVE_ZERO, *FROM_ZERO} <= names | {"epochs"}
    assert not set(FREE) & set(LOOKS) and not names & set(Settings.RETIRED)
    numbers = {f.name for f in fields(Settings) if f.type in (int, float, int | None, float | None)}
    assert numbers == {*ABOVE_ZERO, *FROM_ZERO}  # every number has its limits


def test_lambda_is_lam():
    assert flags("--lambda", 3) == flags("--lam", 3) == Settings(lam=3.0)


def test_help_shows_both_defaults(capsys, monkeypatch):
    """From the tables themselves: a changed table is a changed help."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setitem(FAST, "lr", 7e-3)
    with pytest.raises(SystemExit):
        flags("--help")
    text = capsys.readouterr().out
    assert "(default: 0.007 embedded, 0.0001 Stable Diffusion)" in text
    assert "(default: pooled embedded, raw Stable Diffusion)" in text
    view = text[: text.index("\nregularisation:")]
    assert 12 <= view.count("\n  --") <= 21 and "--attacker-lr" not in view
    assert len(fields(Settings)) <= 43


# ---- limits ----

HIGH = {k: v for k, v in (ABOVE_ZERO | FROM_ZERO).items() if v is not None}
REFUSED = [
    *((name, 0) for name in ABOVE_ZERO),
    *((name, -1) for name in FROM_ZERO),
    *((name, 2 * highest) for name, highest in HIGH.items()),
    *((name, float("inf")) for name in ("lr", "clip", "lam", "alpha")),
    *((name, float("nan")) for name in ("lr", "clip", "lam", "alpha")),
    ("rank", 10**400),
]  # fmt: skip


@pytest.mark.parametrize("name, value", REFUSED)
def test_numbers_out_of_range(tmp_path, name, value):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be .* not "):
        resolve(replace(Settings(out=str(tmp_path)), **{name: value}))


@pytest.mark.parametrize(
    "name, value",
    [*HIGH.items(), ("rank", 1), ("lam", 0.0), ("seed", 0), ("samples", 0), ("lr", 1e30)],
)
def test_numbers_within_range(tmp_path, name, value):
    method = "dp" if name in ("epsilon", "delta_dp") else "smp"
    settings = Settings(out=str(tmp_path), method=method)
    assert getattr(resolve(replace(settings, **{name: value})), name) == value


@pytest.mark.parametrize("alpha, fine", [(-2.0, True), (0.0, True), (-1e7, False)])
def test_alpha_of_an_adapter_from_elsewhere(tmp_path, alpha, fine):
    """What a run begun with --init has stored must not stand in the way of its --resume."""
    settings = Settings(out=str(tmp_path), alpha=alpha, init="adapter")
    if fine:
        assert resolve(settings).alpha == alpha
    else:
        with pytest.raises(UserError, match="--alpha"):
            resolve(settings)
    with pytest.raises(UserError, match="--alpha"):
        resolve(replace(settings, init=None))


# ---- the run folder ----


@pytest.mark.parametrize(
    "out, words",
    [
        ("x" * 300, "too long"),
        ("new/" + "x" * 300, "too long"),
        ("ä" * 130, "too long"),  # 260 bytes
        ("a/" * 3000, "cannot be a folder: File name too long"),
        ("file", "file is a file"),
        ("file/a/b", "file is a file"),
        ("/dev/null", "/dev/null is a file"),
        ("/dev/null/a", "/dev/null is a file"),
        ("dangling", "dangling is a link that leads nowhere"),
        ("dangling/a", "dangling is a link that leads nowhere"),
        ("loop", "loop is a link that leads nowhere"),
        ("used", "used already holds a run"),
    ],
)
def test_out_that_cannot_be(tmp_path, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "used").mkdir()
    write_json(tmp_path / "used" / "config.json", {})
    with pytest.raises(UserError, match=words):
        resolve(Settings(out=out))
    if out != "used":
        with pytest.raises(UserError, match=words):
            stored(Settings(out=out, resume=True))


@pytest.mark.parametrize("out", ["new", "new/er", "x" * 255, "folder", "link", "link/a", "."])
def test_out_that_can_be(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    before = sorted(tmp_path.iterdir())
    assert resolve(Settings(out=out)).out == out and sorted(tmp_path.iterdir()) == before


# ---- the settings of a stored run ----


def store(folder, summary=None, **changes):
    """The config.json of a run of rank 2."""
    begun = resolve(Settings(out=str(folder), rank=2, steps=5, resume=True))
    settings = asdict(begun) | {"resume": False} | changes
    write_json(folder / "config.json", {"settings": settings, "summary": summary})
    return folder / "config.json"


def test_stored_settings_and_what_may_change(tmp_path):
    store(tmp_path, {"seconds": 3.0}, state_every=1)
    given = flags("--out", tmp_path, "--resume", "--state-every", 2, "--steps", 5)
    found, summary = stored(given)
    assert (found.rank, found.steps, found.state_every, found.resume) == (2, 5, 2, True)
    assert found.out == str(tmp_path) and summary == {"seconds": 3.0}
    assert resolve(found) == found
    with pytest.raises(UserError, match="started with --steps 5, not 6: remove --steps"):
        stored(replace(given, steps=6))


def test_default_folder_that_holds_another_method(tmp_path, monkeypatch):
    """The run that was found is the one that is continued."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "smp").mkdir(parents=True)
    store(tmp_path / "runs" / "smp", method="mp")
    found, _ = stored(Settings(resume=True))
    assert (found.method, resolve(found).out) == ("mp", "runs/smp")


def test_nothing_stored(tmp_path):
    settings = Settings(out=str(tmp_path / "new"), resume=True)
    assert stored(settings) == (settings, None)


ANY = [name for name, (_, *neutral) in Settings.RETIRED.items() if neutral == [...]]


@pytest.mark.parametrize("flag", Settings.RETIRED)
def test_flags_of_older_versions(tmp_path, capsys, flag):
    """In the config of a run, such a flag is dropped where it changed nothing, and else refused
    with the last commit that had it, as it is on the command line.
    """
    commit, *neutral = Settings.RETIRED[flag]
    typed = "--" + flag.replace("_", "-")
    for value in ["whatever", 7] if flag in ANY else neutral:
        path = store(tmp_path, **{flag: value})
        found, _ = stored(Settings(out=str(tmp_path), resume=True))
        assert found.rank == 2 and flags("--config", path, "--seed", 7).seed == 7
    if flag not in ANY:
        path = store(tmp_path, **{flag: 0.3})
        with pytest.raises(UserError, match=f"{typed} 0.3 is no longer a flag.*{commit}"):
            stored(Settings(out=str(tmp_path), resume=True))
        with pytest.raises(SystemExit):
            flags("--config", path)
        capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        flags(typed, 3)
    assert stop.value.code == 2 and commit in capsys.readouterr().err


def test_what_changed_a_run_is_not_dropped():
    """Only what was looked at may have any value, and passes, which --steps says."""
    assert set(ANY) == {"epochs", "keep", "threads", "format", "sample_every"}


def test_a_flag_that_an_older_version_did_not_have(tmp_path):
    """It has its default."""
    path = store(tmp_path)
    config = json.loads(path.read_text())
    del config["settings"]["flip"]
    write_json(path, config)
    assert stored(Settings(out=str(tmp_path), resume=True))[0].flip is Settings().flip


def test_config_of_a_run_as_flags(tmp_path):
    """A copy of a run: all of its settings but the folder."""
    found = flags("--config", store(tmp_path), "--seed", 7)
    assert (found.rank, found.steps, found.seed, found.out) == (2, 5, 7, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"settings": [1]}',
        b'{"settings": {"rank": "2"}}',
        b'{"settings": {"rank": 2.5}}',
        b'{"settings": {"rank": {}}}',
        b'{"settings": {"method": "gan"}}',
        b'{"settings": {"method": null}}',
        b'{"settings": {"resume": 1}}',
        b'{"settings": {"epsilom": 1}}',
        b'{"settings": {"model": "\\u0000"}}',
        b'{"settings": {"model": "\xff"}}',
        b'{"settings": {}, "summary": [1]}',
    ],
)
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"config\.json is not a run's config .* take another --out"
    ):
        stored(Settings(out=str(tmp_path), resume=True))


def test_config_cut_anywhere_or_with_a_bad_byte(tmp_path):
    path = store(tmp_path, {"seconds": 3.0})
    whole = path.read_bytes().rstrip()
    for end in range(len(whole)):
        for content in (whole[:end], whole[:end] + b"\xff" + whole[end + 1 :]):
            path.write_bytes(content)
            with pytest.raises(UserError, match="is not a run's config"):
                stored(Settings(out=str(tmp_path), resume=True))


def test_config_that_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="is not a run's config"):
        stored(Settings(out=str(tmp_path), resume=True))
