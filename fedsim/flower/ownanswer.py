"""What an answer to a question looks like: the server answers it once itself, on a few samples of its own.

Where nodes bring their own data, these samples are stand-ins of the right shape: only names, shapes and types of the
answer are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
from torch import Tensor

from fedsim.data.federated import FederatedData
from fedsim.data.shards import Shards
from fedsim.engine.assignments import Broadcast, Chunk
from fedsim.engine.worker import Worker
from fedsim.errors import headline
from fedsim.exchange.release import EVENTS
from fedsim.flower.bounds import sizes_of
from fedsim.flower.checking import OwnAnswer, Question
from fedsim.flower.masking import bare
from fedsim.flower.site import Single

FEW = 4  # samples


def trial(worker: Worker, broadcast: Broadcast, chunk: Chunk, question: Question) -> OwnAnswer:
    """``worker`` in the place of the client that was asked: no more than one local step, on ``FEW`` samples."""
    client, data = question.to.client, worker.data
    own = replace(chunk.alone(client), states={}, steps={client: 1})
    own = replace(own, each={c: part for c, p in own.each.items() if (part := bare(p)) is not None})
    kept = _Unpacked(broadcast.fold)
    try:
        result = worker.try_out(few(data, client), broadcast, own, kept)
    except Exception as error:  # of a client's own code that nobody expected
        return OwnAnswer(why=f"{type(error).__name__}: {error}")
    (outcome,) = result.outcomes
    if outcome.kind not in ("ok", "nonfinite") or kept.arrays.keys() != broadcast.fold.keys():
        return OwnAnswer(why=headline(outcome.reason))
    return OwnAnswer(
        {
            n: (tuple(t.shape), worker.plan.dtype if n in kept.framed else t.dtype)
            for n, t in kept.arrays.items()
        },
        {name: type(value) for name, value in outcome.values.items() if name != "weight"},
        frozenset(outcome.metrics),
        weighs="weight" in outcome.values,
        stateful=bool(result.states),
        sizes=sizes_of(kept.arrays),
        events=cast(int, outcome.values.get(EVENTS, 0)),
        received=max(sizes_of(question.asked.message.arrays).values(), default=0.0),
    )


class _Unpacked(Single):
    """An update as it is folded: frames of the release are told, not kept."""

    framed: frozenset[str] = frozenset()

    def frames(self, frames: Mapping[str, Tensor]) -> None:
        """Note which arrays they are of."""
        self.framed = frozenset(frames)


def few(data: FederatedData, client: int) -> FederatedData:
    """The same data with at most ``FEW`` samples of ``client`` in each role."""

    def cut(shards: Shards | None) -> Shards | None:
        if shards is None:
            return None
        rows = shards.part(client)[:FEW]
        ends = np.zeros_like(shards.offsets)
        ends[client + 1 :] = len(rows)
        return Shards(rows, ends)

    roles = data.roles
    roles = replace(
        roles,
        unlabelled=cut(roles.unlabelled),
        client_validation=cut(roles.client_validation),
        newcomers=cut(roles.newcomers),
    )
    mine = cut(data.shards) or data.shards
    return replace(data, shards=mine, holdout=cut(data.holdout), local_test=cut(data.local_test), roles=roles)
