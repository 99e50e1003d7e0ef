"""command/: flags from the command line and from files, errors of one line, whole files."""

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import command
from command.errors import UserError, one_line_errors, shown, this_command
from command.flags import GROUPS, option, parse
from command.whole_files import read_json, write_json, write_whole

ROOT = Path(__file__).parent.parent
TABLES = {"small": {"lr": 1e-3, "rank": 4}, "large": {"lr": 2.5e-5, "rank": 4}}


@dataclass
class Flags:
    """One field of every kind."""

    runs: list[str] | None = option(None, "folders")
    lam: float | None = option(None, "weight", group="method", aliases=("lambda", "privacy"))
    lr: float | None = option(None, "rate", group="optimisation", tables=TABLES)
    rank: int | None = option(None, "of the adapter", group="adapter", tables=TABLES)
    clip: float = option(1e-5, "50 % of the norm")
    batch_size: int = option(8, "pictures", group="optimisation")
    kind: str = option("a", "which", ("a", "b"))
    note: str | None = option(None, "words")
    prompt: list[str] | None = option(None, "a text, more than once")
    steps: int | None = option(None, "how many", group="optimisation", beats="epochs")
    epochs: int | None = option(None, "passes", group="optimisation")
    ema: float = option(0.0, "decay", group="regularisation")
    fast: bool = option(False, "hurry", group="saving and looking")
    out: str | None = option(None, "folder", group="what and where")
    resume: bool = option(False, "go on", group="what and where")

    RETIRED: ClassVar[dict] = {"every": ("abc1234", 1, None)}


def read(*argv):
    return parse(Flags, "", "runs", [str(a) for a in argv])


