"""From the answers of an audit's adapters to the figures in audit.json.

    record, scores = measure(plan, settings, pixels_of(plan))

Tested in tests/test_audit.py.
"""

import numpy as np
import torch

from attacks import audit_tasks, lira, quality
from attacks.audit_plan import Plan
from attacks.decisions import Decisions
from command import progress
from files.images import load_images
from run.folder import provenance

EXPOSED = 20  # images listed


def measure(plan: Plan, settings: dict, pixels: np.ndarray) -> tuple[dict, dict[str, np.ndarray]]:
    """The record of an audit by `settings`, and its scores (N, P) as "<step>/<attack>" beside names
    and member.

    `pixels` are of `pixels_of`.  Canaries are kept apart from the other images.
    """
    answers, facts = audit_tasks.collect(plan)
    member, canary = plan.members(), np.isin(np.arange(plan.pool), plan.canaries)
    groups = {"attacks": ~canary} | ({"canaries": canary} if plan.canaries else {})
    decisions = {name: Decisions(member[:, g], plan.settings.seed) for name, g in groups.items()}
    kept = {"names": np.array(plan.names[: plan.pool]), "member": member, "canary": canary}
    real, steps = real_features(plan, pixels), {}
    for step, answer in progress.over([*zip(plan.due(), answers, strict=True)], "attacks"):
        scores = lira.attacks(answer, member)
        kept |= {f"{step}/{name}": score for name, score in scores.items()}
        steps[str(step)] = quality_of(answer, real) | {
            name: {attack: decisions[name].figures(x[:, g]) for attack, x in scores.items()}
            for name, g in groups.items()
        }
        chosen = scores[lira.HEADLINE][:, ~canary]
        steps[str(step)]["together"] = decisions["attacks"].together(chosen)
    found = steps[str(step)]["attacks"]
    strongest = max(found, key=lambda name: found[name]["auc"])  # judged on the same images
    caught = Decisions(member).caught(scores[strongest])
    made = provenance() | {"trained_at": facts["commits"]}
    made["measured"] = made.pop("started")
    record = {
        "settings": settings,
        "provenance": made,
        "adapters": len(plan),
        "pool": plan.pool,
        "asked": plan.asked(),
        "steps": steps,
        "exposed": exposed(plan, member, scores[strongest], *caught),
        "often": {"caught": often(member, caught[0]), "alarmed": often(member, caught[1])},
        "seconds": facts["seconds"],
    }
    return record, kept


def quality_of(answer: dict[str, np.ndarray], real: dict[str, torch.Tensor]) -> dict:
    """How well the adapters do at a step: held-out losses, and the Frechet distance of all their
    pictures to each set of `real` features.
    """
    losses = answer["held_out"].mean(1)  # (N,)
    found = {"held_out_loss": float(losses.mean()), "held_out_loss_by_adapter": losses.tolist()}
    for name, features in real.items():
        drawn = torch.from_numpy(np.concatenate(answer["features"]))
        found[f"frechet_{name}"] = quality.frechet_distance(features, drawn)
        by_model = torch.from_numpy(answer["features"])
        kid, interval = quality.kernel_distance_of_all(features, by_model)
        found |= {f"kid_{name}": kid, f"kid_{name}_interval": interval}
    return found


def real_features(plan: Plan, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    """Features of the held-out images and of the pool; nothing without --pictures."""
    if not plan.pictures:
        return {}
    shown = pixels[plan.images]
    parts = {"held_out": shown[plan.held_out], "pool": shown[: plan.pool]}
    return {name: quality.features(audit_tasks.feature_network(), x) for name, x in parts.items()}


def pixels_of(plan: Plan) -> np.ndarray:
    """(N, H, W, 3) of all images of the data."""
    s = plan.settings
    return load_images(s.data, s.size, s.caption).pixels


def often(member: np.ndarray, counts: np.ndarray) -> int:
    """How many images were caught in half of their trainings or more, by `counts` (P,); of false
    alarms the same number is the control, since some images merely scatter.
    """
    return int((2 * counts >= len(member) // 2).sum())


def exposed(plan: Plan, member: np.ndarray, score: np.ndarray, caught, alarms) -> list[dict]:
    """The images that a score gives away most: how often each was caught as a member at 1 % FPR,
    and how often it was a false alarm, each of N / 2 times.
    """
    gap = np.where(member, score, 0).sum(0) - np.where(member, 0, score).sum(0)
    return [
        {
            "name": plan.names[i],
            "caption": plan.captions[i],
            "image": plan.images[i],
            "caught": int(caught[i]),
            "alarms": int(alarms[i]),
            "of": len(member) // 2,
            "canary": int(i) in plan.canaries,
        }
        for i in np.lexsort([-gap, -caught])[:EXPOSED]
    ]
