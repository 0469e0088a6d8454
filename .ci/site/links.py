"""Where a file of the repository lies on the site, and links between files rewritten to it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # files outside docs/ that are pages of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "experiments/quickstart.ipynb": "notebook.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")  # the file of [text](file) and [text](file#place)


def place(path: str) -> str:
    """The path on the site of a file of the repository; what is no page is copied below ``source/``."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def linked(text: str, source: str) -> Iterator[str]:
    """The files of the repository that ``text``, which stands in the file ``source``, links to."""
    for found in LINK.finditer(text):
        if path := _file(found[1], source):
            yield path


def relinked(text: str, source: str, page: str) -> str:
    """``text`` of the file ``source`` with links as the page ``page`` of the site needs them.

    What leads to no file stays as it is: the site's own check names it.
    """

    def link(found: re.Match[str]) -> str:
        path = _file(found[1], source)
        return posixpath.relpath(place(path), posixpath.dirname(page) or ".") if path else found[1]

    return LINK.sub(link, text)


def moved(text: str, source: str, other: str) -> str:
    """``text`` of the file ``source`` with links as they would stand in the file ``other``."""

    def link(found: re.Match[str]) -> str:
        path = _file(found[1], source)
        return posixpath.relpath(path, posixpath.dirname(other)) if path else found[1]

    return LINK.sub(link, text)


def _file(link: str, source: str) -> str | None:
    """The path from the root of what is linked to, if it is a file here."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if "://" not in link and (ROOT / path).is_file() else None
