"""Every Python block of the README and of docs/ runs, in order, one namespace a page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line number and text of every Python block."""
    text = page.read_text()
    return [(text[: match.start(1)].count("\n") + 1, match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a block saves does not land in the checkout
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for line, block in blocks(page):
        # Line numbers of a traceback are those of the page.
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        exec(code, namespace)


def test_pages_have_code() -> None:
    assert sum(bool(blocks(p)) for p in PAGES) >= 2, "the pattern finds no code any more"


PLACES = re.findall(r"`([\w/]+\.py)::([\w.]+)`", (ROOT / "docs" / "algorithm.md").read_text())


@pytest.mark.parametrize(("file", "name"), PLACES, ids="::".join)
def test_an_equation_is_where_the_page_says(file: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse((ROOT / "kfac_fast" / file).read_text()).body
    for part in name.split("."):
        found = [s for s in body if isinstance(s, (ast.ClassDef, ast.FunctionDef)) and s.name == part]
        assert found, f"{file} has no {name}"
        body = found[0].body


def test_links_between_files_resolve() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:|#", target):
                continue
            if not (page.parent / target.split("#")[0]).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