def said(capsys, *argv):
    """The one line on stderr of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- flags ----


@pytest.mark.parametrize(
    "argv, field, value",
    [
        ([], "lam", None),
        (["--lam", "2"], "lam", 2.0),
        (["--lambda", "2"], "lam", 2.0),
        (["--privacy=-2"], "lam", -2.0),
        (["--batch-size", "3"], "batch_size", 3),
        (["--fast"], "fast", True),
        (["--fast", "--no-fast"], "fast", False),
        (["a", "b"], "runs", ["a", "b"]),
        (["--kind", "b", "a"], "kind", "b"),
        (["--prompt", "a b", "x", "--prompt", "c"], "prompt", ["a b", "c"]),
    ],
)
def test_flags(argv, field, value):
    found = getattr(read(*argv), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--batch", "3"], "--batch"),  # an abbreviation
        (["--lamb", "3"], "--lamb"),
        (["--batch-size", "3.0"], "--batch-size"),
        (["--kind", "c"], "--kind"),
        (["--kind"], "--kind"),
        (["--lam", "x\n\x1b[31m"], "--lam"),
        (["--unknown\n"], "--unknown"),
        (["--stepz", "3"], "--stepz; did you mean --steps?"),
        (["--train_batch_size=3"], "; did you mean --batch-size?"),
        (["--max_train_steps", "3"], "; it is --steps here"),
        (["--kind", "bb"], "; did you mean b?"),
        (["--every", "1"], "--every is no longer a flag; commit abc1234"),
    ],
)
def test_refused_flags(capsys, argv, word):
    line = said(capsys, *argv)
    assert word in line and "--help" in line and "\x1b" not in line


def help_of(capsys, settings=Flags, doc="    python x.py  # an example"):
    with pytest.raises(SystemExit) as stop:
        parse(settings, doc, "runs" if settings is Flags else None, ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_in_order(capsys):
    """The examples come first, then the groups; the first one holds the bare words and --config."""
    text = help_of(capsys)
    heads = re.findall(r"^(\w[\w ]*):$", text, re.M)
    assert heads == [name for name in GROUPS if name in heads]  # without the empty ones
    assert heads[:3] == ["what and where", "method", "adapter"]
    assert heads[3:] == ["optimisation", "saving and looking", "regularisation", "advanced"]
    assert "decay (default: 0)" in " ".join(text.split())
    parts = dict(zip(heads, re.split(r"^\w[\w ]*:$", text, flags=re.M)[1:], strict=True))
    assert text.index("an example") < text.index("what and where:")
    assert {"runs", "--out", "--resume", "--config"} <= set(parts["what and where"].split())
    assert "--clip" in parts["advanced"] and "--lr" in parts["optimisation"]


@pytest.mark.parametrize("script", ["train", "evaluate", "audit"])
def test_help_of_the_commands_fits_80_columns(capsys, monkeypatch, script):
    """A sentence, the examples, then the flags; nothing of how the code is tested, no path of this
    machine.
    """
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(script)
    settings = module.Audit if script == "audit" else module.Settings
    with pytest.raises(SystemExit):
        parse(settings, module.__doc__, {"evaluate": "runs", "audit": "audits"}.get(script), ["-h"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 79
    opening = text[: text.index("what and where:")]
    assert 3 <= opening.count("    python ") <= 10 and "tests/" not in text
    assert str(Path(module.__file__).parent) not in text


@pytest.mark.parametrize(
    "words",
    [
        "weight\n",  # None depends on nothing
        "rate (default: 0.001 small, 2.5e-05 large)",
        "of the adapter (default: 4)",  # the same for both
        "50 % of the norm (default: 1e-05)",
        "pictures (default: 8)",
        "hurry\n",
        "--lam X, --lambda X",
    ],
)
def test_help_tells_the_default(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "200")
    assert words in help_of(capsys)


# ---- flags from a file ----


def toml(tmp_path, text):
    (tmp_path / "flags.toml").write_text(text)
    return tmp_path / "flags.toml"


def run_config(tmp_path, **settings):
    write_json(tmp_path / "config.json", {"settings": settings, "commit": "1234567"})
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    "text, argv, expected",
    [
        ("lam = 2", [], {"lam": 2.0}),
        ("lambda = 2.5", [], {"lam": 2.5}),
        ("batch-size = 3", [], {"batch_size": 3}),
        ("batch_size = 3", ["--batch-size", 8], {"batch_size": 8}),  # 8 is also the default
        ("lam = 2", ["--privacy", 3], {"lam": 3.0}),
        ("fast = true", [], {"fast": True}),
        ("fast = true", ["--no-fast"], {"fast": False}),
        ("runs = ['a', 'b']", [], {"runs": ["a", "b"]}),
        ("runs = ['a', 'b']", ["c"], {"runs": ["c"]}),
        ("prompt = ['a', 'b']", [], {"prompt": ["a", "b"]}),
        ("prompt = ['a', 'b']", ["--prompt", "c"], {"prompt": ["c"]}),
        ("out = 'x'\nresume = true", [], {"out": "x", "resume": True}),
        ("every = 1", [], {}),
        ("steps = 9", [], {"steps": 9}),
        ("steps = 9", ["--epochs", 2], {"steps": None, "epochs": 2}),
        ("steps = 9", ["--epochs", 2, "--steps", 7], {"steps": 7, "epochs": 2}),
        ("", [], {}),
    ],
)
def test_toml(tmp_path, text, argv, expected):
    """Defaults, then the file, then the command line; types are those of the flags."""
    found = vars(read("--config", toml(tmp_path, text), *argv))
    assert found == vars(Flags()) | expected
    assert {k: type(found[k]) for k in expected} == {k: type(v) for k, v in expected.items()}


def test_config_of_a_run(tmp_path):
    """The settings of a run, but never into its folder."""
    path = run_config(tmp_path, lam=None, rank=2, clip=1, every=1, out="runs/a", resume=True)
    assert read("--config", path) == Flags(rank=2, clip=1.0)
    assert read("--config", path, "--out", "b") == Flags(rank=2, clip=1.0, out="b")


@pytest.mark.parametrize(
    "text, words",
    [
        ("lamb = 2", "no flag lamb"),
        ("lam = 2\nlambda = 3", "twice"),
        ("lam = '2'", "lam must be a number"),
        ("lam = true", "lam must be a number"),
        ("batch-size = 3.0", "batch-size must be a whole number"),
        ("batch_size = false", "batch_size must be a whole number"),
        (f"batch_size = 0x{'f' * 5000}", "batch_size is too large"),
        (f"lam = {'9' * 400}", "lam is too large"),
        ("fast = 1", "fast must be true or false"),
        ("note = 3", "note must be a text"),
        ("note = 'a\\u0000'".replace("'", '"'), "note must be a text"),
        ("note = 2020-01-01", "note must be a text"),
        ("runs = 'a'", "runs must be a list"),
        ("runs = ['a', 1]", "runs must be a list"),
        ("kind = 'c'", "kind must be one of a, b"),
        ("kind = ['a']", "kind must be one of a, b"),
        ("every = 2", "--every 2 is no longer a flag; commit abc1234"),
        ("batchsize = 2", "no flag batchsize; did you mean batch_size?"),
        ("kind = 'aa'", "must be one of a, b, not 'aa'; did you mean a?"),
        ("[settings]\nlam = 2", "no flag settings"),
        ("lam = ", "cannot read"),
        (f"lam = {'9' * 5000}", "cannot read"),
        ("lam = 2\nlam = 3", "cannot read"),
    ],
)
def test_refused_toml(tmp_path, capsys, text, words):
    """One line names the file and the key."""
    line = said(capsys, "--config", toml(tmp_path, text))
    assert "flags.toml" in line and words in line


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot read"),
        (b'{"settings": {"lam": 2.0}', "cannot read"),
        (b'{"settings": {"note": "\xff"}}', "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b"[]", "holds no settings"),
        (b"{}", "holds no settings"),
        (b'{"settings": [1]}', "holds no settings"),
        (b'{"settings": {"lam": [2]}}', "lam must be a number"),
        (b'{"settings": {"batch_size": null}}', "batch_size must be a whole number"),
        (b'{"settings": {"note": "\\ud800"}}', "note must be a text"),
        (b'{"settings": {"a\\nb": 1}}', "no flag a\\nb"),
    ],
)
def test_refused_config(tmp_path, capsys, content, words):
    (tmp_path / "config.json").write_bytes(content)
    line = said(capsys, "--config", tmp_path / "config.json")
    assert "config.json" in line and words in line


@pytest.mark.parametrize("name", ["no.toml", "no.json", ".", "/dev/zero", "pipe", "x" * 300])
def test_config_that_is_no_file(tmp_path, capsys, name):
    os.mkfifo(tmp_path / "pipe")
    assert "cannot read" in said(capsys, "--config", tmp_path / name)


# ---- errors of one line ----


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain, Größe 3 µm", "plain, Größe 3 µm"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u2028\u202e\x00", "\\u2028\\u202e\\x00"),
        ("\udcff", "\\udcff"),  # a byte of a file name that is no UTF-8
        (Path("a\nb"), "a\\nb"),
    ],
)
def test_shown(text, expected):
    assert shown(text) == expected


@pytest.mark.parametrize(
    "error, words",
    [
        (UserError("there is no a\nb"), "there is no a\\nb"),
        (OSError(errno.ENOSPC, "No space left", "a.json"), "a.json: No space left"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a\nb"), "a\\nb: File name too long"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/g"), "f/g: Not a directory"),
        (OSError(errno.EIO, "Input/output error", "i"), "i: Input/output error"),
        (OSError(errno.ELOOP, "Too many links", "l"), "l: Too many links"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d"), "d: Is a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file", "n"), "n: No such file"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
    ],
)
def test_one_line(capsys, error, words):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shape"), OSError(errno.EBADF, "x")]
)
def test_our_failures_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_interrupted(capsys, monkeypatch):
    """With the command that continues, as it could be typed again, where there is one."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/my run", "--at", "best"])
    command = "; to continue: python evaluate.py 'runs/my run' --at best"
    for again, line in ((None, ""), (this_command, command)):
        with pytest.raises(SystemExit) as stop, one_line_errors(again):
            raise KeyboardInterrupt
        assert stop.value.code == 130 and capsys.readouterr().err == f"stopped{line}\n"


