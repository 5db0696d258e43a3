"""Parts of documents that a command writes: between `<!-- from: COMMAND -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"


def write(command: str, text: str) -> None:
    """Puts `text` where the document has a part of this command."""
    before = DOCUMENT.read_text()
    part = re.compile(rf"(<!-- from: {re.escape(command)} -->\n).*?(<!-- end -->)", re.DOTALL)
    after, count = part.subn(lambda match: f"{match[1]}\n{text.strip()}\n\n{match[2]}", before)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has {count} parts from: {command}")
    DOCUMENT.write_text(after)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
