"""A run folder: what is in it, written and read here and nowhere else.

config.json      settings, versions, commit, time; the summary once it is finished
splits.json      file names per role
images.json      SHA-256 of each picture with its caption, by file name
metrics.jsonl    one object per step; row 0 is the base model
checkpoints/     adapters on the way, each with its held-out loss in metrics.jsonl
state/           training state for --resume, gone when the run is finished (state.py)
adapter/         the result, as diffusers reads it; attacker/, samples/, curves.png

torch and what needs it are imported by the methods that read or write weights, so that a command
can look at a folder at once.  Held by tests/test_train.py, tests/test_checkpoint.py and
tests/test_evaluate_faults.py.
"""

import json
import math
import subprocess
import time
from pathlib import Path

from command.errors import UserError
from command.whole_files import check_file, read_json, to_disk, write_json, write_whole
from settings import DIRECTIONS, EMBEDDED

OURS = {"model": EMBEDDED, "directions": DIRECTIONS}  # lie in the checkout


class RunFolder:
    """The folder of one run, by its path."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def state(self) -> Path:
        """Where the training states are."""
        return self.path / "state"

    def checkpoint(self, step: int) -> Path:
        """Where the adapter of a step on the way is."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    # ----------------------------------------------------------------------------------------------
    # Reading; everything here raises UserError for a folder that is no run or is damaged

    def config(self) -> dict:
        """The object in config.json."""
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{self} is not a run folder: it has no config.json (train.py writes one)"
            )
        found = read_json(self.path / "config.json")
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise UserError(f"{self.path / 'config.json'} is not a run's config: no settings in it")
        for name in OURS if "identity" in found else ():  # which compares what lies there
            place, ours = Path(str(found["settings"].get(name))), OURS[name]
            if place.name == Path(ours).name and not place.exists():  # the checkout was moved
                found["settings"][name] = ours
        return found

    def device(self) -> str | None:
        """Where the run was started; None if it has not been."""
        begun = (self.path / "config.json").is_file()
        return self.config()["settings"].get("device") if begun else None

    def splits(self) -> dict[str, list[str]]:
        """File names per role."""
        return read_splits(self.path / "splits.json")

    def images(self) -> dict[str, str] | None:
        """{file name: SHA-256 of picture and caption}, see data.Images.hashes.

        None for a run from before there was such a file.
        """
        path = self.path / "images.json"
        found = read_json(path) if path.exists() else None
        if not isinstance(found, dict | None):
            raise UserError(f"{path} is damaged: it is not an object of file name -> hash")
        return found

    def identity(self) -> dict:
        """What the run is (run/identity.py), {} of one from before there was such a thing."""
        found = self.config().get("identity", {})
        if not isinstance(found, dict):
            path = self.path / "config.json"
            raise UserError(f"{path} is damaged: its identity is not an object")
        return found

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl; row 0 is the base model."""
        path = self.path / "metrics.jsonl"
        try:
            check_file(path)
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self} is not a complete run: {path.name}: {error}") from None
        if not rows or not all(isinstance(r, dict) and type(r.get("step")) is int for r in rows):
            raise UserError(f"{path} is damaged: not every line is an object with a step")
        return rows

    def held_out(self) -> dict[int, float]:
        """The held-out loss of every step whose adapter was saved."""
        saved = [row for row in self.rows() if row["step"] and "nonmember_val_loss" in row]
        found = {row["step"]: row["nonmember_val_loss"] for row in saved}
        for step, loss in found.items():
            if type(loss) not in (int, float) or not math.isfinite(loss):
                where = self.path / "metrics.jsonl"
                raise UserError(f"{where} is damaged: the held-out loss of step {step} is {loss!r}")
        return found

    def adapter(self, at: str = "last") -> tuple[Path, int]:
        """(folder of the adapter, its step) `at` last, best (lowest held-out loss) or a saved
        step; last is what the run was to leave, see --stop.
        """
        saved = self.held_out()
        if not saved or (at == "last" and not (self.path / "adapter").is_dir()):
            raise UserError(f"{self} has no adapter yet: its training did not finish")
        if at == "last":
            best = self.config()["settings"].get("stop") == "best"
            return self.path / "adapter", min(saved, key=saved.get) if best else max(saved)
        step = min(saved, key=saved.get) if at == "best" else at
        step = next((k for k in saved if str(k) == str(step)), None)
        if step is None or not self.checkpoint(step).is_dir():
            steps = ", ".join(map(str, saved))
            raise UserError(
                f"{self} has no adapter of step {at}: take last, best or one of {steps}"
            )
        return self.checkpoint(step), step

    def attacker(self, base):
        """The proxy attacker at the end of the run, a module on the base's device, in eval mode.

        Raises UserError for one that reads more than error maps, as --proxy calibrated.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from attacker import PROXIES

        path = self.path / "attacker" / "attacker.safetensors"
        proxy = self.config()["settings"]["proxy"]
        if proxy not in PROXIES:
            raise UserError(f"the attacker of {self} is {proxy}: only raw and pooled can be loaded")
        attacker = PROXIES[proxy](base.latent_shape)
        try:
            check_file(path)
            attacker.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} is not the attacker of this run: {error}") from None
        return attacker.to(base.device).eval()

    # ----------------------------------------------------------------------------------------------
    # Writing

    def begin(
        self, config: dict, splits: dict[str, list[str]], images: dict[str, str], row: dict
    ) -> None:
        """Make the folder, config.json near the end: its presence says that it is taken."""
        from run import state

        self.path.mkdir(parents=True, exist_ok=True)
        state.clear(self.state)
        write_json(self.path / "splits.json", splits)
        write_json(self.path / "images.json", images)
        write_json(self.path / "config.json", config)
        write_whole(self.path / "metrics.jsonl", json.dumps(row) + "\n")

    def move(self, places: dict[str, str | None]) -> None:
        """Keep where the files that settings name lie now."""
        config = self.config()
        if config["settings"] != (settings := config["settings"] | places):
            write_json(self.path / "config.json", config | {"settings": settings})

    def sweep(self) -> None:
        """Remove what a killed training has left half-written; an evaluation may be at work on the
        files of its own.
        """
        files = ("config.json", "splits.json", "images.json", "metrics.jsonl", "curves.png")
        left = [path for name in files for path in self.path.glob(f"{name}.*.tmp")]
        for part in ("adapter", "kohya", "attacker", "checkpoints", "samples"):
            left += (self.path / part).rglob("*.tmp")
        for path in left:
            path.unlink()

    def cut(self, step: int) -> None:
        """Cut the rows after `step` off metrics.jsonl, and one torn by a kill.

        Raises UserError if any before is missing.
        """
        path, steps = self.path / "metrics.jsonl", []
        try:
            check_file(path)
            lines = path.read_bytes().splitlines(keepends=True)[: step + 1]
            steps = [json.loads(line)["step"] for line in lines]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass  # then steps are missing
        if steps != list(range(step + 1)):
            raise UserError(
                f"{path} does not hold every step up to {step}: "
                "it cannot be continued, take another --out"
            )
        write_whole(path, b"".join(lines))

    def save_attacker(self, attacker, proxy: str) -> None:
        """The attacker's weights."""
        from safetensors.torch import save as serialize

        (self.path / "attacker").mkdir(exist_ok=True)
        tensors = {name: t.cpu().contiguous() for name, t in attacker.state_dict().items()}
        content = serialize(tensors, {"proxy": proxy})
        write_whole(self.path / "attacker" / "attacker.safetensors", content)

    def finish(self, summary: dict) -> None:
        """The summary into config.json, whose presence says that the run is finished; no state is
        left.
        """
        write_json(self.path / "config.json", self.config() | {"summary": summary})
        self.clear()

    def clear(self) -> None:
        """Delete the states of a finished run, also those that a kill left behind its summary: they
        hold the secret of --method dp.
        """
        from run import state

        state.clear(self.state)


