"""The release of a run from its configuration: its parts, and the server's half."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from fedsim.config.parts import part
from fedsim.exchange.landing import Landing, Terms
from fedsim.exchange.ledger import Ledger
from fedsim.exchange.release import Release
from fedsim.local.kept import LocalPart
from fedsim.server.traits import StrategyLike

if TYPE_CHECKING:
    from fedsim.engine.assignments import Plan
    from fedsim.server.context import Context

GROUPS = ("privacy", "compression", "secagg")


def release(config: DictConfig, method: StrategyLike) -> Release | None:
    """What is done to updates before they leave; None where all three groups are none."""
    built = {name: part(config[name], name) if config.get(name) else None for name in GROUPS}
    if not any(built.values()):
        return None
    statistics = frozenset(getattr(method, "statistics", ()))
    return Release(built["privacy"], built["compression"], built["secagg"], statistics)


def landing(config: DictConfig, work: Plan, context: Context, folder: Path) -> Landing | None:
    """The server's half, if there is a release."""
    if work.release is None:
        return None
    privacy = work.release.privacy
    stays = LocalPart.of(work.buffers, context.layout, work.client.keeps(context.layout)).spans
    terms = Terms(
        seed=config.seed,
        layout=context.layout,
        dtype=work.dtype,
        cohort=float(config.clients_per_round),
        stays=stays,
    )
    return Landing(work.release, terms, None if privacy is None else Ledger(folder, keyed=terms.keyed))
