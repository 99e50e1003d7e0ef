"""What a run leaks, and how good its pictures are: attacks on the test images, with intervals, beside the base model.

    python evaluate.py runs/lora runs/mp runs/smp     # a table, and eval.json in each run folder
    python evaluate.py runs/lora --at best            # the adapter of the step with the lowest held-out loss
    python evaluate.py runs/smp --quality 0           # attacks only

Attacks (attacks.py): loss, difference to the base model, and a fresh proxy attacker of either kind.  Thresholds and
the fresh attackers' checkpoints are chosen on validation images; every figure is of test images.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cli import one_line_errors, option, parse
from errors import UserError


@dataclass
class Settings:
    """Flags of evaluate.py; everything else is read from the run."""

    runs: list[str] | None = option(None, "run folders made by train.py")
    at: str = option("last", "which adapter: last, best (lowest held-out loss), or a step that was saved")
    quality: int = option(200, "pictures to generate for the Frechet distance; 0 skips it")
    sampling_steps: int = option(20, "DDIM steps per picture")
    guidance: float = option(3.0, "classifier-free guidance scale")
    bootstrap: int = option(1000, "bootstrap rounds for the intervals")
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    threads: int = option(0, "CPU threads; 0 leaves it to torch")


if __name__ == "__main__":  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__, positional="runs")

import numpy as np
import torch

import attacks
import lora
import quality
from data import load_images
from diffusion import Base, encode_captions, encode_images, load_base, sample
from train import write_json

ATTACKS = ("loss", "difference", "proxy-raw", "proxy-pooled")


# ---------------------------------------------------------------------------------------------------------------
# Reading a run


def read_run(folder: str) -> tuple[dict, dict[str, list[str]], list[dict]]:
    """(config, splits, metrics) of a run folder; raises UserError."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json (train.py writes one)")
    try:
        config, splits = (json.loads((path / f"{n}.json").read_text()) for n in ("config", "splits"))
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not a complete run: {error}") from None
    return config, splits, metrics


def adapter_folder(folder: str, at: str, metrics: list[dict]) -> tuple[Path, int]:
    """(folder of the adapter, its step) for `at`: last, best or a saved step; raises UserError."""
    saved = {m["step"]: m["nonmember_val_loss"] for m in metrics if m["step"] and "nonmember_val_loss" in m}
    if not saved or (at == "last" and not (Path(folder) / "adapter").is_dir()):
        raise UserError(f"{folder} has no adapter yet: its training did not finish")
    if at == "last":
        return Path(folder) / "adapter", max(saved)
    step = min(saved, key=saved.get) if at == "best" else int(at) if at.isdigit() else -1
    if step not in saved:
        raise UserError(f"{folder} has no adapter of step {at}: take last, best or one of {', '.join(map(str, saved))}")
    return Path(folder) / "checkpoints" / f"step-{step:06d}", step


# ---------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass
class Subject:
    """The images of a run as the attacks see them; indices of `roles` go into all arrays."""

    base: Base
    captions: list[str]
    pixels: np.ndarray  # (N, H, W, 3)
    latents: torch.Tensor  # (N, C, h, w)
    text: torch.Tensor  # (N, L, D)
    roles: dict[str, list[int]]
    base_grid: torch.Tensor  # (N, T, K) losses of the base model


def prepare(config: dict, splits: dict, settings: Settings) -> Subject:
    """Load base model and images of a run, find its roles by file name, and score the base model once."""
    s = config["settings"]
    base = load_base(s["model"], settings.device, s["dtype"])
    images = load_images(s["data"], base.size, s["caption"])
    position = {name: i for i, name in enumerate(images.names)}
    missing = [n for found in splits.values() for n in found if n not in position]
    if missing:
        raise UserError(f"{s['data']} no longer holds {missing[0]} ({len(missing)} images of the run are gone)")
    roles = {role: [position[n] for n in found] for role, found in splits.items()}
    latents, text = encode_images(base, images.pixels), encode_captions(base, images.captions)
    grid = attacks.loss_grid(base, latents, text)
    return Subject(base, images.captions, images.pixels, latents, text, roles, grid)


def leakage(subject: Subject, seed: int, rounds: int, adapted: bool) -> dict[str, dict]:
    """Figures of every attack on the model as it stands."""
    roles = subject.roles
    grid = attacks.loss_grid(subject.base, subject.latents, subject.text) if adapted else subject.base_grid
    scores = {"loss": attacks.loss_attack(grid)}
    if adapted:
        scores["difference"] = attacks.difference_attack(grid, subject.base_grid)
    for proxy in ("raw", "pooled"):
        scores[f"proxy-{proxy}"] = attacks.proxy_attack(subject.base, subject.latents, subject.text, roles, proxy, seed)
    result = {}
    for name, score in scores.items():
        threshold = attacks.balanced_accuracy_threshold(score[roles["member_val"]], score[roles["nonmember_val"]])
        member, nonmember = score[roles["member_test"]], score[roles["nonmember_test"]]
        result[name] = attacks.figures(member, nonmember, threshold, seed, rounds)
    return result


