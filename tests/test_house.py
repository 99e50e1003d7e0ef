"""Where things live: the import rules of the project, held by reading the imports, and docstrings
where a reader looks.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "command",
    "files",
    "curves",
    "run",
    "methods",
    "attacks",
    "report",
    "studies",
    "embedded",
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
    if path.name != "__init__.py"
}
PAPER = {"lora", "attacker", "objectives", "diffusion", "smoothness", "algorithm"}
COMMANDS = {"train", "evaluate", "audit"}
# floors of the house: a module imports from its own and from those below it
FLOORS = [
    {"command"},
    {"paper", "settings", "curves"},
    {"files"},
    {"run"},
    {"methods"},
    {"attacks"},
    {"report"},
    {"commands"},
    {"studies", "embedded"},
]


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


def part(name: str) -> str:
    """Which part of the house a module belongs to."""
    if name in PAPER:
        return "paper"
    return "commands" if name in COMMANDS else name.split(".")[0]


def floor(name: str) -> int:
    """The floor of a module, from below."""
    return next(i for i, parts in enumerate(FLOORS) if part(name) in parts)


def test_the_reader_sees_arrows():
    """The rules below would hold for a reader that found nothing."""
    assert {"objectives", "attacker", "lora", "diffusion"} <= ARROWS["algorithm"]
    assert "methods.assembly" in ARROWS["train"]  # inside a function
    assert "run.folder" in ARROWS["attacks.target"]


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_paper_imports_only_the_paper(name):
    """What goes beyond it attaches from outside."""
    assert ARROWS[name] <= PAPER


@pytest.mark.parametrize("name", FILES)
def test_no_arrow_points_upwards(name):
    """A module imports from its own floor and from those below."""
    assert not [used for used in ARROWS[name] if floor(used) > floor(name)]


def test_who_does_not_know_whom():
    """The run knows no method, and no attack knows what trains a run: it reads run folders."""
    for name, used in ARROWS.items():
        if part(name) == "run":
            assert not [u for u in used if part(u) == "methods"], name
        if part(name) == "attacks":
            trainer = {"run.keeper", "run.watch", "run.prepare", "methods.assembly", "train"}
            assert not used & trainer, name


def test_no_circles():
    """There is an order in which every module comes after those that it imports."""
    order = list(TopologicalSorter(ARROWS).static_order())
    assert len(order) == len(FILES)


def test_the_top_level_is_short():
    """A newcomer sees the paper first."""
    assert len([name for name in FILES if "." not in name]) <= 10


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
    """60 plain lines at most: one statement a line."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{name}.{node.name} has {lines} lines"


@pytest.mark.parametrize("name", FILES)
def test_durations_are_no_differences_of_dates(name):
    """A clock that is set back would make them negative."""
    assert "time.time" not in FILES[name].read_text()


def test_a_statement_a_line_in_algorithm_1():
    """No two statements share a line, and no argument of a call has an effect of its own."""
    tree = ast.parse(FILES["algorithm"].read_text())
    (function,) = [n for n in tree.body if getattr(n, "name", "") == "algorithm_1"]
    statements = [n for n in ast.walk(function) if isinstance(n, ast.stmt) and n is not function]
    assert len({n.lineno for n in statements}) == len(statements)
    effects = {"clip_", "ascend", "descend", "batch", "gradients"}
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        for argument in (n for a in call.args for n in ast.walk(a)):
            if isinstance(argument, ast.Call):
                called = argument.func
                assert getattr(called, "attr", getattr(called, "id", "")) not in effects


@pytest.mark.parametrize(
    ("call", "lines", "files"), [("smp_step", 550, 5), ("local_smoothness", 330, 3)]
)
def test_what_a_reader_has_to_read(call, lines, files):
    """Of one step of SMP, and of the local smoothness at one point; counted by following the
    calls.
    """
    from bench import reading

    found = reading.definitions(reading.entered(getattr(reading, call)()))
    found.pop("bench/reading.py", None)
    assert sum(sum(named.values()) for named in found.values()) <= lines
    assert len(found) <= files
