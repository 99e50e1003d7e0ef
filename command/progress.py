"""What a command says while it works, by tqdm: on a terminal one line that is rewritten, in a log a
line now and then.  Until a command calls `speak` nothing is said, as in notebooks and workers.

    with progress.stage("loading the base model"):              # a clock
    with progress.stage("encoding images", 370) as bar:         # a bar
        bar.advance(32)
    for t in progress.over(timesteps, "SecMI"):                 # a bar over a loop

Stages within a stage stand behind it, on the same line.  Tested in tests/test_progress.py.
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
from tqdm.utils import ObjectWrapper

WIDTH = 79  # columns of a line at most
TICK, LOG = 0.5, 30.0  # seconds between two lines on a terminal, and in a log
TOLD = 1.0  # seconds that a stage must have taken for a terminal to keep its line
BAR = "{desc:.24} {percentage:3.0f}% [{bar:12}] {n:.0f}/{total:.0f} {elapsed}<{remaining}{postfix}"
CLOCK = "{desc}, {elapsed}{postfix}"
tqdm.set_lock(threading.RLock())  # only one process speaks
# the libraries' bars in a notebook without ipywidgets; nobody here draws them
warnings.filterwarnings("ignore", "IProgress not found", TqdmWarning)


@dataclass(eq=False)
class Stage:
    """A piece of work: a bar where `total` is known, else a clock."""

    name: str
    total: float | None
    done: float
    first: float  # of `done`, what an earlier process did
    note: str = ""  # behind the bar
    began: float = field(default_factory=time.time)

    def advance(self, count: float = 1) -> None:
        """So much more is done; the next tick shows it."""
        self.done += count


class Line(tqdm):
    """A tqdm bar that is whichever open stage is to be seen; without a stream it is silent."""

    stands = False  # whether it is on the terminal now

    def __init__(self, stream=None):
        self.stages: list[Stage] = []  # that are open, outermost first
        self.live = stream is not None and stream.isatty()
        # no smoothing: one slow step foretells nothing; the delay leaves all drawing to `draw`
        look = {"ascii": ".#", "smoothing": 0, "position": 0, "nrows": 20, "delay": float("inf")}
        super().__init__(file=stream, disable=stream is None, **look)

    def draw(self, begins: bool = False, end: str = "") -> None:
        """Show the first bar, under the name of the outermost stage, and what is open within it;
        when a stage `begins`, a log has its name.
        """
        with self.get_lock():
            if self.disable or not self.stages:
                return
            shown = next((s for s in self.stages if s.total), self.stages[0])
            within = self.stages[self.stages.index(shown) + 1 :]
            inner = next((f" {s.done:.0f}/{s.total:.0f}" for s in within if s.total), "")
            self.desc = printable(self.stages[0].name)
            self.postfix = printable(within[0].name + inner if within else shown.note)
            self.total, self.initial, self.start_t = shown.total, shown.first, shown.began
            self.n = min(shown.done, shown.total or shown.done)
            self.bar_format = BAR if shown.total else CLOCK
            self.ncols = max(20, min(WIDTH, shutil.get_terminal_size().columns - 1))
            if self.live:
                self.sp(f"{self}{end}")
                self.stands = not end
                return
            with contextlib.suppress(OSError, ValueError):  # whoever read has gone
                print(self.desc if begins else self, file=self.fp, flush=True)

    def tick(self) -> None:
        """Draw as long as the process speaks; tqdm's own monitor sees only bars that advance."""
        while not self.disable:
            time.sleep(TICK if self.live else LOG)
            self.draw()

    def closed(self, stage: Stage) -> None:
        """A stage and those within it have ended; a terminal keeps the line of a long outer one."""
        with self.get_lock():
            if stage not in self.stages:  # a loop that an error has left
                return
            del self.stages[self.stages.index(stage) + 1 :]
            if self.live and self.stages == [stage]:
                self.clear()
                if time.time() - stage.began >= TOLD:
                    self.draw(end="\n")
            self.stages.pop()


class Above(ObjectWrapper):
    """A stream of the terminal with the line on it: what is printed takes the line away until the
    next tick.  (tqdm.write is for whole lines, and print writes pieces.)
    """

    def write(self, text: str) -> int:
        """Print."""
        with tqdm.get_lock():
            if _line.stands:
                _line.clear()
            _line.stands = False
            return self._wrapped.write(text)


_line = Line()


def speak(main: bool = True) -> None:
    """From now on this process says what it does, on stderr; one of several that is not the `main`
    one says nothing from now on, but for errors.
    """
    global _line
    if not main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        return
    _line = Line(sys.stderr)
    if _line.live:
        sys.stderr = Above(sys.stderr)
        sys.stdout = Above(sys.stdout) if sys.stdout.isatty() else sys.stdout
    threading.Thread(target=_line.tick, daemon=True).start()
    atexit.register(hush)


def hush() -> None:
    """The end of it; streams are as they were."""
    global _line
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s._wrapped if isinstance(s, Above) else s for s in streams)
    _line.close()
    _line = Line()


@contextlib.contextmanager
def stage(name: str, total: float | None = None, done: float = 0) -> Iterator[Stage]:
    """Inside, this work is going on; of `total` pieces `done` are behind us already."""
    line, work = _line, Stage(name, total, done, done)
    line.stages.append(work)
    if line.stages == [work]:
        line.draw(begins=True)
    try:
        yield work
    finally:
        line.closed(work)


def over(items: Collection, name: str) -> Iterator:
    """The items, with a bar over them."""
    with stage(name, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def printable(text: str) -> str:
    """One line, without what would move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)
