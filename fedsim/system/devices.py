"""Device profiles: how fast each client computes and communicates, from distributions, a table or measured phones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.config.textfile import read_text
from fedsim.errors import DataError, check_setting

_check = partial(check_setting, "system.devices")

if TYPE_CHECKING:
    import pandas as pd

KB = 1000.0  # bytes
CSV_CLIENTS = 100_000  # larger fleets are recorded as .npz: text would take longer than the run


@dataclass(frozen=True, eq=False)
class Fleet:
    """The devices of m clients: float64 arrays ``(m,)``.

    ``speed`` in units of work per second (see ``System.work``); ``down`` and ``up`` in kB/s, ``down_std`` and
    ``up_std`` their spread from one transfer to the next; ``latency`` in ms, one way; ``memory`` in MB (infinite: not
    a limit); ``compute_watts`` and ``radio_watts`` while training and while transferring (NaN: not known); ``battery``
    its capacity in Wh (infinite: none, or not a limit) and ``charge`` the share of it at the start.
    """

    speed: np.ndarray
    down: np.ndarray
    up: np.ndarray
    down_std: np.ndarray
    up_std: np.ndarray
    latency: np.ndarray
    memory: np.ndarray
    compute_watts: np.ndarray
    radio_watts: np.ndarray
    battery: np.ndarray
    charge: np.ndarray

    def __post_init__(self) -> None:
        for name in ("speed", "down", "up", "battery"):
            bad = np.flatnonzero(~(getattr(self, name) > 0))
            if len(bad):
                raise DataError(
                    f"devices: {name} of client {bad[0]} is {getattr(self, name)[bad[0]]}; it must be positive"
                )
        for name in ("down_std", "up_std", "latency", "memory"):
            bad = np.flatnonzero(~(getattr(self, name) >= 0))
            if len(bad):
                raise DataError(
                    f"devices: {name} of client {bad[0]} is {getattr(self, name)[bad[0]]}; it must not be negative"
                )
        limited, unknown = np.isfinite(self.battery), np.isnan(self.compute_watts + self.radio_watts)
        for wrong, why in (
            (~((self.charge >= 0) & (self.charge <= 1)), "charge must be in [0, 1]"),
            (limited & unknown, "a battery needs compute_watts and radio_watts, which drain it"),
        ):
            if wrong.any():
                raise DataError(f"devices: client {np.flatnonzero(wrong)[0]}: {why}")

    def __len__(self) -> int:
        return len(self.speed)

    def save(self, folder: Path) -> Path:
        """Write ``devices.csv`` (a line a client; very large fleets: ``devices.npz``), which ``Table`` reads back."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        if len(self) > CSV_CLIENTS:
            np.savez(path := folder / "devices.npz", **columns)
            return path
        import pandas as pd

        frame = pd.DataFrame({"client": np.arange(len(self)), **columns})
        frame.to_csv(path := folder / "devices.csv", index=False, lineterminator="\n")
        return path


