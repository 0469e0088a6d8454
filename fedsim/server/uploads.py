"""Models that clients hand over once: asked for, written down with hashes, and found again.

A method that works on them in many ways compares those on the same models: what was asked for under the same settings,
code and samples is not asked for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsim.errors import CheckpointError
from fedsim.exchange.payload import Message, Outcome, Replies
from fedsim.server.depot import Upload, Uploads
from fedsim.server.exchanges import Server
from fedsim.task.vectors import Weights


def gathered(server: Server, message: Message) -> Uploads | None:
    """The models of the round's cohort: found, or asked for in one exchange and written; ``None`` if nobody answered.

    ``message`` holds the model ``w`` (and ``buffers``) that clients start from. Where devices are simulated, or clients
    are real, everybody is asked in every run. What was found is in the round's log as if it had been asked for.
    """
    depot, layout = server.depot, server.layout
    shared = server.clock is None and not server.remote
    if depot is None or not shared:
        return _asked(server, message, share=False)
    with depot.alone():
        found = depot.read(layout)
        if found is None:
            return _asked(server, message, share=True)
    depot.write(found, layout, found=True)
    server.record.begins.append(len(server.record.outcomes))
    server.record.outcomes.extend(replace(o) for o in found.outcomes)
    server.facts["uploads_hash"] = found.hash
    return found


def recalled(server: Server, expected: str) -> Uploads:
    """This run's uploads, whose hash its state holds.

    Raises:
        CheckpointError: if they are gone, or others.
    """
    found = None if server.depot is None else server.depot.read(server.layout, own=True)
    if found is None or found.hash != expected:
        what = "are missing" if found is None else f"are others (uploads_hash {found.hash[:8]})"
        raise CheckpointError(
            f"uploads: the models that this run began with (uploads_hash {expected[:8]}) {what}; put its folder "
            "uploads/ back, or give resume=never to start afresh"
        )
    server.facts["uploads_hash"] = found.hash
    return found


def _asked(server: Server, message: Message, share: bool) -> Uploads | None:
    fold = {"delta": "stack"} | ({"buffers": "stack"} if "buffers" in message.shared.arrays else {})
    turns = dict.fromkeys(server.round.cohort, 0) if server.round.index else None
    before = len(server.outcomes)
    replies = server.exchange(message, fold, turns=turns)
    if not len(replies):
        return None
    found = _uploads(server, message, replies, server.outcomes[before:])
    if server.depot is not None:
        server.depot.write(found, server.layout, share=share)
    server.facts["uploads_hash"] = found.hash
    return found


def _uploads(server: Server, message: Message, replies: Replies, outcomes: Sequence[Outcome]) -> Uploads:
    arrays, deltas = message.shared.arrays, replies.stack("delta")
    none = torch.zeros(0, dtype=deltas.dtype)
    buffers = replies.stack("buffers") if "buffers" in arrays else [none] * len(deltas)
    facts = (lambda client: {}) if server.depot is None else server.depot.facts
    models = [
        Upload(c, Weights(arrays["w"] + delta, own.clone()), weight, facts(c))
        for c, delta, own, weight in zip(
            replies.clients, deltas, buffers, replies.weights.tolist(), strict=True
        )
    ]
    return Uploads(models, list(outcomes), [m.line(server.layout) for m in models])
