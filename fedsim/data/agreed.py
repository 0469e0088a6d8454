"""What all who hold data have agreed on (``data.contract``): classes, columns, images, normalisation, model, versions.

A data set that keeps to it has the classes in the agreed order, whichever of them it holds; one that does not is
refused with all that is wrong, a line each. Base model, layout and versions are checked where nodes join a deployment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.columns import Column, ContractError
from fedsim.data.dataset import Dataset, Samples
from fedsim.errors import ConfigError, check_choice, hint

KEY = "data.contract"
NAMES = ("classes", "columns", "image", "normalize", "base", "layout", "versions")
VERSIONS = ("fedsim", "torch", "python")
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Contract:
    """``classes``: names, in order. ``columns``: of a table. ``mode`` (RGB, L) and ``size`` (height, width): of images;
    nothing where that is open.

    ``pooled``: normalised by mean and deviation of all clients' training samples together; ``given``: by these, by
    name of column or in order of channels; neither: as the source does. ``base``, ``layout``: sha256 of the model's
    frozen base, and of names and shapes of its parameters. ``versions`` by name, as far as they are agreed (2.13 is
    any 2.13.x).
    """

    classes: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    mode: str = ""
    size: tuple[int, int] | None = None
    pooled: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    layout: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(node: Any) -> Contract | None:
        """What the configuration says; ``None`` where nothing is agreed.

        Raises:
            ConfigError: naming the key, and what to type.
        """
        if node is None:
            return None
        values = _mapping(node, KEY, NAMES)
        classes = tuple(str(c) for c in _listed(values.get("classes"), f"{KEY}.classes"))
        if len(set(classes)) < len(classes) or any(c.startswith(("{", "[")) for c in classes):
            raise ConfigError(f"{KEY}.classes={list(classes)}: expected names, each once")
        columns = _mapping(values.get("columns"), f"{KEY}.columns")
        image = _mapping(values.get("image"), f"{KEY}.image", ("mode", "size"))
        if (mode := image.get("mode")) is not None:
            check_choice(f"{KEY}.image.mode", mode, ("RGB", "L"))
        pooled, given = _normalize(values.get("normalize"))
        versions = _mapping(values.get("versions"), f"{KEY}.versions", VERSIONS)
        return Contract(
            classes=classes,
            columns=tuple(Column.of(name, c, f"{KEY}.columns") for name, c in columns.items()),
            mode=str(mode or ""),
            size=_size(image.get("size")),
            pooled=pooled,
            given=given,
            base=str(values.get("base") or ""),
            layout=str(values.get("layout") or ""),
            versions={k: str(v) for k, v in versions.items()},
        )

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the inputs that the columns become, in order."""
        return tuple(name for column in self.columns for name in column.features)

    def fitted(self, data: Dataset) -> Dataset:
        """``data`` with classes and columns in the agreed order.

        Raises:
            ContractError: with a line for each thing that is not as agreed.
        """
        faults: list[str] = []
        parts = {"training": data.train, "test": data.test}
        held = {name: part for name, part in parts.items() if isinstance(part, Samples) and len(part)}
        if self.classes and data.classes != self.classes:
            faults += self._check_classes(data, held)
        if self.columns:
            faults += self._check_columns(data.columns, held)
        else:
            faults += _not_finite(held)
        if self.mode or self.size:
            faults += self._check_images(data.input_shape)
        if faults:
            raise ContractError("\n".join(faults))
        return self._ordered(data)

    def _check_classes(self, data: Dataset, held: Mapping[str, Samples]) -> list[str]:
        agreed = f"agreed are {_short(self.classes)}"
        if not data.classes:
            return [f"classes: the targets are no classes by name, {agreed}; give labels by name"]
        faults = []
        for code, name in enumerate(data.classes):
            if name in self.classes:
                continue
            count, where = 0, ""
            for split, part in held.items():
                if (labels := _labels(part)) is None:
                    continue
                found = (labels.reshape(len(labels), -1) == code).any(1)
                if bool(found.any()):
                    where = where or f", e.g. row {int(found.nonzero()[0]) + 1} of the {split} samples"
                    count += int(found.sum())
            faults.append(
                f"classes: {name[:40]!r} ({count} samples{where}) is none of those agreed, {agreed}; rename it or "
                f"leave those samples out{hint(name, self.classes)}"
            )
        if len(faults) > 2 * SHOWN:  # another column was taken for the label
            faults[SHOWN:] = [
                f"classes: {len(faults) - SHOWN} others are none of those agreed; are these labels?"
            ]
        read = (_labels(p) for p in held.values())
        unreadable = any(labels is None or labels.is_floating_point() for labels in read)
        if not faults and (unreadable or not isinstance(data.train, Samples)):
            faults.append(f"classes: {_short(data.classes)} cannot be put in the agreed order; {agreed}")
        return faults

    def _check_columns(self, names: Sequence[str], held: Mapping[str, Samples]) -> list[str]:
        if not names:
            return ["columns: the data name none; use data=table, or give the Dataset its columns=(...)"]
        faults = missing_and_extra(names, self.features)
        for split, part in held.items():
            x = part.x
            for column in self.columns:
                if column.name in names and isinstance(x, Tensor) and x.dim() == 2:
                    values = x[:, list(names).index(column.name)].double().numpy()
                    found = column.beyond(values, np.ones(len(values), dtype=bool))
                    faults += [f"{split} samples: {fault}" for fault in found]
        return faults

    def _check_images(self, shape: Sequence[int]) -> list[str]:
        channels = {"RGB": 3, "L": 1}.get(self.mode)
        if len(shape) != 3 or (channels or shape[0]) != shape[0] or (self.size or shape[1:]) != shape[1:]:
            size = "any size" if self.size is None else f"{self.size[0]}x{self.size[1]} pixels"
            return [
                f"images: samples have the shape {tuple(shape)} (channels, height, width), agreed is "
                f"{self.mode or 'any mode'}, {size}; convert them, or type data.size=<pixels>"
            ]
        return []

    def _ordered(self, data: Dataset) -> Dataset:
        """Labels and columns as agreed, of data that were checked."""
        classes = data.classes
        if self.classes and classes != self.classes:
            code = torch.tensor([self.classes.index(name) for name in classes])
            data = _changed(data, lambda s: Samples(s.x, _coded(s, code)))
            data = replace(data, classes=self.classes)
        if self.columns and data.columns != self.features:
            order = torch.tensor([data.columns.index(name) for name in self.features])
            data = _changed(data, lambda s: Samples(s.x.index_select(1, order), s.y))
            data = replace(data, columns=self.features)
        return data


