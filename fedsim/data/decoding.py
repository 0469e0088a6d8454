"""Encoded images to arrays of bytes: one reading of every kind, or an error that names file, row and remedy.

Images have 8 bits a channel. Turned ones (EXIF) are set upright, transparent pixels are laid on white, grey becomes RGB
where colours are wanted. Refused are other depths (16 bits, floats), colours where grey is wanted, files of several
pictures, and pictures beyond Pillow's limit.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

ORIENTATION = 0x0112  # EXIF tag
ON_ITS_SIDE = 4  # above it width and height change places
BITS = 258  # TIFF tag: bits per channel
DEEP = {"F": "32-bit floats", "I": "32-bit integers"}  # modes of Pillow; those of 16 bits start with I;16


def decode(
    blobs: Sequence[bytes | None], *, channels: int, size: int | None, source: str, names: Sequence[str] = ()
) -> np.ndarray:
    """Image files (JPEG, PNG, WebP, TIFF, ...) to one uint8 array ``(N, C, H, W)``.

    Args:
        blobs: encoded images.
        channels: 1 (grey) or 3 (RGB).
        size: side in pixels that every image is resized to (bicubic); ``None`` keeps their common size.
        source: where they come from, for messages.
        names: of their files there; without, they are rows of a table.

    Raises:
        DataError: an image cannot be read in one way, or sizes differ while ``size`` is ``None``.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("decoding images needs Pillow: pip install 'fedsim-lab[data]'") from error

    def place(row: int) -> str:
        return f"{source}{os.sep}{names[row]}" if names else f"{source}, row {row}"

    def pixels(row: int) -> np.ndarray:
        where, blob = place(row), blobs[row] or b""
        try:
            picture = _upright(Image.open(io.BytesIO(blob)), blob, where)
            picture = _converted(picture, channels, where)
        except Image.DecompressionBombError as error:
            raise DataError(f"{where}: too many pixels ({error}); shrink it first") from error
        except (OSError, SyntaxError, ValueError) as error:
            said = f"{len(blob)} bytes of no known format" if "BytesIO" in str(error) else str(error)
            raise DataError(f"{where}: not a readable image ({said}); replace or remove it") from error
        if size is not None and picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)

    if not blobs:
        raise DataError(f"{source}: no images in it")
    first = pixels(0)
    out = np.empty((len(blobs), channels, *first.shape[:2]), dtype=np.uint8)

    def fill(start: int, stop: int) -> None:
        for row in range(start, stop):
            array = pixels(row)
            if array.shape != first.shape:
                raise DataError(
                    f"{place(row)}: {array.shape[1]}x{array.shape[0]} pixels, {names[0] if names else 'row 0'} has "
                    f"{first.shape[1]}x{first.shape[0]}; give a common size=<pixels>"
                )
            out[row] = array.transpose(2, 0, 1)

    starts = range(0, len(blobs), 1024)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done in [pool.submit(fill, start, min(start + 1024, len(blobs))) for start in starts]:
            done.result()
    return out


def _upright(picture: Picture, blob: bytes, where: str) -> Picture:
    """One picture of 8 bits a channel as it is meant to be seen; others are refused."""
    if deep := depth(picture, blob):
        raise DataError(
            f"{where}: {deep} a channel; expected 8 bits. Which values are black and white is not said: scale it to "
            "0..255 first"
        )
    if picture.format in ("TIFF", "GIF", "WEBP", "PNG") and getattr(picture, "is_animated", False):
        raise DataError(f"{where}: a file of several pictures; split it first")
    if picture.getexif().get(ORIENTATION, 1) == 1:
        return picture
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def shown_size(file: Path) -> tuple[int, int] | None:
    """Width and height of an image as it is meant to be seen; ``None`` of what is none."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            width, height = picture.size
            return (height, width) if picture.getexif().get(ORIENTATION, 1) > ON_ITS_SIDE else (width, height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def depth(picture: Any, blob: bytes) -> str:
    """What a channel holds if that is not a byte; Pillow itself cuts some of these to 8 bits without a word."""
    if picture.mode in DEEP:
        return DEEP[picture.mode]
    if picture.mode.startswith("I;16") or (picture.format == "PNG" and blob[24] == 16):
        return "16 bits"
    bits = max(map(int, picture.tag_v2.get(BITS, (8,)))) if picture.format == "TIFF" else 8
    if picture.format == "PPM" and blob[:2] in (b"P5", b"P6") and picture.mode != "1":
        header = _words(blob, 4)
        bits = 16 if len(header) == 4 and int(header[3]) > 255 else 8
    return f"{bits} bits" if bits > 8 else ""


def _words(blob: bytes, count: int) -> list[bytes]:
    """The first words of a PPM header, without its comments."""
    lines = (line.split(b"#")[0] for line in blob[:1024].split(b"\n"))
    return b" ".join(lines).split()[:count]


def _converted(picture: Picture, channels: int, where: str) -> Picture:
    """Grey or RGB, without transparency."""
    from PIL import Image

    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if channels == 3:
        return picture.convert("RGB")
    if picture.mode not in ("1", "L", "LA"):
        bands = np.asarray(picture.convert("RGB"))
        if (bands != bands[..., :1]).any():
            raise DataError(f"{where}: a picture in colours, but this data set is grey; is it the right one?")
    return picture.convert("L")
