"""Callbacks that stop a run, or take a picture of its folder, as a round ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


class Interrupt:
    """Ctrl-C as a round ends."""

    def __init__(self, at: int):
        self.at = at

    def round(self, row: dict[str, Any], clients: list[Any]) -> None:
        if row["round"] == self.at:
            raise KeyboardInterrupt


class Photographer:
    """Copies the run folder after every round: what a kill at that moment would leave."""

    def __init__(self, folder: Path, album: Path):
        self.folder, self.album, self.count = folder, album, 0

    def round(self, row: dict[str, Any], clients: list[Any]) -> None:
        self.count += 1
        shutil.copytree(self.folder, self.album / f"{self.count}")
