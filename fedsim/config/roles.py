"""What each setting decides: the roles that the schema's fields say, asked by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_type_hints

from fedsim.config.schema import ENGINES, EngineConfig, Role, RunConfig


@cache
def roles() -> Mapping[str, Role]:
    """Role of every key of the schema, dotted, those of all engines among them."""
    return dict(_walk(RunConfig, ""))


def role_of(key: str) -> Role | None:
    """Role of a dotted key; below an open node (``strategy.rho``) that node's. None: the schema knows no such key."""
    known = roles()
    while key not in known:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return None
    return known[key]


def telling(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings without the neutral ones: whatever can change a result.

    A CPU is called ``auto``, as it was in runs of before: they did not record where they were computed.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if role_of(key) != "neutral":
            kept[name] = telling(value, f"{key}.") if isinstance(value, Mapping) else value
    if prefix == "engine." and kept.get("device") == "cpu":
        kept["device"] = "auto"
        if kept.get("vectorize") == "off":
            kept["vectorize"] = "auto"
    return kept


def _walk(schema: type[Any], prefix: str) -> Iterator[tuple[str, Role]]:
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}", field.metadata["role"]
        for section in _sections(types[field.name]):
            yield from _walk(section, f"{prefix}{field.name}.")


def _sections(kind: Any) -> list[type[Any]]:
    """The configuration types that a field of type ``kind`` may hold."""
    if kind is EngineConfig:
        return list(ENGINES.values())
    return [t for t in (kind, *get_args(kind)) if isinstance(t, type) and dataclasses.is_dataclass(t)]
