"""Ten steps of every method on a tiny model, to compare two states of this code.

    python -m bench.golden write FOLDER             # before a change
    python -m bench.golden check FOLDER             # after it: which cases differ, and by how much

Every case is a command of train.py, evaluate.py or audit.py, as a user would give it.  What is kept
of a run are its rows without their times, its adapter and its attacker; of an evaluation and an
audit their records without times.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMON = "--samples 1 --save-every 5 --norms-every 5 --members 20 --rank 2 --alpha 4 --batch-size 4"
COMMON += " --lr 0.01 --attacker-lr 0.01 --steps 10"
CASES = {
    "lora": "--method lora",
    "lora-flip": "--method lora --flip --schedule cosine --normalise",
    "mp": "--method mp",
    "mp-raw": "--method mp --proxy raw",
    "smp": "--method smp",
    "smp-raw": "--method smp --proxy raw",
    "smp-calibrated": "--method smp --proxy calibrated",
    "smp-detached": "--method smp-detached",
    "smp-accumulate": "--method smp --accumulate 2",
    "smp-half": "--method smp --dtype bfloat16",
    "smp-hessian": "--method smp --hessian-every 5 --target attention",
    "smp-full": "--method smp --target full --lr 0.0001",
    "smp-full-accumulate": "--method smp --target full --lr 0.0001 --accumulate 2",
    "lora-full": "--method lora --target full --lr 0.0001",
    "distill": "--method distill --teachers 3 --teacher-steps 4",
    "distill-flip": "--method distill --teachers 3 --teacher-steps 4 --flip --accumulate 2",
    "smp-two": "--method smp",
    "smp-two-calibrated": "--method smp --proxy calibrated --accumulate 2",
    "distill-two": "--method distill --teachers 3 --teacher-steps 4",
    "smp-resumed": "--method smp --state-every 1",
    "distill-resumed": "--method distill --teachers 3 --teacher-steps 4 --state-every 1",
}
REST = "rest"  # an evaluation of two of these, and an audit
# rank, alpha and layers are a LoRA's
FULL = [("--rank 2 ", ""), ("--alpha 4 ", "")]
TIMES = ("seconds", "started", "measured", "provenance", "versions", "trained_at", "git_commit")


def command(name: str, base: str, images: str, out: Path) -> list[str]:
    """The words of a case."""
    common, flags = COMMON, CASES[name]
    if "full" in name:
        for old, new in FULL:
            common = common.replace(old, new)
    elif "--target" not in flags:
        flags += " --target all"
    words = ["--model", base, "--data", images, "--out", str(out), *common.split(), *flags.split()]
    start = [sys.executable]
    if "two" in name.split("-"):
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*start, "train.py", *words]


def train(name: str, base: str, images: str, out: Path) -> None:
    """Run a case; a resumed one is stopped by SIGTERM at its fourth row."""
    words = command(name, base, images, out)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if name.endswith("resumed"):
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and lines(out / "metrics.jsonl") < 4:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait()
        words.append("--resume")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")


def lines(path: Path) -> int:
    """Rows in a file; none where there is no file."""
    return path.read_text().count("\n") if path.exists() else 0


def rest(folder: Path, base: str, images: str) -> None:
    """An evaluation of two runs, and an audit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    runs = [str(folder / name) for name in ("smp", "lora-full")]
    evaluation = ["evaluate.py", *runs, "--pictures", "6", "--sampling-steps", "4"]
    audit = ["audit.py", "--method", "smp", "--adapters", "4", "--pool", "20", "--steps", "6"]
    audit += ["--save-every", "3", "--rank", "2", "--alpha", "4", "--batch-size", "4", "--model"]
    audit += [base, "--data", images, "--jobs", "1", "--lr", "0.01"]
    audit += ["--pictures", "2", "--target", "attention", "--out", str(folder / "audit")]
    for words in (evaluation, audit):
        words = [sys.executable, *words]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{words[1]}: {done.stderr[-2000:]}")


def timeless(value):
    """The value without what changes from call to call."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def kept(folder: Path) -> dict[str, dict]:
    """{case: {name: number or tensor}} of everything under a folder."""
    from safetensors.torch import load_file

    found = {}
    for name in CASES:
        run = folder / name
        if not (run / "metrics.jsonl").exists():
            continue
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = flat(timeless(rows), "row")
        for file in [*run.glob("adapter/*.safetensors"), *run.glob("attacker/*.safetensors")]:
            found[name] |= {f"{file.parent.name}/{k}": t for k, t in load_file(file).items()}
    records = {f"{run}-eval": folder / run / "eval.json" for run in ("smp", "lora-full")}
    for name, path in (records | {"audit": folder / "audit" / "audit.json"}).items():
        if path.exists():
            record = timeless(json.loads(path.read_text()))
            record = {k: v for k, v in record.items() if k not in ("settings", "run")}
            found[name] = flat(record, "")
    return found


def flat(value, name: str) -> dict:
    """{path: number or text} of nested lists and dictionaries."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}.{key}").items()}
    return {name: value}


def difference(mine: dict, theirs: dict) -> str:
    """What differs between two cases, in words; empty where nothing does."""
    import torch

    if missing := sorted(mine.keys() ^ theirs.keys()):
        return f"{len(missing)} names on one side only, such as {missing[0]}"
    most, where = 0.0, None
    for name, value in mine.items():
        other = theirs[name]
        if isinstance(value, torch.Tensor):
            gap = (value.double() - other.double()).abs().max().item() if value.numel() else 0.0
        elif isinstance(value, int | float) and isinstance(other, int | float):
            gap = abs(value - other)
        elif value != other:
            return f"{name}: {other!r} is now {value!r}"
        else:
            continue
        if not gap <= most:
            most, where = gap, name
    return f"by at most {most:.3g} ({where})" if where else ""


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", help="cases; default all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--base", required=True, help="a small StableDiffusionPipeline folder")
    parser.add_argument("--images", required=True, help="a folder of forty captioned images")
    flags = parser.parse_args()
    folder = flags.folder if flags.what == "write" else flags.folder.with_name("now")
    shutil.rmtree(folder, ignore_errors=True)
    names = [name for name in flags.only or CASES if name != REST]
    with ThreadPoolExecutor(flags.jobs) as pool:
        for _ in pool.map(lambda n: train(n, flags.base, flags.images, folder / n), names):
            pass
    if REST in (flags.only or [REST]):  # needs smp and lora-full
        rest(folder, flags.base, flags.images)
    if flags.what == "check":
        before, now = kept(flags.folder), kept(folder)
        for name in now:
            print(f"{name:22} {difference(now[name], before[name]) or 'the same, bit for bit'}")


if __name__ == "__main__":
    main()