def _labels(part: Samples) -> Tensor | None:
    """Numbers of classes (N, ...): the targets, or ``labels`` of the boxes in them, -1 where there is none."""
    found = part.y.get("labels") if isinstance(part.y, Mapping) else part.y
    return found if isinstance(found, Tensor) else None


def _coded(part: Samples, code: Tensor) -> Any:
    """The targets with class k as ``code[k]``."""
    labels = _labels(part)
    assert labels is not None, "checked before"
    new = torch.where(labels < 0, labels.long(), code[labels.long().clamp(min=0)])
    return {**part.y, "labels": new} if isinstance(part.y, Mapping) else new


def _not_finite(held: Mapping[str, Samples]) -> list[str]:
    """A line for each split whose inputs (n, ...) are not all finite numbers."""
    faults = []
    for split, part in held.items():
        x = part.x
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x.sum())):
            bad = (~torch.isfinite(x)).reshape(len(x), -1).any(1)
            if count := int(bad.sum()):
                faults.append(
                    f"{split} samples: {count} of {len(x)} have NaN or infinity, e.g. row {int(bad.nonzero()[0]) + 1}; "
                    "fill or drop them"
                )
    return faults


def missing_and_extra(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """A line for each column that is missing, and for each that is too many; one where none is there: without a header,
    these names would be the values of a row."""
    if wanted and not set(wanted) & set(names):
        return [f"columns: none of {_short(wanted)} is there; does the first row name them?"]
    lost = [
        f"column '{n}': missing; add it{hint(n, [m for m in names if m not in wanted])}"
        for n in wanted
        if n not in names
    ]
    more = [
        f"column '{n[:40]}': not agreed; leave it out, or name it in data.ignore"
        for n in names
        if n not in wanted
    ]
    if len(more) > 2 * SHOWN:
        more[SHOWN:] = [f"columns: {len(more) - SHOWN} others are not agreed; leave them out"]
    return lost + more


def _changed(data: Dataset, change: Any) -> Dataset:
    test = None if data.test is None else change(data.test)
    return replace(data, train=change(data.train), test=test)


def _normalize(node: Any) -> tuple[bool, Mapping[str, Any]]:
    """Whether constants are to be agreed on, and those that are given."""
    if node is None or node == "agreed":
        return node == "agreed", {}
    given = _mapping(node, f"{KEY}.normalize", ("mean", "std"), "agreed, or {mean: [...], std: [...]}")
    for name, values in given.items():
        listed = list(values.values()) if isinstance(values, Mapping) else values
        numbers = isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed)
        if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in listed):
            raise ConfigError(f"{KEY}.normalize.{name}={values}: expected numbers, a list or by column")
        if name == "std" and min(listed) <= 0:
            raise ConfigError(f"{KEY}.normalize.std={values}: must be positive")
    return False, given


def _size(node: Any) -> tuple[int, int] | None:
    if node is None:
        return None
    pair = [node, node] if isinstance(node, int) else _listed(node, f"{KEY}.image.size")
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ConfigError(f"{KEY}.image.size={node}: expected pixels, or [height, width]")
    return pair[0], pair[1]


def _mapping(node: Any, key: str, names: Sequence[str] = (), expected: str = "") -> dict[str, Any]:
    if node is None:
        return {}
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={node}: expected {expected or '{name: ..., ...}'}")
    values = {str(k): v for k, v in node.items()}
    for name in values:
        if names and name not in names:
            raise ConfigError(f"unknown key '{key}.{name}'{hint(name, names, f'{key}.')}")
    return values


def _listed(node: Any, key: str) -> list[Any]:
    if node is None:
        return []
    if isinstance(node, str) or not isinstance(node, Sequence):
        raise ConfigError(f"{key}={node}: expected a list")
    return list(node)


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
