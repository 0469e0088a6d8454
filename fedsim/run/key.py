"""What a run is called and where it lies: the key of all settings that can change a result."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fedsim.config.compose import load, plain
from fedsim.config.moved import as_before, without_added
from fedsim.config.roles import telling
from fedsim.errors import ConfigError
from fedsim.local.rates import spans_rounds
from fedsim.run.resolve import device

FIRST = "0.1.0"  # the version of fedsim whose runs do not say by which they were made


def version() -> str:
    """Version of fedsim, as runs record it."""
    return str(vars(sys.modules["fedsim"])["__version__"])


def method_name(config: DictConfig) -> str:
    """Short name of the method: ``method`` if set, else the module of the strategy's ``_target_``."""
    if config.get("method"):
        return str(config.method)
    target = str(OmegaConf.select(config, "strategy._target_") or "custom")
    return target.split(".")[-2] if "." in target else target


def run_key(config: DictConfig) -> str:
    """sha256 (64 hex digits; the first 8 name the run folder) of all settings that can change a result.

    The order of overrides does not matter, nor whether a number is written ``1`` or ``1.0``. ``rounds`` is not part of
    it, so that a finished run can be extended, unless a schedule of the method or of the local rate depends on it.
    """
    return _digest(config, rounds=horizon(config))


def marked(key: str, mark: str) -> str:
    """The key of a run of which parts were handed over in Python; ``mark`` identifies them, empty if there are none."""
    return hashlib.sha256(f"{key}/{mark}".encode()).hexdigest() if mark else key


def run_name(config: DictConfig) -> str:
    """``<method>-s<seed>-<first 8 digits of the key>``, e.g. ``fedspeed-s0-1a2b3c4d``."""
    return _named(config, run_key(config))


def run_dir(config: DictConfig) -> Path:
    """Folder of the run: ``dir`` if set, else ``out/name/<run name>``, or where a version of before has begun it."""
    if config.dir:
        return Path(config.dir)
    today: Path = Path(config.out) / config.name / run_name(config)
    before = (old for old in _folders(config) if old.is_dir() and same_run(old, config))
    return today if today.exists() else next(before, today)


def key_before(config: DictConfig) -> str | None:
    """The key by which the version before the rooms, 0.1.0, knew this run; ``None`` if it could not have run it.

    It named classes by their old places, and ``rounds`` was part of every run.
    """
    old = as_before(telling(plain(config)))
    return None if old is None else _hash(old)


def keys_before(config: DictConfig) -> list[str]:
    """All keys by which versions of before may have known this run.

    They held ``engine.device`` and ``engine.vectorize`` as they were typed, ``auto`` or what that comes to.
    """
    typed = [values for rounds in (False, True) for values in _as_typed(config, rounds=rounds)]
    oldest = [old for values in typed if "rounds" in values and (old := as_before(values)) is not None]
    return list(dict.fromkeys(map(_hash, [*typed, *oldest])))


def horizon(config: DictConfig) -> bool:
    """Whether a schedule spans the whole run: that of the local learning rate, or by ``traits.horizon`` one of the
    strategy's class, or of one that it wraps.

    The class is imported. One that cannot be imported has no schedule; building it will say what is wrong.
    """
    return spans_rounds(OmegaConf.select(config, "client.round_schedule")) or has_trait(config, "horizon")


def has_trait(config: DictConfig, name: str) -> bool:
    """Whether the strategy's class, or one that it wraps, says so of itself; the class is imported."""
    node: Any = config.strategy
    while isinstance(node, DictConfig):
        if "given" in node:  # in Python: what its class says was recorded
            return bool(node.get(name))
        try:
            if says(get_object(str(node.get("_target_"))), name):
                return True
        except (ImportError, AttributeError, ValueError):
            return False
        node = node.get("base")
    return False


def says(method: Any, trait: str) -> bool:
    """Whether a strategy (class, object, or a function that makes one) has a trait."""
    try:
        return bool(getattr(method.traits, trait))
    except AttributeError:
        return False  # not a strategy; building it will say what is wrong