def read_splits(path: Path) -> dict[str, list[str]]:
    """File names per role; raises UserError unless every role has its images, and no image two."""
    from files.images import ROLES

    splits = read_json(path)
    lists = splits.values() if isinstance(splits, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v in lists):
        raise UserError(f"{path} is not an object of role -> list of file names")
    if unknown := [role for role in splits if role not in ROLES]:
        raise UserError(f"{path} has an unknown role {unknown[0]}: take {', '.join(ROLES)}")
    if bare := [role for role in ROLES if role != "fresh" and not splits.get(role)]:
        raise UserError(f"{path} has no images for the role {bare[0]}")
    seen = set()
    for name in (name for names in splits.values() for name in names):
        if name in seen:
            raise UserError(f"{path} names {name} twice: an image has one role")
        seen.add(name)
    return splits


class MetricsLog:
    """`log(row)` appends to metrics.jsonl and to `tracker`; does nothing where `folder` is None."""

    def __init__(self, folder: RunFolder | None, tracker=None):
        self.file, self.tracker, self.flushed = None, tracker, time.monotonic()
        if folder:
            self.file = open(folder.path / "metrics.jsonl", "a")  # noqa: SIM115 (see __exit__)

    def __call__(self, row: dict) -> None:
        if self.file:
            flush = time.monotonic() - self.flushed > 5
            self.flushed = time.monotonic() if flush else self.flushed
            print(json.dumps(row), file=self.file, flush=flush)
        if self.tracker:
            shown = {k: v for k, v in row.items() if v is not None and k != "step"}
            self.tracker.log(shown, step=row["step"])

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        if self.file:
            to_disk(self.file)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()
        if self.tracker:
            self.tracker.finish()


def tensorboard(folder: RunFolder):
    """accelerate's TensorBoard tracker, writing to <run folder>/tensorboard."""
    import accelerate
    from accelerate.tracking import TensorBoardTracker

    accelerate.PartialState()
    tracker = TensorBoardTracker(run_name="tensorboard", logging_dir=folder.path)
    getattr(tracker, "start", lambda: None)()  # what older versions of accelerate do at once
    return tracker


def provenance() -> dict:
    """What made a run: versions, threads, commit, time."""
    import diffusers
    import numpy as np
    import torch

    return {
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, np)},
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str:
    """The commit of this code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
