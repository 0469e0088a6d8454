"""What numbers of an answer can be, by what was asked: counts, what a release says of itself, how large they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.payload import Outcome, Payload
from fedsim.exchange.release import EVENTS, FITS, SATURATED
from fedsim.local.work import num_steps, step_size
from fedsim.server.traits import ClientQuestion
from fedsim.task.layout import Layout

LEAP = 1000.0  # times the largest number that a client received, or 1: no honest change is larger
SLACK = 100.0  # times what as many steps, or samples, as the client has would make of the server's own answer
PASSES = 1000  # times the configured work that a client may say it did
WHOLE = 2.0**53  # of counts: whole numbers of that size have no neighbours left out
TINY = float(torch.finfo(torch.float32).tiny)  # what weighs less is nothing, or NaN, once it is divided by


def check_counts(outcome: Outcome, asked: ClientQuestion) -> None:
    """Whether it can have done so much: up to ``PASSES`` times what is configured, for a method's own phases."""
    local, n = asked.local, max(asked.samples, 1.0)
    most = PASSES * (n * max(local.epochs, 1) + (local.steps or 0) * step_size(local))
    for name in ("samples", "gradients", "forwards"):
        if (count := getattr(outcome, name)) > most:
            raise ClientError(
                f"outcome.{name}={count:g}: it has {n:g} samples at most, and {PASSES} times the configured work are "
                f"{most:g}"
            )


def check_released(outcome: Outcome, asked: ClientQuestion, rows: int, each: int) -> None:
    """Whether what a release says of itself can be: bits, entries beyond reach, gradients that a budget counts.

    The most that are counted: ``each`` noisy gradients a step, as the server's own answer has, in the steps that the
    client can take with its ``rows`` samples.
    """
    values: dict[str, Any] = dict(outcome.values)
    fits, events = values.get(FITS, 1.0), values.get(EVENTS)
    if fits not in (0, 1):
        raise ClientError(f"value '{FITS}' is {fits!r:.40}, expected 0 or 1")
    if not 0 <= (beyond := outcome.metrics.get(SATURATED, 0.0)) <= WHOLE:
        raise ClientError(f"metric '{SATURATED}' is {beyond}, expected a number of entries")
    if events is None:
        return
    most = each * steps_of(asked, rows)
    if type(events) is not int or not 0 <= events <= most:
        raise ClientError(
            f"value '{EVENTS}' is {events!r:.40}, expected a whole number up to {most}: {each} a step, with "
            f"{rows} samples"
        )


def steps_of(asked: ClientQuestion, rows: int) -> int:
    """Local steps that a client of ``rows`` samples can have taken, at most."""
    return max(1, num_steps(asked.local, rows, asked.local.epochs))


def largest(t: Tensor) -> float:
    """The largest number in size, NaN if one is; one pass, no temporary."""
    if t.is_complex():
        t = torch.view_as_real(t)
    if not t.is_floating_point() or not t.numel():
        return 0.0
    low, high = torch.aminmax(t)
    return max(abs(float(low)), abs(float(high)))


def sizes_of(arrays: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest number, in size, of each array of numbers with a fraction."""
    return {name: largest(t) for name, t in arrays.items() if t.is_floating_point() or t.is_complex()}


def check_sizes(
    found: Mapping[str, float], own: Mapping[str, float], received: float, times: Callable[[str], float]
) -> None:
    """Whether numbers are of a size that training makes; one update that is absurd leaves others nothing to train.

    The largest of an array is ``LEAP`` times what was ``received``, or 1: a change beyond that leaves nothing of the
    model. More only if the server's ``own`` answer, of one step on a few samples, makes more in as many steps or
    samples as the client has (``times``), with ``SLACK``. No bound where there is no such answer.
    """
    for name, size in found.items():
        mine = own.get(name, math.inf)
        most = max(LEAP * max(1.0, received), SLACK * times(name) * mine) if mine < math.inf else math.inf
        if not size <= most:
            raise ClientError(
                f"'{name}' holds numbers up to {size:.3g}, which leave nothing of the others' work; by what it "
                f"received and was to do, {most:.3g} is the most (a smaller client.lr, if its training diverges)"
            )


def negative_variance(layout: Layout, buffers: Tensor) -> str:
    """The name of a running variance below 0 in ``buffers`` (b,): everybody's evaluation would be NaN; else nothing."""
    named = (s for s in layout.buffers if s.name.endswith("running_var"))
    return next((s.name for s in named if bool((buffers[s.span] < 0).any())), "")


def moved(message: Payload, arrays: Mapping[str, Tensor]) -> Payload | None:
    """The message of a server that took an update alone; none where it changes nothing that clients receive."""
    there = dict(message.arrays)
    for name, change in arrays.items():
        at = "w" if name == "delta" else name
        if at in there and there[at].shape == change.shape and change.is_floating_point():
            there[at] = change if name == "buffers" else there[at] + change
    unlike = any(there[name] is not t for name, t in message.arrays.items())
    return Payload(there, message.values) if unlike else None
