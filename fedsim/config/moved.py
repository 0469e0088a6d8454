"""Old names of modules and of what is in them, and where each has gone: answers to old code and old configurations.

The package's finder asks it where Python finds no module, and whoever reads configurations of before.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from hydra.utils import get_object

from fedsim.config.added import ADDED, OF_ENGINES, OPTIONS, SILENT, computed_otherwise, split_before

_ROOMS = {  # modules that moved under their own name: room, modules
    "cli": "launch sweep exits",
    "config": "parts explain",
    "data": "embedding",
    "exchange": "payload fold",
    "flower": "replay",
    "local": "job work",
    "models": "encoders",
    "run": "given",
    "sampling": "cohort",
    "server": "loop round examiner checkpoint clientstore",
    "system": "events",
    "task": "vectors layout heads evaluation threads",
}
MODULES: Mapping[str, str] = {  # old module: new module
    **{f"fedsim.{name}": f"fedsim.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()},
    "fedsim.attack": "fedsim.server.collusion",
    "fedsim.classes": "fedsim.local.kinds",
    "fedsim.commands": "fedsim.cli.report",
    "fedsim.configured": "fedsim.run",
    "fedsim.configured.initial": "fedsim.run.initial",
    "fedsim.configured.participants": "fedsim.run.participants",
    "fedsim.configured.samples": "fedsim.run.samples",
    "fedsim.data.picture": "fedsim.data.partition_picture",
    "fedsim.engine.cluster": "fedsim.engine.ray.cluster",
    "fedsim.engine.line": "fedsim.engine.ray.transport",
    "fedsim.engine.mail": "fedsim.engine.ray.transport",
    "fedsim.engine.post": "fedsim.engine.ray.transport",
    "fedsim.flower.exchange": "fedsim.flower.asking",
    "fedsim.flower.settings": "fedsim.flower.options",
    "fedsim.helptext": "fedsim.cli.help",
    "fedsim.localpart": "fedsim.local.kept",
    "fedsim.localsteps": "fedsim.local.optimiser",
    "fedsim.models.initial": "fedsim.models.weights",
    "fedsim.narrow": "fedsim.task.submodels",
    "fedsim.session": "fedsim.run",
    "fedsim.session.assembly": "fedsim.run.assembly",
    "fedsim.session.folder": "fedsim.run.folder",
    "fedsim.session.outcome": "fedsim.run.summary",
    "fedsim.session.preparation": "fedsim.run.preparation",
    "fedsim.settings": "fedsim.config.compose",
    "fedsim.system.flight": "fedsim.server.flight",
    "fedsim.system.picture": "fedsim.system.fleet_picture",
    "fedsim.system.settings": "fedsim.system.system",
    "fedsim.system.whatif": "fedsim.run.whatif",
    "fedsim.topology.picture": "fedsim.topology.graph_picture",
    "fedsim.validation": "fedsim.config.check",
}

# What did not go with its module, and what is elsewhere because the module's name is a room today: new place, names
_ELSEWHERE = {
    "fedsim.cli": [("fedsim.cli.main", "command")],
    "fedsim.cohort": [("fedsim.engine.chunks", "cut")],
    "fedsim.commands": [("fedsim.cli.verify", "verify"), ("fedsim.report.terminal", "show")],
    "fedsim.config": [
        (
            "fedsim.config.schema",
            "AdamConfig CheckpointConfig ClientConfig ConsoleConfig EmbedConfig ENGINES EngineConfig EvaluationConfig "
            "FailureConfig FlowerConfig RayConfig RunConfig TrackerConfig WandbConfig",
        ),
        ("fedsim.config.tree", "VERSION_BASE config_dir config_loader register"),
    ],
    "fedsim.engine.ray": [("fedsim.engine.ray.engine", "RayEngine")],
    "fedsim.evaluation": [("fedsim.server.clientmetrics", "over_clients")],
    "fedsim.job": [("fedsim.local.interface", "ClientLike")],
    "fedsim.loop": [("fedsim.server.traits", "StrategyLike")],
    "fedsim.server": [("fedsim.server.exchanges", "Server")],
    "fedsim.settings": [("fedsim.run.key", "finished method_name run_dir run_key run_name")],
    "fedsim.task": [("fedsim.task.task", "LossFn MetricFn Task accuracy cross_entropy")],
    "fedsim.validation": [("fedsim.errors", "hint nearest")],
    "fedsim.vectors": [("fedsim.rng", "hash_tensors"), ("fedsim.task.slots", "finite")],
    "fedsim.work": [("fedsim.data.local", "batches_per_epoch")],
}
NAMES: Mapping[str, str] = {  # old dotted name: new dotted name
    **{
        f"{module}.{name}": f"{place}.{name}"
        for module, places in _ELSEWHERE.items()
        for place, names in places
        for name in names.split()
    },
    "clients.attacks.NonFinite": "clients.attacks.NonFiniteUpdate",
    "fedsim.attack.conspiracy": "fedsim.server.collusion.colluding",
    "fedsim.classes.Classes": "fedsim.local.kinds.Kinds",
    "fedsim.launch.job": "fedsim.cli.launch.run_job",
    "fedsim.parts.typed": "fedsim.config.parts.as_dataclass",
    "fedsim.replay.Reality": "fedsim.flower.replay.DeploymentRecord",
    "fedsim.sweep.Outcome": "fedsim.cli.sweep.JobResult",
    "fedsim.topology.timing.Lognormal": "fedsim.topology.timing.LognormalTicks",
}


def now(name: str) -> str | None:
    """Today's dotted name of an old module, or of what was in one; ``None`` if ``name`` has not moved."""
    if name in NAMES or name in MODULES:
        return NAMES.get(name) or MODULES[name]
    head, _, last = name.rpartition(".")
    inside = now(head) if head else None
    return f"{inside}.{last}" if inside else None


