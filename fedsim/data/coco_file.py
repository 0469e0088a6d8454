"""One JSON file of annotations in COCO's format (Lin et al. 2014): what it says of images and boxes, checked."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.config.textfile import read_text
from fedsim.data.files import existing
from fedsim.errors import DataError, NoSamplesError

FILES = ("images", "annotations", "categories")

log = logging.getLogger(__name__)


class Annotated(NamedTuple):
    """One split: its images' entries by id, each one's boxes (corners (4,) in pixels of the resized image, category
    id), and names of the categories."""

    file: Path
    images: list[Mapping[str, Any]]
    boxes: list[list[tuple[np.ndarray, int]]]
    categories: dict[int, str]

    def domain(self, image: Mapping[str, Any], key: str) -> str:
        """That of an image, by a key of its entry or of its ``attributes``.

        Raises:
            DataError: if it has none.
        """
        attributes = image.get("attributes")
        found = image.get(key, attributes.get(key) if isinstance(attributes, Mapping) else None)
        if found is None:
            raise DataError(f"{self.file}: image {image['id']} has no '{key}', its domain by data.domain")
        return str(found)

    def of_domains(self, key: str, names: Sequence[str]) -> Annotated:
        """Images of these domains alone.

        Raises:
            DataError: if that is none.
        """
        rows = [i for i, image in enumerate(self.images) if self.domain(image, key) in names]
        if not rows:
            raise DataError(f"{self.file}: no image is of the domains {', '.join(names)}")
        return self._replace(images=[self.images[i] for i in rows], boxes=[self.boxes[i] for i in rows])

    def named_as(self, first: Annotated) -> dict[int, int]:
        """For each category id its place among those of the training file ``first``, by name; left out if there is
        none, or several that have another id."""
        places = {category: at for at, category in enumerate(sorted(first.categories))}
        names = list(first.categories.values())
        single = {name: places[i] for i, name in first.categories.items() if names.count(name) == 1}
        out = {}
        for category, name in self.categories.items():
            if first.categories.get(category) == name:
                out[category] = places[category]
            elif name in single:
                out[category] = single[name]
        return out


def annotated(file: Path, size: int, layout: str) -> Annotated:
    """The content of ``file``, of images that are resized to ``size`` x ``size``; crowds, and boxes without area in
    their image, are left out and counted in the log.

    Raises:
        DataError: naming the file and the entry; of one that does not exist with ``layout``, what is expected.
    """
    content = _content(file, layout)
    images, at = _images(file, content["images"])
    categories = _categories(file, content["categories"])
    scales = [_scale(file, image, size) for image in images]
    boxes: list[list[tuple[np.ndarray, int]]] = [[] for _ in images]
    empty = 0
    for i, one in enumerate(content["annotations"]):
        try:
            box = [float(v) for v in one["bbox"]]
            x, y, width, height = box
            category, image = _id(one["category_id"]), _id(one["image_id"])
            crowd = bool(int(one.get("iscrowd") or 0))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(
                f"{file}: annotation {i} needs image_id, category_id and bbox, four numbers ({error})"
            ) from error
        if image not in at or category not in categories:
            what = f"image {image}" if image not in at else f"category {category}"
            raise DataError(f"{file}: annotation {i} is of {what}, which the file does not have")
        if not all(map(math.isfinite, box)):
            raise DataError(f"{file}: annotation {i} has the bbox {box}; expected x, y, width and height")
        corners = np.array([x, y, x + width, y + height]) * scales[at[image]]
        corners = corners.clip(0, size).astype(np.float32)
        if crowd or not (corners[2:] > corners[:2]).all():
            empty += 1
            continue
        boxes[at[image]].append((corners, category))
    if empty:
        log.warning("%s: %d crowds or boxes without area in their image are left out", file, empty)
    return Annotated(file, images, boxes, categories)


def _content(file: Path, layout: str) -> Mapping[str, list[Any]]:
    try:
        content = json.loads(read_text(existing(file, layout)))
    except (ValueError, IsADirectoryError) as error:
        raise DataError(f"{file}: is no JSON file ({error})") from error
    for name in FILES:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"{file}: has no list '{name}'; expected COCO's {', '.join(FILES)}")
    if not content["images"]:
        raise NoSamplesError(f"{file}: has no images")
    if not content["categories"]:
        raise DataError(f"{file}: has no categories")
    found: dict[str, list[Any]] = content
    return found


def _images(file: Path, entries: Sequence[Any]) -> tuple[list[Mapping[str, Any]], dict[int, int]]:
    """Entries by id, and the place of each id."""
    try:
        images = sorted(entries, key=lambda image: _id(image["id"]))
        ids = [_id(image["id"]) for image in images]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{file}: an image without id, a whole number ({error})") from error
    at = {image: i for i, image in enumerate(ids)}
    if len(at) < len(ids):
        twice = next(a for a, b in zip(ids, ids[1:], strict=False) if a == b)
        raise DataError(
            f"{file}: several images have id {twice}; it would not be known whose boxes are whose"
        )
    return images, at


def _categories(file: Path, entries: Sequence[Any]) -> dict[int, str]:
    """Names by id."""
    out = dict[int, str]()
    try:
        named = [(_id(c["id"]), c["name"]) for c in entries]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{file}: a category without id, a whole number, and name ({error})") from error
    for category, name in named:
        if name is None or out.setdefault(category, str(name)) != str(name):
            what = "no name" if name is None else f"the names '{out[category]}' and '{name}'"
            raise DataError(f"{file}: category {category} has {what}")
    return out


def _scale(file: Path, image: Mapping[str, Any], size: int) -> np.ndarray:
    """By which corners (4,) of boxes in ``image`` are multiplied."""
    try:
        sides = [float(image[key]) for key in ("width", "height")]
        if not all(0 < side < math.inf for side in sides):
            raise ValueError(f"{sides[0]:g} x {sides[1]:g}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: image {image['id']} needs its width and height ({error})") from error
    return size / np.array(sides * 2)


def _id(value: Any) -> int:
    """A whole number, however it is written."""
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value} is no whole number")
    return number
