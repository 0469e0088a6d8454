"""The files of clients' models that were asked for once: their index, and how a run's folder holds those of others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError
from fedsim.server.depot import MEASURED

INDEX, FOLDER = "uploads.json", "uploads"


def rest_hash(index: Mapping[str, Any]) -> str:
    """Sha256 over what the index says beside the models: by which settings they came, what they cost, and, but in older
    folders, how good each is."""
    measured = [measures(line) for line in index["clients"]]
    text = json.dumps(
        [index.get("key"), index["outcomes"], *([measured] if any(measured) else ())], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def measures(line: Mapping[str, Any]) -> dict[str, float | None]:
    """What a line says of how good its model is; nothing in older folders."""
    return {k: line[k] for k in MEASURED if k in line}


def folder_of(path: Path) -> Path:
    """The folder of uploads that ``path``, a run's or its own, stands for."""
    for place in (path.expanduser(), path.expanduser() / FOLDER):
        if (place / INDEX).is_file():
            return place
    raise ConfigError(
        f"strategy.uploads={path}: there is no {FOLDER}/{INDEX}; give the folder of a run of a one-shot method, or "
        "strategy.uploads=auto"
    )


def link(source: Path, target: Path) -> None:
    """The files of ``source`` in ``target`` too: links, or copies where there can be none."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("*.safetensors"), target / INDEX):
        old.unlink(missing_ok=True)
    for path in (*sorted(source.glob("*.safetensors")), source / INDEX):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)
