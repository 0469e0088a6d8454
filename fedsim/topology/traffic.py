"""What goes over clients' links, where that is not the message and the answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedsim.exchange.payload import Outcome


@dataclass(frozen=True)
class Traffic:
    """Bytes (m,) over every client's link: ``sent`` (``None``: what the answers hold) and ``received``."""

    sent: np.ndarray | None
    received: np.ndarray

    def book(self, outcomes: Iterable[Outcome]) -> None:
        """Into the outcomes, instead of the message and the answers."""
        for o in outcomes:
            o.bytes_down = int(self.received[o.client])
            if self.sent is not None:
                o.bytes_up = int(self.sent[o.client])
