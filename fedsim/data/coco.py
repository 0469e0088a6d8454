"""Object detection sets in COCO's format (Lin et al. 2014): one JSON file of annotations for each split, and images."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.config.textfile import read_text
from fedsim.data.agreed import Contract
from fedsim.data.cache import Arrays, cached, fingerprint
from fedsim.data.columns import ContractError
from fedsim.data.common import to_tensor
from fedsim.data.dataset import Dataset, Normalize, Samples
from fedsim.data.decoding import decode
from fedsim.data.domains import SYMMETRIC
from fedsim.data.files import PathLike, existing
from fedsim.data.image_folders import check_images
from fedsim.errors import DataError, NoSamplesError

LAYOUT = (
    "a folder with data.train (annotations/train.json) in it, and the images that this names, or a JSON file"
)
GREY = Normalize(SYMMETRIC.scale, (0.5,), (0.5,))
FILES = ("images", "annotations", "categories")

log = logging.getLogger(__name__)


class Annotated(NamedTuple):
    """One split: its images' entries, and the boxes of each (x, y, width, height, category id)."""

    file: Path
    images: list[Mapping[str, Any]]
    boxes: list[list[tuple[float, float, float, float, int]]]
    categories: dict[int, str]


def coco(
    path: PathLike | None,
    *,
    train: str,
    test: str | None,
    images: str | None,
    size: int,
    domain: str | None,
    domains: Sequence[str] | None,
    train_domains: Sequence[str] | None = None,
    contract: Mapping[str, Any] | None = None,
) -> Dataset:
    """Images x uint8 (N, C, size, size), RGB or as agreed, and y ``{"boxes": (N, M, 4), "labels": (N, M)}``: x1, y1,
    x2, y2 in pixels of the resized image, label -1 where there is no box, M the most boxes of an image.

    Crowds and boxes without area are left out. Classes are the categories of the training file by id.

    Args:
        path: the folder that the other names are relative to; or a JSON file, all of it training data: ``train`` and
            ``test`` are not looked for then.
        train: annotations of the training images, a JSON file.
        test: those of the test images; ``None``: there are none.
        images: folder of the images; ``None``: beside the annotations, in ``images`` or in a folder named like the
            split (``train``, ``train2017``).
        size: side in pixels that all images are resized to.
        domain: key of an image's entry, or of its ``attributes``, that names its domain, such as ``weather``.
        domains: those to keep, in this order; ``None``: all, by name.
        train_domains: those of them with training images, the others are only tested; ``None``: all.
        contract: what ``data.contract`` says.

    Raises:
        ContractError: images are not in the agreed mode: how many, which first.
        DataError: naming file and entry, for what is no COCO file or an image that is not there.
    """
    if path is None:
        raise DataError(f"data.path=null: data=coco is read from a folder only: {LAYOUT}")
    if size < 8:
        raise DataError(f"data.size={size}: the side of the resized images, at least 8")
    for key, given in (("domains", domains), ("train_domains", train_domains)):
        if given is not None and domain is None:
            raise DataError(f"data.{key}={list(given)}: by what? Type data.domain=<key of an image's entry>")
    root = existing(path, LAYOUT)
    if root.is_file():
        root, train, test = root.parent, root.name, None
    agreed = Contract.of(contract) or Contract()
    parts = {k: _annotated(root / name) for k, name in (("train", train), ("test", test)) if name is not None}
    first = parts["train"]
    ids = {category: at for at, category in enumerate(sorted(first.categories))}
    names: tuple[str, ...] = ()
    if domain is not None:
        found = {k: [_domain(part, image, domain) for image in part.images] for k, part in parts.items()}
        names = tuple(sorted({d for each in found.values() for d in each}) if domains is None else domains)
        wanted = {"train": names if train_domains is None else tuple(train_domains), "test": names}
        if stray := [name for name in wanted["train"] if name not in names]:
            raise DataError(f"data.train_domains: '{stray[0]}' is none of {', '.join(names)}")
        parts = {k: _kept(part, [d in wanted[k] for d in found[k]], wanted[k]) for k, part in parts.items()}
    groups, made = dict[str, dict[str, np.ndarray]](), dict[str, Samples]()
    for split, part in parts.items():
        x = _pixels(root, part, images, size, agreed)
        made[split] = Samples(to_tensor(x), _targets(part, ids, size))
        if domain is not None:
            codes = [names.index(_domain(part, image, domain)) for image in part.images]
            groups[split] = {"domain": np.array(codes, dtype=np.int64)}
    return Dataset(
        train=made["train"],
        test=made.get("test"),
        classes=tuple(first.categories[i] for i in sorted(first.categories)),
        normalize=GREY if agreed.mode == "L" else SYMMETRIC,
        ids=groups["train"]["domain"] if groups else None,
        groups=groups,
        group_names={"domain": names} if names else {},
    )


