"""No sample in two places: a part of the training samples for the server, and the proof that parts do not overlap."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from fedsim.data.common import SPLIT_SEED
from fedsim.data.dataset import Dataset, Samples, SamplesLike
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Portion, Roles, class_labels, stratified
from fedsim.data.shards import Stated
from fedsim.errors import ConfigError, DataError
from fedsim.rng import numpy_rng
from fedsim.server.traits import StrategyLike

log = logging.getLogger(__name__)

FILE = "disjoint.json"
VALIDATION, SERVER = "the validation set", "the server"
MOST = 1 << 30  # bytes of inputs that are looked through for equal ones


def share_of_server(config: DictConfig) -> bool:
    """Whether ``data.server`` is a part of the training samples instead of another source."""
    node = config.data.get("server")
    return isinstance(node, DictConfig) and "share" in node and "_target_" not in node


def with_server_part(
    config: DictConfig, data: Dataset, rows: np.ndarray, roles: Roles
) -> tuple[np.ndarray, Roles]:
    """``rows`` (n,) without the server's part of them, by a fixed key and of every class alike, and the roles with it.

    Raises:
        ConfigError: for a share that is none, or other settings.
    """
    if not share_of_server(config):
        return rows, roles
    node = config.data.server
    share, labelled = node.share, node.get("labelled", True)
    known = {"share", "labelled"}
    number = isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)
    if set(node) - known or not isinstance(labelled, bool) or not number:
        raise ConfigError(f"data.server={dict(node)}: expected {{share: 0.1, labelled: false}}")
    count = int(share * len(rows) + 0.5)
    if not 0 < count < len(rows):
        raise ConfigError(
            f"data.server.share={share}: that is {count} of {len(rows)} samples; give one in (0, 1)"
        )
    strata = class_labels(data)
    picked = stratified(
        None if strata is None else strata[rows], len(rows), count, numpy_rng(SPLIT_SEED, "server")
    )
    chosen = rows[picked]
    portion = Portion(torch.from_numpy(chosen), labelled=labelled)
    return np.setdiff1d(rows, chosen, assume_unique=True), replace(roles, server=portion)


def check(data: FederatedData) -> dict[str, Any]:
    """What there is to tell of places that share no sample: how many, of how many samples, and how many samples are the
    same as one of another place (duplicates of the data set itself, which is warned of). ``disjoint`` is ``None`` where
    samples lie with the nodes of a deployment, which is said.

    Raises:
        DataError: naming two places that share a sample, and the first one; of samples that the server brings itself,
            one that is equal to a test sample.
    """
    elsewhere = isinstance(
        data.shards, Stated
    )  # with the nodes of a deployment: nobody here can look at them
    places, own = [] if elsewhere else list(_places(data)), dict(_brought(data))
    names, parts = [name for name, _ in places], [part for _, part in places]
    rows = np.concatenate([np.zeros(0, np.int64), *parts])
    owner = np.repeat(np.arange(len(parts)), np.array([len(p) for p in parts], np.int64))
    order = np.lexsort((owner, rows))
    rows, owner = rows[order], owner[order]
    twice = np.flatnonzero((rows[1:] == rows[:-1]) & (owner[1:] != owner[:-1]))
    if len(twice):
        at = int(twice[0])
        raise DataError(
            f"partition: training sample {int(rows[at])} is in two places, {names[owner[at]]} and "
            f"{names[owner[at + 1]]} ({len(twice)} such pairs); methods that compare models by samples that others "
            "trained on need a disjoint split: type partition=dirichlet or partition=iid, without balanced"
        )
    same = _duplicates(data, rows, owner, own)
    if same and any(same.values()):
        log.warning("data: the data set holds equal inputs in different places: %s", same)
    by_place = {name: len(part) for name, part in places} | {k: len(p.rows) for k, p in own.items()}
    if elsewhere:
        log.warning(
            "partition: samples lie with the clients, so it cannot be checked that no two of them, nor one and the "
            "test set, have the same"
        )
    return {
        "disjoint": None if elsewhere else True,
        "places": len(by_place),
        "samples": sum(by_place.values()),
        "by_place": by_place,
        "equal_inputs": same,
    }


def prove(method: StrategyLike, data: FederatedData, folder: Path) -> None:
    """Write what ``check`` tells beside the partition, where the method needs a disjoint split."""
    if method.traits.disjoint:
        (folder / FILE).write_text(json.dumps(check(data), indent=1) + "\n")


def _places(data: FederatedData) -> Iterator[tuple[str, np.ndarray]]:
    """Every place with rows of the training samples, by name."""
    roles = data.roles
    for whose, shards in (
        ("client {}", data.shards),
        ("the unlabelled samples of client {}", roles.unlabelled),
        ("the test samples of client {}", data.holdout),
        ("the validation samples of client {}", roles.client_validation),
    ):
        for client in range(len(shards) if shards is not None else 0):
            assert shards is not None
            if len(part := np.unique(shards.part(client))):
                yield whose.format(client), part
    for whose, portion in ((VALIDATION, roles.validation), (SERVER, roles.server)):
        if portion is not None and portion.samples is None:
            yield whose, portion.rows.numpy()


def _brought(data: FederatedData) -> Iterator[tuple[str, Portion]]:
    """Every place with samples of its own."""
    for whose, portion in ((VALIDATION, data.roles.validation), (SERVER, data.roles.server)):
        if portion is not None and portion.samples is not None:
            yield whose, portion


def _duplicates(
    data: FederatedData, rows: np.ndarray, owner: np.ndarray, own: Mapping[str, Portion]
) -> dict[str, int] | None:
    """Samples whose input is equal to one of another place, and to one of the test set; ``None`` where inputs are no
    single tensor in memory, or too many."""
    x = _inputs(data.dataset.train)
    if x is None:
        return None
    seen: dict[int, int] = {}
    among, found = 0, _hashes(x[torch.from_numpy(rows)])
    for number, place in zip(found, owner.tolist(), strict=True):
        among += seen.setdefault(number, place) != place
    test = _inputs(data.dataset.test)
    tests = {} if test is None else {number: row for row, number in enumerate(_hashes(test))}
    of_tests = sum(number in tests for number in found)
    for place, (whose, portion) in enumerate(own.items(), start=1):
        z = _inputs(portion.samples)
        alike = z is not None and (z.dtype == x.dtype or (z.is_floating_point() and x.is_floating_point()))
        found = _hashes(z[portion.rows].to(x.dtype)) if z is not None and alike else []
        twice = [i for i, number in enumerate(found) if number in tests]
        if twice and whose == SERVER:
            raise DataError(
                f"data.server: sample {twice[0]} of the server's own is sample {tests[found[twice[0]]]} of the test "
                f"set ({len(twice)} such): what learns from it would be measured on it; leave it out"
            )
        of_tests += len(twice)
        among += sum(seen.setdefault(number, -place) != -place for number in found)
    return {"places": among, "test": of_tests}


def _inputs(samples: SamplesLike | None) -> torch.Tensor | None:
    """Inputs that are one tensor in memory, and not too many to be looked through."""
    x = samples.x if isinstance(samples, Samples) else None
    return x if isinstance(x, torch.Tensor) and x.nbytes <= MOST else None


def _hashes(x: torch.Tensor) -> list[int]:
    if not x.numel():
        return []
    flat = x.detach().cpu().contiguous().reshape(len(x), -1)
    return [hash(row.tobytes()) for row in flat.view(torch.uint8).numpy()]
