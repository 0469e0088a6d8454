"""Who may take part in a release of central noise: a cohort no larger than was said, and nobody back too early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsim.errors import EngineError, StrategyError


@dataclass
class Turns:
    """``last`` round (from 0) of each client, where clients take turns."""

    last: dict[int, int] = field(default_factory=dict)

    def check(self, clients: Sequence[int], round: int, apart: int, cap: int | None) -> None:
        """Refuse more clients than ``cap``, and one that is back in fewer than ``apart`` rounds: correlated noise does
        not hide it then.

        Raises:
            EngineError, StrategyError: naming the round, or the client.
        """
        if cap is not None and len(clients) > cap:
            raise EngineError(f"round {round + 1}: {len(clients)} clients answered, but privacy.cap={cap}")
        for c in clients if apart else []:
            last = self.last.get(c)
            if last is not None and last != round and round - last < apart:
                raise StrategyError(
                    f"client {c} takes part in rounds {last + 1} and {round + 1}, but correlated noise hides it only "
                    f"every {apart} rounds; type sampling=round_robin"
                )
            self.last[c] = round
