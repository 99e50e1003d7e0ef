"""The pages: short enough to be read, links that lead somewhere, flags that there are."""

import re
from pathlib import Path

import pytest

from settings import Settings
from studies.tables import narrow

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "base" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "records").glob("*.md"))
LIMITS = {"docs/results.md": 4500, "docs/reference.md": 4000, "README.md": 1200}
ALL_PAGES = 13_000  # docs/*.md and base/README.md together
OTHERS = {"inplace", "extra-index-url", "nthreads", "dist"}  # of jupyter, pip, dask and pytest


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words(page: Path) -> int:
    return len(page.read_text().split())


def anchors(page: Path) -> set[str]:
    """Those of its headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in found}


@pytest.mark.parametrize(("page", "most"), LIMITS.items())
def test_a_page_is_short_enough_to_be_read(page, most):
    assert words(ROOT / page) <= most


def test_all_pages_are_short_enough_to_be_read():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "base" / "README.md"]
    assert sum(map(words, pages)) <= ALL_PAGES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    """Of pages and pictures in the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), target
        if anchor:
            assert anchor in anchors(aim), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_have_as_many_cells_in_every_row(page):
    """A row with a cell too many or too few is drawn askew."""
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M):
        rows = [re.sub(r"\\\|", "", row) for row in block.splitlines()]
        assert len({row.count("|") for row in rows}) == 1, rows[0]
        assert re.fullmatch(r"\|( ?:?-+:? ?\|)+", rows[1]), rows[0]


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "records"], ids=name)
def test_flags_of_the_pages_are_flags(page):
    """Each is a field of some command's settings, or its section says which commit had it last."""
    code = "\n".join(p.read_text() for p in ROOT.glob("*/*.py") if p.parent.name != "tests")
    code += "\n".join(p.read_text() for p in ROOT.glob("*.py"))
    for section in re.split(r"^(?=#+ )", page.read_text(), flags=re.M):
        for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", section)) - OTHERS:
            field = flag.replace("-", "_")
            if Settings.RETIRED.get(field, ("nowhere",))[0] in section:  # the last with this flag
                continue
            known = re.search(rf'^    {field}: |"--{re.escape(flag)}"', code, re.M)
            assert known or f'aliases=("{flag}"' in code, (flag, section[:60])


def test_a_narrow_table_is_the_long_one_without_columns():
    """By hand: a column, the note and zeros before the point go; a ten keeps its zero."""
    long = (
        "| a | b | c |\n| --- | --- | --- |\n| 0.97 [-0.10, 1.0] | x |  |\n| 10.5 | y | 0.0 % |\n"
    )
    short = "| a | c |\n| --- | --- |\n| .97 [-.10, 1.0] |  |\n| 10.5 | .0 % |\n"
    assert narrow(f"{long}\nBrackets are 0.95 intervals.\n", "b") == short
    with pytest.raises(ValueError):
        narrow(long, "d")
