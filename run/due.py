"""When something of a run is written: adapters, pictures, training states."""

from settings import Settings

STATE_SECONDS = 300  # between two states where --state-every does not say; so much is lost at most
PARTS, FIRST = 8, 20  # an adapter each eighth of a run, the first after a twentieth
KEEP = 2  # training states kept, so that a damaged one is not the end of a run
QUICK = 128  # pixels of a side up to which a CPU draws at every save


def saves(s: Settings, step: int) -> bool:
    """Whether the adapter of a step is kept, with its held-out loss: every --save-every and the
    last; without the flag each eighth of the run, and before them one after a twentieth.
    """
    if step == s.steps:
        return True
    if s.save_every:
        return step % s.save_every == 0
    return step == first_saved(s) or step % max(1, s.steps // PARTS) == 0


def first_saved(s: Settings) -> int:
    """The first step whose adapter is kept."""
    return min(s.steps, s.save_every or max(1, s.steps // FIRST))


def draws(run, step: int) -> bool:
    """Whether there is a grid of pictures at `step`, which is not the last: at the start and at
    every save.

    A CPU takes minutes for a large picture, and draws such pictures at the first save alone.
    """
    s = run.settings
    if not s.samples or step == s.steps:
        return False
    if run.base.device.type == "cpu" and run.base.size > QUICK:
        return step == first_saved(s)
    return step == 0 or saves(s, step)


def state_due(s: Settings, step: int, since: float) -> bool:
    """Whether a state for --resume is due, `since` seconds after the one before."""
    return step % s.state_every == 0 if s.state_every else since >= STATE_SECONDS
