"""The data contract at work: what a node says of itself before round 1, and what the server makes of it.

A node compares itself with the contract of the run's configuration, and does not join if it differs; the server
compares nodes that bring their own data with its own. Where statistics are to be agreed on, each node sends count, sum
and sum of squares per channel or column with its introduction; the constants that they pool to go to the nodes with
every message.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from omegaconf import DictConfig

from fedsim.data.agreed import Contract
from fedsim.data.columns import ContractError
from fedsim.data.dataset import Dataset, Normalize
from fedsim.data.moments import Moments
from fedsim.data.normalising import pooled_constants, trained_on
from fedsim.data.trees import leaves
from fedsim.engine.worker import Worker
from fedsim.errors import ConfigError, DataError, NoSamplesError
from fedsim.flower.answers import said
from fedsim.flower.introductions import Known
from fedsim.flower.nodes import Nodes
from fedsim.flower.options import Node
from fedsim.run import agreement, samples
from fedsim.run.key import version
from fedsim.server import checkpoint
from fedsim.task.frozen import base_of

RECORD = "contract"  # of a message: what was agreed on
FILE = "contract.json"  # in the run's folder
CHANGED = (
    "its data are others than when the run began, and so would be what was agreed on; put the data back, or start a "
    "new run (resume=never)"
)
LARGEST = 1e15  # of values for which no range is agreed on
STANDARDISED = ("fedsim.data.sources.heart_disease",)  # nodes that read their own files with it are not alike

log = logging.getLogger(__name__)


@contextmanager
def reading(config: DictConfig, node: Node) -> Iterator[None]:
    """Whatever is not as agreed while a node's data are read is said in a line each, with the client's name.

    Of a node's own data other errors stay in its log, since they may hold values.
    """
    try:
        yield
    except DataError as error:
        known = isinstance(error, ContractError)
        if not known and not node.own_data:
            raise
        cause = None if known else error.__cause__
        log.error("client %d: its data cannot be used: %s", node.client, error, exc_info=cause)
        what = "have no samples" if isinstance(error, NoSamplesError) else "cannot be read"
        lines = str(error).splitlines() if known else [f"its data {what}; the node's log says why"]
        raise ContractError(_named(node.client, [*_versions(config), *lines])) from error


def of_ones_own(config: DictConfig) -> Dataset:
    """The data of a node that owns them, as configured.

    Raises:
        DataError: something went wrong that is no mistake in the settings: it may say values, in whatever words.
    """
    try:
        return samples.dataset(config)
    except (ContractError, NoSamplesError):
        raise
    except Exception as error:
        if isinstance(error, ConfigError) and error.__cause__ is None:
            raise
        raise DataError(str(error)) from error


def introduce(config: DictConfig, node: Node, worker: Worker, layout: str) -> str:
    """What the server compares, as JSON.

    Raises:
        ContractError: versions, base model or layout are not those of the contract.
    """
    agreed, data = agreement.of(config), worker.data.dataset
    base, shape = base_of(worker.plan.task.model), hashlib.sha256(layout.encode()).hexdigest()
    faults = _versions(config)
    if agreed is not None:
        held = base.sha256 if base else ""
        for what, mine, wanted in (("base model", held, agreed.base), ("layout", shape, agreed.layout)):
            if wanted and mine != wanted:
                faults.append(
                    f"{what}: sha256 {mine[:12] or 'none'}, agreed is {wanted[:12]}; take the agreed one"
                )
    if faults:
        raise ContractError(_named(node.client, faults))
    about: dict[str, Any] = {"versions": _here(), "layout": shape, "base": base.sha256 if base else ""}
    if node.own_data:
        about |= _of_data(data)
        if agreed is not None and agreed.pooled:
            about["moments"] = trained_on(worker.data).text()
    return json.dumps(about)


def settle(config: DictConfig, content: RecordDict) -> DictConfig:
    """``config`` (changed in place) with the constants that came with a message, if any did."""
    agreed = agreement.of(config)
    if RECORD in content and agreed is not None and agreed.pooled:
        about: Mapping[str, Any] = content[RECORD]
        config.data.contract.normalize = {"mean": list(about["mean"]), "std": list(about["std"])}
    return config


def difference(node: Known, config: DictConfig, data: Dataset) -> str:
    """Why a node with data of its own does not fit the server's; nothing if it does."""
    stated, ours = facts(node), _of_data(data)
    if stated is None:
        return "what it says of its data cannot be read; install the same version of fedsim"
    agreed = agreement.of(config)
    if agreed is not None and agreed.pooled:
        stated["normalize"] = ours["normalize"]
        why = _implausible(stated.get("moments"), node, data, agreed)
        if why:
            return why
    remedies = {
        "classes": "name all classes, in one order, in data.contract.classes=[...]",
        "columns": "name them in data.contract.columns={...}",
        "dtype": "store them alike",
        "image": "convert or resize them, as by data.size=<pixels>",
        "normalize": "type data.contract.normalize=agreed, or {mean: [...], std: [...]}",
    }
    for what, remedy in remedies.items():
        mine, theirs = ours[what], stated.get(what, ours[what] if what == "image" else None)
        if mine != theirs:
            return f"{what}: its data have {_short(theirs)}, the server's {_short(mine)}; {remedy}"
    return ""


