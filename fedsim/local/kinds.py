"""Classes of clients that do different amounts of local work, or train models of different widths."""

from __future__ import annotations

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
KEYS = ("share", "width", *WORK)


@dataclass(frozen=True, eq=False)
class Classes:
    """``member`` (m,) is each client's class; ``settings`` and ``widths`` are those of the classes."""

    member: np.ndarray
    settings: tuple[ClientConfig, ...]
    widths: tuple[float, ...]

    def local(self, client: int) -> ClientConfig:
        """Local optimiser of one client."""
        return self.settings[int(self.member[client])]

    def width(self, client: int) -> float:
        """Share of each hidden layer that one client trains."""
        return self.widths[int(self.member[client])]

    @staticmethod
    def of(local: ClientConfig, num_clients: int, seed: int, speed: np.ndarray | None) -> Classes:
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
        return Classes(member, settings, tuple(float(row.get("width", 1.0)) for row in rows))


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
        whole = key in WORK
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
            raise ConfigError(f"{where}.{key}={value}: must be a positive {'whole ' if whole else ''}number")
    if not 0 < row.get("width", 1.0) <= 1:
        raise ConfigError(f"{where}.width={row['width']}: must be in (0, 1]")
    if "share" not in row:
        raise ConfigError(f"{where}: needs a share of the clients, e.g. share: 0.5")
    return float(row["share"])
