"""The clock that a run makes of what the ``system`` group says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedsim.rng import key, numpy_rng
from fedsim.system.battery import WH, Batteries
from fedsim.system.clock import Clock
from fedsim.system.cost import SAMPLES, Cost
from fedsim.system.system import System


def start_clock(
    system: System, num_clients: int, seed: int, memory_mb: float, measure: Callable[[], Cost]
) -> Clock:
    """Draw the fleet; ``memory_mb`` is what training takes, ``measure()`` the model's flops per sample."""
    cost = SAMPLES if system.work == "samples" else measure()
    fleet = system.devices(num_clients, numpy_rng(seed, "devices"))
    presence = system.availability.start(num_clients, seed)
    batteries = None
    if np.isfinite(fleet.battery).any():
        own = system.battery.charging
        plugged = presence if own is None else own.start(num_clients, key(seed, "charging") >> 1)
        batteries = Batteries(system.battery, plugged, WH * fleet.battery, WH * fleet.battery * fleet.charge)
    return Clock(
        system=system,
        fleet=fleet,
        presence=presence,
        cost=cost,
        seed=seed,
        memory_mb=memory_mb,
        batteries=batteries,
    )
