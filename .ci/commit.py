"""Build hook of hatchling: a distribution carries the commit that it was built from, as runs record it.

A version is a tag ``vX.Y.Z``: a commit with tags of versions is built only if one is that of ``pyproject.toml``.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``fedsim/commit.txt``: the commit, and ``clean`` or ``changed``; nothing where there is no checkout."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Ask git, write the file elsewhere than in the checkout, and have it included."""
        if not (Path(self.root) / ".git").exists():
            return
        git = ["git", "-C", self.root]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        tags = subprocess.run(
            [*git, "tag", "--points-at", "HEAD", "v*"], capture_output=True, text=True, check=True
        ).stdout.split()
        if tags and f"v{self.metadata.version}" not in tags:
            raise ValueError(f"tagged {' '.join(tags)}, but pyproject.toml says {self.metadata.version}")
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True).stdout
        file = Path(tempfile.mkdtemp()) / "commit.txt"
        file.write_text(f"{commit.strip()} {'changed' if changed else 'clean'}\n")
        build_data["force_include"][str(file)] = "fedsim/commit.txt"
