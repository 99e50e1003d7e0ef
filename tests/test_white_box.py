"""The attack on published weights: its gradients are autograd's, its regression finds what an
update was made of, and it runs on a finished audit.
"""

import numpy as np
import pytest
import torch

import audit
from attacks import lira
from command.errors import UserError
from command.whole_files import read_json
from curves import roc
from diffusion import GRID_SEED, TIMESTEPS, squared_error
from studies import white_box

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_gradients_are_those_of_each_image(subject):
    """Of a mean loss over timesteps and mirror images, one image at a time by autograd."""
    base, data = subject
    index = [0, 3, 5]
    z, c = data.latents[index], data.text[index]
    names = [n for n, m in base.unet.named_modules() if isinstance(m, torch.nn.Linear)]
    layers = [base.unet.get_submodule(n) for n in names if n.endswith(("to_q", "proj_in"))]
    layers.append(next(m for m in base.unet.modules() if isinstance(m, torch.nn.Conv2d)))
    ways = [z, z.flip(-1)]
    found = white_box.gradients(base, layers, ways, c)
    noise = torch.randn(
        (2 * len(TIMESTEPS), *base.latent_shape),
        generator=torch.Generator().manual_seed(GRID_SEED),
    )
    assert not any(layer.weight.requires_grad for layer in layers)
    for i in range(len(index)):
        for layer in layers:
            layer.weight.requires_grad_(True)
        total = 0
        for k, (way, t) in enumerate((way, t) for way in ways for t in TIMESTEPS):
            at = torch.tensor([t])
            total = (
                total
                + squared_error(base, way[i : i + 1], c[i : i + 1], at, noise[k : k + 1]).mean()
            )
        wanted = torch.autograd.grad(total / len(noise), [layer.weight for layer in layers])
        for g, want in zip(found, wanted, strict=True):
            assert torch.nn.functional.cosine_similarity(g[i].float(), want.flatten(), 0) > 0.999
            torch.testing.assert_close(g[i].float().norm(), want.norm(), rtol=0.02, atol=0)
    for layer in layers:
        layer.weight.requires_grad_(False)


def test_members_are_in_the_update():
    """Updates made of members' gradients and noise, images' gradients alike: the regression tells
    who is in, and better than products alone; with the headline attack it is better than either.
    """
    rng = np.random.default_rng(0)
    adapters, images, numbers = 8, 60, 300
    member = np.zeros((adapters, images), bool)
    for k in range(0, adapters, 2):
        member[k, rng.permutation(images)[:30]] = True
        member[k + 1] = ~member[k]
    g = rng.normal(size=(images, numbers)) + 2 * rng.normal(size=numbers)  # a common direction
    updates = -member.astype(float) @ g + 12 * rng.normal(size=(adapters, numbers))
    layers = [torch.tensor(g[:, :100]), torch.tensor(g[:, 100:])]
    parts = [[torch.tensor(u[:100]), torch.tensor(u[100:])] for u in updates]
    gram, inner = white_box.products(layers, parts)
    np.testing.assert_allclose(gram, g @ g.T, rtol=1e-3, atol=0.1)
    np.testing.assert_allclose(inner, -updates @ g.T, rtol=1e-3, atol=1)
    headline = member + rng.normal(size=member.shape)
    scores = white_box.joined(white_box.shares(gram, inner), headline, member)
    auc = {name: roc.auc(s[member], s[~member]) for name, s in scores.items()}
    plain = white_box.joined(inner, headline, member)["white box"]
    assert auc["white box"] > roc.auc(plain[member], plain[~member])
    assert auc["joined"] > max(auc["white box"], auc[lira.HEADLINE]) > 0.7


def test_on_a_finished_audit(tiny_base, image_folder, tmp_path, in_thread, capsys):
    """Its file is beside audit.json, the headline's figures are the audit's."""
    flags = {"model": tiny_base, "data": image_folder, "adapters": 4, "pool": 10, "steps": 2}
    flags |= {"rank": 2, "alpha": 2.0, "batch_size": 2, "target": "attention", "jobs": 1}
    out = tmp_path / "audit"
    record = audit.audit(audit.Audit(**flags, method="lora", flip=True, out=str(out)))
    (found,) = white_box.white_box(white_box.WhiteBox(folders=[str(out)]))
    assert set(found["attacks"]) == {"white box", lira.HEADLINE, "joined"}
    headline = record["steps"]["2"]["attacks"][lira.HEADLINE]["auc"]
    assert found["attacks"][lira.HEADLINE]["auc"] == headline
    assert read_json(out / "white_box.json")["attacks"] == found["attacks"]
    assert "white box" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no finished audit"):
        white_box.white_box(white_box.WhiteBox(folders=[str(tmp_path)]))
