"""What a command says while it works: on a terminal one line that is rewritten, in a log a line
now and then.  Until a command calls `speak` nothing is said, as in notebooks and workers.

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
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

WIDTH, BAR = 79, 16  # letters of a line at most, and of the bar in it
TICK, LOG = 0.5, 30.0  # seconds between two lines on a terminal, and in a log
TOLD = 1.0  # seconds that a stage must have taken for a terminal to keep its line


@dataclass(eq=False)
class Stage:
    """A piece of work: a bar where `total` is known, else a clock."""

    name: str
    total: float | None = None
    done: float = 0.0
    note: str = ""  # behind the bar
    first: float = 0.0  # of `done`, what an earlier process did
    began: float = field(default_factory=lambda: time.monotonic())

    def advance(self, count: float = 1) -> None:
        """So much more is done."""
        self.done += count
        _speaker.draw()


class Speaker:
    """Shows the open stages on a stream; a silent one, with stream None, only keeps them."""

    def __init__(self, stream=None):
        self.stream, self.stages = stream, []
        self.live = bool(stream) and stream.isatty()
        self.width = 0  # letters of the line that stands on the terminal
        self.drawn = time.monotonic()
        self.lock, self.ended = threading.RLock(), threading.Event()

    def draw(self, now: bool = False) -> None:
        """Show where the work is, if the last line is old enough or `now`."""
        due = time.monotonic() - self.drawn >= (TICK if self.live else LOG)
        if not self.stream or not (due or now):
            return
        with self.lock:
            if self.stages and not self.ended.is_set():
                self.write(line(self.stages, room()), keep=not self.live)

    def write(self, text: str, keep: bool) -> None:
        """`text` in place of the line that stands there; what is kept is not rewritten."""
        with self.lock, contextlib.suppress(OSError, ValueError):  # whoever read has gone
            end = "\n" if keep else ""
            start = f"\r{' ' * self.width}\r" if self.width else ""
            self.stream.write(start + text + end)
            self.stream.flush()
            self.width, self.drawn = (0 if keep else len(text)), time.monotonic()

    def clear(self) -> None:
        """Take the line away: something else is printed."""
        if self.width:
            self.write("", keep=False)

    def opened(self, stage: Stage) -> None:
        """A stage begins; a log names those that are within no other."""
        self.stages.append(stage)
        if self.stream and not self.live and len(self.stages) == 1:
            self.write(printable(stage.name), keep=True)
        self.draw(now=self.live)

    def closed(self, stage: Stage) -> None:
        """A stage and those within it have ended; a terminal keeps the line of a long outer one."""
        with self.lock:
            if stage not in self.stages:
                return
            outer = self.stages[0] is stage
            last = line([stage], room())
            del self.stages[self.stages.index(stage) :]
            if self.stream and self.live and outer:
                self.clear()
                if time.monotonic() - stage.began >= TOLD:
                    self.write(last, keep=True)

    def tick(self) -> None:
        """Keep the clock going, for as long as there is a process."""
        while not self.ended.wait(TICK):
            self.draw()


class Above:
    """A stream of the terminal on which the line stands: what is printed takes the line away."""

    def __init__(self, stream, speaker: Speaker):
        self.stream, self.speaker = stream, speaker

    def write(self, text: str) -> int:
        """Print; the line comes back with the next tick."""
        self.speaker.clear()
        return self.stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


_speaker = Speaker()


def speak(main: bool = True) -> None:
    """From now on this process says what it does, on stderr; one of several that is not the `main`
    one says nothing from now on, but for errors.
    """
    global _speaker
    if not main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        return
    _speaker = Speaker(sys.stderr)
    if _speaker.live:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                setattr(sys, name, Above(stream, _speaker))
    threading.Thread(target=_speaker.tick, daemon=True).start()
    atexit.register(hush)


def hush() -> None:
    """The end of it; streams are as they were."""
    global _speaker
    _speaker.clear()
    _speaker.ended.set()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, stream.stream if isinstance(stream, Above) else stream)
    _speaker = Speaker()


@contextlib.contextmanager
def stage(name: str, total: float | None = None, done: float = 0.0) -> Iterator[Stage]:
    """Inside, this work is going on; of `total` pieces `done` are behind us already."""
    speaker, work = _speaker, Stage(name, total, done, first=done)
    speaker.opened(work)
    try:
        yield work
    finally:
        speaker.closed(work)


def over(items: Collection, name: str) -> Iterator:
    """The items, with a bar over them."""
    with stage(name, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


# --------------------------------------------------------------------------------------------------
# The line


def line(stages: list[Stage], width: int = WIDTH) -> str:
    """Open stages, outermost first, in at most `width` letters: the first bar, under the name of
    the outermost, and behind it what is done within it, or its note.
    """
    at = next((i for i, s in enumerate(stages) if s.total), None)
    if at is None:
        return printable(f"{stages[0].name}, {clock(_age(stages[0]))}")[:width]
    bar, within = stages[at], stages[at + 1 :]
    share, gone, fresh = min(bar.done / bar.total, 1), _age(bar), bar.done - bar.first
    left = clock(gone * (bar.total - bar.done) / fresh) if fresh > 0 else "?"
    text = f" {share:4.0%} [{'#' * int(BAR * share):.<{BAR}}] {bar.done:.0f}/{bar.total:.0f}"
    text += f" {clock(gone)}<{left}"
    inner = next((f" {s.done:.0f}/{s.total:.0f}" for s in within if s.total), "")
    text += f" {within[0].name}{inner}" if within else f" {bar.note}" if bar.note else ""
    name = stages[0].name
    return printable(name[: max(8, width - len(text))] + text)[:width]


def _age(stage: Stage) -> float:
    return time.monotonic() - stage.began


def room() -> int:
    """Letters that a line may have here."""
    return max(20, min(WIDTH, shutil.get_terminal_size().columns - 1))


def clock(seconds: float) -> str:
    """Seconds as people read them: 0:07, 12:30, 3:04:05."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """One line, without what would move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)
