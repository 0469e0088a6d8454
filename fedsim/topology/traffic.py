"""What goes over the links of clients that talk to each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedsim.exchange.payload import Outcome


@dataclass(frozen=True)
class Traffic:
    """Bytes (m,) over every client's link: ``sent`` and ``received``."""

    sent: np.ndarray
    received: np.ndarray

    def book(self, outcomes: Iterable[Outcome]) -> None:
        """Into the outcomes, instead of the message and the answers."""
        for o in outcomes:
            o.bytes_up, o.bytes_down = int(self.sent[o.client]), int(self.received[o.client])
