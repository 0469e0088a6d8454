"""What is measured besides the loss, and how what batches gave is put together: exactly, whoever computed them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from torchmetrics import Metric

# (model output, target) -> mean over the batch (), or (sum, count), whose sums are divided at the end
MetricFn = Callable[[Any, Any], Any]
# columns of a run's rows that have a meaning of their own
RESERVED = frozenset(
    [
        "round",
        "loss",
        "samples",
        "by_class",
        "taken_for",
        "train_loss",
        "nan",
        "bytes_up",
        "bytes_down",
        "seconds",
        "cohort",
        "failures",
        "weights_hash",
        "sim_seconds",
        "joules",
        "battery",
        "clients",
        "weight",
        "gradients",
        "forwards",
    ]
)
DTYPE = torch.float64  # of sums, so that their order does not show


@dataclass(frozen=True)
class Ratio:
    """A mean that is counted in units of its own, such as tokens."""

    total: float
    count: float

    def __add__(self, other: Any) -> Ratio:
        """Of both."""
        return Ratio(self.total + other.total, self.count + other.count) if isinstance(other, Ratio) else self

    __radd__ = __add__

    def value(self) -> float:
        """NaN of nothing."""
        return self.total / self.count if self.count else float("nan")


class State:
    """What a torchmetrics object has seen: its states by name, tensors or lists of them."""

    def __init__(self, values: dict[str, Any], reduced: Mapping[str, str]):
        self.values, self._reduced = values, reduced

    def __add__(self, other: Any) -> State:
        """Of both, the left one first."""
        if not isinstance(other, State):
            return self
        put: dict[str, Any] = {
            "sum": torch.add,
            "max": torch.maximum,
            "min": torch.minimum,
            "list": lambda a, b: a + b,
        }
        return State(
            {k: put[how](self.values[k], other.values[k]) for k, how in self._reduced.items()}, self._reduced
        )

    __radd__ = __add__


class Counted:
    """A torchmetrics object as a metric of batches: each batch gives a ``State``, and ``value`` what they come to."""

    def __init__(self, name: str, metric: Metric):
        """Copies ``metric``, with float states in float64.

        Raises:
            ConfigError: if states of two batches cannot be put together exactly.
        """
        kinds = [type(m).__name__ for m in metric.modules() if m is not metric and hasattr(m, "_reductions")]
        if kinds or not metric._reductions:
            what = f"keeps other metrics ({', '.join(kinds)})" if kinds else "keeps no states"
            raise ConfigError(
                f"metrics: {name!r} ({type(metric).__name__}) {what}, so what workers compute of it cannot be put "
                "together; give those metrics by themselves, or one whose add_state holds all it needs"
            )
        self.metric = copy.deepcopy(metric)
        self.metric.set_dtype(DTYPE)
        self.metric.reset()
        self._reduced = {k: _kind(name, metric, k) for k in metric._reductions}

    def __call__(self, output: Any, y: Any) -> State:
        """What the metric keeps of one batch."""
        metric = self.metric
        metric.reset()
        metric.update(output, y)
        values = {k: _held(getattr(metric, k)) for k in self._reduced}
        metric.reset()  # which empties its lists
        return State(values, self._reduced)

    def value(self, state: State) -> dict[str, float]:
        """Numbers by name, ``""`` for the only one."""
        metric = self.metric
        metric.reset()
        for k, v in state.values.items():
            setattr(metric, k, list(v) if isinstance(v, list) else v)
        metric._update_count = 1
        found = self.named(metric.compute())
        metric.reset()
        return found

    def named(self, found: Any) -> dict[str, float]:
        """What ``compute`` gave, by name: a dict's own names, of several numbers their places (``0``, ``1``, ...)."""
        return dict(_numbers("", found))


