"""What goes between the simulator and a strategy's own code: nothing that is handed over may be written to, and what
comes back must be what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsim.errors import StrategyError, returned
from fedsim.exchange.payload import Message
from fedsim.server.traits import State
from fedsim.task.layout import Layout
from fedsim.task.vectors import Weights


class Handed:
    """Tensors that a strategy was given, by name; ``check`` says whether they still are what they were.

    They are told by torch's version counters: nothing is copied.
    """

    def __init__(self, strategy: object, **given: Mapping[str, Any]):
        self._strategy = strategy
        self._seen = [
            (f"{kind}[{name!r}]", tensor, tensor._version)
            for kind, values in given.items()
            for name, tensor in values.items()
            if isinstance(tensor, Tensor)
        ]

    @property
    def written(self) -> str:
        """The first that was written to; empty if none was."""
        return next((name for name, tensor, version in self._seen if tensor._version != version), "")

    def check(self, method: str) -> None:
        """After the strategy's ``method``.

        Raises:
            StrategyError: naming strategy, method and array.
        """
        if name := self.written:
            raise StrategyError(
                f"{type(self._strategy).__name__}.{method} wrote to {name}, which must stay as it was in case the "
                "round is interrupted; make a new tensor (w = w + step, or w.clone() first) and return a new state"
            )


def as_state(strategy: object, method: str, found: Any, before: Mapping[str, Any] | None = None) -> State:
    """The state that a strategy's ``method`` returned, with the model of the state ``before`` if that has one.

    Raises:
        StrategyError: naming strategy, method and entry.
    """
    if not isinstance(found, Mapping):
        raise StrategyError(returned(strategy, method, found, "the next state, a dict: return state | {...}"))
    for name in ("w", "buffers"):
        if not isinstance(old := (before or {}).get(name), Tensor):
            continue
        if name not in found:
            raise StrategyError(
                f"{type(strategy).__name__}.{method} returned a state without {name!r} (it has "
                f"{', '.join(map(repr, found)) or 'nothing'}); keep what does not change: return state | {{...}}"
            )
        new = found[name]
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
            expected = f"a tensor of shape {tuple(old.shape)}, {old.dtype}"
            got = returned(strategy, method, new, expected, f"state[{name!r}]")
            other = isinstance(new, Tensor) and new.dtype != old.dtype
            raise StrategyError(got + (f", not {new.dtype}" if other else ""))
    return found if isinstance(found, dict) else dict(found)


def as_message(strategy: object, found: Any) -> Message:
    """The message that a strategy returned.

    Raises:
        StrategyError: if it is none.
    """
    if not isinstance(found, Message):
        raise StrategyError(
            returned(strategy, "message", found, 'a Message, e.g. Message.of({"w": state["w"]})')
        )
    return found


def as_numbers(strategy: object, method: str, found: Any) -> dict[str, Any]:
    """Numbers for the round's row that a strategy's ``method`` returned.

    Raises:
        StrategyError: if it is no dict.
    """
    if not isinstance(found, Mapping):
        raise StrategyError(returned(strategy, method, found, "a dict of numbers by name (may be empty)"))
    return dict(found)


def models_of(strategy: Any, state: State, layout: Layout) -> Mapping[str, Weights]:
    """The models of a state, as ``strategy.models`` gives them.

    Raises:
        StrategyError: naming what the state lacks, or the model that does not fit.
    """
    name = type(strategy).__name__
    try:
        found = strategy.models(state)
    except KeyError as e:
        raise StrategyError(
            f"{name}.models finds no {e} in the state that {name} returned (it has {', '.join(map(repr, state))}); "
            "keep what does not change: return state | {...}"
        ) from e
    if not isinstance(found, Mapping) or "global" not in found:
        raise StrategyError(returned(strategy, "models", found, 'a dict with a model named "global"'))
    for key, model in found.items():
        part = f"model {key!r}"
        if not isinstance(model, tuple) or len(model) != 2:
            raise StrategyError(returned(strategy, "models", model, "Weights(w, buffers)", part))
        for array, size in zip(model, (layout.dim, layout.buffer_dim), strict=True):
            if not isinstance(array, Tensor) or not array.dim() or array.shape[-1] != size:
                raise StrategyError(returned(strategy, "models", array, f"vectors (..., {size})", part))
    return found