@dataclass(frozen=True)
class Finished:
    """A run that need not be computed: what lies in its folder."""

    folder: Path
    summary: Mapping[str, Any]
    rounds: int  # that were computed
    wanted: int  # rounds asked for now

    @property
    def remarks(self) -> list[str]:
        """What is not as somebody would expect who asks for the run now: more rounds, another version of fedsim."""
        more = [
            f"has {self.rounds} rounds; report --until {self.wanted} reads the first {self.wanted}, weights of round "
            f"{self.wanted} are {self._weights}"
        ]
        by = str(self.summary.get("fedsim", FIRST))
        other = [f"made by fedsim {by}, this is {version()}"]
        early = [f"stopped after round {self.rounds}: {self.summary.get('stopped')}"]
        return (
            (more if self.rounds > self.wanted else [])
            + (early if "stopped" in self.summary else [])
            + (other if by != version() else [])
        )

    @property
    def _weights(self) -> str:
        """Where the weights of the last round that is wanted are."""
        place = Path("checkpoint") / f"round-{self.wanted:06d}"
        return f"in {place}" if (self.folder / place).is_dir() else "not kept"

    def __str__(self) -> str:
        """The folder, with the remarks."""
        return f"{self.folder} ({'; '.join(self.remarks)})" if self.remarks else str(self.folder)


def finished(config: DictConfig) -> Finished | None:
    """What the run folder holds if that is this very run, with all its rounds, and it need not be done again."""
    if config.resume != "auto":
        return None
    found = (finished_in(folder, config) for folder in _folders(config))
    return next((f for f in found if f is not None and same_run(f.folder, config)), None)


def finished_in(folder: Path, config: DictConfig, *, stoppable: bool = False) -> Finished | None:
    """What ``folder`` holds if the run in it ended well and has all rounds of ``config``, whatever run it is.

    A run that stopped before its last round, at a target for instance, would stop there again: it has all rounds. So
    has one that a callback stopped, if it is ``stoppable`` (there are callbacks) and no more rounds are asked for.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        planned = int(load(folder / "config.yaml").rounds)
        rounds = int(summary.get("rounds", planned))
    except (ConfigError, OSError, ValueError, AttributeError, TypeError):
        return None  # the run itself will say what is wrong with the folder
    if summary.get("status") != "done" or planned <= rounds < config.rounds:
        return None
    goes_on = not stoppable or config.rounds > planned
    if "stopped" in summary and rounds < config.rounds and goes_on:
        return None
    return Finished(folder, summary, rounds, config.rounds)


def _folders(config: DictConfig) -> Iterator[Path]:
    """Where the run may lie, found without importing its method, which takes seconds."""
    if config.dir:
        yield Path(config.dir)
        return
    today = [_digest(config, rounds=rounds) for rounds in (False, True)]
    for key in dict.fromkeys((*today, *keys_before(config))):
        yield Path(config.out) / config.name / _named(config, key)


def same_run(folder: Path, config: DictConfig) -> bool:
    """Whether the run in ``folder`` is that of ``config``, its number of rounds aside if it can be extended."""
    try:
        recorded = load(folder / "config.yaml")
    except ConfigError:
        return False
    if recorded.engine.device == "auto" != config.engine.device:  # of before: where it would be computed now
        recorded.engine.device = device("auto")
    if _digest(recorded, rounds=True) == _digest(config, rounds=True):
        return True
    return _digest(recorded, rounds=False) == _digest(config, rounds=False) and not horizon(config)


def _named(config: DictConfig, key: str) -> str:
    return f"{method_name(config)}-s{config.seed}-{key[:8]}"


def _digest(config: DictConfig, *, rounds: bool) -> str:
    return _hash(_without_rounds(without_added(telling(plain(config))), rounds))


def _as_typed(config: DictConfig, *, rounds: bool) -> Iterator[dict[str, Any]]:
    """What can change a result, with the device as it was, or may have been, typed: ``auto`` or by name."""
    values, engine = without_added(telling(plain(config))), config.engine
    modes = {engine.vectorize, "auto", "off"} if engine.device == "cpu" else {engine.vectorize}
    for place in sorted({engine.device, "auto"}):
        for mode in sorted(modes):
            spelt = {**values, "engine": {**values["engine"], "device": place, "vectorize": mode}}
            yield _without_rounds(spelt, rounds)


def _without_rounds(values: dict[str, Any], rounds: bool) -> dict[str, Any]:
    return values if rounds else {k: v for k, v in values.items() if k != "rounds"}


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_canonical(values), sort_keys=True).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