OPTIONAL = {
    "down_std": 0.0,
    "up_std": 0.0,
    "latency": 0.0,
    "memory": np.inf,
    "compute_watts": np.nan,
    "radio_watts": np.nan,
    "battery": np.inf,
    "charge": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """Log-normal speeds and links around given medians; a sigma of 0 gives every client the median.

    ``memory`` in MB, the two powers in W and the ``battery`` in Wh are the same for all; ``None`` where they do not
    matter. Batteries start at a share drawn uniformly between the two of ``charge``.
    """

    speed: float
    speed_sigma: float
    down: float
    up: float
    link_sigma: float
    latency: float
    latency_sigma: float
    memory: float | None
    compute_watts: float | None
    radio_watts: float | None
    battery: float | None = None
    charge: Sequence[float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("speed", "down", "up"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("speed_sigma", "link_sigma", "latency_sigma", "latency"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")

    def __call__(self, num_clients: int, rng: np.random.Generator) -> Fleet:
        """Draw the fleet; a client's two directions share one factor."""
        speed, link, latency = rng.standard_normal((3, num_clients))
        factor = np.exp(self.link_sigma * link)
        return fleet_of(
            num_clients,
            {
                "speed": self.speed * np.exp(self.speed_sigma * speed),
                "down": self.down * factor,
                "up": self.up * factor,
                "latency": self.latency * np.exp(self.latency_sigma * latency),
                "memory": self.memory,
                "compute_watts": self.compute_watts,
                "radio_watts": self.radio_watts,
                "battery": self.battery,
                "charge": rng.uniform(*_shares(self.charge), num_clients),
            },
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Devices from a CSV, Parquet or NPZ table whose columns are the fields of ``Fleet`` (speed, down, up at least).

    ``draw=False``: a column ``client`` says whose each row is; without it row i is client i. ``draw=True``: each client
    gets a row, drawn with replacement, whoever's it was.
    """

    path: str
    draw: bool

    def __call__(self, num_clients: int, rng: np.random.Generator) -> Fleet:
        """Read the table and give each client its row."""
        frame = read_table(Path(self.path))
        known = {f.name for f in fields(Fleet)} | {"client"}
        unknown, missing = set(frame) - known, {"speed", "down", "up"} - set(frame)
        if unknown or missing:
            wrong = (
                f"unknown column {sorted(unknown)[0]!r}" if unknown else f"no column {sorted(missing)[0]!r}"
            )
            raise DataError(f"{self.path}: {wrong}; columns are {', '.join(sorted(known))}")
        if not self.draw and len(frame) < num_clients:
            raise DataError(
                f"{self.path}: {len(frame)} rows for {num_clients} clients; "
                "give system.devices.draw=true to draw a row for each client"
            )
        rows = rng.integers(len(frame), size=num_clients) if self.draw else self._own(frame, num_clients)
        return fleet_of(num_clients, {k: frame[k].to_numpy()[rows] for k in frame if k != "client"})

    def _own(self, frame: pd.DataFrame, num_clients: int) -> np.ndarray:
        """Row of each client ``(m,)``, by the column ``client`` where there is one."""
        if "client" not in frame:
            return np.arange(num_clients)
        clients = frame["client"].to_numpy()
        try:
            order = {int(c): row for row, c in enumerate(clients) if int(c) == c}
        except (ValueError, TypeError):
            order = {}
        missing = [c for c in range(num_clients) if c not in order]
        if len(order) < len(clients) or missing:
            what = (
                f"client {missing[0]} has no row" if missing else "a client has two rows, or no whole number"
            )
            raise DataError(
                f"{self.path}: column 'client': {what}; number the rows 0 to {num_clients - 1}, each once, or leave "
                "the column out (then row i is client i)"
            )
        return np.array([order[c] for c in range(num_clients)], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Phones:
    """Measured phones and networks, as collected by FLASH (Yang et al. 2021) and NetLatency-Data (Zhu et al. 2017).

    Each client is a phone of ``phones_ai_benchmark.csv`` (the ratio of its floating-point CPU score to the median one
    scales ``speed``; its RAM times ``memory_share`` is what training may use), has a user's mean and spread from
    ``network_speed.csv``, and half a round trip of ``latency.npz`` (PlanetLab). ``battery`` and ``charge`` as of
    ``Lognormal``.
    """

    path: str
    speed: float
    memory_share: float
    compute_watts: float | None
    radio_watts: float | None
    battery: float | None = None
    charge: Sequence[float] = (1.0, 1.0)

    def __call__(self, num_clients: int, rng: np.random.Generator) -> Fleet:
        """Draw a phone, a user of the network and a pair of hosts for each client."""
        folder = Path(self.path)
        phones = read_table(folder / "phones_ai_benchmark.csv")
        links = read_table(folder / "network_speed.csv")
        delays = read_array(folder / "latency.npz", "planetlab_median_ms")
        delays = delays[np.isfinite(delays) & (delays > 0)]
        score, ram = phones.cpu_float_score.to_numpy(float), phones.ram_gb.to_numpy(float)
        phone = rng.integers(len(phones), size=num_clients)
        user = rng.integers(len(links), size=num_clients)
        return fleet_of(
            num_clients,
            {
                "speed": self.speed * score[phone] / np.median(score),
                **{
                    name: links[f"{way}_{kind}_kBps"].to_numpy(float)[user]
                    for way in ("down", "up")
                    for name, kind in ((way, "mean"), (f"{way}_std", "std"))
                },
                "latency": delays[rng.integers(len(delays), size=num_clients)] / 2,
                "memory": 1e3 * self.memory_share * ram[phone],
                "compute_watts": self.compute_watts,
                "radio_watts": self.radio_watts,
                "battery": self.battery,
                "charge": rng.uniform(*_shares(self.charge), num_clients),
            },
        )


def fleet_of(num_clients: int, columns: dict[str, Any]) -> Fleet:
    """A fleet from columns or one value for all; what is not given, or ``None``, does not matter."""
    out = {}
    for field in fields(Fleet):
        value = columns.get(field.name)
        value = OPTIONAL.get(field.name, np.nan) if value is None else value
        out[field.name] = np.broadcast_to(np.asarray(value, dtype=np.float64), (num_clients,)).copy()
    return Fleet(**out)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV, Parquet or NPZ file (one array per column) as a table; ``DataError`` naming the file."""
    import pandas as pd

    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                return pd.DataFrame(dict(stored))
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(io.StringIO(read_text(path)), float_precision="round_trip")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: not a readable CSV, Parquet or NPZ table ({error})") from error


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an NPZ file; ``DataError`` naming the file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return np.asarray(stored[name], dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: expected an .npz file with the array {name!r} ({error})") from error


def _shares(charge: Sequence[float]) -> tuple[float, float]:
    good = len(charge) == 2 and 0 <= charge[0] <= charge[1] <= 1
    _check(good, "charge", list(charge), "must be two shares in [0, 1], the lower one first")
    return charge[0], charge[1]
