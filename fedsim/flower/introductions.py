"""What a node says of itself before it gets work. Nothing is believed that could be too large, and nothing is made of
a size before it is known to be possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedsim.errors import ConfigError
from fedsim.flower.answers import said
from fedsim.flower.wire import WIRE

LINES = 50  # of what a node says is wrong, at most
CLASSES = 100_000  # in a list of counts, at most
LETTERS = {"host": 255, "instance": 64, "base": 255, "base_sha256": 64, "partition": 64}
TEXT = 16 << 20  # letters of other texts: names and shapes of all tensors


@dataclass(frozen=True)
class Known:
    """What a node said of itself."""

    id: int
    client: int
    samples: int
    counts: list[int]  # samples per class, of nodes with their own data
    own: bool  # its data are its own, not a part of a common data set
    partition: str
    layout: str
    host: str
    instance: str  # of its state folder: the same after a restart
    base: str = ""  # of its model: name and sha256 of the frozen part, nothing where all is trained
    base_sha256: str = ""
    contract: str = ""  # JSON: versions, and of own data classes, columns, statistics

    @property
    def name(self) -> str:
        """For messages."""
        return f"node {self.id} on {self.host}"


@dataclass(frozen=True)
class Limits:
    """What an introduction may say; ``classes()`` is how many the server's data have, 0 where targets are none."""

    num_clients: int
    samples: int = 10**7  # of one client
    classes: Callable[[], int] | None = None  # asked for once a node brings its own data


def introduction_records(about: Sequence[Mapping[str, Any]]) -> RecordDict:
    """What a node says of each of its clients: records ``node``, ``node.1``, ``node.2``, ..."""
    return RecordDict({_record(k): ConfigRecord(dict(one)) for k, one in enumerate(about)})


def known(node: int, content: RecordDict, limits: Limits) -> list[Known]:
    """The node that introduced itself with ``content``, as each of its clients.

    Raises:
        ConfigError: why it cannot take part.
    """
    names = [_record(k) for k in range(len(content))]
    if not 0 < len(names) <= max(1, limits.num_clients) or any(name not in content for name in names):
        raise ConfigError("its introduction is none: expected a record 'node' for each of its clients")
    found = [_known(node, content[name], limits) for name in names]
    if len({one.client for one in found}) < len(found) or len({one.own for one in found}) > 1:
        raise ConfigError("its introduction names a client twice, or data of its own for some alone")
    return found


def _record(number: int) -> str:
    return f"node.{number}" if number else "node"


def _known(node: int, record: Any, limits: Limits) -> Known:
    if not isinstance(record, ConfigRecord):
        raise ConfigError("its introduction is none: expected a record 'node' for each of its clients")
    about: dict[str, Any] = dict(record)
    if (refused := about.get("refused")) is not None:
        raise ConfigError("\n".join(said(line) for line in str(refused).splitlines()[:LINES]))
    if (spoken := about.pop("wire", 0)) != WIRE:
        raise ConfigError(
            f"its fedsim speaks version {said(str(spoken))} to nodes, this one {WIRE}; install the same"
        )
    _check_types(about)
    found = Known(id=node, **about)
    _check_counts(found, limits)
    return found


def _check_types(about: Mapping[str, Any]) -> None:
    fields = {f.name: f for f in dataclasses.fields(Known) if f.name != "id"}
    if unknown := [name for name in about if name not in fields]:
        raise ConfigError(f"its introduction holds {said(unknown[0])!r:.80}, which is not known")
    for name, field in fields.items():
        if name not in about:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"its introduction lacks '{name}'")
            continue
        value = about[name]
        kind = str(field.type).partition("[")[0]
        if type(value).__name__ != kind:
            raise ConfigError(f"its introduction: '{name}' is {type(value).__name__}, expected {kind}")
        if isinstance(value, str) and (len(value) > LETTERS.get(name, TEXT) or not value.isprintable()):
            raise ConfigError(f"its introduction: '{name}' is too long, or no text")


def _check_counts(node: Known, limits: Limits) -> None:
    if not 0 <= node.client < limits.num_clients:
        raise ConfigError(f"partition-id={node.client}: the run has {limits.num_clients} clients")
    if not 0 <= node.samples <= limits.samples:
        raise ConfigError(
            f"it says that it has {node.samples} samples; engine.most_samples={limits.samples} is the most that a "
            "client is believed to have, and to weigh"
        )
    if not node.own:
        if node.counts:
            raise ConfigError("it counts its classes, but has no data of its own")
        return
    if len(node.counts) > CLASSES or not all(type(n) is int and n >= 0 for n in node.counts):
        raise ConfigError(f"its counts of {len(node.counts)} classes are none; at most {CLASSES} are taken")
    classes = limits.classes() if limits.classes else len(node.counts)
    if len(node.counts) != classes:
        raise ConfigError(f"its data have {len(node.counts)} classes, the server's {classes}")
    if classes and sum(node.counts) != node.samples:
        raise ConfigError(
            f"it says that it has {node.samples} samples, but its classes have {sum(node.counts)}"
        )
