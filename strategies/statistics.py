"""What an honest client can send to GGEUR: statistics that fit together, and no more rows than it can have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from fedsim.exchange.payload import Payload
from fedsim.server.traits import ClientQuestion
from strategies.base import Strategy, miscounted

WHY = "clients of GGEUR send mean and covariance of each class without this noise; type strategy=fedavg"
SAID: dict[str, Any] = {"meets_all_clients": True, "labels": True, "vectors": True, "discloses": WHY}


class JudgesStatistics:
    """The part of GGEUR that judges what comes back; everything but phase 0 is its ``base``'s to judge."""

    base: Strategy
    target: int | None
    per_prototype: int
    fill: str
    total: int
    noise: float

    def most_weight(self, asked: ClientQuestion) -> float:
        """What the base says of the client's rows and those that are generated."""
        return self.base.most_weight(self._filled(asked))

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Counts, means and factors that do not belong together, or a domain that there is not; else the base's."""
        if asked.task != "statistics":
            return self.base.objection(self._filled(asked), update)
        n, mean, factor = (update.arrays.get(name) for name in ("n", "mean", "factor"))
        if n is None or mean is None or factor is None:
            return ""
        domain = update.values.get("domain", -1)
        if type(domain) is not int or not -1 <= domain < asked.domains:
            return f"domain={domain!r}: must be a number from -1 to {asked.domains - 1}"
        if why := miscounted("n", asked, update):
            return why
        kept, d = n[n > 0].double(), mean.shape[1]
        r = torch.full_like(kept, d) if self.noise else (kept - 1).clamp(max=d)
        needed = int((r * d - r * (r - 1) / 2).sum())
        if len(mean) != len(kept):
            return f"'mean' has {len(mean)} rows, but {len(kept)} classes have samples"
        return f"'factor' has {len(factor)} numbers, expected {needed}" if len(factor) != needed else ""

    def _filled(self, asked: ClientQuestion) -> ClientQuestion:
        """The same with the generated rows among the samples, see ``clients.generated.plan_rows``."""
        if asked.task != "fit" or (of := asked.message.arrays.get("ggeur/of")) is None:
            return asked
        present = cast(Any, asked.message.arrays.get("ggeur/present", ()))
        target = 2000 if self.target is None else self.target
        each = target + self.per_prototype * len(present) + self.total
        return replace(asked, samples=asked.samples + len(of) * each)
