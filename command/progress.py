"""What a command does while it works, on stderr: on a terminal one line that is rewritten, in a log
a line every half minute.  Nothing is shown before a command calls `start`.

    with progress.stage("loading the base model"):              # a clock
    with progress.stage("encoding images", 370) as bar:         # a bar
        bar.advance(32)
    for t in progress.over(timesteps, "SecMI"):                 # a bar over a loop

A stage within another one is shown behind it.  Where the pieces of a bar differ in cost, each is a
`part` of it, and the bar of what goes on in a part fills that part.  tqdm formats the line.  It
cannot draw it: its bars stay still where nothing advances, and a log of them is one line without
end.
Tested in tests/test_progress.py.
"""

import atexit
import contextlib
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from tqdm import TqdmWarning, tqdm
from tqdm.utils import ObjectWrapper, disp_len

from command.errors import shown

COLUMNS = 79  # of a line at most
TICK, LOG = 0.5, 30.0  # seconds between two lines on a terminal, and in a log
KEPT = 1.0  # a terminal keeps the last line of a stage that took so many seconds
BAR = "{desc:.24} {percentage:3.0f}% [{bar:12}] {n:.0f}/{total:.0f} {elapsed}<{remaining}{postfix}"
PARTS = BAR.replace(" {n:.0f}/{total:.0f}", "")  # which are of different sizes
CLOCK = "{desc}, {elapsed}{postfix}"
# about the libraries' bars in a notebook without ipywidgets, which are switched off
warnings.filterwarnings("ignore", "IProgress not found", TqdmWarning)


@dataclass(eq=False)
class Stage:
    """A piece of work: a bar if `total` is known, else a clock."""

    name: str
    total: float | None
    done: float
    first: float  # the part of `done` that an earlier process did
    note: str = ""  # shown behind the bar
    open: float = 0.0  # what is left of the part that goes on, see `part`
    filled: float = 0.0  # the share of it that the bars in it have reached
    began: float = field(default_factory=time.monotonic)

    def advance(self, count: float = 1) -> None:
        """Add `count` to what is done."""
        self.done += count

    @contextlib.contextmanager
    def part(self, size: float) -> Iterator[None]:
        """Inside, work goes on that counts as `size`.  It may have parts of its own."""
        before, around = self.done, self.open
        self.open, self.filled = size, 0.0
        try:
            yield
        finally:
            self.done, self.open, self.filled = before + size, max(around - size, 0.0), 0.0


class Line:
    """The open stages of this process, and their line on `stream`; None shows nothing."""

    def __init__(self, stream=None):
        self.stages: list[Stage] = []  # outermost first
        self.stream = stream
        self.live = stream is not None and stream.isatty()
        self.columns = 0  # that it takes on the terminal now
        self.lock = threading.RLock()

    def text(self) -> str:
        """The first bar, with the name of the outermost stage and the stages within the bar."""
        bar = next((s for s in self.stages if s.total), self.stages[0])
        within = self.stages[self.stages.index(bar) + 1 :]
        inner = ""
        for stage in [s for s in within if s.total][:1]:
            inner = f" {stage.done:.0f}/{stage.total:.0f}"
            bar.filled = max(bar.filled, min(stage.done / stage.total, 1))
        done = bar.done + bar.open * bar.filled
        return tqdm.format_meter(
            n=min(done, bar.total or done),
            total=bar.total,
            initial=bar.first,
            elapsed=time.monotonic() - bar.began,
            prefix=shown(self.stages[0].name),
            postfix=shown(within[0].name + inner if within else bar.note),
            bar_format=(PARTS if bar.open else BAR) if bar.total else CLOCK,
            ascii=".#",
            ncols=max(20, min(COLUMNS, shutil.get_terminal_size().columns - 1)),
        )

    def draw(self) -> None:
        """Rewrite the line of the terminal, or add one to the log."""
        text, before = self.text(), self.columns
        if not self.live:
            self.write(f"{text}\n")
            return
        self.columns = disp_len(text)
        self.write("\r" + text + " " * (before - self.columns))

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self.columns:
            self.write("\r" + " " * self.columns + "\r")
            self.columns = 0

    def write(self, text: str) -> None:
        """Write to the stream, if there is one and somebody still reads it."""
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                print(text, end="", file=self.stream, flush=True)

    def repeat(self) -> None:
        """Draw again and again until `stop`."""
        while self.stream is not None:
            time.sleep(TICK if self.live else LOG)
            with self.lock:
                if self.stages:
                    self.draw()

    def close(self, stage: Stage) -> None:
        """End a stage, and those within it that an error has left open."""
        del self.stages[self.stages.index(stage) + 1 :]
        if self.live and self.stages == [stage]:
            if time.monotonic() - stage.began >= KEPT:
                self.draw()
                self.write("\n")
                self.columns = 0
            self.clear()
        self.stages.pop()


class Above(ObjectWrapper):
    """A stream of the terminal that has the line.  What is printed replaces the line, which returns
    below it.  (tqdm.write is for whole lines, but print writes pieces.)
    """

    def write(self, text: str) -> int:
        """Print."""
        with _line.lock:
            _line.clear()
            return self._wrapped.write(text)


_line = Line()


def start(main: bool = True) -> None:
    """Show the progress of this process on stderr from now on.

    With `main` False, for the other processes of a run, silence what this one prints.
    """
    global _line
    if not main:
        # open until the process ends
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        return
    _line = Line(sys.stderr)
    if _line.live:
        sys.stderr = Above(sys.stderr)
        sys.stdout = Above(sys.stdout) if sys.stdout.isatty() else sys.stdout
    threading.Thread(target=_line.repeat, daemon=True).start()
    atexit.register(stop)


def stop() -> None:
    """Show nothing any more, and restore stdout and stderr."""
    global _line
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s._wrapped if isinstance(s, Above) else s for s in streams)
    _line.stream = None
    _line = Line()


@contextlib.contextmanager
def stage(name: str, total: float | None = None, done: float = 0) -> Iterator[Stage]:
    """Inside, this work goes on.  Of `total` pieces an earlier process did `done`."""
    line, work = _line, Stage(name, total, done, done)
    with line.lock:
        line.stages.append(work)
        if line.stages == [work]:  # a log then has its name alone
            line.draw() if line.live else line.write(f"{shown(name)}\n")
    try:
        yield work
    finally:
        with line.lock:
            if work in line.stages:
                line.close(work)


def over(items: Collection, name: str) -> Iterator:
    """The items, with a bar over them."""
    with stage(name, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()
