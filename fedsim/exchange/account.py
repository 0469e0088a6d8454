"""The account of central releases: who may take part, the line on disk before each, and what all of them cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.exchange.accounting import Mechanism
from fedsim.exchange.ledger import Ledger
from fedsim.exchange.payload import Outcome
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.terms import Terms
from fedsim.exchange.turns import Turns


@dataclass
class Account:
    """Releases of sums with noise, as ``ledger`` knows them."""

    privacy: Privacy
    terms: Terms
    ledger: Ledger
    released: int = 0  # as the ledger says
    made: int = 0  # of the rounds that count
    _turns: Turns = field(default_factory=Turns)
    _cost: tuple[float, str] | None = None

    def enter(
        self, names: Sequence[str], bound: float, ok: Sequence[Outcome], round: int, exchange: int
    ) -> None:
        """Begin to note a release of ``round`` (from 0), which is not made before it is settled.

        Raises:
            EngineError, StrategyError: of clients that the accounting does not cover.
        """
        self._turns.check([o.client for o in ok], round, self.terms.apart, self.privacy.cap)
        about = {"z": self.privacy.multiplier, "clip": bound, "cohort": len(ok)}
        self.ledger.begin(round + 1, exchange, vectors=names, **about)
        self.released, self.made, self._cost = self.ledger.upto(round + 1), self.made + 1, None

    def settle(self) -> tuple[float, str]:
        """See to it that what was entered is on disk; meanwhile worked out is the epsilon of all so far, and the
        relation of data sets that it holds for."""
        self._cost = self._cost or self._mechanism.bound(self.released, self._delta)
        self.ledger.settle()
        return self._cost

    def spent(self, round: int, most: float) -> bool:
        """Whether a release of ``round`` (from 1) would cost more than ``most``."""
        count = self.ledger.after(round)
        if self.terms.affords is not None:
            return count > self.terms.affords
        return self._mechanism.bound(count, self._delta)[0] > most

    def exact(self) -> float:
        """Epsilon of all releases by privacy loss distributions."""
        return self._mechanism.epsilon(self.released, self._delta, "pld")[0]

    def save(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        turns = {str(c): r for c, r in self._turns.last.items()}
        return {"released": self.released, "made": self.made, "turns": turns}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave.

        Raises:
            CheckpointError: if the ledger has lost releases since.
        """
        self.released, self.made = plain["released"], plain["made"]
        self._turns.last = {int(c): r for c, r in plain["turns"].items()}
        self.ledger.check(self.released)

    @property
    def _mechanism(self) -> Mechanism:
        assert self.terms.mechanism is not None
        return self.terms.mechanism

    @property
    def _delta(self) -> float:
        assert self.privacy.delta is not None
        return self.privacy.delta