def test_terminated(capsys):
    """As an interrupt, with its own exit code; afterwards SIGTERM does what it did."""
    with pytest.raises(SystemExit) as stop, one_line_errors(lambda: "python evaluate.py x"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped; to continue: python evaluate.py x\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("lines", [1, 100_000])
def test_closed_pipe_is_quiet(lines):
    """As `| head` does: no traceback, also where all that is printed waits in the buffer."""
    code = "from command.errors import one_line_errors\nwith one_line_errors():\n"
    code += f"    for _ in range({lines}): print('a line')"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=writer, stderr=-1, cwd=ROOT, env=env)
    finally:
        os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_a_console_that_cannot_show_a_name(encoding):
    """It is spelled out, on stdout as on stderr."""
    code = "import sys; from command import flags; from settings import Settings\n"
    code += "s = flags.parse(Settings, ''); print(s.caption, s.out); print(s.out, file=sys.stderr)"
    command = [sys.executable, "-c", code, "--caption", "\u0e01\u20ac", "--out", b"r\xff"]
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == 0 and done.stderr.strip() == rb"r\udcff", done.stderr
    shown = {"cp1252": b"\x80"}.get(encoding, rb"\u20ac")
    assert done.stdout.split() == [rb"\u0e01" + shown, rb"r\udcff"]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "audit.py"])
