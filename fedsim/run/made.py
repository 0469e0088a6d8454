"""Folders that were made for something that was then refused: which they are, and how they go again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def absent(folder: Path) -> list[Path]:
    """Those of ``folder`` and the folders above it that are not there yet."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove(folder: Path, made: Sequence[Path]) -> None:
    """Remove ``folder``, and those above it, if they were ``made`` since and nobody has put anything there."""
    if folder in made:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # others have put something there
            for place in made[1:]:
                place.rmdir()
