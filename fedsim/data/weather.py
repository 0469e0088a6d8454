"""Pictures of circles, squares and triangles in four weathers, with their boxes: object detection under feature shift.

A small stand-in for driving scenes as FedSTO is tried on (Kim et al. 2023): the server's labelled pictures are cloudy,
clients see other weathers. Nothing is fetched; the same seed gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedsim.data.common import to_tensor
from fedsim.data.dataset import Dataset, Normalize, Samples
from fedsim.errors import DataError, hint
from fedsim.rng import numpy_rng

SHAPES = ("circle", "square", "triangle")
MOST = 4  # shapes in a picture, at least one
TRIES = 12  # places tried for a shape before it is left out


NOISE = 0.15  # standard deviation of pixels; how it was chosen: see ``weather_shapes``


class Pictures(NamedTuple):
    """``x`` (N, 3, S, S) uint8; ``boxes`` (N, 4, 4) float32, x1, y1, x2, y2 in pixels, ``labels`` (N, 4) int64, -1
    where there is no shape: those come last, and their boxes are zero."""

    x: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def weather_shapes(
    *,
    train: Mapping[str, int],
    test: int,
    side: int,
    shapes: Sequence[int],
    contrast: Mapping[str, float],
    domains: Sequence[str] | None,
    seed: int,
    noise: float = NOISE,
) -> Dataset:
    """Pictures x (N, 3, side, side) and y ``{"boxes": (N, 4, 4), "labels": (N, 4)}`` (see ``Pictures``).

    Args:
        train: training pictures of each weather; its keys are the weathers there are. One of 0 is only tested.
        test: test pictures of each weather.
        side: of a picture, in pixels.
        shapes: smallest and largest side of a shape's box, in pixels.
        contrast: what is left of each weather's contrast, in (0, 1]: smaller is a harder shift.
        domains: weathers to keep, in this order; ``None``: all of ``train``.
        seed: of the pictures themselves.
        noise: standard deviation of the pixels on a clear day. FedSTO's small form asks for a shift at which a
            detector trained on 500 cloudy pictures alone finds .5 to .65 (mAP at IoU .5) in the worst weather. Of .05,
            .1 and .15 the last does (snowy .75, .69, .63), on pictures of ``seed=1``, which nothing else uses.

    Raises:
        DataError: for an unknown weather, or sizes that cannot be.
    """
    names = tuple(train if domains is None else domains)
    low, high = _checked(names, train, test, side, shapes, contrast)
    splits: dict[str, Pictures] = {}
    for split, counts in (("train", train), ("test", dict.fromkeys(names, test))):
        parts = [
            pictures(
                name,
                counts[name],
                numpy_rng(seed, f"weather/{split}/{name}"),
                side=side,
                sizes=(low, high),
                contrast=float(contrast.get(name, 1.0)),
                noise=noise,
            )
            for name in names
        ]
        splits[split] = Pictures(*map(np.concatenate, zip(*parts, strict=True)))
    codes = np.arange(len(names), dtype=np.int64)
    of_train = np.repeat(codes, [train[name] for name in names])
    return Dataset(
        train=_samples(splits["train"]),
        test=_samples(splits["test"]) if test else None,
        classes=SHAPES,
        normalize=Normalize(1 / 255, (0.5,), (0.25,)),
        ids=of_train,
        groups={"train": {"domain": of_train}, "test": {"domain": np.repeat(codes, test)}},
        group_names={"domain": names},
    )


def pictures(
    weather: str,
    count: int,
    rng: np.random.Generator,
    *,
    side: int = 64,
    sizes: tuple[float, float] = (9, 22),
    contrast: float = 1.0,
    noise: float = NOISE,
) -> Pictures:
    """``count`` pictures of one weather."""
    boxes, labels = _placed(count, side, sizes, rng)
    x = WEATHERS[weather](_drawn(boxes, labels, side, noise, rng), contrast, rng)
    return Pictures((255 * x.clip(0, 1)).round().astype(np.uint8), boxes, labels)


def _placed(
    count: int, side: int, sizes: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4, 4) that do not overlap, and labels (N, 4)."""
    boxes = np.zeros((count, MOST, 4), np.float32)
    labels = np.full((count, MOST), -1, np.int64)
    wanted = rng.integers(1, MOST + 1, count)
    for j in range(MOST):
        size = rng.uniform(*sizes, (count, 1, 1))
        corner = rng.random((count, TRIES, 2)) * (side - size)
        tried = np.concatenate([corner, corner + size], axis=2).astype(np.float32)[:, :, None]
        others = boxes[:, None, :j]
        within = (tried[..., :2] < others[..., 2:]) & (tried[..., 2:] > others[..., :2])
        free = ~np.any(np.all(within, axis=3), axis=2)
        here = np.any(free, axis=1) & (j < wanted)
        boxes[here, j] = tried[here, free.argmax(axis=1)[here], 0]
        labels[here, j] = rng.integers(len(SHAPES), size=count)[here]
    order = np.argsort(labels < 0, axis=1, kind="stable")
    return np.take_along_axis(boxes, order[..., None], 1), np.take_along_axis(labels, order, 1)


