"""Clients that attack or fail: what can be wrapped around any client, chosen by ``attack=...``."""

from __future__ import annotations

from clients.attacks.backdoor import Backdoor
from clients.attacks.base import Attack, Attacked
from clients.attacks.data import AugmentedData, LabelFlip
from clients.attacks.omniscient import ALIE, IPM, Mimic, alie_z
from clients.attacks.optimised import OptimalALIE, OptimalIPM, line_search
from clients.attacks.updates import Drop, NonFiniteUpdate, RandomUpdate, SignFlip

__all__ = [
    "ALIE",
    "IPM",
    "Attack",
    "Attacked",
    "AugmentedData",
    "Backdoor",
    "Drop",
    "LabelFlip",
    "Mimic",
    "NonFiniteUpdate",
    "OptimalALIE",
    "OptimalIPM",
    "RandomUpdate",
    "SignFlip",
    "alie_z",
    "line_search",
]
