"""Every notebook runs from top to bottom on the tiny model, in a few steps; what is committed has
run, without errors.
"""

from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

from command.whole_files import write_json
from studies import smoothness

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHORT = {
    "MODEL": "{base}",
    "DATA": "{images}",
    "RUNS": "{runs}",
    "FLAGS": {
        "members": 10,
        "steps": 8,
        "batch_size": 4,
        "proxy": "pooled",
        "lr": 1e-3,
        "samples": 1,
        "threads": 1,
    },
    "HESSIAN_EVERY": 2,
    "POINTS": 3,
    "DESCENT": 3,
    "LIVE": 2,
    "STUDY": "{runs}/study",
    "LAMBDAS": (),
    "LOW_RANK": 2,
    "EARLY": (4,),
    "EVALUATE": {"threads": 1},
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
