"""Links from the pages to files outside of docs/, for the site: mkdocs knows only what is in docs/.

On a code host such links work as they are.  In the site they lead to ``repo_url``, or are plain text where there is
none.  A link to a file that is not there is left as it is, and fails ``mkdocs build --strict``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

BRANCH = "main"
# [text](path) and [text](path#anchor); text may span lines.
_LINK = re.compile(r"(?<!!)\[([^\]\[]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links of one page."""
    docs = Path(config.docs_dir)
    return rewritten(markdown, docs / page.file.src_uri, docs, config.repo_url)


def rewritten(markdown: str, file: Path, docs: Path, repository: str | None) -> str:
    """The page's text with links out of ``docs`` as the site can have them."""

    def replace(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        found = Path(os.path.normpath(file.parent / path))
        if found.is_relative_to(docs) or not found.exists():
            return link[0]
        if not repository:
            return text
        kind = "tree" if found.is_dir() else "blob"
        return f"[{text}]({repository.rstrip('/')}/{kind}/{BRANCH}/{found.relative_to(docs.parent).as_posix()}{anchor})"

    return _LINK.sub(replace, markdown)