def _drawn(
    boxes: np.ndarray, labels: np.ndarray, side: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Pictures (N, 3, S, S) float32 on a clear day: flat shapes on a gray ground, with noise."""
    count = len(boxes)
    ground = rng.uniform(0.3, 0.6, (count, 1, 1, 1)).astype(np.float32)
    x = np.repeat(ground, 3, axis=1) + np.zeros((1, 1, side, side), np.float32)
    middle = np.arange(side, dtype=np.float32) + 0.5
    for j in range(MOST):
        x1, y1, x2, y2 = (boxes[:, j, i, None, None] for i in range(4))
        across, down = middle[None, None, :] - (x1 + x2) / 2, middle[None, :, None] - (y1 + y2) / 2
        half = (x2 - x1) / 2
        square = (abs(across) <= half) & (abs(down) <= half)
        inside = np.stack(
            [across**2 + down**2 <= half**2, square, square & (2 * abs(across) <= down + half)], axis=1
        )
        own = np.take_along_axis(inside, labels[:, j, None, None, None].clip(0), 1)
        # of four colours, the one that stands out most in gray
        colours = rng.random((count, 4, 3)).astype(np.float32)
        furthest = abs(colours.mean(axis=2) - ground[:, 0, 0]).argmax(axis=1)
        colour = colours[np.arange(count), furthest][:, :, None, None]
        x = np.where(own & (labels[:, j] >= 0)[:, None, None, None], colour, x)
    return x + np.float32(noise) * rng.standard_normal(x.shape, dtype=np.float32)


def _faded(x: np.ndarray, contrast: float, middle: float = 0.5) -> np.ndarray:
    return (middle + contrast * (x - 0.5)).astype(np.float32)


def _cloudy(x: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """As drawn."""
    return _faded(x, contrast)


def _overcast(x: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Gray and flat."""
    return _faded(np.repeat(x.mean(axis=1, keepdims=True), 3, axis=1), contrast)


def _rainy(x: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Blurred, with slanted bright streaks."""
    x = _faded(_blurred(x), contrast)
    drops = rng.random((len(x), 1, *x.shape[2:]), dtype=np.float32) < 0.008
    streaks = np.zeros_like(drops)
    for k in range(8):
        streaks |= np.roll(drops, (k, -(k // 2)), axis=(2, 3))
    return np.where(streaks, x + np.float32(0.5) * (np.float32(0.9) - x), x)


def _snowy(x: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Bright and flat, with white specks of up to 2x2 pixels."""
    x = _faded(x, contrast, middle=0.7)
    specks = rng.random((len(x), 1, *x.shape[2:]), dtype=np.float32) < 0.02
    large = specks & (rng.random(specks.shape, dtype=np.float32) < 0.5)
    for shift in ((0, 1), (1, 0), (1, 1)):
        specks = specks | np.roll(large, shift, axis=(2, 3))
    return np.where(specks, np.float32(1), x)


def _blurred(x: np.ndarray) -> np.ndarray:
    """Mean of 3x3 pixels; the rim is repeated."""
    for axis in (2, 3):
        padded = np.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
        n = x.shape[axis]
        first, second, third = (np.take(padded, range(k, k + n), axis=axis) for k in range(3))
        x = (first + second + third) / np.float32(3)
    return x


Weather = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
WEATHERS: Mapping[str, Weather] = {"cloudy": _cloudy, "overcast": _overcast, "rainy": _rainy, "snowy": _snowy}


def _samples(found: Pictures) -> Samples:
    targets = {"boxes": to_tensor(found.boxes), "labels": to_tensor(found.labels)}
    return Samples(to_tensor(found.x), targets)


def _checked(
    names: Sequence[str],
    train: Mapping[str, int],
    test: int,
    side: int,
    shapes: Sequence[int],
    contrast: Mapping[str, float],
) -> tuple[float, float]:
    """Refuse what cannot be drawn; the smallest and largest side of a shape."""
    for key, given in (("train", train), ("contrast", contrast), ("domains", names)):
        for name in given:
            if name not in WEATHERS:
                known = ", ".join(WEATHERS)
                raise DataError(
                    f"data.{key}: there is no weather {name!r}; give {known}{hint(name, WEATHERS)}"
                )
    for name in names:
        if name not in train or train[name] < 0:
            raise DataError(
                f"data.train.{name}: how many training pictures of the weather? Type data.train.{name}=300"
            )
    if not sum(train[name] for name in names):
        raise DataError("data.train: no weather has a training picture; type data.train.cloudy=500")
    if not names or len(set(names)) < len(names) or test < 0:
        raise DataError(
            f"data.domains={list(names)} data.test={test}: give each weather once, and a number from 0"
        )
    if len(shapes) != 2 or not 2 <= shapes[0] <= shapes[1] <= side:
        raise DataError(
            f"data.shapes={list(shapes)}: give the smallest and largest side, between 2 and data.side ({side})"
        )
    for name, value in contrast.items():
        if not 0 < value <= 1:
            raise DataError(f"data.contrast.{name}={value}: must be in (0, 1]")
    return float(shapes[0]), float(shapes[1])
