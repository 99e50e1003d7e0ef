"""The adapter of --method dp: U R V folds into A and B exactly, only R moves, and the
directions are those of known matrices."""

from pathlib import Path

import pytest
import torch

import lora
import train
from command.errors import UserError
from files import lora_files, lora_writing
from files.bases import load_base
from methods import directions, subspace
from methods.assembly import assemble
from run.processes import Processes
from run.resolve import resolve
from settings import DIRECTIONS, EMBEDDED, Settings


@pytest.fixture(scope="module")
def file(tiny_base, image_folder, tmp_path_factory):
    """Three directions of every layer of the tiny base, from two sets."""
    out = tmp_path_factory.mktemp("directions") / "d.safetensors"
    flags = {"model": tiny_base, "target": "all", "steps": 2, "batch_size": 4, "directions": 3}
    sets = [image_folder, image_folder]
    directions.make(directions.Flags(data=sets, out=str(out), lr=0.01, **flags))
    return str(out)


def settings(tiny_base, file, **flags):
    """Of four steps."""
    small = {"method": "dp", "directions": file, "batch_size": 12, "steps": 4}
    small |= {"model": tiny_base, "norms_every": 10**6, "out": "/nowhere/run", "lr": 0.05}
    return resolve(Settings(**(small | flags)))


@pytest.fixture
def run(subject, tiny_base, file, request):
    """A run whose cores are no longer zero."""
    found = assemble(
        settings(tiny_base, file, **getattr(request, "param", {})), *subject, Processes()
    )
    with torch.no_grad():
        for p in found.adapter.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    yield found
    lora.remove(subject[0].unet, found.adapter)


def test_directions_of_known_matrices():
    """Of two updates whose columns span two known lines each, those four and no others; as long as
    the root of their singular values, and the mean update is where the cores start.
    """
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4))[0] for n in (9, 7))
    scale = torch.tensor([5.0, 4.0, 3.0, 2.0])
    one = left[:, :2] * scale[:2] @ right[:, :2].T
    two = left[:, 2:] * scale[2:] @ right[:, 2:].T
    found = subspace.directions_of([{"a": one}, {"a": two}], 4)["a"]
    for got, want in ((found.left, left), (found.right.T, right)):
        lengths = got.norm(dim=0)
        assert torch.allclose(lengths / lengths[0], (scale / scale[0]).sqrt(), atol=1e-4)
        cosines = (got / lengths).T @ want
        torch.testing.assert_close(cosines.abs(), torch.eye(4), atol=1e-4, rtol=1e-4)
    products = torch.outer(found.left.norm(dim=0), found.right.norm(dim=1))
    assert products.mean().item() == pytest.approx(1, abs=1e-4)
    mean = found.left @ found.start @ found.right
    torch.testing.assert_close(mean, (one + two) / 2, atol=1e-4, rtol=1e-4)
    strongest = found.leading(1)
    assert [*map(len, (strongest.left.T, strongest.right, strongest.start))] == [1, 1, 1]
    assert abs(strongest.left[:, 0] @ left[:, 0]) == pytest.approx(
        strongest.left.norm().item(), abs=1e-4
    )
    with pytest.raises(ValueError, match="no 8 directions"):
        subspace.directions_of([{"a": one}], 8)


def test_it_folds_into_a_and_b_exactly(run, subject, tmp_path, tiny_base):
    """U R V is what the layer adds, linear and convolution alike; the file that is written gives
    the same outputs in a plain LoRA.
    """
    base, data = subject
    convolutions = 0
    for name, layer in run.adapter.layers.items():
        matrix = layer.lora_B.left @ layer.lora_B.core @ layer.lora_A.weight.flatten(1)
        torch.testing.assert_close(layer.delta().flatten(1), matrix, atol=1e-6, rtol=1e-5)
        convolutions += layer.lora_B.convolution
        assert layer.alpha == layer.rank == 3, name
    assert 0 < convolutions < len(run.adapter.layers)
    index = torch.tensor([0, 5, 9])
    given = data.latents[index], torch.tensor([10, 400, 900]), data.text[index]
    with torch.no_grad():
        found = base.unet(*given, return_dict=False)[0]
        with run.adapter.disabled():
            assert not torch.allclose(found, base.unet(*given, return_dict=False)[0], atol=1e-3)
        lora_writing.save(run.adapter, tmp_path / "adapter", {})
        other = load_base(tiny_base)
        plain, _ = lora_files.load(other.unet, tmp_path / "adapter")
        assert plain.rank_and_alpha() == (3, 3.0)
        torch.testing.assert_close(
            found, other.unet(*given, return_dict=False)[0], atol=1e-5, rtol=1e-4
        )


def test_only_the_cores_move(subject, tiny_base, file):
    """U and V keep every bit, and the cores leave their start."""
    base, data = subject
    given, target = subspace.load(file)
    assert target == "all"
    for step, adapter in train.train_adapter(base, data, settings(tiny_base, file)):
        if step == 1:
            assert {p.shape for p in adapter.parameters()} == {(3, 3)}
        for name, layer in adapter.layers.items():
            assert torch.equal(layer.lora_B.left, given[name].left.float())
            assert torch.equal(layer.lora_A.weight, given[name].right.float())
            assert not torch.equal(layer.lora_B.core, given[name].start.float())


def test_what_cannot_be(tiny_base, tmp_path, file, subject, monkeypatch):
    """One sentence each."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"icons/emojione/icons\.json is missing"):
        directions.make(directions.Flags(model=tiny_base, data=["emojione"]))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no directions"):
        subspace.load(bad)
    with pytest.raises(UserError, match="directions are those of other"):
        assemble(settings(tiny_base, DIRECTIONS), *subject, Processes())
    with pytest.raises(UserError, match="no public set"):
        directions.make(directions.Flags(model=tiny_base))
    with pytest.raises(UserError, match="there is no folder"):
        directions.make(directions.Flags(model=tiny_base, data=["/nowhere"]))
    with pytest.raises(UserError, match="--directions must be 1 to 4"):
        directions.make(directions.Flags(model=tiny_base, data=["openmoji"], directions=5))


@pytest.mark.usefixtures("elsewhere")
def test_the_embedded_directions():
    """They fit every layer of the embedded model, and are orthogonal; small enough to be here."""
    found, target = subspace.load(DIRECTIONS)
    assert target == "all" and Path(DIRECTIONS).stat().st_size < 2**20
    base = load_base(EMBEDDED)
    adapter = subspace.inject(base.unet, found, target)
    rank = adapter.rank_and_alpha()[0]
    for layer in adapter.layers.values():
        for basis in (layer.lora_B.left, layer.lora_A.weight.flatten(1).T):
            basis = basis / basis.norm(dim=0)
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=4e-3, rtol=0)


def test_a_dry_run_of_directions_writes_nothing(tiny_base, image_folder, tmp_path, capsys):
    """It says pictures, steps and time, and leaves the base as it was for the next set."""
    out = tmp_path / "d.safetensors"
    flags = {"model": tiny_base, "target": "all", "steps": 50, "batch_size": 4, "lr": 0.01}
    sets = [image_folder, image_folder]
    made = directions.make(directions.Flags(data=sets, out=str(out), dry_run=True, **flags))
    said = capsys.readouterr().out
    assert made == {} and not out.exists()
    assert said.count("40 pictures, 50 steps at") == 2 and "time:     about" in said
