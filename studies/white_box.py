"""The published weights themselves: which images' gradients an adapter's update is made of.

    python -m studies.white_box runs/defences/dp-epsilon-8    # white_box.json beside audit.json

An adapter moves the weights W along the gradients of its members.  With g_i the gradient of image
i's mean loss at the base, in the layers that the adapter changes, its update dW is regressed on
minus the gradients of all candidates:

    a = (G + RIDGE tr(G) / P I)^-1 b,    G_ij = <g_i, g_j>,  b_i = -<g_i, dW>

a_i is what image i has in the update.  LiRA pooled over the shadows' a (attacks/lira.py) reads
membership.  `joined` adds the scores of the audit's headline attack, both with deviation 1 over the
images of an adapter.  The gradients of all candidates are held at once, P times the layers' numbers
in two bytes each, 2.7 GB for the embedded model: this is for small models.  The adapters must be
there still.  Tested in tests/test_white_box.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import audit
import lora
from attacks import audit_tasks, lira
from attacks.decisions import Decisions
from attacks.per_image import PerImage
from attacks.store import read_arrays
from command import progress
from command.errors import UserError
from command.flags import checked, option
from command.whole_files import read_json, write_json
from diffusion import GRID_SEED, TIMESTEPS, Base, squared_error
from files import adapters as files
from report.audit_page import print_attacks
from run.folder import provenance
from studies import grid

RIDGE = 0.1  # of the mean diagonal; from .001 to .1 the AUC changes by .001
IMAGES = 4  # in one forward with gradient


@dataclass
class WhiteBox:
    """Flags of the command."""

    folders: list[str] | None = option(None, "finished audits of audit.py", group=grid.WHERE)


def white_box(s: WhiteBox) -> list[dict]:
    """Attack every audit; writes white_box.json into its folder, returns the records."""
    return [attack(Path(folder)) for folder in s.folders or ()]


def attack(folder: Path) -> dict:
    """The attack on the last step of one audit.  Raises UserError for what is no finished audit."""
    path = folder / "audit.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished audit: run audit.py --out {folder} first")
    known = checked(audit.Audit, read_json(path)["settings"], path)
    plan = audit.make_plan(replace(audit.Audit(**known), out=str(folder), device="cpu"))
    base, data = audit_tasks.subject(plan)
    updates = [update(base, plan.folder(k) / "adapter") for k in range(len(plan))]
    ways = audit_tasks.shown(base, data, plan)
    layers = [base.unet.get_submodule(name) for name in updates[0]]
    every = gradients(base, layers, ways, data.text[: plan.pool])
    gram, inner = products(every, [list(u.values()) for u in updates])
    member, scores = plan.members(), read_arrays(folder / "scores.npz")
    found = joined(shares(gram, inner), scores[f"{plan.due()[-1]}/{lira.HEADLINE}"], member)
    figures = {name: Decisions(member, plan.settings.seed).figures(x) for name, x in found.items()}
    print_attacks(f"{folder.name}, step {plan.due()[-1]}", figures)
    record = {"ridge": RIDGE, "step": plan.due()[-1], "attacks": figures}
    write_json(folder / "white_box.json", record | {"provenance": provenance()})
    return record


def update(base: Base, path: Path) -> dict[str, torch.Tensor]:
    """dW of an adapter by layer, each flat."""
    adapter, _ = files.load(base, path)
    try:
        return {name: layer.delta().detach().flatten() for name, layer in adapter.layers.items()}
    finally:
        lora.remove(base.unet, adapter)


def gradients(base: Base, layers: list[nn.Module], ways: list, text) -> list[torch.Tensor]:
    """Of each layer's weight the gradient of every image's mean loss over timesteps and `ways` to
    show the image, (P, C, h, w) each: (P, numbers) bfloat16 per layer.
    """
    timesteps = torch.tensor(TIMESTEPS, device=base.device).repeat(len(ways))
    generator = torch.Generator().manual_seed(GRID_SEED)
    noise = torch.randn((len(timesteps), *base.latent_shape), generator=generator).to(base.device)
    images, draws = torch.stack(ways, 1), len(timesteps)  # (P, ways, C, h, w)
    found = [torch.empty(len(text), m.weight.numel(), dtype=torch.bfloat16) for m in layers]
    for layer in layers:  # so that what it gives has a gradient
        layer.weight.requires_grad_(True)
    with PerImage(layers) as per_image:
        for i in progress.over(range(0, len(text), IMAGES), "gradients"):
            part = images[i : i + IMAGES].repeat_interleave(len(TIMESTEPS), dim=1)
            z, count = part.flatten(0, 1), len(part)
            c = text[i : i + IMAGES].repeat_interleave(draws, dim=0)
            drawn = timesteps.repeat(count), noise.repeat(count, 1, 1, 1)
            loss = squared_error(base, z, c, *drawn).mean((1, 2, 3))
            each = per_image.gradients(loss.sum() / draws, count)
            for kept, g in zip(found, each, strict=True):
                kept[i : i + count] = g.flatten(1).cpu()
    for layer in layers:
        layer.weight.requires_grad_(False)
    return found


def products(every: list[torch.Tensor], updates: list[list[torch.Tensor]]) -> tuple:
    """G (P, P) and b (N, P) of gradients per layer and N updates per layer."""
    gram, inner = 0, 0
    for k, layer in enumerate(every):
        g = layer.float()
        gram = gram + g @ g.T
        inner = inner - torch.stack([u[k].float() for u in updates]) @ g.T
    return gram.double().numpy(), inner.double().numpy()


def shares(gram: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """a, (N, P)."""
    count = len(gram)
    return np.linalg.solve(gram + RIDGE * np.trace(gram) / count * np.eye(count), inner.T).T


def joined(a: np.ndarray, headline: np.ndarray, member: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (N, P) of the attack on a alone, of the headline attack, and of both."""

    def alike(score: np.ndarray) -> np.ndarray:
        return (score - score.mean(1, keepdims=True)) / score.std(1, keepdims=True)

    x = a[:, :, None]
    targets = range(len(member))
    level = [lira.without_difficulty(x, member, k) for k in targets]
    alone = np.stack([lira.pooled(level[k], member, k) for k in targets])
    return {"white box": alone, lira.HEADLINE: headline, "joined": alike(alone) + alike(headline)}


if __name__ == "__main__":
    grid.command(WhiteBox, white_box, __doc__, "folders")
