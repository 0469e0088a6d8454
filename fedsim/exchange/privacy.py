"""Differential privacy of what leaves a client: the settings, and what they do to one update.

``level=client`` (McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR 2018):
vectors are clipped to length C, a trusted server adds N(0, (z C)^2) to each entry of their sum and divides it by the
expected number of clients. ``local``: each client adds that noise to its own vector. ``record``: DP-SGD inside the
client (Abadi et al. 2016), see ``fedsim.local.sample_noise``; updates then pass as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from fedsim.errors import ClientError, check_setting
from fedsim.exchange import normals as noise
from fedsim.exchange.normals import Draws
from fedsim.exchange.payload import Value

check = partial(check_setting, "privacy")

LEVELS = ("client", "local", "record")
MECHANISMS = ("gaussian", "banded", "tree")
ACCOUNTANTS = ("rdp", "pld")
WHERE = ("server", "distributed")
CENTRAL_ONLY = {
    "mechanism": "gaussian",
    "cap": None,
    "assume_poisson": False,
    "accountant": "rdp",
}  # else as here


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping, NeurIPS 2021."""

    start: float = 0.1  # C of round 1
    rate: float = 0.2  # eta
    quantile: float = 0.5  # gamma: share of the updates that fit
    noise: float | None = None  # sigma_b of the sum of bits; None: a twentieth of the expected cohort


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The settings of group ``privacy``; either ``z`` or ``epsilon`` is given.

    ``found`` is the z that a run works out of ``epsilon``, ``span`` the number of rounds that it, or the mechanism, is
    made for: both are filled in by the run, and are part of its key.
    """

    level: str
    z: float | None = None  # noise multiplier: noise of the sum in lengths of the clip bound
    epsilon: float | None = None  # of the whole run
    delta: float | None = None
    clip: float | str = 1.0  # C, or adaptive
    clips: Mapping[str, float] | None = None  # by vector, where another bound holds
    adaptive: AdaptiveClip = field(default_factory=AdaptiveClip)
    mechanism: str = "gaussian"
    band: int | None = None  # rounds between two turns of a client, at least; None: what the sampling gives
    accountant: str = "rdp"
    epsilon_max: float | None = None  # the run ends before the round that would exceed it
    noise: str = "auto"
    cap: int | None = None  # most clients of a bernoulli cohort
    assume_poisson: bool = False
    metrics: str = "drop"
    where: str = "server"  # who adds noise to a sum: the server, or each client a share below the ring
    least: int | None = None  # clients whose shares are enough; None: two thirds of the cohort
    micro: int = 32  # samples whose gradients are computed together
    found: float | None = None
    span: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.adaptive, Mapping):
            object.__setattr__(self, "adaptive", AdaptiveClip(**self.adaptive))
        check(
            self.noise != "distributed",
            "noise",
            self.noise,
            "where noise is added says another setting; type privacy.where=distributed with secagg=masks",
        )
        for name, value, allowed in (
            ("level", self.level, LEVELS),
            ("mechanism", self.mechanism, MECHANISMS),
            ("accountant", self.accountant, ACCOUNTANTS),
            ("noise", self.noise, ("auto", "keyed", "os")),
            ("metrics", self.metrics, ("drop", "plain")),
            ("where", self.where, WHERE),
        ):
            check(value in allowed, name, value, f"choose one of {', '.join(allowed)}")
        _check_amounts(self)
        if self.level != "client":
            for name, off in (
                ("mechanism", "gaussian"),
                ("cap", None),
                ("assume_poisson", False),
                ("accountant", "rdp"),
                ("where", "server"),
                ("least", None),
            ):
                value = getattr(self, name)
                check(value == off, name, value, f"goes with privacy=client only; leave {name} out")
            check(
                self.clip != "adaptive", "clip", self.clip, "adapts under privacy=client only; type a number"
            )
        if self.mechanism != "gaussian":
            check(
                self.clip != "adaptive", "clip", self.clip, "correlated noise needs one bound; type a number"
            )
        if self.distributed:
            _check_shares(self)

    @property
    def central(self) -> bool:
        """Whether the server adds the noise to sums."""
        return self.level == "client"

    @property
    def distributed(self) -> bool:
        """Whether clients add the noise of the sum, each a share of it, in the fixed point of secure sums."""
        return self.central and self.where == "distributed"

    @property
    def local(self) -> bool:
        """Whether each client adds it to its vectors."""
        return self.level == "local"

    @property
    def adapts(self) -> bool:
        """Whether the bound changes from round to round."""
        return self.clip == "adaptive"

    @property
    def multiplier(self) -> float:
        """z, typed or found."""
        found = self.found if self.found is not None else self.z
        assert found is not None, "a run works it out before it starts"
        return found

    @property
    def most(self) -> float | None:
        """Epsilon before which the run ends: also that which z was found for, where rules differ in their gradients."""
        return self.epsilon if self.epsilon_max is None and self.level == "record" else self.epsilon_max

    @property
    def span_matters(self) -> bool:
        """Whether another number of rounds is another mechanism."""
        return self.epsilon is not None or self.mechanism != "gaussian"

    def bound(self, vector: str, said: Value | None) -> float | None:
        """C of a vector; ``said``: what the server says of this exchange, where bounds adapt."""
        if self.level == "record":
            return None
        if self.clips and vector in self.clips:
            return float(self.clips[vector])
        if not self.adapts:
            return float(self.clip)
        if not isinstance(said, float | int):
            raise ClientError("privacy.clip=adaptive: the message says no bound; server and client disagree")
        return float(said)

    def check_update(
        self,
        arrays: Mapping[str, Tensor],
        names: Collection[str],
        values: Mapping[str, Value],
        public: frozenset[str],
    ) -> None:
        """Refuse an update of which more leaves than the vectors ``names``, or whose sum has another sensitivity.

        Raises:
            ClientError: naming the array, the value or the weight.
        """
        how, weight, whole = self.level, values.get("weight", 1.0), self.level == "record"
        if weight != 1.0 and not whole:  # how many samples there are is no secret of one
            raise ClientError(
                f"the update weighs {weight!r}, but under privacy={how} every one weighs 1: another weight would say "
                "how many samples a client has. Type strategy.weighting=uniform, or send Update(weight=1)"
            )
        for name, array in arrays.items():
            if (name not in names and not whole) or not array.is_floating_point():
                raise ClientError(
                    f"'{name}' leaves the client without noise: privacy={how} covers vectors of real numbers that are "
                    "summed. Send it in no update, or choose another method (docs/privacy.md)"
                )
        for name in values:
            if name != "weight" and name not in public:
                raise ClientError(
                    f"the value '{name}' leaves the client without noise under privacy={how}; send it in no update, "
                    "or name it in the strategy's traits.public_values if it says nothing of the samples"
                )

    def own_spread(self, bound: float, count: int) -> float:
        """Standard deviation of what a client adds to one of ``count`` vectors: z C sqrt(count), of ``least`` shares
        one; 0 where it adds nothing."""
        whole = self.multiplier * bound * math.sqrt(count)
        if self.distributed:
            assert self.least is not None, "a run fills it in"
            return whole / math.sqrt(self.least)
        return whole if self.local else 0.0

    def own_noise(self, x: Tensor, bound: float | None, count: int, draws: Draws) -> Tensor:
        """Noise for one of ``count`` vectors of a client, of the size of ``x``."""
        assert bound is not None
        normals = noise.secret if self.noise == "os" else noise.of(draws("noise"))
        return normals(x.numel()).to(x.device) * self.own_spread(bound, count)


def _check_shares(p: Privacy) -> None:
    """Noise in shares is plain Gaussian, and nothing in the clear tells what it hides."""
    check(
        p.mechanism == "gaussian",
        "mechanism",
        p.mechanism,
        "shares of clients are drawn afresh each round; with privacy.where=distributed type privacy.mechanism=gaussian",
    )
    check(
        not p.adapts,
        "clip",
        p.clip,
        "clients would say in the clear whether they fit; with privacy.where=distributed type a number",
    )


def _check_amounts(p: Privacy) -> None:
    check(
        (p.z is None) != (p.epsilon is None),
        "z",
        p.z,
        "type either the noise, as privacy.z=1, or the budget, as privacy.epsilon=2"
        + ("; not both" if p.z is not None else ""),
    )
    check(
        p.delta is not None, "delta", p.delta, "must be given: type privacy.delta=1e-5, below 1/num_clients"
    )
    assert p.delta is not None
    check(0 < p.delta < 1, "delta", p.delta, "must lie in (0, 1)")
    for name in ("epsilon", "epsilon_max", "cap", "micro", "band", "least"):
        value = getattr(p, name)
        check(value is None or value > 0, name, value, "must be positive")
    check(p.z is None or p.z >= 0, "z", p.z, "must not be negative")
    bounds = {"clip": p.clip, **{f"clips.{k}": v for k, v in (p.clips or {}).items()}}
    for name, value in bounds.items():
        if name == "clip" and value == "adaptive":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(number, name, value, "must be a positive number" + (", or adaptive" if name == "clip" else ""))
        check(
            0 < float(value) < math.inf, name, value, "must be positive and finite: noise is a multiple of it"
        )
    a = p.adaptive
    check(0 < a.start < math.inf, "adaptive.start", a.start, "must be positive")
    check(a.rate > 0, "adaptive.rate", a.rate, "must be positive")
    check(0 < a.quantile < 1, "adaptive.quantile", a.quantile, "must lie in (0, 1)")
    check(a.noise is None or a.noise > 0, "adaptive.noise", a.noise, "must be positive")
