"""What a strategy's own code does wrong while it works: raising, keeping something on itself, returning NaN, or state
that no checkpoint can hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fedsim.engine.draws import ours
from fedsim.engine.watch import Watch
from fedsim.errors import CheckpointError, FedsimError, StrategyError
from fedsim.server import checkpoint
from fedsim.server.traits import parts_of

log = logging.getLogger(__name__)

OTHERS = (
    "fedsim.engine",
    "fedsim.server.exchanger",
    "fedsim.server.clientstore",
)  # what fails there is not its doing


@contextmanager
def blamed(strategy: object, method: str, when: str) -> Iterator[None]:
    """Calls of the strategy's ``method`` (and of those that it calls): what they raise is a ``StrategyError``.

    Raises:
        StrategyError: naming method, round and error, which is the cause; errors of fedsim's own pass.
    """
    try:
        yield
    except FedsimError:
        raise
    except Exception as error:
        at, name = error.__traceback__, method
        while at is not None:
            frame = at.tb_frame
            if str(frame.f_globals.get("__name__", "")).startswith(OTHERS):
                raise
            if frame.f_locals.get("self") is strategy:
                name = frame.f_code.co_name
            at = at.tb_next
        what = f"{type(error).__name__}: {error}"
        raise StrategyError(f"{type(strategy).__name__}.{name} failed {when}: {what}") from error


class Kept(Watch):
    """A strategy as its ``setup`` left it: what it keeps on itself or its class is not in a checkpoint, so that a run
    which is resumed would be another one. Its client is watched where it works."""

    def __init__(self, strategy: Any):
        self._said = set[str]()
        self._clients = [part.client for part in islice(parts_of(strategy), 8)]  # of a method within one, too
        super().__init__(strategy)

    def after(self, method: str, when: str) -> None:
        """After the strategy's ``method``.

        Raises:
            StrategyError: naming the attribute.
        """
        self._at = f"{type(self.client).__name__}.{method} {when}"
        self.check(-1, -1)

    def _changed(self, path: str, now: Any, before: Any, kind: type | None, number: int, round: int) -> None:
        if kind is None:  # a list or the like: notes for whoever looks at them, no fault unless it reads them
            if path not in self._said:
                self._said.add(path)
                log.warning("%s; notes that it reads itself belong into the state", self._what(path))
            return
        if isinstance(now, dict) and "aggregator" in now:  # a method hands its own to its base
            before["aggregator"] = now["aggregator"]
        super()._changed(path, now, before, kind, number, round)

    def _refuse(self, path: str, number: int, round: int) -> None:
        raise StrategyError(f'{self._what(path)}. Keep it in the state: return state | {{"name": value}}')

    def _what(self, path: str) -> str:
        return (
            f"{self._at} changed {type(self.client).__name__}.{path}, which no checkpoint holds: a run that is resumed "
            "would go on from another value"
        )

    def _add(self, path: str, value: Any) -> None:
        if not any(value is client for client in self._clients):
            super()._add(path, value)

    def _globals(self, function: FunctionType) -> None:
        """Lists and the like outside the strategy may take notes of it."""


def check_numbers(strategy: object, state: Mapping[str, Any], before: Mapping[str, Any], when: str) -> None:
    """Refuse a model with NaN or infinity that a user's strategy made: updates of clients are finite, or left out.

    Raises:
        StrategyError: naming the array.
    """
    if ours(type(strategy)):
        return
    for name in ("w", "buffers"):
        new, old = state.get(name), before.get(name)
        if isinstance(new, Tensor) and new is not old and not _finite(new) and _finite(old):
            bad = int((~torch.isfinite(new)).sum())
            raise StrategyError(
                f"{type(strategy).__name__} returned state[{name!r}] with {bad} numbers of {new.numel()} that are NaN "
                f"or infinite {when}; those that it had, and what clients sent, were finite (a division by 0?)"
            )


def _finite(t: Any) -> bool:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return True
    return bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all())


def check_state(strategy: object, state: Mapping[str, Any]) -> None:
    """Refuse state that a checkpoint cannot hold, before more rounds build on it.

    Raises:
        StrategyError: naming the entry.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            try:
                checkpoint.as_json(name, value)
            except CheckpointError as error:
                raise StrategyError(f"{type(strategy).__name__}: {error}") from error