def held_out_loss(subject: Subject) -> float:
    """Adaptation loss on the test non-members over all timesteps: how well the private domain was learned."""
    index = subject.roles["nonmember_test"]
    grid = attacks.loss_grid(subject.base, subject.latents[index], subject.text[index], attacks.ALL_TIMESTEPS, draws=1)
    return grid.mean().item()


def picture_quality(subject: Subject, network, settings: Settings) -> dict[str, float]:
    """Frechet distance of pictures generated from members' captions to the members and to held-out pictures.

    The captions are the members', as in the paper, repeated as often as needed; noise and number are the same for
    every model.
    """
    roles = subject.roles
    members = sorted(roles["member_aux"] + roles["member_val"] + roles["member_test"])
    index = np.resize(members, settings.quality)
    noise = torch.randn((len(index), *subject.base.latent_shape), generator=torch.Generator().manual_seed(1))
    empty = encode_captions(subject.base, [""])
    noise = noise.to(subject.base.device)
    images = sample(subject.base, subject.text[index], empty, noise, settings.sampling_steps, settings.guidance)
    generated = quality.features(network, images)
    held_out = roles["fresh"] if len(roles["fresh"]) > 1 else roles["nonmember_test"]
    real = {"members": members, "held_out": held_out}
    return {
        f"frechet_{name}": quality.frechet_distance(quality.features(network, subject.pixels[found]), generated)
        for name, found in real.items()
    }


def evaluate(settings: Settings) -> list[dict]:
    """Evaluate every run; writes eval.json into each (eval-<at>.json for other adapters) and returns the results."""
    if not settings.runs:
        raise UserError("name at least one run folder, such as runs/smp")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    network = quality.Features() if settings.quality else None
    results, controls, subject, key = [], {}, None, None
    for folder in settings.runs:
        started = time.time()
        config, splits, metrics = read_run(folder)
        path, step = adapter_folder(folder, settings.at, metrics)
        s = config["settings"]
        new_key = json.dumps([s["model"], s["data"], s["caption"], s["dtype"], splits])
        if new_key != key:  # runs over the same images share encoding and the control
            subject, key = prepare(config, splits, settings), new_key
            controls = measure(subject, network, settings, s["seed"], adapted=False)
        adapter, _ = lora.load(subject.base.unet, path)
        result = {"run": folder, "method": s["method"], "seed": s["seed"], "step": step, "at": settings.at}
        result |= {"adapted": measure(subject, network, settings, s["seed"], adapted=True), "base": controls}
        lora.remove(subject.base.unet, adapter)
        result["seconds"] = round(time.time() - started, 1)
        name = "eval.json" if settings.at == "last" else f"eval-{settings.at}.json"
        write_json(Path(folder) / name, result)
        results.append(result)
    print_table(results)
    return results


def measure(subject: Subject, network, settings: Settings, seed: int, adapted: bool) -> dict:
    """All figures of the model as it stands, with the worst attack named."""
    found = {"attacks": leakage(subject, seed, settings.bootstrap, adapted), "held_out_loss": held_out_loss(subject)}
    found["worst"] = max(found["attacks"], key=lambda a: found["attacks"][a]["auc"])
    if network is not None:
        found |= picture_quality(subject, network, settings)
    return found


def print_table(results: list[dict]) -> None:
    """One line per model, AUC with 95 % interval per attack; the controls first."""
    rows = [(f"base (control, seed {r['seed']})", r["base"]) for r in {r["seed"]: r for r in results}.values()]
    rows += [(f"{r['run']} @{r['step']}", r["adapted"]) for r in results]
    width = max(len(name) for name, _ in rows)
    print(
        f"{'':{width}}  "
        + "".join(f"{a + ' AUC':>20}" for a in ATTACKS)
        + f"{'worst: ASR':>12}{'TPR@5%':>8}{'held-out':>10}{'FD mem':>8}{'FD out':>8}"
    )
    for name, row in rows:
        cells = []
        for a in ATTACKS:
            f = row["attacks"].get(a)
            cells.append(f"{f['auc']:.2f} [{f['auc_interval'][0]:.2f}, {f['auc_interval'][1]:.2f}]" if f else "-")
        worst = row["attacks"][row["worst"]]
        tpr = f"{worst['tpr_at_5_fpr']:.2f}" if worst["tpr_at_5_fpr"] is not None else "-"
        distances = "".join(
            f"{row[k]:>8.1f}" if k in row else f"{'-':>8}" for k in ("frechet_members", "frechet_held_out")
        )
        print(
            f"{name:{width}}  "
            + "".join(f"{c:>20}" for c in cells)
            + f"{worst['asr']:>12.2f}{tpr:>8}{row['held_out_loss']:>10.4f}{distances}"
        )


if __name__ == "__main__":
    with one_line_errors():
        evaluate(SETTINGS)
