"""The data contract of a run's configuration, ``data.contract``, as nodes and simulations read it."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim.data.agreed import Contract
from fedsim.data.dataset import Dataset


def node(config: DictConfig) -> dict[str, Any] | None:
    """What was typed, as plain values; ``None`` if nothing."""
    found = config.data.get("contract") if isinstance(config.data, DictConfig) else None
    plain: Any = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    return plain  # type: ignore[no-any-return]


def of(config: DictConfig) -> Contract | None:
    """The contract; ``None`` if there is none. ConfigError names what of it cannot be."""
    return Contract.of(node(config))


def kept(config: DictConfig, data: Dataset) -> Dataset:
    """``data`` with classes and columns in the agreed order; ContractError says what of them is not as agreed."""
    agreed = of(config)
    return data if agreed is None else agreed.fitted(data)
