"""Where things live: the import rules of the project, held by reading the imports, and docstrings
where a reader looks.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("command", "files", "run", "methods", "attacks", "report", "embedded", "studies")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
    if path.name != "__init__.py"
}
SCRIPTS = {"train", "evaluate", "audit", "embedded.pretrain", "methods.directions"}
SCRIPTS |= {name for name in FILES if name.startswith("studies.")}
PAPER = {"lora", "attacker", "objectives", "smoothness", "diffusion"}


def imported(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


ARROWS = {name: imported(path) for name, path in FILES.items()}


def test_the_reader_sees_arrows():
    """The rules below would hold for a reader that found nothing."""
    assert {"objectives", "run.learner"} <= ARROWS["train"]
    assert "run.folder" in ARROWS["attacks.target"]
    assert "attacker" in ARROWS["objectives"]


def test_no_module_imports_a_script():
    """The shadows are handed the training function; only scripts may import scripts."""
    for name in set(FILES) - SCRIPTS:
        assert not ARROWS[name] & SCRIPTS, name


def test_the_paper_stands_alone():
    """Its modules know neither the flags nor any folder; the adapter knows nothing of ours."""
    assert not ARROWS["lora"]
    for name in PAPER:
        assert not ARROWS[name] & {"settings"}, name
        assert not [used for used in ARROWS[name] if "." in used], name


def test_folders_keep_their_distance():
    """Training never looks at the evaluation, which sees only what a run has left on disk."""
    for name, used in ARROWS.items():
        if name.startswith("adapters."):
            assert not [u for u in used if "." in u and not u.startswith("adapters.")], name
        if name.startswith("training."):
            others = ("evaluation.", "embedded.", "defences.")
            used = used - {"methods.subspace"}  # an adapter, as lora.py has one
            assert not [u for u in used if u.startswith(others)], name
        if name.startswith("defences."):
            assert not [u for u in used if u.startswith(("evaluation.", "embedded."))], name
        if name.startswith("evaluation."):
            assert {u for u in used if u.startswith("training.")} <= {"run.folder"}, name


def test_no_circles():
    """There is an order in which every module comes after those that it imports."""
    order = list(TopologicalSorter(ARROWS).static_order())
    assert len(order) == len(FILES)


def test_the_top_level_is_short():
    """A newcomer sees the paper first: at most sixteen modules."""
    assert len([name for name in FILES if "." not in name]) <= 16


@pytest.mark.parametrize("name", FILES)
def test_public_things_say_what_they_are(name):
    """Modules, public functions, classes and methods have a docstring."""
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree), name
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            inside = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        else:
            inside = []
        for thing in [*([node] if node in tree.body else []), *inside]:
            if isinstance(thing, ast.FunctionDef | ast.ClassDef) and thing.name[0] != "_":
                documented = ast.get_docstring(thing) or thing.name in ("forward", "error")
                assert documented, f"{name}.{thing.name} has no docstring"


def test_functions_fit_on_a_screen():
    """Algorithm 1 in 45 lines; nothing else above 60."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                most = 45 if node.name == "algorithm_1" else 60
                assert lines <= most, f"{name}.{node.name} has {lines} lines"
