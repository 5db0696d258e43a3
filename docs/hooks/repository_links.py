"""MkDocs hook: a link from docs/ to a file elsewhere in the repository becomes its path, checked to exist.

On a code host such a link opens the file; the site does not contain it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent
log = logging.getLogger("mkdocs.hooks.repository_links")  # a warning fails the strict build


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = (DOCS / page.file.src_uri).parent

    def replace(link: re.Match[str]) -> str:
        target = link.group(2)
        path = (folder / target.split("#")[0]).resolve()
        if DOCS in path.parents:
            return link.group(0)
        if not path.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        return f"`{path.relative_to(DOCS.parent)}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)", replace, markdown)
