"""The server's half of a release: sums come out of the ring, get their noise once, and are divided by a fixed number.

With S_t the cohort, C the bound, z the noise multiplier and E the expected size of a cohort,
``total = sum_{i in S_t} clip(v_i) + N(0, (z C)^2 I)`` and ``mean = total / E``: whoever did not answer adds zero, and a
round in which nobody did releases noise (McMahan, Ramage, Talwar, Zhang, ICLR 2018). G vectors of one exchange share a
budget: each gets noise of std ``z C_g sqrt(G)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from fedsim.errors import StrategyError
from fedsim.exchange.account import Account
from fedsim.exchange.central import CentralNoise, too_few_shares
from fedsim.exchange.descent import HeldModel, held_model
from fedsim.exchange.entries import clip, length_of, like_of, shared_entries, slots_of
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.payload import DENOMINATOR, WEIGHT, Outcome, Payload
from fedsim.exchange.release import CLIP, FITS, OWN, SATURATED, Kinds, Leaving, Release
from fedsim.exchange.spending import Spending
from fedsim.exchange.summing import void, weighted_sums
from fedsim.exchange.terms import Terms

Folded = dict[tuple[str, str], Tensor]
RECLIPPED = f"{OWN}reclipped"


@dataclass
class Landing:
    """The pipeline after the fold, and what it keeps from round to round."""

    release: Release
    terms: Terms
    account: Account | None = None
    central: CentralNoise | None = None
    spending: Spending | None = None
    held: HeldModel | None = field(init=False)  # what clients hold, where the way down is by differences
    row: dict[str, Any] = field(default_factory=dict)  # entries of the round's row
    _last: int = -1  # round of the last release
    _exchange: int = 0  # its number in the round

    def __post_init__(self) -> None:
        self.held = held_model(self.release.compression, self.terms.seed, self.terms.layout)

    @property
    def values(self) -> dict[str, Any]:
        """What a message says to clients."""
        privacy = self.release.privacy
        adapts = privacy is not None and privacy.adapts and self.central is not None
        return {CLIP: self.central.bound} if adapts and self.central is not None else {}

    def weighted(self, kinds: Kinds, task: str) -> dict[str, Any]:
        """What a message says of weighted sums in fixed point."""
        secure, privacy = self.release.secure, self.release.privacy
        if secure is None or (privacy is not None and privacy.central):
            return {}
        return weighted_sums(secure, self.release.vectors(kinds, task), kinds, self.terms.heaviest)

    def begin(self, kinds: Kinds, task: str, clients: Sequence[int], round: int) -> None:
        """An exchange of ``round`` (from 0) is about to ask ``clients``."""
        if self.spending is not None:
            self.spending.begin(round + 1, clients, self.release.vectors(kinds, task))

    def void(self, cohort: Sequence[int], outcomes: Sequence[Outcome], round: int) -> str:
        """Why the server cannot take masks off the sum, if so; noted in the round's row."""
        secure = self.release.secure
        why = "" if secure is None else void(secure, cohort, outcomes, self.terms.seed, round)
        why = why or too_few_shares(self.release.privacy, outcomes)
        if why:
            self.row["secagg"] = "void"
            if self.central is not None and self.account is not None:
                self.row |= self.central.spent(self.account.settle()) | self._marks
        return why

    def land(
        self,
        folded: Folded,
        kinds: Kinds,
        task: str,
        message: Payload,
        outcomes: Sequence[Outcome],
        round: int,
    ) -> Folded:
        """``folded`` with the sums that the strategy sees, and what their means are divided by."""
        names, privacy, ring = self.release.vectors(kinds, task), self.release.privacy, self.release.secure
        if not names or (ring is None and privacy is None):
            return folded
        ok = [o for o in outcomes if o.kind == "ok"]
        self.row = {k: v for k, v in self.row.items() if k == "secagg"}
        self._number(round)
        if ring is not None:
            self.row["saturated"] = int(sum(o.metrics.get(SATURATED, 0.0) for o in ok))
        if self.spending is not None:
            self.spending.add(outcomes, self.terms.deployed)
            self.row |= self.spending.row() | self._marks
        if self.central is not None and self.account is not None:
            self.account.enter(names, self.central.bound, ok, round, self._exchange)
        elif ring is None:
            return folded
        out = dict(folded)
        shares, bits = (out.pop((name, "sum"), None) for name in (WEIGHT, FITS))
        if shares is not None:
            out[WEIGHT, DENOMINATOR] = shares
        for name in names:
            bound, total = self.release.bound(name, self.values), out.pop((name, "sum"), None)
            if total is None and self.central is None:
                continue
            if total is None:
                total = torch.zeros_like(like_of(name, message, self.terms.dtype))
            elif ring is not None and not total.is_floating_point():
                like = like_of(name, message, self.terms.dtype) if self.release.turned(name, 1) else total
                about = Leaving(self.terms.seed, round, -1, task, self.terms.layout)
                total = self.release.landed(name, total, like, about, bound, len(names))
                total = total.to(self.terms.dtype) if total.is_floating_point() else total
            if self.central is not None and self.account is not None:
                assert bound is not None
                total = self._noised(self.central, self.account, name, total, bound, len(names), round)
            out[name, "sum"] = total
            out[name, DENOMINATOR] = self._divisor(name, ok, message, shares)
        if self.central is not None and self.account is not None:
            self._note(self.central, self.account.settle(), ok, self._fits(ok, bits), round)
        return out

    def clipped(self, name: str, v: Tensor) -> Tensor:
        """A vector no longer than its bound, whoever made it."""
        vector = name != "buffers" and name not in self.release.statistics and v.is_floating_point()
        bound = self.release.bound(name, self.values) if self.central is not None and vector else None
        return v if bound is None else clip(v, bound)[0]

    def _divisor(self, name: str, ok: Sequence[Outcome], message: Payload, shares: Tensor | None) -> Tensor:
        """What the sum of a vector is divided by for its mean."""
        by, secure = self.terms.cohort, self.release.secure
        if secure is not None and (self.release.privacy is None or not self.release.privacy.central):
            by = secure.denominator(name, [o.weight for o in ok], message.values, shares)
        return torch.tensor(by, dtype=torch.float64)

    def _number(self, round: int) -> None:
        """Count exchanges that release something in a round."""
        again = self._last == round
        self._exchange = self._exchange + 1 if again else 0
        self._last = round
        mechanism = self.terms.mechanism
        if again and mechanism is not None and not mechanism.alone:
            raise StrategyError(
                f"round {round + 1}: a second exchange of the round releases vectors, of the same cohort as the first: "
                "privacy=client has no accountant for both; choose a method with one exchange a round, such as fedavg"
            )

    def _noised(
        self,
        central: CentralNoise,
        account: Account,
        name: str,
        total: Tensor,
        bound: float,
        count: int,
        round: int,
    ) -> Tensor:
        """The sum with noise, drawn for entries that leave clients."""
        layout, sums = self.terms.layout, self.row.setdefault("_sums", [0.0, 0.0])
        sums[0] += length_of(total) ** 2
        if central.privacy.distributed:  # it is in the sum
            account.settle()
            return total
        slots = slots_of(total, layout)
        size = total.numel() if slots is None else slots.size
        added = central.of(name, size, bound, count, round, self._exchange, account.made)
        if (mask := shared_entries(layout, self.terms.stays, total, slots)) is not None:
            added = added * mask
        sums[1] += float(added.dot(added))
        account.settle()
        if not self._exchange:  # and not before: drawing delays what is written beside it
            central.draw_ahead(name, size, bound, count, round + 1)
        noised = total.to(torch.float64, copy=True)
        if slots is None:
            noised.add_(added.reshape(total.shape))
        else:
            slots.add(noised, added)
        return noised.to(total.dtype)

    @property
    def _marks(self) -> dict[str, Any]:
        """Whether noise hides anything from who has the seed."""
        named = ["train_loss", "clipped", "reclipped", "sum_norm", "noise_norm"]
        return {"private": not (self.terms.deployed and self.terms.keyed), "not_private": named}

    def _fits(self, ok: Sequence[Outcome], bits: Tensor | None) -> list[float]:
        """A bit for each update that came, 1 if it was no longer than the bound; ``bits``: their masked sum."""
        if bits is None or self.release.secure is None:
            return [o.values.get(FITS, 1.0) for o in ok]  # type: ignore[misc]
        count = int(0.5 + float(self.release.secure.leave(FITS, bits, 1.0)))
        return [1.0] * count + [0.0] * (len(ok) - count)

    def _note(
        self,
        central: CentralNoise,
        cost: tuple[float, str],
        ok: Sequence[Outcome],
        fits: Sequence[float],
        round: int,
    ) -> None:
        """The row's entries, and the bound of the next exchange."""
        long = int(sum(cast(float, o.values[RECLIPPED]) for o in ok if RECLIPPED in o.values))
        sums = self.row.pop("_sums", [0.0, 0.0])
        self.row |= central.row(cost, fits, long, sums) | self._marks
        central.adapt(fits, round)

    def spent(self, round: int) -> bool:
        """Whether ``round`` (from 1) would exceed ``privacy.epsilon_max``."""
        privacy = self.release.privacy
        if privacy is None or (most := privacy.most) is None:
            return False
        if self.spending is not None:
            return self.spending.exceeds(most)
        return self.account is not None and self.account.spent(round, most)

    def check_asked(
        self, task: str, fold: Collection[str], clients: Sequence[int] | None, cohort: Sequence[int]
    ) -> None:
        """Refuse to ask others than the round's cohort: who was drawn is all that is accounted for; and to fold what
        clients measure, which passes neither noise nor masks.

        Raises:
            StrategyError: naming the exchange.
        """
        if fold and is_measuring(task) and self.release.hides:
            raise StrategyError(
                f"the exchange '{task}' only measures, so '{min(fold)}' would leave clients without noise or masks; "
                "give a training exchange another name, as task='fit'"
            )
        others = clients is not None and set(clients) != set(cohort)
        if others and self.central is not None and not is_measuring(task):
            raise StrategyError(
                f"the exchange '{task}' asks other clients than the round's cohort, which privacy=client does not "
                "account for; leave clients= out"
            )

    def row_entries(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Entries of the round's row; what concerns the whole run goes to its ``facts``."""
        row, self.row = self.row, {}
        if "epsilon" in row and (privacy := self.release.privacy) is not None:
            said = {k: row[k] for k in ("epsilon", "delta", "relation", "z", "epsilon_valid", "private")}
            facts["privacy"] = {
                "level": privacy.level,
                **said,
                "noise": "keyed" if self.terms.keyed else "os",
            }
            if self.account is not None and self.terms.mechanism is not None:  # for whoever asks more of it
                made = asdict(self.terms.mechanism)
                facts["privacy"] |= {"releases": self.account.released, "mechanism": made}
        return row

    def at_end(self, facts: dict[str, Any]) -> None:
        """What is worked out once, of the whole run: epsilon by privacy loss distributions, if they are asked for."""
        privacy, mechanism = self.release.privacy, self.terms.mechanism
        if privacy is None or mechanism is None or self.account is None or "privacy" not in facts:
            return
        if privacy.accountant == "pld" or mechanism.event == "truncated":
            facts["privacy"] |= {"epsilon": self.account.exact(), "accountant": "pld"}

    def save(self) -> dict[str, Any]:
        """Entries of a checkpoint, under no prefix: ``""`` plain values, others tensors."""
        plain = {} if self.account is None else self.account.save()
        tensors: dict[str, Tensor] = {}
        if self.central is not None:
            plain["central"], tensors = self.central.save()
        if self.spending is not None:
            plain["spent"] = self.spending.save()
        if self.held is not None:
            plain["down"], frames = self.held.save()
            tensors |= frames
        return {"": plain, **tensors}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave.

        Raises:
            CheckpointError: if the ledger has lost releases since.
        """
        plain = saved[""]
        if self.central is not None:
            self.central.restore(plain["central"], saved)
        if self.spending is not None:
            self.spending.restore(plain["spent"])
        if self.held is not None:
            self.held.restore(plain["down"], saved)
        if self.account is not None:
            self.account.restore(plain)
