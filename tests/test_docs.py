"""The docs hold together: every link leads somewhere, and lines fit a screen."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)#:\s]*)(#[^)\s]+)?\)")


def ids(path):
    return path.name


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    lines = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).split("\n")
    titles = (line.lstrip("#").strip().lower() for line in lines if re.match("#+ ", line))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor[1:] in anchors(target), f"{path}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_fit_a_screen(page):
    lines = page.read_text(encoding="utf-8").split("\n")
    long = [i for i, line in enumerate(lines, 1) if len(line) > 110 and not line.startswith("|")]
    assert not long, f"lines {long}"


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"}
    assert pages == {path for path, _ in LINK.findall(index) if not path.startswith("..")}


def test_every_path_of_the_repository_that_is_named_exists():
    named = re.compile(r"`((?:aixsim_cli|kernels|scripts|tests|configs|docs)/[\w./-]+)`")
    for page in PAGES:
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert (REPOSITORY / path).exists(), f"{page.name}: {path}"
