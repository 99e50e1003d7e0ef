"""Seconds of a training step per method, as ratios to plain LoRA measured in turn in one process.

python bench/step.py                # embedded model, default settings; about three minutes on two cores
python bench/step.py --model DIR    # any other base
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import train

METHODS = (("lora", "pooled"), ("mp", "pooled"), ("smp", "pooled"), ("smp", "raw"))


def step_seconds(model: str, method: str, proxy: str, steps: int) -> float:
    """Median seconds of a step, the first five left out; no norms, no checkpoints in between."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        train.train(
            train.Settings(
                method=method, proxy=proxy, model=model, out=out, steps=steps, norms_every=10**6, save_every=10**6
            )
        )
        rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return median(row["seconds"] for row in rows[6:])


def main() -> None:
    """Three rounds over all methods; prints the ratio per round, so that drift of the machine shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=train.EMBEDDED)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = [[step_seconds(args.model, *m, args.steps) for m in METHODS] for _ in range(args.rounds)]
    print(f"{'method':14}{'seconds':>9}   ratio to lora, per round")
    for i, (method, proxy) in enumerate(METHODS):
        ratios = "  ".join(f"{r[i] / r[0]:.2f}" for r in rounds)
        print(f"{method + ' ' + proxy:14}{median(r[i] for r in rounds):9.3f}   {ratios}")


if __name__ == "__main__":
    main()
