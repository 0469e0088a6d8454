"""Classes of clients that do different amounts of local work, or train models of different widths or architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedsim.config.schema import ClientConfig
from fedsim.errors import ConfigError, hint
from fedsim.rng import numpy_rng

WORK = (
    "epochs",
    "min_epochs",
    "steps",
    "batch_size",
    "accumulate",
)  # settings of the group `client` that a class may change
KEYS = ("share", "width", "model", *WORK)


@dataclass(frozen=True, eq=False)
class Kinds:
    """``member`` (m,) is each client's class; ``settings`` and ``widths`` are those of the classes, and
    ``architectures`` the number of the model that each trains: 0 the run's, others as ``models`` counts them."""

    member: np.ndarray
    settings: tuple[ClientConfig, ...]
    widths: tuple[float, ...]
    architectures: tuple[int, ...] = ()

    def local(self, client: int) -> ClientConfig:
        """Local optimiser of one client."""
        return self.settings[int(self.member[client])]

    def width(self, client: int) -> float:
        """Share of each hidden layer that one client trains."""
        return self.widths[int(self.member[client])]

    def architecture(self, client: int) -> int:
        """Number of the model that one client trains."""
        return self.architectures[int(self.member[client])]

    @staticmethod
    def of(local: ClientConfig, num_clients: int, seed: int, speed: np.ndarray | None) -> Kinds:
        """Deal the clients out by the shares of ``client.classes``: at random, or the slowest devices first.

        Without classes all clients are one. ``speed`` (m,) is that of the devices, if there are any.

        Raises:
            ConfigError: naming the class and key that cannot be.
        """
        rows = local.classes or [{"share": 1.0}]
        shares = np.array([_check_class(i, row) for i, row in enumerate(rows)])
        if local.classes_by == "speed":
            if speed is None:
                raise ConfigError(
                    "client.classes_by=speed: needs devices; add system=lognormal or another system"
                )
            order = np.argsort(speed, kind="stable")
        else:
            order = numpy_rng(seed, "classes").permutation(num_clients)
        ends = np.rint(np.cumsum(shares) / shares.sum() * num_clients)
        member = np.empty(num_clients, dtype=np.int16)
        member[order] = np.searchsorted(ends, np.arange(num_clients), side="right")
        settings = tuple(replace(local, **{k: row[k] for k in WORK if k in row}) for row in rows)
        for i, one in enumerate(settings):
            if one.min_epochs is not None and one.min_epochs > one.epochs:
                raise ConfigError(
                    f"client.classes[{i}]: min_epochs={one.min_epochs} exceeds epochs ({one.epochs})"
                )
        kinds, widths = models(rows), tuple(float(row.get("width", 1.0)) for row in rows)
        numbers = tuple(kinds.index(row["model"]) + 1 if "model" in row else 0 for row in rows)
        return Kinds(member, settings, widths, numbers)


def models(rows: Sequence[Any] | None) -> list[Mapping[str, Any]]:
    """The models that the classes ``rows`` name, each once, in their order: numbers 1, 2, ... of architectures."""
    found = list[Mapping[str, Any]]()
    for row in rows or ():
        if isinstance(row, Mapping) and row.get("model") is not None and row["model"] not in found:
            found.append(row["model"])
    return found


def _check_class(i: int, row: Any) -> float:
    """The share of one class."""
    where = f"client.classes[{i}]"
    if not isinstance(row, dict):
        raise ConfigError(f"{where}={row}: must be like {{share: 0.5, epochs: 1}}")
    for key, value in row.items():
        if key not in KEYS:
            raise ConfigError(
                f"{where}: unknown key {key!r}{hint(str(key), KEYS)}; classes have {', '.join(KEYS)}"
            )
        if key == "model":
            _check_model(where, value)
            continue
        whole = key in WORK
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
            raise ConfigError(f"{where}.{key}={value}: must be a positive {'whole ' if whole else ''}number")
    if not 0 < row.get("width", 1.0) <= 1:
        raise ConfigError(f"{where}.width={row['width']}: must be in (0, 1]")
    if "model" in row and "width" in row:
        raise ConfigError(
            f"{where}: a width is a share of the run's model, so there is no model beside it; leave one out"
        )
    if "share" not in row:
        raise ConfigError(f"{where}: needs a share of the clients, e.g. share: 0.5")
    return float(row["share"])


def _check_model(where: str, node: Any) -> None:
    """Refuse what names no model (``fedsim.run.architectures`` has written it out)."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(
            f"{where}.model={node}: must be an option of `model`, such as model: lenet, its settings, such as "
            "model: {option: mlp, hidden: [32]}, or {_target_: my_module.MyNet}"
        )
