"""What travels: one type for messages and updates, checked and normalised the same way in every engine.

A payload holds named arrays and named scalars. What passes here passes through Flower's records too, so a method that
works in simulation works when deployed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ClientError, StrategyError
from fedsim.exchange.travelling import Value as Value
from fedsim.exchange.travelling import as_array, as_value, checked_name, value_bytes

DENOMINATOR = "denominator"  # in the place of a kind: what the sum of an array is divided by for its mean
WEIGHT = (
    "release/weight"  # array of an update: its weight in fixed point, (1,), where nobody may see single ones
)
Named = Mapping[str, Any] | None


@dataclass(frozen=True)
class Payload:
    """Named arrays (any shape; floats, integers, bool) and named plain values. Read-only for its receiver."""

    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)

    @staticmethod
    def of(arrays: Mapping[str, Any] | None = None, values: Mapping[str, Any] | None = None) -> Payload:
        """Check and normalise: numpy arrays become tensors, numpy scalars Python ones, the rest is refused by name."""
        return Payload(
            {checked_name(k): as_array(k, v) for k, v in (arrays or {}).items()},
            {checked_name(k): as_value(k, v) for k, v in (values or {}).items() if v is not None},
        )

    def to(self, device: str) -> Payload:
        """The same payload with its arrays on ``device``."""
        return Payload({k: v.to(device) for k, v in self.arrays.items()}, self.values)

    def joined(self, more: Payload | None) -> Payload:
        """This payload and ``more``, whose entries count where both have them."""
        more = more or Payload()
        return Payload({**self.arrays, **more.arrays}, {**self.values, **more.values})

    @property
    def nbytes(self) -> int:
        """Bytes of the content: array data, 8 per number, the encoded length of text; what travels may be less, see
        ``fedsim.exchange.packing.sent_bytes``."""
        found = sum(map(value_bytes, self.values.values())) if self.values else 0
        for t in self.arrays.values():
            found += t.nbytes
        return found


@dataclass(frozen=True)
class Message:
    """Server to clients: one ``shared`` payload for the cohort and an optional part per client.

    ``rows`` are arrays (n, ...) over the clients asked, ascending: each receives its own row, they travel as blocks.
    ``standing`` is what its receivers were sent before and still hold, as the ``shared`` part of a message with
    ``keep`` (which counted its bytes): it is at hand in the job like the rest, is put into shared memory once, and
    neither counts nor travels again. A node of a deployment that lost it is sent it again, and that counts.
    """

    shared: Payload = field(default_factory=Payload)
    each: Mapping[int, Payload] = field(default_factory=dict)
    standing: Payload | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    owners: Sequence[int] = ()  # of the rows, once the message is addressed
    keep: bool = False  # its receivers keep the shared part: later messages may rely on it

    def addressed(self, clients: Sequence[int], without: Sequence[str] = ()) -> Message:
        """The message with its rows assigned to ``clients``, ascending; rows named in ``without`` are left out."""
        for name, array in self.rows.items():
            if len(array) != len(clients):
                raise ClientError(
                    f"message rows '{name}' hold {len(array)} rows; expected {len(clients)}, one per client asked"
                )
        rows = {k: v for k, v in self.rows.items() if k not in without}
        return replace(self, rows=rows, owners=tuple(clients))

    def own(self, clients: Sequence[int]) -> dict[str, Tensor]:
        """The rows of some of those addressed, ascending; a view where they are neighbours."""
        if not self.rows:
            return {}
        at = np.searchsorted(self.owners, clients)
        if at[-1] - at[0] == len(at) - 1:
            return {k: v[at[0] : at[-1] + 1] for k, v in self.rows.items()}
        return {k: v[torch.from_numpy(at)] for k, v in self.rows.items()}

    @staticmethod
    def of(
        arrays: Mapping[str, Any] | None = None,
        values: Mapping[str, Any] | None = None,
        each: Mapping[int, Payload] | None = None,
        rows: Mapping[str, Any] | None = None,
    ) -> Message:
        """A message from plain dicts of arrays and values."""
        return Message(Payload.of(arrays, values), dict(each or {}), rows=Payload.of(rows).arrays)


class BoxGuesses(NamedTuple):
    """Boxes that a client found in n of its unlabelled images, as a view showed these; of labels -1 is none."""

    at: Tensor  # (n,) positions of the images
    boxes: Tensor  # (n, M, 4)
    labels: Tensor  # (n, M)
    scores: Tensor  # (n, M)
    moves: Tensor  # (n, K, 2, 3) float64, by which the images came to be shown so: ``fedsim.data.views.geometry``
    size: tuple[int, int]  # (H, W) of an image
    visible: float  # share of a box that must be left for it to be there


@dataclass(frozen=True)
class Update:
    """Client to server: what one client contributes. ``weight`` enters every "mean" fold (sample count, or 1).

    ``state``: the client's new one, committed only if the server takes the update (``None``: the old one). ``metrics``
    go to the log alone, ``guesses`` to the evaluator alone: (2, k), positions of unlabelled samples and their classes,
    or boxes in them.
    """

    arrays: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    values: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    guesses: Tensor | BoxGuesses | None = None
    implied: Mapping[str, Tensor] = field(default_factory=dict)  # what the server can work out: not sent
    weighs: bool = True  # False: the server knows the weight, which does not travel

    @property
    def payload(self) -> Payload:
        """The part that travels."""
        weight = {"weight": float(self.weight)} if self.weighs else {}
        return Payload.of(self.arrays, {**self.values, **weight})


class NonFinite(Exception):  # noqa: N818 - treated as a non-finite update
    """Raised by a client's own code that finds NaN or infinity in its data; says where."""


