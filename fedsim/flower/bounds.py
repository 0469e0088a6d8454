"""What numbers of an answer can be, by what was asked: counts, and what a release says of itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.payload import Outcome
from fedsim.exchange.release import EVENTS, FITS, SATURATED
from fedsim.local.work import num_steps, step_size
from fedsim.server.traits import ClientQuestion

PASSES = 1000  # times the configured work that a client may say it did
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


def check_released(outcome: Outcome, asked: ClientQuestion) -> None:
    """Whether what a release says of itself can be: bits, entries beyond reach, gradients that a budget counts."""
    values: dict[str, Any] = dict(outcome.values)
    fits, events = values.get(FITS, 1.0), values.get(EVENTS)
    if fits not in (0, 1):
        raise ClientError(f"value '{FITS}' is {fits!r:.40}, expected 0 or 1")
    if not 0 <= (beyond := outcome.metrics.get(SATURATED, 0.0)) < math.inf:
        raise ClientError(f"metric '{SATURATED}' is {beyond}, expected a number of entries")
    if events is None or not asked.samples < math.inf:
        return
    local, n = asked.local, int(asked.samples)
    most = PASSES * max(1, num_steps(local, n, local.epochs))
    if type(events) is not int or not 0 <= events <= most:
        raise ClientError(f"value '{EVENTS}' is {events!r:.40}, expected a whole number up to {most}")


def largest(t: Tensor) -> float:
    """The largest number in size, NaN if one is; one pass, no temporary."""
    if t.is_complex():
        t = torch.view_as_real(t)
    if not t.is_floating_point() or not t.numel():
        return 0.0
    low, high = torch.aminmax(t)
    return max(abs(float(low)), abs(float(high)))
