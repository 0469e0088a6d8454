"""The settings of group ``secagg``: sums in fixed point, and the masks of which simulation prices the bytes.

A secure sum is the sum of integers (``fedsim.exchange.secagg.ring``): it depends on no order, and the masked protocol
gives the same bits. A weighted mean is a sum of vectors times w = weight/max_weight, divided by the sum of these w in
the same fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ClientError, EngineError, check_choice, check_setting
from fedsim.exchange.codecs.codec import StageDraws
from fedsim.exchange.codecs.rotation import flat_reach
from fedsim.exchange.compression import as_bytes, as_tensor
from fedsim.exchange.payload import Outcome, Value
from fedsim.exchange.secagg.protocol import LegBytes, check_threshold, default_threshold, neighbours
from fedsim.exchange.secagg.ring import (
    ROUNDING,
    FixedPoint,
    read_ring_frame,
    residues_of,
    ring_frame,
    ring_levels,
    rounding_growth,
    signed,
    to_levels,
)

if TYPE_CHECKING:
    from fedsim.exchange.normals import Draws
    from fedsim.exchange.release import Kinds
    from fedsim.exchange.stages import Ring

WEIGHTED = (
    "release/weighted"  # value of a message: names of vectors that are summed times the client's weight
)
TAIL = 8  # deviations of noise that fit the ring beside the vector: beyond is one entry in 10^15
MAX_WEIGHT = "release/max_weight"  # and the weight that counts as 1


@dataclass(frozen=True, kw_only=True)
class SecureSums:
    """A ``stages.Ring`` of ``bits`` for sums of at most ``most`` clients.

    ``masks``: clients mask what they send; without, the server could read single residues.
    """

    bits: int = 32
    reach: float | None = None  # of an entry, where updates are not clipped
    round: str = "nearest"  # nearest | stochastic
    max_weight: float | None = None  # of a client in a mean; None: the most samples that one has
    masks: bool = False
    threshold: int | None = None  # clients that must answer; None: two thirds of those asked
    neighbours: int | None = None  # clients that each masks with, even; None: all
    most: int | None = None  # clients of a sum; None: filled in by the run
    hides: bool = False  # weights are masked too; filled in by the run
    firm: bool = False  # no fewer than the threshold will do, whoever was asked; filled in by the run

    def __post_init__(self) -> None:
        check_choice("secagg.round", self.round, ROUNDING)
        check_setting("secagg", self.reach is None or self.reach > 0, "reach", self.reach, "must be positive")
        heavy = self.max_weight is None or self.max_weight > 0
        check_setting("secagg", heavy, "max_weight", self.max_weight, "must be positive")
        check_setting("secagg", self.most is None or self.most > 0, "most", self.most, "must be positive")
        k = self.neighbours
        check_setting(
            "secagg", k is None or (k >= 2 and k % 2 == 0), "neighbours", k, "must be even, from 2 on"
        )
        ring_levels(self.bits, self.most or 1)

    @property
    def ring(self) -> FixedPoint:
        """The fixed point of the run."""
        assert self.most is not None
        return FixedPoint(self.bits, self.most, self.round)

    def enter(
        self,
        vector: str,
        v: Tensor,
        bound: float | None,
        draws: Draws,
        factor: float = 1.0,
        noise: Tensor | None = None,
        spread: float = 0.0,
        flat: bool = False,
    ) -> tuple[Tensor, int]:
        """Levels (d,), int64, of ``v`` (d,) times ``factor``; and how many entries were beyond reach.

        ``noise`` (d,) of deviation ``spread`` is rounded to levels by itself, and added to them.
        Where lengths are bounded, so is that of the levels: rounding may add to it, and ``v`` leaves room for that.
        """
        u = StageDraws(draws).uniforms(len(v)) if self.round == "stochastic" else None
        x, reach = v.cpu().numpy() * factor, self._reach(bound, spread, len(v) if flat else 0)
        if bound is not None:
            room = bound - rounding_growth(len(x), reach / self.ring.L, self.round)
            if room <= bound / 2:
                raise ClientError(
                    f"secagg.bits={self.bits}: rounding {len(x)} entries is as long as the clip bound; more bits"
                )
            x = x * min(1.0, room / max(float(np.sqrt(np.sum(x * x))), room))
        found, L = self.ring.levels(x, reach, u), self.ring.L
        if noise is None:
            return torch.from_numpy(found.q), found.saturated
        whole = found.q + np.rint(noise.cpu().numpy() / (reach / L)).astype(np.int64)
        q = np.clip(whole, -L, L)
        return torch.from_numpy(q), found.saturated + int(np.count_nonzero(q != whole))

    def leave(
        self, vector: str, total: Tensor, bound: float | None, spread: float = 0.0, flat: bool = False
    ) -> Tensor:
        """The real sum, of any shape, float64: the integer one, mod R and read as signed, times step = reach/L."""
        whole = torch.from_numpy(np.asarray(signed(residues_of(total.cpu().numpy(), self.bits), self.bits)))
        return whole.double() * (self._reach(bound, spread, len(total) if flat else 0) / self.ring.L)

    def frame(self, levels: Tensor) -> Tensor:
        """Levels (d,) as they travel: residues of ``bits`` bits each."""
        return as_tensor(ring_frame(residues_of(levels.cpu().numpy(), self.bits), self.bits))

    def opened(self, frame: Tensor, d: int) -> Tensor:
        """The inverse of :meth:`frame`.

        Raises:
            ClientError: for what is no frame of ``d`` residues, or holds levels that no client may have.
        """
        q = signed(read_ring_frame(as_bytes(frame), d, self.bits), self.bits)
        if not self.masks and (np.abs(q) > self.ring.L).any():
            raise ClientError(f"a frame holds levels above {self.ring.L}, which would make the sum wrap")
        return torch.from_numpy(np.ascontiguousarray(q))

    def factor(self, vector: str, weight: float, said: Mapping[str, Value]) -> float:
        """What a client's vector is multiplied by: its weight in the ring, by the message's values.

        Raises:
            ClientError: if it weighs more than anybody may.
        """
        if vector not in _names(said):
            return 1.0
        most = float(said[MAX_WEIGHT])  # type: ignore[arg-type]
        if weight > most:
            raise ClientError(
                f"the update weighs {weight:g}, but secure sums were made for weights up to {most:g}; "
                f"type secagg.max_weight={weight:g}, or strategy.weighting=uniform"
            )
        return weight / most

    def hidden(self, said: Mapping[str, Value]) -> bool:
        """Whether clients' weights travel in fixed point, as one more number of the sum."""
        return self.hides and bool(_names(said))

    def share(self, weight: float, said: Mapping[str, Value]) -> Tensor:
        """weight/max_weight in fixed point, (1,) int64; refused as by ``factor``."""
        found = self.factor(_names(said)[0], weight, said)
        return torch.from_numpy(to_levels(np.array([found]), 1.0, self.ring.L).q)

    def count(self, vector: str, v: Tensor) -> Tensor:
        """Whole numbers as they are, int64.

        Raises:
            ClientError: for others, and for such that a sum of ``most`` clients could wrap.
        """
        L = self.ring.L
        if v.is_floating_point() or bool((v.abs() > L).any()):
            raise ClientError(
                f"'{vector}' is no array of whole numbers up to {L}, what secagg.bits={self.bits} can add up; more bits"
            )
        return v.cpu().long()

    def counts(self, total: Tensor) -> Tensor:
        """The sum of whole numbers, int64, by the sum of residues."""
        return torch.from_numpy(np.asarray(signed(residues_of(total.cpu().numpy(), self.bits), self.bits)))

    def bit(self, one: bool) -> Tensor:
        """A bit in fixed point, (1,) int64: all levels, or none."""
        return torch.tensor([self.ring.L if one else 0])

    def denominator(
        self, vector: str, weights: Sequence[float], said: Mapping[str, Value], total: Tensor | None = None
    ) -> float:
        """What the sum of a vector is divided by for its mean: how many came, or the sum of their weights, of which
        ``total`` is the one in fixed point where single ones are hidden."""
        if vector not in _names(said):
            return float(len(weights))
        if total is not None:
            return float(self.leave(vector, total, 1.0))
        shares = np.array([self.factor(vector, w, said) for w in weights])
        L = self.ring.L
        return float(to_levels(shares, 1.0, L).q.sum()) / L

    def enough(self, asked: int) -> int:
        """t: how many of ``asked`` clients must answer.

        Raises:
            EngineError: if they are more than the ring was made for.
        """
        self.ring.check_cohort(asked)
        if not self.masks or not asked:
            return 0
        if self.firm and self.threshold is not None:
            return self.threshold
        if self.neighbours is not None:
            asked = min(asked, self.neighbours + 1)
        if self.threshold is None:
            return default_threshold(asked)
        return min(max(self.threshold, asked // 2 + 1), asked)  # cohorts of coins differ in size

    def legs(self, asked: int) -> LegBytes:
        """Bytes of one client beyond the message and the frame: keys, shares and what reveals them; raises as
        ``enough``."""
        self.ring.check_cohort(asked)
        if not self.masks or not asked:
            return LegBytes(0, 0)
        k = asked - 1 if self.neighbours is None else min(self.neighbours, asked - 1)
        return LegBytes.of(k, asked, 0, 0)

    def check(self, cohort: int) -> None:
        """Refuse a threshold that does not go with cohorts of that size."""
        if self.masks and self.threshold is not None:
            size = cohort if self.neighbours is None else min(cohort, self.neighbours + 1)
            check_threshold(self.threshold, size)

    def _reach(self, bound: float | None, spread: float = 0.0, flat: int = 0) -> float:
        """Of an entry; ``flat``: how many entries of like size there are, 0 where sizes differ."""
        if bound is not None and flat:
            bound *= flat_reach(flat, self.ring.most)
        reach = bound + TAIL * spread if bound is not None else self.reach
        if reach is None:
            raise EngineError(
                "secagg.reach is missing: no entry of an update may be larger; add secagg.reach=1"
            )
        return float(reach)


def weighted_sums(secure: Ring, names: Sequence[str], kinds: Kinds, heaviest: float) -> dict[str, Any]:
    """Values of a message: which vectors are summed times clients' weights, and the weight that counts as 1.

    One that is summed with weights and without has uniform ones, so that both are one sum (``fedsim.run.sendable``).
    """
    weighted = [name for name in names if "mean" in kinds[name] and "sum" not in kinds[name]]
    return {WEIGHTED: weighted, MAX_WEIGHT: float(secure.max_weight or heaviest)} if weighted else {}


def void(secure: Ring, cohort: Sequence[int], outcomes: Sequence[Outcome], seed: int, round: int) -> str:
    """Why the server cannot take masks off the sum of those of ``cohort`` who came, if so.

    It needs t answers, and with ``neighbours`` t of them around each client, who hold shares of its secrets.
    """
    came, t = {o.client for o in outcomes if o.kind == "ok"}, secure.enough(len(cohort))
    if len(came) < t:
        return f"secure aggregation is void: {len(came)} of {len(cohort)} clients answered, {t} are needed"
    if t and secure.neighbours is not None:
        for i, near in neighbours(cohort, secure.neighbours, seed, round).items():
            holders = len(came.intersection(near)) + (i in came)
            if 0 < holders < t:
                return (
                    f"secure aggregation is void: {holders} neighbours of client {i} answered, {t} are needed"
                )
    return ""


def price(secure: Ring | None, asked: int, outcomes: Sequence[Outcome]) -> None:
    """Count the legs of masks beside the update: keys, shares, and those that take masks off."""
    if secure is None or not secure.masks:
        return
    legs = secure.legs(asked)
    for o in outcomes:
        o.bytes_down += legs.down
        o.bytes_up += legs.up if o.kind == "ok" else 0


def _names(said: Mapping[str, Value]) -> Sequence[str]:
    found = said.get(WEIGHTED, ())
    return [found] if isinstance(found, str) else list(map(str, found))  # type: ignore[arg-type]
