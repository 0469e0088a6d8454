"""Samples of some clients that nobody uses (``exclude_samples``, and of whole clients what was set apart before)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from fedsim.data.dataset import Dataset
from fedsim.data.sample_roles import Portion, Roles, belongings, by_domain
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError


def positions(config: DictConfig) -> dict[int, list[int]]:
    """Positions by client, as ``exclude_samples`` names them.

    Raises:
        ConfigError: where it is not written so, or names a position twice.
    """
    node = config.exclude_samples
    plain = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if plain is None:
        return {}
    found: dict[int, list[int]] = {}
    for client, chosen in plain.items() if isinstance(plain, dict) else [("?", plain)]:
        if (
            not str(client).isdecimal()
            or not isinstance(chosen, list)
            or any(type(at) is not int for at in chosen)
        ):
            raise ConfigError(
                f"exclude_samples={plain}: give positions by client, e.g. exclude_samples={{3: [0, 17]}}"
            )
        if any(at < 0 for at in chosen) or len(set(chosen)) < len(chosen):
            raise ConfigError(f"{_named(client, chosen)}: give positions from 0, each once")
        found[int(str(client))] = chosen
    return found


def check(config: DictConfig, gone: Collection[int]) -> None:
    """Refuse samples of clients that do not exist, or that are ``gone`` as a whole."""
    for client, chosen in positions(config).items():
        if not client < config.num_clients:
            most = config.num_clients - 1
            raise ConfigError(
                f"{_named(client, chosen)}: client {client} does not exist; ids go from 0 to {most}"
            )
        if client in gone:
            raise ConfigError(
                f"{_named(client, chosen)}: client {client} is left out as a whole (exclude); name it in one of them"
            )


def rows(config: DictConfig, dealt: Shards) -> dict[int, np.ndarray]:
    """Rows of the data set that clients lose, by positions among what the partition ``dealt`` each.

    Raises:
        ConfigError: for a position beyond a client's last sample.
    """
    found = {}
    for client, chosen in positions(config).items():
        own, at = dealt.part(client), np.array(chosen, dtype=np.int64)
        if len(at) and at.max() >= len(own):
            raise ConfigError(
                f"{_named(client, chosen)}: client {client} has {len(own)} samples, at positions from 0 to "
                f"{len(own) - 1}"
            )
        found[client] = own[at]
    return found


def of_others(roles: Roles, data: Dataset, dealt: Shards, excluded: Collection[int]) -> Roles:
    """``roles`` in which what was set apart before samples were dealt out has none of ``excluded`` clients.

    Raises:
        ConfigError: if nothing is left to validate on.
    """
    theirs = belongings(data.ids, dealt, excluded)
    if theirs is None:
        return roles

    def left(portion: Portion | None) -> Portion | None:
        if portion is None or portion.samples is not None:  # not of the clients' samples
            return portion
        rows = portion.rows.numpy()
        return replace(portion, rows=torch.from_numpy(rows[~theirs[rows]]))

    validation, spans = left(roles.validation), roles.validation_domains
    if validation is not None and validation is not roles.validation:
        rows, spans = by_domain(data, np.sort(validation.rows.numpy()))
        validation = replace(validation, rows=torch.from_numpy(rows))
        if not len(rows):
            raise ConfigError(
                f"exclude={sorted(excluded)}: all samples of evaluation.validation are theirs; set a larger share apart"
            )
    return replace(roles, validation=validation, validation_domains=spans, server=left(roles.server))


def unused(
    data: Dataset, dealt: Shards, excluded: Collection[int], rows: Mapping[int, np.ndarray]
) -> np.ndarray:
    """Training samples (m,), sorted, of ``excluded`` clients, wherever they are, and the ``rows`` of others."""
    parts = [*(dealt.part(c) for c in excluded), *rows.values()]
    if (theirs := belongings(data.ids, dealt, excluded)) is not None:
        parts.append(np.flatnonzero(theirs))
    return np.unique(np.concatenate(parts))


def _named(client: object, chosen: object) -> str:
    return f"exclude_samples={{{client}: {chosen}}}"
