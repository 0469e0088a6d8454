"""Object detection sets in COCO's format (Lin et al. 2014): one JSON file of annotations for each split, and images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.agreed import Contract
from fedsim.data.cache import Arrays, cached, fingerprint
from fedsim.data.coco_file import Annotated, annotated
from fedsim.data.columns import ContractError
from fedsim.data.common import to_tensor
from fedsim.data.dataset import Dataset, Normalize, Samples
from fedsim.data.decoding import decode, shown_size
from fedsim.data.domains import SYMMETRIC
from fedsim.data.files import PathLike, existing
from fedsim.data.image_folders import check_images
from fedsim.errors import DataError

LAYOUT = (
    "a folder with data.train (annotations/train.json) in it, and the images that this names, or a JSON file"
)
GREY = Normalize(SYMMETRIC.scale, (0.5,), (0.5,))


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

    Crowds, and boxes without area in their image, are left out. Classes are the categories of the training file in the
    order of their ids; those of the test file go by name.

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
    if not isinstance(size, int) or size < 8:
        raise DataError(f"data.size={size}: the side of the resized images, in whole pixels, at least 8")
    for key, given in (("domains", domains), ("train_domains", train_domains)):
        if given is not None and domain is None:
            raise DataError(f"data.{key}={given}: by what? Type data.domain=<key of an image's entry>")
    root = existing(path, LAYOUT)
    if root.is_file():
        root, train, test = root.parent, root.name, None
    agreed = Contract.of(contract) or Contract()
    files = {k: root / name for k, name in (("train", train), ("test", test)) if name is not None}
    parts = {k: annotated(file, size, LAYOUT) for k, file in files.items()}
    first, names = parts["train"], tuple[str, ...]()
    if domain is not None:
        names, parts = _of_domains(parts, domain, domains, train_domains)
    groups, made = dict[str, dict[str, np.ndarray]](), dict[str, Samples]()
    for split, part in parts.items():
        x = _pixels(root, part, images, size, agreed)
        made[split] = Samples(to_tensor(x), _targets(part, part.named_as(first)))
        if domain is not None:
            codes = [names.index(part.domain(image, domain)) for image in part.images]
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


def _of_domains(
    parts: Mapping[str, Annotated],
    key: str,
    domains: Sequence[Any] | str | None,
    trained: Sequence[Any] | str | None,
) -> tuple[tuple[str, ...], dict[str, Annotated]]:
    """Names of the domains to keep, and the images of these, for training of those ``trained``."""
    if domains is None:
        domains = sorted({part.domain(image, key) for part in parts.values() for image in part.images})
    names = _names(domains)
    wanted = names if trained is None else _names(trained)
    if stray := [name for name in wanted if name not in names]:
        raise DataError(f"data.train_domains: '{stray[0]}' is none of {', '.join(names)}")
    return names, {k: part.of_domains(key, wanted if k == "train" else names) for k, part in parts.items()}


def _names(given: Sequence[Any] | str) -> tuple[str, ...]:
    """Names of domains as they are compared: one by itself, or several, each once."""
    return tuple(dict.fromkeys(map(str, [given] if isinstance(given, str) else given)))


def _pixels(root: Path, part: Annotated, images: str | None, size: int, agreed: Contract) -> np.ndarray:
    """Images (N, C, size, size) uint8, in the file's order of ids; decoded once. ContractError if of another mode."""
    if images is not None:
        folders = [root / images]
    else:
        stem = part.file.stem.removeprefix("instances_")
        folder, short = part.file.parent, stem.rstrip("0123456789")
        folders = [
            folder,
            *(root / name for name in (stem, short, f"images/{stem}", f"images/{short}", "images", "")),
        ]
    files = []
    for image in part.images:
        name = str(image.get("file_name") or "")
        if not name:
            raise DataError(f"{part.file}: image {image['id']} has no file_name")
        there = next((f / name for f in folders if (f / name).is_file()), None)
        if there is None:
            places = ", ".join(dict.fromkeys(map(str, folders)))
            raise DataError(f"{part.file}: image '{name}' is in none of {places}; type data.images=<folder>")
        files.append(there)
    channels = 1 if agreed.mode == "L" else 3
    if agreed.mode and (
        faults := check_images([f.read_bytes() for f in files], agreed, size, list(map(str, files)))
    ):
        raise ContractError("\n".join(faults))

    def build() -> Arrays:
        _check_upright(part, files)
        blobs = [f.read_bytes() for f in files]
        names = [os.path.relpath(f, root) for f in files]
        return {"image": decode(blobs, channels=channels, size=size, source=str(root), names=names)}

    about = (*map(str, files), *fingerprint(files), str(size), *(["L"] if channels == 1 else []))
    return cached(f"{root.name}-coco", about, build)["image"]


def _check_upright(part: Annotated, files: Sequence[Path]) -> None:
    """Refuse images that lie on their side where their boxes stand.

    Raises:
        DataError: naming the first.
    """
    for image, file in zip(part.images, files, strict=True):
        said = int(float(image["width"])), int(float(image["height"]))
        if said[0] != said[1] and shown_size(file) == said[::-1]:
            raise DataError(
                f"{part.file}: image {image['id']} has {said[1]} x {said[0]} pixels when shown (EXIF says how), not "
                f"{said[0]} x {said[1]}: its boxes would lie elsewhere; turn the one or the other"
            )


def _targets(part: Annotated, places: Mapping[int, int]) -> dict[str, Any]:
    """Boxes and labels, padded; ``places`` are classes by category id."""
    most = max(1, *(len(each) for each in part.boxes))
    boxes = np.zeros((len(part.images), most, 4), np.float32)
    labels = np.full((len(part.images), most), -1, np.int64)
    for i, each in enumerate(part.boxes):
        for j, (corners, category) in enumerate(each):
            if category not in places:
                name = part.categories[category]
                raise DataError(f"{part.file}: '{name}' is no category of the training file")
            boxes[i, j], labels[i, j] = corners, places[category]
    return {"boxes": to_tensor(boxes), "labels": to_tensor(labels)}
