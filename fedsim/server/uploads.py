"""Models that clients hand over once: asked for, written down with hashes, and found again.

A method that works on them in many ways compares those on the same models: what was asked for under the same settings,
code and samples is not asked for again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsim.errors import CheckpointError
from fedsim.exchange.payload import Message, Outcome, Payload, Replies
from fedsim.rng import undisturbed
from fedsim.server.depot import MEASURED, Upload, Uploads
from fedsim.server.exchanges import Server
from fedsim.server.roundlog import RoundLog
from fedsim.task.vectors import Weights

log = logging.getLogger(__name__)


def gathered(server: Server, message: Message) -> Uploads | None:
    """The models of the round's cohort: found, or asked for in one exchange and written; ``None`` if nobody answered.

    ``message`` holds the model ``w`` (and ``buffers``) that clients start from. Where devices are simulated, or clients
    are real, everybody is asked in every run; and so they are where some of them failed the last time. What was found
    is in the round's log as if it had been asked for.
    """
    depot = server.depot
    shared = server.clock is None and not server.remote
    if depot is None or not shared:
        return _asked(server, message, share=False)
    with depot.alone():
        found = depot.read(server.round.cohort)
        if found is None:
            return _asked(server, message, share=True)
    depot.write(found, found=True)
    server.record.begins.append(len(server.record.outcomes))
    server.record.outcomes.extend(replace(o) for o in found.outcomes)
    server.facts["uploads_hash"] = found.hash
    return found


def recalled(server: Server, expected: str) -> Uploads:
    """This run's uploads, whose hash its state holds.

    Raises:
        CheckpointError: if they are gone, or others.
    """
    found = None if server.depot is None else server.depot.read(own=True)
    if found is None or found.hash != expected:
        what = "are missing" if found is None else f"are others (uploads_hash {found.hash[:8]})"
        raise CheckpointError(
            f"uploads: the models that this run began with (uploads_hash {expected[:8]}) {what}; put its folder "
            "uploads/ back, or give resume=never to start afresh"
        )
    server.facts["uploads_hash"] = found.hash
    return found


def _asked(server: Server, message: Message, share: bool) -> Uploads | None:
    """One exchange with everybody; where clients train several architectures, one with those of each, side by side."""
    groups = server.by_architecture(server.round.cohort) or {0: []}
    turns = dict.fromkeys(server.round.cohort, 0) if server.round.index else None
    alone, longest = len(groups) == 1, 0.0
    models, outcomes = list[Upload](), list[Outcome]()
    for number, clients in groups.items():
        sent, before = message if not number else _first(server, number), len(server.outcomes)
        fold = {"delta": "stack"} | ({"buffers": "stack"} if "buffers" in sent.shared.arrays else {})
        asked = None if alone else clients
        replies = server.exchange(sent, fold, clients=asked, wait=alone, turns=turns, architecture=number)
        longest = max(longest, replies.sim_seconds)
        outcomes += server.outcomes[before:]
        if len(replies):
            models += _models(server, sent, replies, number)
    if server.clock is not None and not alone:
        server.clock.elapse(longest)
    if not models:
        return None
    models = _measured(server, sorted(models, key=lambda m: m.client))
    found = Uploads(models, outcomes, [m.line(server.architecture(m.architecture).layout) for m in models])
    if share and found.lost:
        log.warning(
            "%s failed or sent no finite numbers: these models stay this run's own, and the next run asks again",
            f"client{'s' * (len(found.lost) > 1)} {', '.join(map(str, found.lost))}",
        )
    if server.depot is not None:
        server.depot.write(found, share=share and not found.lost)
    server.facts["uploads_hash"] = found.hash
    return found


def _first(server: Server, number: int) -> Message:
    """What clients receive that train the model ``number``: its first weights."""
    start = server.architecture(number).start
    return Message.of({"w": start.w} | ({"buffers": start.buffers} if len(start.buffers) else {}))


def _models(server: Server, message: Message, replies: Replies, number: int) -> list[Upload]:
    arrays, deltas = message.shared.arrays, replies.stack("delta")
    none = torch.zeros(0, dtype=deltas.dtype)
    buffers = replies.stack("buffers") if "buffers" in arrays else [none] * len(deltas)
    facts = (lambda client: {}) if server.depot is None else server.depot.facts
    return [
        Upload(c, Weights(arrays["w"] + delta, own.clone()), weight, facts(c), number)
        for c, delta, own, weight in zip(
            replies.clients, deltas, buffers, replies.weights.tolist(), strict=True
        )
    ]


def _measured(server: Server, models: Sequence[Upload]) -> list[Upload]:
    """The models with their accuracy on the samples that each was trained on, and on its client's own tests.

    ``None`` for what there is not: no such samples, a task without accuracy, or the nodes of a deployment, which would
    have to be asked once more. Leaves no trace in the round, its log or what is drawn in it; that a client could not be
    measured ends no run.
    """
    depot = server.depot
    if depot is None:
        return list(models)
    tries = replace(server.exchanger.failures, policy="skip", nonfinite="skip")
    aside = replace(server, record=RoundLog(), exchanger=replace(server.exchanger, failures=tries))
    places = zip(MEASURED, (aside.on("train"), aside if depot.own_tests else None), strict=True)
    with undisturbed():
        found = {name: {} if on is None or server.remote else _accuracies(on, models) for name, on in places}
    return [replace(m, measured={name: found[name].get(m.client) for name in MEASURED}) for m in models]


def _accuracies(server: Server, models: Sequence[Upload]) -> dict[int, float]:
    """Accuracy of each model on its own client's samples, by client."""
    out: dict[int, float] = {}
    for number in sorted({m.architecture for m in models}):
        each = {
            m.client: Payload({k: v for k, v in m.weights._asdict().items() if len(v)})
            for m in models
            if m.architecture == number
        }
        message = Message(each=each)
        replies = server.exchange(message, {}, task="evaluate", clients=list(each), architecture=number)
        for o in replies.outcomes:
            accuracy = o.metrics.get("accuracy")
            if o.kind == "ok" and accuracy is not None and math.isfinite(accuracy):
                out[o.client] = accuracy
            elif o.kind == "failed":
                log.warning(
                    "the model of client %d could not be measured on its samples: %s", o.client, o.reason
                )
    return out
