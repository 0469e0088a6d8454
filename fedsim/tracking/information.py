"""What a caller's callbacks are told: a round with its models at hand, the run's end; and their base class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from fedsim.errors import ConfigError, hint
from fedsim.tracking.base import Row, RunInfo

if TYPE_CHECKING:  # torch is imported when models are asked for
    import torch
    from torch import Tensor, nn

    from fedsim.task.task import Task
    from fedsim.task.vectors import Weights


@dataclass(kw_only=True)
class RoundInfo:
    """A finished round. Models are made when they are asked for; nothing that is given out is shared with the run."""

    round: int  # finished rounds, this one included
    rounds: int  # that were asked for
    row: Row  # of metrics.jsonl: loss, accuracy, val/loss ... on evaluated rounds
    past: Sequence[Row] = field(repr=False)  # the run's own rows, see ``history``
    clients: Sequence[Row]  # rows {"round", "client", "metric", "value"} of this round
    measured: bool  # whether models were evaluated after it
    task: Task = field(repr=False)
    dtype: torch.dtype = field(repr=False)
    models: Mapping[str, Weights] = field(
        repr=False
    )  # flat vectors by name, read-only; "global" is always there
    stopped: str = field(default="", init=False)  # why the run is to end here

    @cached_property
    def history(self) -> list[Row]:
        """The rows of all rounds so far, this one last; after a resumption too. Copies, without the ids of ``cohort``,
        which are in ``row`` and ``metrics.jsonl``."""
        return [copied(row) for row in self.past]

    @property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the global model, a copy."""
        return self._state("global")

    def model(self, name: str = "global") -> nn.Module:
        """The model of that name as a module by itself, in evaluation mode, on the CPU.

        Raises:
            ConfigError: if there is none, or several.
        """
        from fedsim.task.standalone import standalone

        return standalone(self.task.model, self._state(name), self.dtype)

    def stop(self, reason: str) -> None:
        """End the run after this round: it is done, and ``reason`` is in its summary, as ``stopped``."""
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigError(f'info.stop({reason!r}): say why, e.g. info.stop("loss no longer falls")')
        self.stopped = reason

    def _state(self, name: str) -> dict[str, Tensor]:
        from fedsim.task.standalone import state_of

        if name not in self.models:
            there = ", ".join(self.models)
            raise ConfigError(f"there is no model {name!r}, but {there}{hint(name, self.models)}")
        weights = self.models[name]
        if weights.w.dim() > 1:
            raise ConfigError(
                f"{name!r} are {len(weights.w)} models, not one; info.models[{name!r}].w has a row for each"
            )
        return state_of(self.task.model, self.dtype, weights)


def copied(row: Row) -> Row:
    """A row of one's own, with the dicts and lists that lie in it."""
    return {k: _own(v) if isinstance(v, dict | list) else v for k, v in row.items()}


def _own(values: Any) -> Any:
    """As ``copy.deepcopy``, of what JSON knows; a cohort's ids cost no call each."""
    if isinstance(values, dict):
        return {k: _own(v) if isinstance(v, dict | list) else v for k, v in values.items()}
    return [_own(v) if v.__class__ is dict or v.__class__ is list else v for v in values]


class Copies(Sequence[Row]):
    """Rows of one's own: copied when they are first looked at, since there are hundreds a round."""

    def __init__(self, rows: Sequence[Row]):
        self._given = rows

    @cached_property
    def _rows(self) -> list[Row]:
        return [copied(row) for row in self._given]

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        return self._rows[at]

    def __repr__(self) -> str:
        return repr(self._rows)


class Ending(dict[str, Any]):
    """The run's summary, with the models of its last finished round at hand."""

    def __init__(self, summary: Row, last: RoundInfo | None):
        super().__init__(summary)
        self._last = last

    @property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the global model, a copy."""
        return self._info.weights

    def model(self, name: str = "global") -> nn.Module:
        """See :meth:`RoundInfo.model`."""
        return self._info.model(name)

    @property
    def _info(self) -> RoundInfo:
        if self._last is None:
            raise ConfigError("no round was finished in this process, so there is no model")
        return self._last


class Callback:
    """Base of a caller's callbacks, ``simulate(..., callbacks=[Mine()])``; every hook is optional.

    What a hook raises ends the run (``CallbackError``), after its last finished round was checkpointed. Callbacks are
    not part of what a run is: they may stop it, but must not change what it computes.
    """

    def start(self, run: RunInfo) -> None:
        """Before the first round."""

    def evaluated(self, info: RoundInfo) -> None:
        """After a round whose models were measured, before ``round``."""

    def round(self, info: RoundInfo) -> None:
        """After each round."""

    def end(self, summary: Ending) -> None:
        """Once: after the last round, ``status`` "done", or early, "failed" or "interrupted"."""