def began(config: DictConfig, folder: Path) -> dict[str, Any]:
    """What was agreed on when the run in ``folder`` began, if ``config`` goes on with it; nothing if it begins."""
    path = folder / FILE
    resumes = config.resume == "auto" and checkpoint.latest(folder / "checkpoint") is not None
    found: dict[str, Any] = json.loads(path.read_text()) if resumes and path.exists() else {}
    return found


def changed(node: Known, before: Mapping[str, Any]) -> str:
    """Why a node's data are not those that the run ``began`` with; nothing if they are."""
    client, mine = str(node.client), (facts(node) or {}).get("moments")
    counted = [node.samples, node.counts]
    held, moments = before.get("held", {}).get(client, counted), before.get("moments", {}).get(client, mine)
    return f"client {client}: {CHANGED}" if node.own and (held != counted or moments != mine) else ""


def conclude(
    config: DictConfig,
    folder: Path,
    nodes: Nodes,
    data: Dataset,
    absent: Sequence[int],
    before: Mapping[str, Any],
) -> tuple[Dataset, dict[str, ConfigRecord]]:
    """Agree on statistics if that is to be done; the server's data read so, and what every message carries.

    What was agreed on is written down in the run's folder, and a run that goes on keeps to it, to what it
    ``began`` with.
    """
    agreed, path = agreement.of(config), folder / FILE
    if any(n.own for n in nodes.of.values()) and config.data.get("_target_") in STANDARDISED:
        log.warning(
            "%s standardises what it reads by itself: each node by its own data", config.data._target_
        )
    stated = {str(c): facts(node) or {} for c, node in sorted(nodes.of.items())}
    there = {c: nodes.of[int(c)] for c in stated if int(c) not in absent}
    owned = agreed is not None and agreed.pooled and any(n.own for n in there.values())
    moments = before.get("moments", {c: stated[c]["moments"] for c in there if owned})
    norm = data.normalize
    if moments:
        first, *rest = map(Moments.read, moments.values())
        norm = pooled_constants(sum(rest, start=first), data)
    about = {k: v for k, v in _of_data(data).items() if k != "normalize"} | {"normalize": _constants(norm)}
    about |= {"versions": _here(), "nodes": {c: _versions_of(t.get("versions")) for c, t in stated.items()}}
    about |= next((_shape_of(node) for node in nodes.of.values()), {"layout": "", "base": ""})
    held = before.get("held", {c: [n.samples, n.counts] for c, n in there.items() if n.own})
    about |= {"without": before.get("without", nodes.without), "held": held, "moments": moments}
    path.write_text(json.dumps(about, indent=1))
    nodes.event("contract", normalize=about["normalize"], clients=[int(c) for c in stated])
    if not moments or norm is None:
        return data, {}
    terms = ConfigRecord({"mean": list(norm.mean), "std": list(norm.std)})
    return replace(data, normalize=norm), {RECORD: terms}


