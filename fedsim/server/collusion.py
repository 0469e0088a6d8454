"""Where attacks enter a run: who the attackers are, and what those that see everything send instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Portion
from fedsim.exchange.fold import Folder
from fedsim.exchange.packing import pack, unpack
from fedsim.exchange.payload import Outcome
from fedsim.rng import numpy_rng
from fedsim.task.layout import Layout

ATTACKERS = "attackers.json"  # in the run folder: ids of the attackers
Kinds = Mapping[str, tuple[str, ...]]
Folded = dict[tuple[str, str], Tensor]


class AttackLike(Protocol):
    """An attack as the simulator sees it (see ``clients.attacks``)."""

    fraction: float  # share of all clients that attack
    omniscient: ClassVar[bool]  # whether it is also ``Omniscient``

    @property
    def changes_vectors(self) -> bool:
        """Whether it changes what is sent, not only what is trained on or who answers."""

    def fitted(self, data: Dataset) -> AttackLike:
        """The attack on ``data``, with all values filled in that follow from it; ``ConfigError`` if it cannot be."""

    def wrap(self, client: Any, attackers: frozenset[int]) -> Any:
        """``client`` whose local half is hostile where its id is among ``attackers``."""


@runtime_checkable
class Planting(Protocol):
    """An attack that trains a backdoor into the model, and is measured by how often that works."""

    def triggered(self, data: FederatedData) -> Portion | None:
        """The test samples of other classes than the target's, with the trigger, labelled as the target."""


class Omniscient(Protocol):
    """An attack that is computed from what the honest clients of the round sent."""

    def collude(self, own: Tensor, honest: Tensor) -> Tensor:
        """What the attackers send (a, D) instead of ``own`` (a, D), given the ``honest`` updates (h, D)."""


@runtime_checkable
class Adaptive(Protocol):
    """One that is also computed from what the server will make of the updates."""

    def collude_against(self, own: Tensor, honest: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """As ``collude``; ``rule`` gives the aggregate (D,) of updates (h + a, D), the honest ones first."""


def colluding(
    attack: AttackLike | None, attackers: Sequence[int], folder: Path, aggregator: Any = None
) -> Collusion | None:
    """What the server needs of an attack on ``aggregator``, if anything; the attackers' ids go into the run folder."""
    if attack is None:
        return None
    (folder / ATTACKERS).write_text(json.dumps(list(attackers)) + "\n")
    together = attack.omniscient and len(attackers) > 0
    return Collusion(frozenset(attackers), cast(Omniscient, attack), aggregator) if together else None


def draw_attackers(seed: int, num_clients: int, fraction: float) -> list[int]:
    """Ids of the attackers, ascending: ``fraction`` of all clients, rounded, drawn by the seed."""
    count = int(fraction * num_clients + 0.5)
    return sorted(numpy_rng(seed, "attackers").choice(num_clients, count, replace=False).tolist())


@dataclass(frozen=True)
class Collusion:
    """Replaces the attackers' rows between an exchange and its use, whatever the strategy folds.

    All arrays of real numbers that a client sends, BatchNorm statistics excepted, count as its update; an attack sees
    them as one vector. Workers then have to send single updates; sums are taken here, in client order. Exchanges with
    an array whose length differs by client (laid end to end) are answered honestly: such answers have no mean.
    """

    attackers: frozenset[int]
    attack: Omniscient
    aggregator: Any = None  # (updates (n, d), weights (n,)) -> (d,), for attacks that are aimed at it

    def widen(self, kinds: Kinds) -> dict[str, tuple[str, ...]]:
        """What to ask of the workers instead of ``kinds``."""
        if _uneven(kinds):
            return dict(kinds)
        return {name: kind if name == "buffers" else ("stack",) for name, kind in kinds.items()}

    def apply(
        self,
        folded: Folded,
        outcomes: Sequence[Outcome],
        kinds: Kinds,
        layout: Layout,
        again: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Folded:
        """From stacks of what was sent to the asked ``kinds`` of what arrives.

        Of flat vectors an attack sees, and replaces, what is not padding; ``again`` is what the server makes of an
        array that is put in the place of one, by its name.
        """
        if _uneven(kinds):
            return folded
        ok = [o for o in outcomes if o.kind == "ok"]
        bad = [i for i, o in enumerate(ok) if o.client in self.attackers]
        good = [i for i, o in enumerate(ok) if o.client not in self.attackers]
        stacks = {name: rows for (name, kind), rows in folded.items() if kind == "stack"}
        if bad and good:
            weights = torch.tensor([ok[i].weight for i in (*good, *bad)], dtype=torch.float64)
            self._replace(stacks, bad, good, weights, layout)
            for name, rows in stacks.items() if again is not None else ():
                for i in bad:
                    rows[i] = again(name, rows[i])  # type: ignore[misc]
        out = {key: value for key, value in folded.items() if key[1] != "stack"}
        sums = {n: tuple(k for k in kinds[n] if k != "stack") for n in stacks}
        folder = Folder({n: k for n, k in sums.items() if k})
        for i, outcome in enumerate(ok):
            folder.add({n: rows[i] for n, rows in stacks.items()}, outcome.weight)
        return out | folder.sums | {(n, "stack"): rows for n, rows in stacks.items() if "stack" in kinds[n]}

    def _replace(
        self,
        stacks: dict[str, Tensor],
        bad: Sequence[int],
        good: Sequence[int],
        weights: Tensor,
        layout: Layout,
    ) -> None:
        sent, packed = pack({n: rows for n, rows in stacks.items() if rows.is_floating_point()}, layout)
        if not sent:
            return
        flat = [rows.flatten(1) for rows in sent.values()]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
        widths = [f.shape[1] for f in flat]

        def rule(rows: Tensor) -> Tensor:
            """Each array passes the rule by itself, as in a method."""
            return torch.cat([self.aggregator(part, weights) for part in torch.split(rows, widths, dim=1)])

        if isinstance(self.attack, Adaptive) and self.aggregator is not None:
            answer = self.attack.collude_against(whole[bad], whole[good], rule)
        else:
            answer = self.attack.collude(whole[bad], whole[good])
        made = torch.split(answer, widths, dim=1)
        shaped = {n: part.reshape(len(bad), *sent[n].shape[1:]) for n, part in zip(sent, made, strict=True)}
        for name, rows in unpack(shaped, packed, layout).items():
            stacks[name][bad] = rows.to(stacks[name].dtype)


def _uneven(kinds: Kinds) -> bool:
    """Whether the shape of an array may differ by client."""
    return any("cat" in kind for kind in kinds.values())