class Refusal(Exception):  # noqa: N818 - an answer, not an error
    """Raised by a client's own code: it has nothing to contribute this time."""


@dataclass
class Outcome:
    """What became of one client in one exchange; a row of the log."""

    client: int
    kind: str  # ok | refused | failed | nonfinite | dropped
    weight: float = 0.0
    values: Mapping[str, Value] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    samples: int = 0  # processed, local epochs included
    gradients: float = 0  # samples that went through a forward and a backward pass
    forwards: float = 0  # samples that went through a forward pass alone
    seconds: float = 0.0
    sim_seconds: float | None = None  # virtual time from the start of the exchange to the answer
    joules: float | None = None
    battery: float | None = None  # share that is left, where the device has one
    reason: str = ""
    task: str = "fit"
    phase: str = ""  # of a method, reported apart from the rounds
    hashes: dict[str, str] | None = None  # of message/NAME and update/NAME, where they are asked for
    error: BaseException | None = None  # what its code raised, where that is to end the run
    guesses: Tensor | BoxGuesses | None = None  # see ``Update``; gone once they were looked at

    def __reduce__(self) -> tuple[Any, ...]:
        return Outcome, _fields_of(self)


_fields_of = attrgetter(*(f.name for f in fields(Outcome)))  # a tuple travels in half the time of an object


@dataclass
class Replies:
    """All answers to one exchange, in client order.

    ``total(name)`` is the sum over clients of an array, ``mean(name)`` its weighted mean, ``stack(name)`` the
    ``(n, *shape)`` array of single contributions, ``cat(name)`` these end to end, for the kinds the fold asked for.
    """

    outcomes: Sequence[Outcome]
    folded: Mapping[tuple[str, str], Tensor]
    sim_seconds: float = 0.0  # virtual duration of the exchange
    log: dict[str, Any] = field(default_factory=dict)  # further entries of the round's row
    memory: dict[str, Tensor] = field(default_factory=dict)  # what a rule goes on from, by vector

    @property
    def ok(self) -> list[Outcome]:
        """Those who contributed."""
        return [o for o in self.outcomes if o.kind == "ok"]

    @property
    def clients(self) -> list[int]:
        """Ids of those who contributed, ascending."""
        return [o.client for o in self.ok]

    @property
    def weights(self) -> Tensor:
        """Aggregation weights ``(n,)``, float64, in the order of ``clients``.

        Raises:
            StrategyError: where masks hide them (``secagg=masks``): their sum is all that is known.
        """
        if (WEIGHT, DENOMINATOR) in self.folded:
            raise StrategyError(
                "secagg=masks hides what single clients weigh, which this method reads; type strategy.weighting=uniform"
            )
        return torch.tensor([o.weight for o in self.ok], dtype=torch.float64)

    @property
    def removed(self) -> int:
        """Updates that came but were left out, since they were not finite."""
        return sum(o.kind == "nonfinite" for o in self.outcomes)

    @property
    def released(self) -> bool:
        """Whether there are sums even if nobody answered: with noise, an empty cohort must not be told."""
        return any(kind == DENOMINATOR for _, kind in self.folded)

    def __len__(self) -> int:
        return len(self.ok)

    def values(self, name: str) -> list[Value]:
        """One value per contributing client."""
        return [o.values[name] for o in self.ok]

    def total(self, name: str) -> Tensor:
        """Unweighted sum over clients."""
        return self._get(name, "sum")

    def stack(self, name: str) -> Tensor:
        """Single contributions ``(n, *shape)`` in the order of ``clients``."""
        return self._get(name, "stack")

    def cat(self, name: str) -> Tensor:
        """Single contributions end to end along their first axis, in the order of ``clients``."""
        return self._get(name, "cat")

    def mean(self, name: str) -> Tensor:
        """Weighted mean over clients (a fresh tensor); from the plain sum if asked for that and weights are equal."""
        if (fixed := self.folded.get((name, DENOMINATOR))) is not None:
            return self.total(name) / float(fixed)
        weights = [o.weight for o in self.ok]
        if not sum(weights) > 0:
            raise ClientError(
                f"the mean of '{name}' needs a positive total weight, got {sum(weights)}: has any of these clients a "
                "sample whose target counts?"
            )
        if (name, "mean") not in self.folded and (name, "sum") in self.folded and len(set(weights)) == 1:
            return self.total(name) / len(weights)
        return self._get(name, "mean") / sum(weights)

    def _get(self, name: str, kind: str) -> Tensor:
        try:
            return self.folded[name, kind]
        except KeyError:
            have = ", ".join(f"{n}: {k}" for n, k in self.folded) or "nothing"
            raise ClientError(
                f"replies hold no '{kind}' of '{name}' (folded: {have}); "
                f"ask for it in the strategy's fold: {{'{name}': '{kind}'}}, and send it in the client's update"
            ) from None
