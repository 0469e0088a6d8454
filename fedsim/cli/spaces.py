"""What ``fedsim tune`` tries: the values of each method's settings, how they are thinned, and what lies at an edge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from fedsim.config.roles import role_of
from fedsim.config.words import readable
from fedsim.errors import ConfigError, hint
from fedsim.rng import key, numpy_rng

EDGE = 0.05  # share of an interval that counts as its edge
PURPOSE = "tune"  # of the fixed draws, whose seed is 0


@dataclass(frozen=True)
class Swept:
    """A setting with several values, as they were typed, or with an interval of numbers."""

    key: str
    values: tuple[str, ...] = ()
    low: float = math.nan  # of an interval
    high: float = math.nan
    log: bool = False  # drawn evenly by its logarithm
    whole: bool = False  # of an interval of whole numbers, both ends among them

    @property
    def interval(self) -> bool:
        """Whether it is an interval."""
        return not self.values

    def drawn(self, share: float) -> str:
        """The number of an interval that lies ``share`` (0..1) of the way from its lower end."""
        if self.whole:
            return str(min(int(self.low + share * (self.high - self.low + 1)), int(self.high)))
        if self.log:
            return f"{self.low * (self.high / self.low) ** share:.6g}"
        return f"{self.low + share * (self.high - self.low):.6g}"


Point = tuple[str, ...]  # a value of each axis


@dataclass(frozen=True)
class Space:
    """A method, what is typed for it alone, and the axes along which it is tuned."""

    method: str
    axes: tuple[Swept, ...]
    fixed: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int | None:
        """Points of its grid; ``None`` if there is an interval in it."""
        return None if any(a.interval for a in self.axes) else math.prod(len(a.values) for a in self.axes)

    @cached_property
    def order(self) -> Sequence[Point]:
        """All points of the grid in the order in which a smaller budget takes them: by a fixed key of each, but first
        those that have as many values as possible that none before them has, until every value is there."""
        grid = list(itertools.product(*(a.values for a in self.axes)))
        at = sorted(range(len(grid)), key=lambda i: (key(0, f"{PURPOSE}/{self.method}", i), i))
        left, first = [grid[i] for i in at], list[Point]()
        missing = [set(a.values) for a in self.axes]
        while any(missing):
            new = max(left, key=lambda p: sum(v in lack for v, lack in zip(p, missing, strict=True)))
            left.remove(new)
            first.append(new)
            for value, lack in zip(new, missing, strict=True):
                lack.discard(value)
        return [*first, *left]

    def points(self, trials: int) -> list[Point]:
        """The points to try: in grid order as many as there are up to ``trials``; drawn, where there are intervals."""
        if self.size is not None:
            grid = {p: i for i, p in enumerate(itertools.product(*(a.values for a in self.axes)))}
            return sorted(self.order[:trials], key=lambda point: grid[point])
        return [self.drawn(trial) for trial in range(trials)]

    def drawn(self, trial: int) -> Point:
        """The point of a trial where there are intervals, by its fixed key."""
        rng = numpy_rng(0, f"{PURPOSE}/{self.method}", trial)
        return tuple(
            a.drawn(float(rng.random())) if a.interval else a.values[int(rng.integers(len(a.values)))]
            for a in self.axes
        )

    def overrides(self, point: Point) -> list[str]:
        """Settings of a point, without those that are common to all methods."""
        return [*self.fixed, *(f"{a.key}={v}" for a, v in zip(self.axes, point, strict=True))]


def spaces(settings: Sequence[str]) -> tuple[list[Space], list[str]]:
    """The methods with their axes, in the order typed, and the settings that all of them share.

    Raises:
        ConfigError: for settings that cannot be tuned, and those of a method that is not among ``strategy``.
    """
    common, own, axes, methods = list[str](), dict[str, list[str]](), list[Swept](), ["fedavg"]
    for word in settings:
        name, colon, rest = word.partition(":")
        if colon and "=" not in name and "@" not in name:
            own.setdefault(name, []).append(rest)
            continue
        if word.partition("=")[0] == "strategy":
            methods = word.partition("=")[2].split(",")
            continue
        axis = axis_of(word)
        axes += [axis] if axis else []
        common += [] if axis else [word]
    if len(set(methods)) < len(methods):
        raise ConfigError(f"strategy={','.join(methods)}: a method stands there twice")
    for name in own:
        if name not in methods:
            raise ConfigError(
                f"{name}:{own[name][0]}: strategy={','.join(methods)} has no {name!r}{hint(name, methods)}"
            )
    found = []
    for method in methods:
        mine = [(word, axis_of(word)) for word in own.get(method, ())]
        typed = {word.partition("=")[0].lstrip("+") for word, _ in mine}
        shared = tuple(a for a in axes if a.key not in typed)
        fixed = (f"strategy={method}", *(word for word, axis in mine if axis is None))
        found.append(Space(method, (*shared, *(axis for _, axis in mine if axis is not None)), fixed))
    if not any(space.axes for space in found):
        raise ConfigError(
            "there is nothing to choose: give a setting several values, as in client.lr=0.03,0.1"
        )
    return found, common


def axis_of(word: str) -> Swept | None:
    """The axis that a setting with several values is; ``None`` for one with one value.

    Raises:
        ConfigError: if it says what is learned, or changes no result.
    """
    try:
        (parsed,) = OverridesParser.create().parse_overrides(readable([word]))
    except HydraException:
        return None  # said when it is composed
    if not parsed.is_sweep_override():
        return None
    name = parsed.key_or_group
    role = "method" if "@" in word.partition("=")[0] else role_of(name.replace("/", "."))
    if name == "seed":
        raise ConfigError(f"{word}: type --seeds {word.partition('=')[2]}; winners are run on --final-seeds")
    if role == "problem":
        raise ConfigError(
            f"{word}: says what is learned, not how; tune each by a command of its own, with its name="
        )
    if role == "neutral":
        raise ConfigError(f"{word}: changes no result; give it one value")
    return _interval(parsed) if parsed.is_interval_sweep() else Swept(_key(parsed), tuple(_values(parsed)))


def _interval(parsed: Override) -> Swept:
    found: Any = parsed.value()
    assert isinstance(found, IntervalSweep)
    assert found.start is not None and found.end is not None
    low, high, log = float(found.start), float(found.end), "log" in found.tags
    if not low < high or (log and low <= 0):
        raise ConfigError(f"{parsed.input_line}: an interval goes from a smaller number to a larger one")
    whole = isinstance(found.start, int) and isinstance(found.end, int) and not log
    return Swept(_key(parsed), low=low, high=high, log=log, whole=whole)


def _key(parsed: Override) -> str:
    return str(parsed.get_key_element())


def _values(parsed: Override) -> Iterator[str]:
    found = list(dict.fromkeys(map(str, parsed.sweep_string_iterator())))
    if not found:
        raise ConfigError(f"{parsed.input_line}: holds no value")
    yield from found


@dataclass(frozen=True)
class Edge:
    """A winner's value that is the smallest or the largest tried."""

    method: str
    key: str
    value: str
    largest: bool
    inside: str | None  # the value next to it
    next: str | None  # one further out; ``None`` where the ends of an interval, or the values, tell of none

    def __str__(self) -> str:
        """``fedspeed: client.lr=0.1 is the largest tried``."""
        return (
            f"{self.method}: {self.key}={self.value} is the {'largest' if self.largest else 'smallest'} tried"
        )