def before(name: str) -> str:
    """The dotted name that a class or function had before the moves: the inverse of :func:`now`."""
    if name in _OLD_NAMES:
        return _OLD_NAMES[name]
    head, _, last = name.rpartition(".")
    return f"{_OLD_MODULES[head]}.{last}" if head in _OLD_MODULES else name


_OLD_NAMES = {new: old for old, new in NAMES.items()}
_OLD_MODULES = {new: old for old, new in MODULES.items()}


class Loader:
    """Loads an old module, or a name of one, as what it is today, and says in a ``FutureWarning`` where that lies."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Nothing special."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """An old module looks each of its names up at its new place; an old name is the thing itself."""
        name = module.__name__
        warnings.warn(said(name), FutureWarning, stacklevel=2)
        if name in NAMES:
            sys.modules[name] = get_object(NAMES[name])
        else:
            module.__path__ = []
            module.__getattr__ = lambda inner: _look_up(f"{name}.{inner}")  # type: ignore[method-assign]


def spec(name: str) -> ModuleSpec | None:
    """How Python imports an old name; ``None`` if ``name`` has not moved."""
    return ModuleSpec(name, cast(Any, Loader)) if now(name) is not None else None


def said(name: str) -> str:
    """``fedsim.vectors is now fedsim.task.vectors; hash_tensors is now fedsim.rng.hash_tensors``."""
    inside = {old.rpartition(".")[2]: new for old, new in NAMES.items() if old.rpartition(".")[0] == name}
    return f"{name} is now {now(name)}" + "".join(f"; {old} is now {new}" for old, new in inside.items())


def _look_up(name: str) -> Any:
    """The thing that had this dotted name in an old module."""
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    place, _, last = str(now(name)).rpartition(".")
    return getattr(importlib.import_module(place), last)


def targets(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and value of every ``_target_`` among nested settings."""
    for key, value in _items(node):
        where = f"{prefix}{key}"
        if key == "_target_" and isinstance(value, str):
            yield where, value
        yield from targets(value, f"{where}.")


def renamed(node: Any, rename: Callable[[str], str | None]) -> Any:
    """Nested settings with every ``_target_`` for which ``rename`` has another name under that one."""
    if isinstance(node, Mapping):
        return {
            key: rename(value) or value
            if key == "_target_" and isinstance(value, str)
            else renamed(value, rename)
            for key, value in node.items()
        }
    return [renamed(value, rename) for value in node] if isinstance(node, list) else node


def as_before(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Nested settings as a run of before would have recorded them; ``None`` if there can be no such run."""
    if computed_otherwise(*_method(values)):
        return None
    old: dict[str, Any] = renamed(values, before)
    for key, unchanged in _added(values):
        section, name = _place(old, key)
        if section.pop(name, unchanged) != unchanged:
            return None
    for part, options in _with_options(old):
        if any(part.pop(name, unchanged) != unchanged for name, unchanged in options.items()):
            return None
    return old


def without_added(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without those that were added since and change nothing: no part of a key."""
    kept: dict[str, Any] = renamed(values, lambda name: None)
    for key, unchanged in ADDED.items():
        section, name = _place(kept, key)
        if name in section and section[name] == unchanged:
            del section[name]
    for part, options in _with_options(kept, SILENT):
        for name, unchanged in options.items():
            if name in part and part[name] == unchanged:
                del part[name]
    return kept


def as_today(recorded: Any) -> Any:
    """Nested settings that a run of before recorded, with today's names of classes, and with what was added since."""
    new = renamed(recorded, now)
    for key, unchanged in _added(recorded):
        section, name = _place(new, key)
        if key not in OF_ENGINES or section.get("name") == OF_ENGINES[key]:
            section.setdefault(name, unchanged)
    for part, options in _with_options(new):
        for name, unchanged in options.items():
            part.setdefault(name, unchanged)
    return new


def _added(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was added since, and the value by which nothing changes for a run of before."""
    split = split_before(*_method(values))
    for key, unchanged in ADDED.items():
        yield key, "split" if split and key == "client.clip_pull" else unchanged


def _method(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """A run's settings of clients, and the classes of its method and of what that wraps."""
    client = values.get("client")
    return client if isinstance(client, Mapping) else {}, [c for _, c in targets(values.get("strategy"))]


def _with_options(
    node: Any, table: Mapping[str, Mapping[str, Any]] = {**OPTIONS, **SILENT}
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Sections whose class takes options of ``table``, at any depth, with those options."""
    if isinstance(node, dict) and node.get("_target_") in table:
        yield node, table[node["_target_"]]
    for _, value in _items(node):
        yield from _with_options(value, table)


def _place(node: Any, key: str) -> tuple[dict[str, Any], str]:
    """The section of nested settings that a dotted key lies in, and its name there; an empty one if there is none."""
    *sections, name = key.split(".")
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else {}), name


def _items(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    return [(str(at), value) for at, value in enumerate(node)] if isinstance(node, list) else []
