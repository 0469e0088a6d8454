"""What a node's owner says of it, in ``--node-config`` or a file: keys and types, checked without anything of a run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, hint

Values = Mapping[str, bool | float | int | str]
NODE_KEYS = (
    "partition-id",
    "clients",
    "num-partitions",
    "data-path",
    "own-data",
    "state-dir",
    "state.keep_days",
    "allow",
    "metrics",
)
TEXTS = {  # settings that are text, and what each says
    **dict.fromkeys(("data-path", "state-dir", "metrics"), "a path in quotes"),
    "allow": "modules and dotted names in quotes, separated by spaces",
}


def read_file(path: Path) -> str:
    """That ``flower-supernode --node-config path`` can read the file, and whose it is.

    Raises:
        ConfigError: one line on what is wrong with it.
    """
    try:
        values = dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:  # not there, no text, no TOML
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for key, value in values.items():
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"{path}: {key}={value!r:.80}: must be a number, true, false, or text in quotes "
                '(several: clients = "0 3", allow = "one two")'
            )
    try:
        check_settings(values)
        clients = clients_of(values)
        if clients == [None]:
            raise ConfigError("the node has no partition-id; which client is it?")
        if any(type(c) is not int or c < 0 for c in clients):
            raise ConfigError(f"partition-id={clients[0]!r}: must be an integer from 0, without quotes")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return f"{path}: client {', '.join(map(str, clients))}"


def clients_of(values: Values) -> Sequence[Any]:
    """The clients that a node is, as written: one by ``partition-id``, or several by ``clients="0 1"``."""
    if "clients" not in values:
        return [values.get("partition-id")]
    text = str(values["clients"])
    numbers = re.findall(r"\d+", text)
    if not re.fullmatch(r"\[?\s*\d+([\s,]+\d+)*\s*\]?", text) or len(set(map(int, numbers))) < len(numbers):
        raise ConfigError(f'clients={text!r:.80}: expected numbers, each once, such as clients="0 1"')
    if "partition-id" in values:
        raise ConfigError(f"partition-id={values['partition-id']}, clients={text}: give one of the two")
    if len(numbers) > 1 and values.get("own-data", False):
        raise ConfigError(f"clients={text}: a node with own-data=true is one client; start a node for each")
    return [int(n) for n in numbers]


def check_settings(values: Values) -> None:
    """Refuse what is no setting of a node, or of another type: misspelt, ``own-data`` would be taken for left out.

    Tables of other apps (``other.key``) are theirs.
    """
    for key in values:
        near = hint(key, NODE_KEYS)
        if key not in NODE_KEYS and (near or "." not in key):
            raise ConfigError(
                f"unknown key {key!r:.80} in the node's settings{near}; they are {', '.join(NODE_KEYS)} (those of "
                "other apps stand in a table of their own)"
            )
    for key, what in TEXTS.items():
        if key in values and (not isinstance(values[key], str) or not (values[key] or key == "allow")):
            raise ConfigError(f"{key}={values[key]!r}: must be {what}")
    own, days = values.get("own-data", False), values.get("state.keep_days", 1.0)
    if not isinstance(own, bool):
        raise ConfigError(f"own-data={own!r}: must be true or false, without quotes")
    if isinstance(days, bool | str) or not days > 0:
        raise ConfigError(f"state.keep_days={days!r}: must be a positive number of days")


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values as Flower names them: ``state.keep_days`` of a table ``state``."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