def admitted_metrics(metrics: Mapping[str, Any]) -> dict[str, MetricFn]:
    """Metrics by name as functions of a batch; torchmetrics objects are copied and collections taken apart.

    Raises:
        ConfigError: for what is neither, or cannot be put together from parts.
    """
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"metrics: got {type(metrics).__name__}; give them by name, e.g. metrics={{'f1': F1Score(...)}}"
        )
    out: dict[str, MetricFn] = {}
    found: dict[str, MetricFn]
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"metrics: the name {name!r} is no text; give one, e.g. 'f1'")
        kinds = {f"{k.__module__.partition('.')[0]}.{k.__name__}" for k in type(metric).__mro__}
        if "torchmetrics.MetricCollection" in kinds:
            found = {k: Counted(f"{name}: {k}", one) for k, one in metric.items(keep_base=False)}
        elif "torchmetrics.Metric" in kinds:
            found = {name: Counted(name, metric)}
        elif isinstance(metric, type):
            raise ConfigError(f"metrics: {name!r} is a class; hand over an object, {metric.__name__}(...)")
        elif callable(metric):
            found = {name: metric}
        else:
            raise ConfigError(
                f"metrics: {name!r} is a {type(metric).__name__}; give a function (output, y) -> mean or (sum, count), "
                "or a torchmetrics object"
            )
        for own in found:
            if own in RESERVED:
                raise ConfigError(f"metrics: {own!r} is always measured; give yours another name")
            if own in out:
                raise ConfigError(f"metrics: {own!r} is the name of two; give one a prefix or another name")
        out |= found
    return out


def summed(name: str, found: Any, samples: int) -> Any:
    """What a metric gave for a batch of ``samples``, as something that adds up: a sum, a ``Ratio``, a ``State``, or any
    object that adds itself to its like and has a ``value()``.

    Raises:
        ConfigError: for anything else, and for a count that counts nothing.
    """
    if isinstance(found, State) or hasattr(found, "value"):
        return found
    try:
        if isinstance(found, str | bytes):
            raise TypeError
        if isinstance(found, tuple | list):
            total, count = found
            return _ratio(name, float(total), float(count))
        return float(found) * samples
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"metrics: {name!r} gave {type(found).__name__}; expected one number (the mean) or (sum, count)"
        ) from error


def _ratio(name: str, total: float, count: float) -> Ratio:
    """(sum, count), of which a batch without anything to count gives (0, 0)."""
    if not math.isfinite(count) or count < 0:
        raise ConfigError(
            f"metrics: {name!r} gave (sum, count) = ({total:g}, {count:g}); what was counted is a number >= 0"
        )
    if not count and total:
        raise ConfigError(
            f"metrics: {name!r} gave a sum of {total:g} over a count of 0; a batch with nothing to count gives (0, 0)"
        )
    return Ratio(total, count)


def values(name: str, metric: Any, found: Any, samples: float) -> dict[str, Any]:
    """Numbers by name of what batches of ``samples`` in all came to."""
    if isinstance(found, State):
        return {f"{name}/{k}" if k else name: v for k, v in metric.value(found).items()}
    if not hasattr(found, "value"):
        return {name: found / samples}
    try:
        return {name: float(found.value())}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"metrics: value() of what {name!r} gave must be one number ({type(error).__name__}: {error})"
        ) from error


def _kind(name: str, metric: Metric, state: str) -> str:
    """How two values of a state become one."""
    how, at_first = metric._reductions[state], metric._defaults[state]
    called = getattr(how, "__name__", "")
    if isinstance(at_first, list) and (how is None or called == "dim_zero_cat"):
        return "list"
    for kind in ("sum", "max", "min"):
        if called == f"dim_zero_{kind}":
            return kind
    raise ConfigError(
        f"metrics: {name!r} ({type(metric).__name__}) keeps '{state}', which cannot be put together exactly from "
        "the parts that workers compute; give one whose states are sums, extremes or lists, or a function that "
        "returns (sum, count)"
    )


def _held(value: Any) -> Any:
    return (
        [t.detach().cpu() for t in value] if isinstance(value, list | tuple) else value.detach().clone().cpu()
    )


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Each number of ``value`` under a name of its own."""
    if isinstance(value, Mapping):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) or math.prod(getattr(value, "shape", ())) != 1:
        parts = enumerate(value)
    else:
        yield name, float(value)
        return
    for key, part in parts:
        yield from _numbers(f"{name}/{key}" if name else str(key), part)


def added(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of what batches gave, in the order given."""
    total: dict[str, Any] = {}
    for part in sums:
        for k, v in part.items():
            total[k] = total.get(k, 0.0) + v
    return total


def confusion_of(y: Tensor, guess: Tensor, classes: int) -> Tensor:
    """Counts (C, C + 1) of samples of class ``y`` (n,) that were given the id ``guess`` (n,), the last column that of
    ids beyond the classes."""
    ids = classes + 1
    return (
        torch.bincount(y * ids + guess.clamp(max=classes), minlength=classes * ids).view(classes, ids).cpu()
    )
