"""Settings that are worked out before a run gets its key: the device, digests of the user's own code and of weights."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig

from fedsim.config.classmodels import write_out
from fedsim.config.code import digest
from fedsim.config.compose import plain
from fedsim.config.roles import telling
from fedsim.config.usermodules import importable, is_users

_GPUS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # one of these lies in /dev where Linux has a GPU
_DIGITS = 16
_FILES = (
    "path",
    "weights",
    "folder",
    "base",
)  # settings of a model that may name a file of weights, or a folder


def resolve(config: DictConfig) -> DictConfig:
    """Put what ``auto`` comes to here, and digests of the user's code and of the model's files, in place.

    Only the user's modules are imported. A target that cannot be is left to whoever builds it: that says what is wrong.

    Raises:
        ConfigError: if the user's code holds what cannot be told apart by content; for a class's model that there is
            not.
    """
    write_out(config)
    if config.engine.name != "flower":  # whose nodes each see for themselves
        config.engine.device = device(config.engine.device)
        if config.engine.device == "cpu" and config.engine.vectorize == "auto":
            config.engine.vectorize = "off"
    if config.get("privacy"):
        from fedsim.run.budgeting import fill_in  # and with it torch

        fill_in(config)
    config.code = code_of(plain(config)) or None
    return config


def code_of(values: Mapping[str, Any]) -> dict[str, str]:
    """By dotted key, a digest of the code of each ``_target_`` of the user's that can be imported, and of the content
    of each file or folder of weights that the model is built from, or of models that the method takes."""
    found = {**dict(_weights(values.get("model"), "model")), **dict(_uploads(values.get("strategy")))}
    for at, node in enumerate((values.get("client") or {}).get("classes") or ()):
        found |= _weights(
            node.get("model") if isinstance(node, Mapping) else None, f"client.classes.{at}.model"
        )
    for key, name in _targets(telling(values)):
        top = name.partition(".")[0]
        if not importable(top) or not is_users(top):
            continue
        try:
            target = resolve_name(name)
        except Exception:  # whatever the user's module raises; see above
            continue
        found[key] = digest(f"{key}={name}", target)[:_DIGITS]
    return found


def _weights(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and digest of each file, or folder of files, that a setting of the model names."""
    for name, value in node.items() if isinstance(node, Mapping) else ():
        if (
            name in _FILES
            and isinstance(value, str)
            and value
            and (path := Path(value).expanduser()).exists()
        ):
            yield f"{key}.{name}", _content(path)
        yield from _weights(value, f"{key}.{name}")


def _uploads(node: Any) -> Iterator[tuple[str, str]]:
    """The same of the models of another run, whose lines hold their hashes."""
    named = node.get("uploads") if isinstance(node, Mapping) else None
    if isinstance(named, str):
        path = Path(named).expanduser()
        places = (path / "uploads.json", path / "uploads" / "uploads.json")
        yield from [("strategy.uploads", _content(place)) for place in places if place.is_file()][:1]


def _content(path: Path) -> str:
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            part = hashlib.file_digest(f, "sha256").hexdigest()
        whole.update(f"{file.name if path.is_dir() else ''}={part}".encode())
    return whole.hexdigest()[:_DIGITS]


def device(wish: str) -> str:
    """``auto`` as ``cpu`` or ``cuda``; torch, which takes seconds to load, is asked only where there may be a GPU."""
    if wish != "auto":
        return wish
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _GPUS):
        return "cpu"
    from fedsim.engine.base import pick_device

    return pick_device(wish)


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key of each node that names an object, with the object's dotted name."""
    if isinstance(node, list):
        node = {str(at): value for at, value in enumerate(node)}
    if not isinstance(node, Mapping):
        return
    target = str(node.get("_target_", ""))
    named = node.get("path") if target.startswith("hydra.utils.get_") else target
    if named and "given" not in node:  # what was handed over in Python is told apart by itself
        yield key, str(named)
    for name, value in node.items():
        yield from _targets(value, f"{key}.{name}" if key else str(name))