def _annotated(file: Path) -> Annotated:
    """The content of a JSON file, checked."""
    try:
        content = json.loads(read_text(existing(file, LAYOUT)))
    except (ValueError, IsADirectoryError) as error:
        raise DataError(f"{file}: is no JSON file ({error})") from error
    for name in FILES:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"{file}: has no list '{name}'; expected COCO's {', '.join(FILES)}")
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        images = sorted(content["images"], key=lambda image: int(image["id"]))
        at = {int(image["id"]): i for i, image in enumerate(images)}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: an image without id, or a category without id and name ({error})"
        ) from error
    boxes: list[list[tuple[float, float, float, float, int]]] = [[] for _ in images]
    empty = 0
    for i, one in enumerate(content["annotations"]):
        try:
            (x, y, width, height), category, image = (
                map(float, one["bbox"]),
                int(one["category_id"]),
                int(one["image_id"]),
            )
            if not math.isfinite(x + y + width + height):
                raise ValueError("its bbox is not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file}: annotation {i} needs image_id, category_id and bbox ({error})"
            ) from error
        if image not in at or category not in categories:
            what = f"image {image}" if image not in at else f"category {category}"
            raise DataError(f"{file}: annotation {i} is of {what}, which the file does not have")
        if one.get("iscrowd") or not (width > 0 and height > 0):
            empty += 1
            continue
        boxes[at[image]].append((x, y, width, height, category))
    if empty:
        log.warning("%s: %d crowds or boxes without area are left out", file, empty)
    if not images:
        raise NoSamplesError(f"{file}: has no images")
    if not categories:
        raise DataError(f"{file}: has no categories")
    return Annotated(file, images, boxes, categories)


def _domain(part: Annotated, image: Mapping[str, Any], key: str) -> str:
    found = image.get(key, (image.get("attributes") or {}).get(key))
    if found is None:
        raise DataError(f"{part.file}: image {image['id']} has no '{key}', its domain by data.domain")
    return str(found)


def _kept(part: Annotated, keep: Sequence[bool], names: Sequence[str]) -> Annotated:
    if not any(keep):
        raise DataError(f"{part.file}: no image is of the domains {', '.join(names)}")
    rows = [i for i, wanted in enumerate(keep) if wanted]
    return part._replace(images=[part.images[i] for i in rows], boxes=[part.boxes[i] for i in rows])


def _pixels(root: Path, part: Annotated, images: str | None, size: int, agreed: Contract) -> np.ndarray:
    """Images (N, C, size, size) uint8, in the file's order of ids; decoded once. ContractError if of another mode."""
    if images is not None:
        folders = [root / images]
    else:
        stem = part.file.stem.removeprefix("instances_")
        folder, short = part.file.parent, stem.rstrip("0123456789")
        folders = [
            folder,
            *(root / name for name in (stem, short, f"images/{stem}", f"images/{short}", "images")),
        ]
    files = []
    for image in part.images:
        name = str(image.get("file_name", ""))
        there = next((f / name for f in folders if name and (f / name).is_file()), None)
        if there is None:
            places = ", ".join(str(f) for f in folders)
            raise DataError(f"{part.file}: image '{name}' is in none of {places}; type data.images=<folder>")
        files.append(there)
    channels = 1 if agreed.mode == "L" else 3
    if agreed.mode and (
        faults := check_images([f.read_bytes() for f in files], agreed, size, list(map(str, files)))
    ):
        raise ContractError("\n".join(faults))

    def build() -> Arrays:
        blobs = [f.read_bytes() for f in files]
        return {"image": decode(blobs, channels=channels, size=size, source=str(part.file))}

    about = (*map(str, files), *fingerprint(files), str(size), *(["L"] if channels == 1 else []))
    return cached(f"{root.name}-coco", about, build)["image"]


def _targets(part: Annotated, ids: Mapping[int, int], size: int) -> dict[str, Any]:
    """Boxes and labels, padded; in pixels of the resized image."""
    most = max(1, *(len(each) for each in part.boxes))
    boxes = np.zeros((len(part.images), most, 4), np.float32)
    labels = np.full((len(part.images), most), -1, np.int64)
    for i, (image, each) in enumerate(zip(part.images, part.boxes, strict=True)):
        try:
            scale = size / np.array([image["width"], image["height"]] * 2, dtype=np.float64)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise DataError(
                f"{part.file}: image {image['id']} needs its width and height ({error})"
            ) from error
        for j, (x, y, width, height, category) in enumerate(each):
            if category not in ids:
                name = part.categories[category]
                raise DataError(f"{part.file}: '{name}' is no category of the training file")
            boxes[i, j] = (np.array([x, y, x + width, y + height]) * scale).clip(0, size)
            labels[i, j] = ids[category]
    return {"boxes": to_tensor(boxes), "labels": to_tensor(labels)}
