"""Inputs read alike by everybody: the constants that a contract gives, or those of all training samples together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.agreed import KEY, Contract
from fedsim.data.dataset import Dataset, Normalize
from fedsim.data.federated import FederatedData
from fedsim.data.moments import Moments
from fedsim.errors import ConfigError, hint

BYTES = 255  # the whole of a byte


def normalised(contract: Contract | None, found: FederatedData) -> FederatedData:
    """``found`` read with the agreed constants: those given, or of all samples that its clients train on.

    Raises:
        ConfigError: the constants do not fit, or there are no plain arrays to take them of.
    """
    if contract is None or not (contract.pooled or contract.given):
        return found
    data = found.dataset
    if contract.pooled:
        return replace(found, dataset=replace(data, normalize=pooled_constants(trained_on(found), data)))
    return replace(found, dataset=with_given(contract, data))


def with_given(contract: Contract | None, data: Dataset) -> Dataset:
    """``data`` read with the constants that the contract gives, if it gives any."""
    if contract is None or not contract.given:
        return data
    return replace(data, normalize=constants(contract, data))


def trained_on(found: FederatedData) -> Moments:
    """Moments of what the clients of ``found`` train on, with and without labels."""
    x = getattr(found.dataset.train, "x", None)
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ConfigError(
            f"{KEY}.normalize=agreed: needs inputs (n, columns) or (n, channels, ...) in memory; give mean and std"
        )
    more = found.roles.unlabelled
    rows = found.shards.index if more is None else np.concatenate([found.shards.index, more.index])
    return Moments.of(x, rows)


def pooled_constants(moments: Moments, data: Dataset) -> Normalize:
    """The normalisation that ``moments`` of all clients' samples give, for data like ``data``."""
    return moments.normalize(_levels(data))


def _levels(data: Dataset) -> int:
    x = getattr(data.train, "x", None)
    return BYTES if isinstance(x, Tensor) and x.dtype == torch.uint8 else 1


def constants(contract: Contract, data: Dataset) -> Normalize:
    """The agreed normalisation of ``data``.

    Raises:
        ConfigError: they are not those of the columns or channels that there are.
    """
    shape, levels = data.input_shape, _levels(data)
    width, scale = (shape[0] if shape else 0), 1.0 if levels == 1 else 1 / levels
    mean, std = (
        _constants(f"{KEY}.normalize.{key}", contract.given.get(key), default, data.columns, width)
        for key, default in (("mean", 0.0), ("std", 1.0))
    )
    if len(mean) != len(std):
        mean, std = (v * width if len(v) == 1 else v for v in (mean, std))
    return Normalize(scale=scale, mean=mean, std=std)


def _constants(key: str, node: Any, default: float, columns: Sequence[str], width: int) -> tuple[float, ...]:
    """Constants by column name, or one a channel; ``default`` where a column is not named."""
    if isinstance(node, Mapping):
        for name in node:
            if name not in columns:
                raise ConfigError(f"{key}.{name}: there is no such column{hint(str(name), columns)}")
        return tuple(float(node.get(name, default)) for name in columns)
    if node is None:
        return (default,)
    values = tuple(float(v) for v in node)
    if len(values) != width and (columns or len(values) > 1):  # one value may be that of all channels
        raise ConfigError(f"{key}: {len(values)} values for {width} channels or columns")
    return values