def untried(space: Space, tried: Sequence[Point]) -> list[str]:
    """A line for each setting of which no trial had some value, as in a grid that was thinned much."""
    found = []
    for at, axis in enumerate(space.axes):
        left = [value for value in axis.values if all(point[at] != value for point in tried)]
        if left:
            found.append(
                f"{space.method}: {axis.key}={','.join(left)} was in none of {len(tried)} trials; raise --trials"
            )
    return found


def edges(space: Space, winner: Point, tried: Sequence[Point]) -> list[Edge]:
    """The numeric settings of the winner that lie at an edge of what was tried."""
    found = []
    for at, (axis, value) in enumerate(zip(space.axes, winner, strict=True)):
        values = {point[at] for point in tried}
        edge = _of_interval(axis, value) if axis.interval else _of_values(axis.key, value, values)
        if edge is not None:
            found.append(Edge(space.method, axis.key, value, *edge))
    return found


def _of_interval(axis: Swept, value: str) -> tuple[bool, str | None, str | None] | None:
    scale = math.log if axis.log else float
    low, high, at = scale(axis.low), scale(axis.high), scale(float(value))
    if high - at > EDGE * (high - low) and at - low > EDGE * (high - low):
        return None
    return high - at <= at - low, None, None


def _of_values(name: str, value: str, tried: set[str]) -> tuple[bool, str | None, str | None] | None:
    numbers = {text: number for text in tried if (number := _number(text)) is not None}
    if len(numbers) < len(tried) or len(set(numbers.values())) < 2:
        return None
    ordered = sorted(numbers, key=lambda text: numbers[text])
    if numbers[value] not in (numbers[ordered[0]], numbers[ordered[-1]]):
        return None
    largest = numbers[value] == numbers[ordered[-1]]
    inside = ordered[-2] if largest else ordered[1]
    return largest, inside, _further([ordered[-1], ordered[-2]] if largest else ordered[:2], ordered)


def _further(last: Sequence[str], all_of: Sequence[str]) -> str | None:
    """The value beyond ``last`` (outermost first): by their ratio if all are positive, else by their difference.

    It is as precise as the values typed; whole numbers stay whole.
    """
    outer, inner = float(last[0]), float(last[1])
    positive = all(float(text) > 0 for text in all_of)
    if positive:
        rounded = float(f"{outer * outer / inner:.{max(map(_digits, all_of))}g}")
    else:
        rounded = round(2 * outer - inner, max(len(text.partition(".")[2]) for text in all_of))
    if all(_whole(text) for text in all_of):
        found = str(round(rounded))
        return None if found in all_of else found
    return f"{rounded:g}"


def _digits(text: str) -> int:
    """Significant digits of a number as it was typed."""
    bare = text.removesuffix(".0").lower().lstrip("+-").partition("e")[0].replace(".", "").lstrip("0")
    return max(1, len(bare.rstrip("0") if "." not in text.removesuffix(".0") else bare))


def _whole(text: str) -> bool:
    return text.lstrip("+-").isdecimal()


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def described(space: Space, point: Point) -> Mapping[str, str]:
    """The values of a point by key."""
    return {axis.key: value for axis, value in zip(space.axes, point, strict=True)}
