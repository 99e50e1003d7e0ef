"""What is said while a command works: one line on a terminal, few in a log, nothing elsewhere."""

import contextlib
import io
import os
import re
import sys
import time

import pytest
from tqdm.utils import disp_len

from command import progress


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def speaking(monkeypatch):
    """A function (stream) -> the stream, to which this process now speaks; no thread draws."""

    def begin(stream):
        monkeypatch.setattr(progress, "_line", progress.Line(stream))
        return stream

    return begin


def drawn(*given):
    """The line with stages (name, total, done) open, of which all began 90 s ago, with 0 done."""
    line = progress._line
    line.stages = [progress.Stage(*stage, first=0) for stage in given]
    for stage in line.stages:
        stage.began -= 90.2
    line.draw()
    return line.stream.getvalue().split("\r")[-1]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([("loading", None, 0)], "loading, 01:30"),
        ([("smp", 400, 100)], "smp  25% [###.........] 100/400 01:30<04:30"),
        ([("smp", 400, 0)], "smp   0% [............] 0/400 01:30<?"),
        ([("smp", 400, 401)], "smp 100% [############] 400/400 01:30<00:00"),
        ([("pictures", 4, 2.66)], "pictures  66% [#######.....] 3/4 01:30<00:45"),
        (
            [("smp", 400, 200), ("held-out losses", None, 0), ("losses", 80, 20)],
            "smp  50% [######......] 200/400 01:30<01:30, held-out losses 20/80",
        ),
        (  # a clock around a bar gives it its name
            [("held-out losses", None, 0), ("losses", 80, 20)],
            "held-out losses  25% [###.........] 20/80 01:30<04:30",
        ),
    ],
)
def test_the_line(speaking, given, line):
    speaking(Terminal())
    assert drawn(*given) == line


def test_time_left_is_of_this_process(speaking):
    """Of 400 steps 300 were done by an earlier one: 50 in 90 s leave 50."""
    stream = speaking(Terminal())
    with progress.stage("smp", 400, done=300) as bar:
        bar.began -= 90.2
        bar.advance(50)
        bar.note = "loss 0.1"
        progress._line.draw()
    assert " 350/400 01:30<01:30, loss 0.1" in stream.getvalue()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["x" * 200, "a\x1b[2K\nb" * 9, "\u58f0" * 90])
def test_lines_fit(speaking, name, count):
    """80 columns whatever the names, with the bar in it and nothing that moves the cursor."""
    speaking(Terminal())
    line = drawn(*[(name, 10**6, 10**5), (name, None, 0), (name, 10**6, 3)][:count])
    assert disp_len(line) <= 79 and line.isprintable() and "[#...........]" in line


@contextlib.contextmanager
def terminal(monkeypatch):
    """Inside, this process speaks to a terminal; gives a function that reads what it was sent."""
    ours, its = os.openpty()
    with (
        open(its, "w") as out,
        open(its, "w", closefd=False) as err,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        progress.start()
        yield lambda: os.read(ours, 10**6).decode()
        progress.stop()
        assert sys.stdout is out and sys.stderr is err
    os.close(ours)


def test_a_terminal_has_one_line(monkeypatch):
    """It is rewritten though nothing advances, and kept where the work took long."""
    monkeypatch.setattr(progress, "TICK", 0.05)
    with terminal(monkeypatch) as sent:
        with progress.stage("encoding", 1000) as bar:
            for _ in range(1000):
                bar.advance()
            bar.began -= 15
            shown, until = "", time.monotonic() + 20
            while shown.count("\r") < 4 and time.monotonic() < until:
                shown += sent()
            assert shown.count("\r") >= 4 and time.monotonic() - bar.began >= 15.1
            assert "\n" not in shown
        last = r"\rencoding 100% \[############\] 1000/1000 00:\d\d<00:00\r\n$"
        assert re.search(last, sent())
        with progress.stage("short"):
            pass
        assert re.fullmatch(r"(\rshort, 00:0\d *)+\r +\r+", sent())  # nothing of it is left


def test_what_is_printed_takes_the_line_away(monkeypatch):
    """It stands alone, also where it comes in pieces, and the line returns below it."""
    monkeypatch.setattr(progress, "TICK", 1000)
    with terminal(monkeypatch) as sent, progress.stage("loading"):
        assert sent() == "\rloading, 00:00"
        print("note:", "done", flush=True)
        shown = sent()
        while not shown.endswith("\n"):  # a terminal may give it in pieces
            shown += sent()
        assert re.fullmatch(r"\r {14}\r+note: done\r\n", shown)
        progress._line.draw()  # as the next tick does
        assert sent() == "\rloading, 00:00" and sys.stdout.isatty()


def test_a_log_is_not_flooded(capsys, monkeypatch):
    """The name of an outer stage, then a line now and then, whatever goes on."""
    monkeypatch.setattr(progress, "LOG", 0.2)
    progress.start()
    with progress.stage("smp", 10**6) as bar:
        while time.monotonic() < bar.began + 0.7:
            for _ in progress.over([1, 2], "held-out losses"):
                time.sleep(0.001)
            bar.advance()
    progress.stop()
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert lines[0] == "smp" and 2 <= len(lines) <= 5 and "\r" not in shown
    assert re.match(r"smp   0% \[\.{12}\] \d+/1000000 00:00<", lines[1])


def test_a_log_that_nobody_reads(speaking):
    """Work goes on where stderr was a pipe that has been closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as stream:
        speaking(stream)
        with progress.stage("smp", 2) as bar:
            progress._line.draw()
            bar.advance()
        os.close(writer)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert bar.done == 1


def test_an_error_closes_what_was_open(speaking):
    """Also the stages of loops that were left."""
    speaking(io.StringIO())
    with pytest.raises(ValueError), progress.stage("outer"):
        for _ in progress.over([1, 2], "inner"):
            raise ValueError
    assert not progress._line.stages


def test_silent_until_told(capsys):
    """Notebooks, workers and other processes of a run say nothing; streams are as they were."""
    streams = sys.stdout, sys.stderr
    for _ in progress.over([1, 2], "quiet"):
        pass
    assert capsys.readouterr() == ("", "")
    progress.start()
    try:
        with progress.stage("loud"):
            pass
    finally:
        progress.stop()
    assert capsys.readouterr().err == "loud\n" and (sys.stdout, sys.stderr) == streams
    with progress.stage("quiet again"):
        pass
    assert capsys.readouterr() == ("", "")


def test_only_the_main_process_speaks(capsys, monkeypatch):
    """What another one prints is not to be seen, but for errors."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # as it was, afterwards
    progress.start(main=False)
    with progress.stage("mine"):
        print("a note")
    print("error", file=sys.stderr)
    sys.stdout.close()
    assert capsys.readouterr() == ("", "error\n")


def test_parts_count_by_their_size(speaking):
    """Of 10 a part of 8 is half done by the bar within it; parts within a part fill it up to its
    own size, and the bars that follow fill the rest.
    """
    stream = speaking(Terminal())

    def share():
        progress._line.draw()
        return int(re.search(r"(\d+)%", stream.getvalue().split("\r")[-1])[1])

    with progress.stage("attacks", 10) as bar:
        with bar.part(8), progress.stage("SecMI", 4) as inner:
            inner.advance(2)
            assert share() == 40
        assert share() == 80
        with bar.part(2):
            with bar.part(1.5), progress.stage("encoding", 3) as inner:
                inner.advance(1)
                assert share() == 85
            with progress.stage("losses", 2) as inner:
                assert share() == 95
                inner.advance(1)
                assert share() == 98  # 95 and half of the rest
    assert bar.done == 10
