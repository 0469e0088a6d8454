"""Images of one's own in a folder per class, and whether images are in the mode and size that were agreed."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.data.agreed import Contract
from fedsim.data.cache import Arrays, cached, fingerprint
from fedsim.data.columns import ContractError
from fedsim.data.common import image_options, samples
from fedsim.data.dataset import Augment, Dataset, Normalize, Samples
from fedsim.data.decoding import decode, depth
from fedsim.data.domains import NOTES, SUFFIXES, SYMMETRIC
from fedsim.data.files import PathLike, existing
from fedsim.errors import ConfigError, DataError, NoSamplesError

LAYOUT = "<class>/<image> folders (training samples), or folders train and test (or one of them) of such"
GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")
COLOUR = ("RGB", "RGBA", "P", "PA", "YCbCr")  # as Pillow calls what has red, green and blue without loss
OTHERS = {
    "L": "grey",
    "RGB": "in colours",
    "A": "see-through",
    "": "of other colours than red, green and blue",
}

log = logging.getLogger(__name__)


def image_folder(
    path: PathLike | None,
    *,
    mode: str | None = None,
    size: int | None = None,
    augment: bool | str | Augment = False,
    subset: int | None = None,
    contract: Mapping[str, Any] | None = None,
) -> Dataset:
    """Images in a folder per class, x uint8 ``(N, C, H, W)``; pixels are read as -1 to 1 if nothing else is agreed.

    Args:
        path: a folder of folders ``<class>/``, or of ``train/<class>/``, ``test/<class>/`` or both.
        mode: ``RGB`` or ``L`` (grey); ``None``: what ``contract`` says, or RGB.
        size: side in pixels that all are resized to; ``None``: they have one size already.
        augment, subset: as in ``fedsim.data.images``.
        contract: what ``data.contract`` says.

    Raises:
        ContractError: images are not in the agreed mode or size: how many, which first.
    """
    if path is None:
        raise DataError(f"data.path=null: data=image_folder is read from a folder only: {LAYOUT}")
    if mode not in (None, "RGB", "L"):
        raise DataError(f"data.mode={mode}: must be RGB, L, or null")
    root, agreed = existing(path, LAYOUT), Contract.of(contract) or Contract()
    if mode and agreed.mode and mode != agreed.mode:
        raise ConfigError(
            f"data.mode={mode}: data.contract.image.mode says {agreed.mode}; leave data.mode out"
        )
    if not root.is_dir():
        raise DataError(f"{root} is a file; expected {LAYOUT}. Type data.path=<that folder>")
    channels = 1 if (mode or agreed.mode) == "L" else 3
    parts = {name: _read(folder, channels, size, agreed) for name, folder in _splits(root).items()}
    names = sorted({str(name) for part in parts.values() for name in np.unique(part["label"])})
    made = {
        name: samples(part["image"], np.searchsorted(names, part["label"]).astype(np.int64))
        for name, part in parts.items()
    }
    none = Samples(next(iter(made.values())).x[:0], torch.zeros(0, dtype=torch.int64))
    dataset = Dataset(
        train=made.get("train", none),
        test=made.get("test"),
        classes=tuple(names),
        normalize=SYMMETRIC if channels == 3 else Normalize(SYMMETRIC.scale, (0.5,), (0.5,)),
    )
    return image_options(dataset, augment=augment, subset=subset)


def check_images(
    blobs: Sequence[bytes | None], agreed: Contract, size: int | None, names: Sequence[str] = ()
) -> list[str]:
    """What is wrong with encoded images, before they are decoded; ``size``: that they are resized to, if at all.

    Of ``names`` the first is put into the log only: file names may be patients'.
    """
    from PIL import Image

    channels, sizes, deep = [], [], [False] * len(blobs)
    for at, blob in enumerate(blobs):
        try:
            with Image.open(io.BytesIO(blob or b"")) as picture:
                deep[at] = bool(depth(picture, blob or b""))
                channels.append(_mode(picture))
                sizes.append((picture.height, picture.width))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # decoding says what it is
            channels.append(agreed.mode)
            sizes.append(agreed.size or (0, 0))

    def said(bad: Sequence[bool], what: str, remedy: str) -> list[str]:
        if not any(bad):
            return []
        first = bad.index(True)
        if names:
            log.warning("image %d is %s: %s", first + 1, what, names[first])
        return [f"images: {sum(bad)} of {len(bad)} are {what}, e.g. image {first + 1}; agreed is {remedy}"]

    faults = []
    if agreed.mode:
        agreed_is = f"{agreed.mode}{' (grey)' if agreed.mode == 'L' else ''}: convert them"
        for other, what in OTHERS.items():
            faults += said([c == other != agreed.mode for c in channels], what, agreed_is)
        faults += said(
            deep, "of more than 8 bits a channel", f"{agreed.mode} of 8 bits: scale them to 0..255"
        )
    if agreed.size and size is None:
        height, width = agreed.size
        faults += said(
            [s != agreed.size for s in sizes],
            "of another size",
            f"{height}x{width}: resize them, or type data.size=<pixels>",
        )
    return faults


def _mode(picture: Any) -> str:
    """``L``, ``RGB``, ``A`` of one that can be seen through somewhere, or nothing where colours are others (CMYK)."""
    clear = "A" in picture.getbands() or "transparency" in picture.info
    if clear and picture.convert("RGBA").getextrema()[3][0] < 255:
        return "A"
    return "L" if picture.mode in GREY else "RGB" if picture.mode in COLOUR else ""


def _splits(root: Path) -> dict[str, Path]:
    inner = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    split = inner and inner <= {"train", "test"}
    return {name: root / name for name in sorted(inner)} if split else {"train": root}


def _say_what_is_left_out(root: Path, files: Sequence[Path]) -> None:
    """Images that lie higher or deeper than ``<class>/<image>``, and folders without one."""
    apart = [*root.glob("*.*"), *root.glob("*/*/**/*.*")]
    apart = [f for f in apart if f.suffix.lower() in SUFFIXES and not _hidden(f.relative_to(root))]
    if apart:
        log.warning(
            "%s: %s: left out, since images are read as <class>/<image>", root, _some(sorted(map(str, apart)))
        )
    full = {f.parent for f in files}
    empty = [p.name for p in root.iterdir() if p.is_dir() and p not in full and not _hidden(Path(p.name))]
    if empty:
        log.warning("%s: no class %s, since its folder holds no image", root, _some(sorted(empty)))


def _deeper(root: Path) -> str:
    """Which folders hold folders of images, other than ``train`` and ``test`` alone; empty if none does."""
    found = (f.parts[len(root.parts)] for f in root.glob("*/*/*") if f.suffix.lower() in SUFFIXES)
    folders = sorted({name for name in found if not _hidden(Path(name))})
    if not folders:
        return ""
    other = [name for name in folders if name not in ("train", "test")]
    what = "; ".join(f"no {name!r} is read" for name in other[:3])
    return f" as <class>/<image>, but in folders {', '.join(folders)}; {what}: move or rename it"


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _read(root: Path, channels: int, size: int | None, agreed: Contract) -> Arrays:
    """Arrays image (N, C, H, W) and label (N,) of ``root/<class>/<image>``, in name order."""
    there = sorted(
        f for f in root.glob("*/*") if f.is_file() and not f.name.startswith(".") and f.parent.name[:1] != "."
    )
    files = [f for f in there if f.suffix.lower() in SUFFIXES]
    other = [f for f in there if f.suffix.lower() not in (*SUFFIXES, *NOTES)]
    if other:
        raise DataError(
            f"{other[0]}: is no image that can be read ({', '.join(SUFFIXES)}); convert or remove it"
        )
    if not files:
        raise NoSamplesError(f"{root} holds no images{_deeper(root)}; expected {LAYOUT}")
    _say_what_is_left_out(root, files)
    names = [str(f.relative_to(root)) for f in files]

    def build() -> Arrays:
        blobs = [f.read_bytes() for f in files]
        if faults := check_images(blobs, agreed, size, names):
            raise ContractError("\n".join(faults))
        return {
            "image": decode(blobs, channels=channels, size=size, source=str(root), names=names),
            "label": np.array([f.parent.name for f in files]),
        }

    key = (
        *names,
        *fingerprint(files),
        str(channels),
        str(size),
        agreed.mode,
        str(agreed.size),
    )
    return cached(f"{root.name}-classes", key, build)