def test_without_docstrings(script):
    """--help works under python -OO; training does not, as transformers reads docstrings."""
    for argv, code, words in ((["-h"], 0, "--device"), ([], 2, "leave -OO out")):
        command = [sys.executable, "-OO", str(ROOT / script), *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr


def test_imports_nothing_heavy():
    code = "import sys, settings; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- whole files ----


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_write_whole_has_the_usual_permissions(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write_whole(tmp_path / "a.bin", b"\xff\x00")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"\xff\x00" and path.stat().st_mode & 0o777 == mode
    assert list(tmp_path.iterdir()) == [path]


def test_write_whole_by_many_at_once(tmp_path):
    """Every reader sees one writer's content, whole; nothing is left aside and no writer fails."""
    path, failed = tmp_path / "a.txt", []
    write_whole(path, "0" * 10_000)

    def write(digit):
        try:
            for _ in range(25):
                write_whole(path, digit * 10_000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(digit,)) for digit in "1234"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        content = path.read_text()
        assert content == content[0] * 10_000
    assert not failed and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_write_whole_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failure, step):
    """While it writes, or when it renames."""
    path = write_whole(tmp_path / "a.txt", "old")

    def fail(*_):
        assert [p.match("a.txt.*.tmp") for p in tmp_path.iterdir() if p != path] == [True]
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)) as caught:
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert getattr(caught.value, "filename", str(path)) == str(path)


def test_write_whole_where_fsync_is_unknown(tmp_path, monkeypatch):
    """Some network drives answer EINVAL; what else a disk says counts."""

    def fsync(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    code = errno.EINVAL
    assert write_whole(tmp_path / "a.txt", "new").read_text() == "new"
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("name", ["d", "d/f/g", "x" * 300, "no/such"])
def test_write_whole_where_no_file_can_be(tmp_path, capsys, name):
    """Onto a folder, below a file, a name too long, no folder: one line that names the file."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("")
    with pytest.raises(SystemExit) as stop, one_line_errors():
        write_whole(tmp_path / name, "new")
    assert stop.value.code == 2 and f"{tmp_path / name}: " in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp"))


def test_write_whole_spells_out_what_utf8_cannot_say(tmp_path):
    """Such as the name of a folder in another encoding."""
    assert (
        write_whole(tmp_path / "a", "r\udcff \u20ac").read_bytes()
        == rb"r\udcff " + "\u20ac".encode()
    )


def test_json_there_and_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": "Größe"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_bytes())
    with pytest.raises(UserError, match=r"nowhere\.json: No such file"):
        read_json(tmp_path / "nowhere.json")


def test_threads_wait_for_a_moment(monkeypatch):
    """Unless the user has said how long."""
    for given, want in ((None, "20000"), ("7", "7")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        importlib.reload(command)
        assert os.environ["GOMP_SPINCOUNT"] == want
