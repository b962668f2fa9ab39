"""The pages under docs/ point to what is there: files, headings, and the names that a link says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").glob("*.md")])
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([A-Za-z_]\w*)`")


def links(page: Path) -> list[tuple[str, str]]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [(text, target) for text, target in LINK.findall(text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The headings as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def names_in(file: Path) -> set[str]:
    """What a module defines at its top: functions, classes, constants."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for text, target in links(page):
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: [{text}] leads to {target}, which is not there"
        if heading:
            assert heading in anchors(file), f"{page.name}: {target}: no such heading"
        code = CODE.fullmatch(text)
        if code and file.suffix == ".py":
            assert code[1] in names_in(file), f"{page.name}: {target} defines no {code[1]}"


def test_the_tour_has_its_five_journeys() -> None:
    tour = CHECKOUT / "docs" / "tour.md"
    assert len([title for title in anchors(tour) if title[0].isdigit()]) == 5
    assert len(links(tour)) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths in code spans of a page. Those that a user would have (model.gguf, out/) are not ours."""
    rooms = {path.name for path in CHECKOUT.iterdir() if path.is_dir()}
    for span in re.findall(r"`([^`\s]+)`", page.read_text()):
        path = span.split("#")[0].rstrip("/")
        if "/" in path and path.split("/")[0] in rooms and re.fullmatch(r"[\w./-]+", path):
            assert (CHECKOUT / path).exists(), f"{page.name} names {span}"
