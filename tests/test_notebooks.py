"""Every notebook runs from top to bottom on the tiny model, in a few steps; what is committed has
run, without errors.  The walks of notebook 3 against a bowl.
"""

from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch

from command.whole_files import write_json
from notebooks.surface import descend, linear_reach, moved
from studies import smoothness

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHORT = {
    "MODEL": "{base}",
    "DATA": "{images}",
    "RUNS": "{runs}",
    "FLAGS": {
        "members": 10,
        "steps": 4,
        "batch_size": 4,
        "proxy": "pooled",
        "lr": 5e-3,
        "samples": 1,
    },
    "HESSIAN_EVERY": 2,
    "POINTS": 3,
    "DESCENT": 3,
    "LIVE": 2,
    "STUDY": "{runs}/study",
    "LAMBDAS": (),
    "LOW_RANK": 2,
    "EARLY": (2,),
    "EVALUATE": {"test_nonmembers": 10},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The notebooks share their runs, as they do in earnest; a study of made-up numbers is there
    too.
    """
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    columns = {k: rng.uniform(1, 2, 9).tolist() for k in smoothness.KEYS}
    groups = [
        smoothness.group("paper", m, [{"seed": 0, "columns": columns}]) for m in ("mp", "smp")
    ]
    (folder / "study").mkdir()
    write_json(folder / "study" / "smoothness.json", {"runs": [], "groups": groups})
    return folder


def settings(notebook) -> list:
    return [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def complaints(notebook) -> list:
    """Errors, and warnings of whatever library."""
    return [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_the_tiny_model(path, tiny_base, image_folder, runs):
    notebook = nbformat.read(path, as_version=4)
    (cell,) = settings(notebook)
    places = {"base": tiny_base, "images": image_folder, "runs": str(runs)}
    for name, value in SHORT.items():
        value = value.format(**places) if isinstance(value, str) else value
        cell.source += f"\n{name} = {value!r}"
    nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    assert not complaints(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    """Outputs are there, in order, none of them an error, and name no folder of whoever ran it."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not complaints(notebook)
    assert not any(place in path.read_text() for place in ("/home/", "/work/", "/tmp/"))


def test_there_are_five():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


# ---- walks on a surface ----


def bowl():
    """((a - 3)^2 + 100 b^2) / 2 in float64, and its parameters at (0, 1)."""
    a, b = (torch.nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (0.0, 1.0))
    return lambda: (((a - 3) ** 2 + 100 * b**2) / 2).sum(), [a, b]


def test_a_move_is_taken_back():
    """Inside the parameters stand elsewhere; afterwards, also after an error, where they were."""
    value, parameters = bowl()
    before = [p.detach().clone() for p in parameters]
    with moved(parameters, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.5):
        assert [p.item() for p in parameters] == [0.5, 0.5]
        assert value().item() == pytest.approx((2.5**2 + 100 * 0.25) / 2)
    with pytest.raises(ZeroDivisionError), moved(parameters, torch.ones(2, dtype=torch.float64)):
        _ = 1 / 0
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_a_descent_follows_the_gradient():
    """The flow of the bowl is exp(-t) and exp(-100 t): at b = 0.1, a is where that has it.  The
    path goes on to the minimum, ends where the gradient is zero, and is taken back.
    """
    value, parameters = bowl()
    places = {
        length: [p.item() for p in parameters]
        for length in descend(value, parameters, size=1e-3, steps=5000)
    }
    lengths = list(places)
    assert lengths == pytest.approx(1e-3 * np.arange(5001))
    steps = np.linalg.norm(np.diff(list(places.values()), axis=0), axis=1)
    assert steps == pytest.approx(1e-3)
    a = next(a for a, b in places.values() if b < 0.1)
    assert a == pytest.approx(3 * (1 - 0.1 ** (1 / 100)), rel=0.02)
    assert places[lengths[-1]] == pytest.approx([3, 0], abs=0.05)
    assert [p.item() for p in parameters] == [0, 1]
    walk = descend(value, parameters, size=1e-3, steps=5)
    assert next(walk) == 0 and next(walk) == 1e-3
    walk.close()
    assert [p.item() for p in parameters] == [0, 1]
    assert list(descend(lambda: 0 * value(), parameters, size=1.0, steps=5)) == [0]


def test_how_far_a_gradient_describes():
    """x + x^2 is its slope to a quarter up to x = 1/4, on the worse side too; a kink or a
    wrong slope nowhere.
    """
    steps = [0.05, 0.1, 0.2, 0.25, 0.3, 0.05]
    both = {sign: [sign * x + x * x for x in steps] for sign in (1, -1)}
    assert linear_reach(steps, both, 1.0) == 0.25
    kink = {1: steps, -1: steps}
    assert linear_reach(steps, kink, 1.0) == 0 == linear_reach(steps, both, 3.0)
