"""What will become of the clients of one exchange, in virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedsim.exchange.payload import Outcome
from fedsim.local.work import Work
from fedsim.system.devices import Fleet


@dataclass
class Schedule:
    """What will become of the clients of one exchange: arrays ``(n,)`` in the order of ``ids``.

    ``down``, ``compute`` and ``up`` are predicted seconds; ``end`` is when the client answers or is lost, in seconds
    after the start. ``dropped`` says why a client contributes nothing, ``works`` what the others are asked to do.
    """

    ids: np.ndarray
    down: np.ndarray
    compute: np.ndarray
    up: np.ndarray
    up_rate: np.ndarray  # bytes/s
    end: np.ndarray
    bytes_down: np.ndarray
    works: dict[int, Work]
    dropped: dict[int, str] = field(default_factory=dict)
    trips: int = 1  # round trips of the exchange
    enough: bool = False  # as many answers as were needed: nobody waits for the rest
    seconds: float = 0.0  # duration, once settled

    @property
    def answering(self) -> list[int]:
        """Who will contribute, in order."""
        return [int(c) for c in self.ids if int(c) not in self.dropped]

    def lost(self, task: str) -> list[Outcome]:
        """Outcomes of those who contribute nothing."""
        return [
            Outcome(
                c,
                "dropped",
                bytes_down=int(self.bytes_down[i]) if self.end[i] > 0 else 0,
                reason=why,
                task=task,
            )
            for i, c in enumerate(self.ids.tolist())
            if (why := self.dropped.get(c))
        ]

    def energy(self, i: int, until: float, fleet: Fleet) -> float:
        """Joules that the i-th client spent on its transfers and its work until then; NaN where not known."""
        down = min(until, self.down[i])
        compute = min(max(until - self.down[i], 0.0), self.compute[i])
        up = min(max(until - self.down[i] - self.compute[i], 0.0), self.up[i])
        client = self.ids[i]
        return float(fleet.compute_watts[client] * compute + fleet.radio_watts[client] * (down + up))
