"""A client that is held out for good, measured: as it comes, or after a little training on half of its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fedsim.data.local import LocalData
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.rng import numpy_rng

HELD_OUT = "held_out"  # the exchange; the same for all methods, so no method of a client's class


def held_out(job: Job, start: Callable[[Job], Tensor] = Job.start) -> Update:
    """The received model on all samples of this client; after ``steps`` local steps on half of them, on the others.

    Where several models are offered (``halves`` in the message), ``start(job)`` chooses by the first half, which is
    ``job.data`` then, and the others are what is measured, with or without steps. Steps are those of the configured
    local optimiser, without corrections of the method's own. The halves are drawn by (seed, client): the same in every
    round and for every method.
    """
    data, steps = (
        job.source.newcomer(job.client, job.model.w.dtype),
        int(cast(int, job.values.get("steps", 0))),
    )
    if not len(data):
        raise Refusal("no samples")
    choosing = bool(job.values.get("halves"))
    if not steps and not choosing:
        return Update(metrics=job.evaluate(data), weight=len(data))
    order = torch.from_numpy(numpy_rng(job.seed, "held_out", 0, job.client).permutation(len(data)))
    tuned, measured = (
        _of(data, order[part]) for part in (slice(len(data) // 2), slice(len(data) // 2, None))
    )
    if not len(tuned):
        raise Refusal("one sample, too few for a half to train on")
    if choosing:
        job.data = tuned
    w = start(job)
    job.local = replace(job.local, steps=steps)
    for batch in job.batches("held_out", data=tuned) if steps else ():
        w = job.descend(w, batch)
    return Update(metrics=job.measure(measured, w), weight=len(measured))


def _of(data: LocalData, rows: torch.Tensor) -> LocalData:
    return replace(data, index=data.index[rows.sort().values])
