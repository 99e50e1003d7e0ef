"""What is said while a command works: one line on a terminal, few in a log, nothing elsewhere."""

import io
import sys
from types import SimpleNamespace

import pytest

import progress
from progress import Stage


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The clock of all stages."""
    made = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=made))
    return made


@pytest.fixture
def speaking(monkeypatch, clock):
    """A function (stream) -> the stream, to which this process now speaks without a thread."""

    def begin(stream):
        monkeypatch.setattr(progress, "_speaker", progress.Speaker(stream))
        return stream

    return begin


def stages(*given):
    """Open stages (name, total, done), of which the first began 90 s before the clock."""
    return [Stage(name, total, done, began=910.0) for name, total, done in given]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([("loading", None, 0)], "loading, 1:30"),
        ([("smp", 400, 100)], "smp  25% [####............] 100/400 1:30<4:30"),
        ([("smp", 400, 0)], "smp   0% [................] 0/400 1:30<?"),
        ([("smp", 400, 400)], "smp 100% [################] 400/400 1:30<0:00"),
        (
            [("smp", 400, 200), ("held-out losses", None, 0), ("losses", 80, 20)],
            "smp  50% [########........] 200/400 1:30<1:30 held-out losses 20/80",
        ),
        (  # a clock around a bar gives it its name
            [("held-out losses", None, 0), ("losses", 80, 20)],
            "held-out losses  25% [####............] 20/80 1:30<4:30",
        ),
    ],
)
def test_the_line(clock, given, line):
    assert progress.line(stages(*given)) == line


def test_time_left_is_of_this_process(clock):
    """Of 400 steps 300 were done by an earlier one: 50 in 90 s leave 50."""
    bar = Stage("smp", 400, 350, first=300, began=910.0)
    assert progress.line([bar]).endswith(" 350/400 1:30<1:30")


@pytest.mark.parametrize("name", ["x" * 200, "a\x1b[2K\nb"])
def test_lines_fit(clock, name):
    """80 columns whatever the names, with the bar whole and nothing that moves the cursor."""
    given = stages((name, 10**6, 10**5), (name, None, 0), (name, 10**6, 3))
    for count in (1, 2, 3):
        line = progress.line(given[:count])
        assert len(line) <= 79 and line.isprintable() and "[#...............]" in line
    assert (progress.clock(7), progress.clock(11045)) == ("0:07", "3:04:05")


def test_a_terminal_has_one_line(clock, speaking):
    """It is rewritten at most twice a second, and kept where the work took long."""
    stream = speaking(Terminal())
    with progress.stage("encoding", 1000) as bar:
        for _ in range(1000):
            clock.now += 1 / 64
            bar.advance()
        assert 10 <= stream.getvalue().count("\r") <= 2 * 33 and "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\rencoding 100% [################] 1000/1000 0:15<0:00\n")
    before = len(stream.getvalue())
    with progress.stage("short"):
        pass
    assert not stream.getvalue()[before:].rsplit("\r", 1)[1]  # nothing of it is left


def test_a_log_is_not_flooded(clock, speaking):
    """The name of an outer stage, then a line every half minute."""
    stream = speaking(io.StringIO())
    with progress.stage("smp", 1000) as bar:
        for _ in range(1000):
            clock.now += 1 / 8
            for _ in progress.over([1, 2], "held-out losses"):
                pass
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "smp" and len(lines) == 5 and "\r" not in stream.getvalue()
    assert lines[1].startswith("smp  24% [###.............] 239/1000 0:30<1:35")


def test_what_is_printed_takes_the_line_away(clock, speaking):
    """A note stands alone, and the line returns below it."""
    stream = speaking(Terminal())
    out = progress.Above(stream, progress._speaker)
    with progress.stage("loading"):
        print("note: done", file=out)
    shown = stream.getvalue().split("\r")
    assert shown[-1] == "note: done\n" and shown[-2].isspace()
    assert out.isatty()


def test_an_error_closes_what_was_open(clock, speaking):
    """Also the stages of loops that were left."""
    speaking(io.StringIO())
    with pytest.raises(ValueError), progress.stage("outer"):
        for _ in progress.over([1, 2], "inner"):
            raise ValueError
    assert not progress._speaker.stages


def test_silent_until_told(capsys):
    """Notebooks, workers and other processes of a run say nothing; streams are as they were."""
    streams = sys.stdout, sys.stderr
    for _ in progress.over([1, 2], "quiet"):
        pass
    assert capsys.readouterr() == ("", "")
    progress.speak()
    try:
        with progress.stage("loud"):
            pass
    finally:
        progress.hush()
    assert capsys.readouterr().err == "loud\n" and (sys.stdout, sys.stderr) == streams
    with progress.stage("quiet again"):
        pass
    assert capsys.readouterr() == ("", "")