def facts(node: Known) -> dict[str, Any] | None:
    """What the node said in its introduction; ``None`` if that is unreadable."""
    try:
        about = json.loads(node.contract)
    except (ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) and _shallow(about, 4) else None


def _shape_of(node: Known) -> dict[str, str]:
    """Layout and base as contracts name them, of a node whose own were compared with the server's."""
    return {"layout": hashlib.sha256(node.layout.encode()).hexdigest(), "base": node.base_sha256}


def _versions_of(versions: Any) -> dict[str, str]:
    """The versions that a node named, as text."""
    found = versions if isinstance(versions, dict) else {}
    return {name: said(str(found[name])) for name in _here() if name in found}


def _shallow(value: Any, depth: int) -> bool:
    """Whether lists and mappings stand within each other ``depth`` times at most."""
    if not isinstance(value, list | dict):
        return True
    return depth > 0 and all(
        _shallow(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value)
    )


def _of_data(data: Dataset) -> dict[str, Any]:
    """What must be the same of the data of all: in plain values."""
    x = getattr(data.train, "x", None)
    kinds = [getattr(leaf, "dtype", "") for leaf in leaves(x)] if x is not None else []
    return {
        "classes": list(data.classes),
        "columns": list(data.columns),
        "dtype": ", ".join(str(kind).removeprefix("torch.") for kind in kinds),
        "image": list(data.input_shape) if len(data.input_shape) == 3 else [],  # channels, height, width
        "normalize": _constants(data.normalize),
    }


def _constants(norm: Normalize | None) -> list[Any]:
    return [] if norm is None else [norm.scale, list(norm.mean), list(norm.std)]


def _implausible(text: Any, node: Known, data: Dataset, agreed: Contract) -> str:
    """Why a node's statistics cannot be those of its samples, within the ranges agreed on."""
    shape = data.input_shape or (0,)
    each = math.prod(shape[1:])
    try:
        found = Moments.read(text)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return "its statistics cannot be read, or are those of no values"
    if found.count != node.samples * each or len(found.total) != shape[0]:
        return (
            f"its statistics are of {found.count} values in {len(found.total)} columns or channels, its "
            f"{node.samples} samples have {node.samples * each} in {shape[0]}"
        )
    if getattr(getattr(data.train, "x", None), "dtype", None) == torch.uint8:
        ends: list[tuple[float | None, float | None]] = [(0.0, 255.0)] * shape[0]
    else:
        ends = [
            (c.low, c.high) if not c.categories else (0.0, 1.0) for c in agreed.columns for _ in c.features
        ]
        ends = ends or [(None, None)] * shape[0]
    for (low, high), total, squares in zip(ends, found.total, found.squares, strict=False):
        below, above = Fraction(-LARGEST if low is None else low), Fraction(LARGEST if high is None else high)
        most = found.count * max(below * below, above * above)
        if not found.count * below <= total <= found.count * above or squares > most:
            return "its statistics are those of values outside the agreed range"
    return ""


def _versions(config: DictConfig) -> list[str]:
    agreed, here = agreement.of(config), _here()
    wanted = {} if agreed is None else agreed.versions
    return [
        f"{name}: version {here[name]}, agreed is {v}; install that one"
        for name, v in wanted.items()
        if here[name] != v and not here[name].startswith((f"{v}.", f"{v}+"))
    ]


def _here() -> dict[str, str]:
    return {"fedsim": version(), "torch": str(torch.__version__), "python": platform.python_version()}


def _named(client: int, lines: Sequence[str]) -> str:
    return "\n".join(f"client {client}: {line}" for line in lines)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 160 else f"{text[:150]}..."
