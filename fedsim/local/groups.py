"""Groups of parameters, by patterns of their names: other learning rates and weight decays, or none at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedsim.errors import ClientError, ConfigError, hint
from fedsim.task.layout import Layout

KEYS = ("lr", "weight_decay", "frozen")
KEY = "client.groups"
SHOWN = 6  # names in an error


class EntryRates(NamedTuple):
    """Per entry of a vector (d,): ``scale``, multiples of the learning rate; weight ``decay``; what is ``frozen``."""

    scale: Tensor
    decay: Tensor
    frozen: Tensor | None


class Groups:
    """``client.groups`` on the vectors of one layout. What several patterns match follows the last one that says."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]], layout: Layout, weight_decay: float):
        check_groups(settings, [slot.name for slot in layout.params])
        self._decay, self._dim = weight_decay, layout.dim
        self._slots = [(slot.span, _of(slot.name, settings)) for slot in layout.params]
        self._made: dict[Any, EntryRates] = {}

    @staticmethod
    def of(settings: Mapping[str, Mapping[str, Any]], layout: Layout | None, weight_decay: float) -> Groups:
        """The groups, worked out once for a layout."""
        if layout is None:
            raise ConfigError(f"{KEY}: parameters have no names here; an optimiser needs the model's layout")
        known = _known.setdefault(layout, {})
        key = f"{settings} {weight_decay}"
        if key not in known:
            known[key] = Groups(settings, layout, weight_decay)
        return known[key]

    def rates(self, like: Tensor, spans: Sequence[slice] | None) -> EntryRates:
        """Those for vectors as long as ``like`` (..., n): the model's (d,), the model's with more behind it, or the
        parts ``spans`` laid end to end."""
        places = None if spans is None else tuple((s.start, s.stop) for s in spans)
        key = (places, like.shape[-1], like.dtype, like.device)
        if key not in self._made:
            self._made[key] = self._make(like, spans)
        return self._made[key]

    def _make(self, like: Tensor, spans: Sequence[slice] | None) -> EntryRates:
        more = like.shape[-1] - self._dim if spans is None else 0
        if more < 0:
            raise ClientError(
                f"{KEY}: a step on a vector of {like.shape[-1]} numbers, which is not the model's ({self._dim}); call "
                "job.sgd.cut(spans) before it, or type client.groups=null"
            )
        frozen = torch.zeros(self._dim + more, dtype=torch.bool)
        scale, decay = (torch.full((self._dim + more,), v, dtype=torch.float64) for v in (1.0, self._decay))
        for span, group in self._slots:
            frozen[span] = group.get("frozen", False)
            scale[span] = 0.0 if group.get("frozen") else group.get("lr", 1.0)
            decay[span] = group.get("weight_decay", self._decay)
        found = scale.to(like), decay.to(like), frozen.to(like.device)
        if spans is not None:
            found = tuple(torch.cat([v[s] for s in spans]) for v in found)  # type: ignore[assignment]
        return EntryRates(found[0], found[1], found[2] if bool(found[2].any()) else None)


_known: WeakKeyDictionary[Layout, dict[str, Groups]] = WeakKeyDictionary()


def matching(patterns: str | Iterable[str], names: Sequence[str], what: str) -> set[str]:
    """The ``names`` that any of the patterns (as ``fnmatch`` reads them) matches.

    Raises:
        ConfigError: for a pattern that matches none, naming ``what``, the pattern and the nearest names.
    """
    out = set[str]()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            within = {".".join([*n.split(".")[:i], "*"]) for n in names for i in range(1, n.count(".") + 1)}
            near = get_close_matches(pattern, [*names, *sorted(within)], 3, 0.5)
            all_ = [*names[:SHOWN], "..."] if len(names) > SHOWN else names
            text = f"nearest is {', '.join(near)}" if near else f"parameters are {', '.join(all_)}"
            raise ConfigError(f"{what}: {pattern!r} matches no parameter; {text}")
        out.update(found)
    return out


def check_values(groups: Any) -> None:
    """Refuse what cannot be a value of ``client.groups``, whatever the model.

    Raises:
        ConfigError: naming pattern and key.
    """
    if groups is None:
        return
    example = f"'{KEY}={{head.*: {{lr: 10}}, *.bias: {{weight_decay: 0}}}}'"
    if not isinstance(groups, Mapping) or not all(
        isinstance(one, Mapping) and one for one in groups.values()
    ):
        raise ConfigError(f"{KEY}={groups}: must be patterns of names with settings, as in {example}")
    for pattern, group in groups.items():
        where = f"{KEY}.{pattern}"
        for name, value in group.items():
            if name not in KEYS:
                raise ConfigError(
                    f"{where}: unknown key {name!r}{hint(str(name), KEYS)}; groups have {', '.join(KEYS)}"
                )
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name == "frozen" and not isinstance(value, bool):
                raise ConfigError(f"{where}.frozen={value}: must be true or false")
            if name != "frozen" and not (number and value >= 0):
                what = "a multiple of client.lr, 0 or more" if name == "lr" else "0 or more"
                raise ConfigError(f"{where}.{name}={value}: must be {what}")
        if group.get("frozen") and len(group) > 1:
            raise ConfigError(f"{where}: what is frozen has no {next(k for k in group if k != 'frozen')}")


def check_groups(groups: Mapping[str, Mapping[str, Any]] | None, names: Sequence[str]) -> None:
    """Refuse groups that do not go with a model whose trainable parameters are called ``names``.

    Raises:
        ConfigError: naming the pattern that matches none.
    """
    check_values(groups)
    for pattern in groups or ():
        matching(pattern, names, KEY)
    if groups and all(_of(name, groups).get("frozen") for name in names):
        raise ConfigError(f"{KEY}: all parameters are frozen; nothing would be trained")


def other_rates(groups: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """The first pattern that gives parameters another learning rate."""
    return next((p for p, group in (groups or {}).items() if group.get("lr", 1) != 1), None)


def _of(name: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the groups say of one parameter."""
    out = dict[str, Any]()
    for pattern, group in settings.items():
        if fnmatchcase(name, pattern):
            out |= group
    return out
