"""Views of images against PIL, one sample at a time; what they keep; what a sample's view depends on."""

from __future__ import annotations

import inspect
import math
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image, ImageEnhance, ImageOps

from fedsim.data import views
from fedsim.data.views.geometry import resampled
from fedsim.data.views.photometric import Pixels
from fedsim.data.views.randaugment import GEOMETRIC, OPERATIONS, geometric_move, photometric
from fedsim.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "view"
OPTIONS = {file.stem: OmegaConf.load(file) for file in sorted(CONF.glob("*.yaml"))}
IMAGES = ("weak", "strong", "randaugment", "affine", "colour", "cutout", "mosaic")
BYTES = Pixels(255, whole=True)


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, channels=3, height=24, width=20):
    """Smooth images with some texture, bytes, of little and of much contrast."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / rng.uniform(2, 6) + c) * np.cos(y / rng.uniform(2, 6)) for c in range(count * channels)
    ]
    flat = (
        np.stack(waves).reshape(count, channels, height, width) * 60
        + 110
        + rng.normal(0, 9, (count, 1, height, width))
    )
    return torch.from_numpy(np.clip(flat, 0, 255).astype(np.uint8))


def image(x):
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy())


def tensor(picture):
    array = torch.from_numpy(np.array(picture))
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1)


def by_pil(name, x, level):
    """One image by PIL, at ``level`` in [-1, 1] of the operation's range in torchvision's RandAugment."""
    picture, (width, height) = image(x), image(x).size
    matrices = {
        "shear_x": (1, 0.3 * level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": (1, 0, -int(150 / 331 * width * level), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(150 / 331 * height * level)),
    }
    if name in matrices:
        return tensor(picture.transform(picture.size, Image.AFFINE, matrices[name], Image.NEAREST))
    done = {
        "rotate": lambda: picture.rotate(30 * level, Image.NEAREST),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * level),
        "colour": lambda: ImageEnhance.Color(picture).enhance(1 + 0.9 * level),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * level),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * level),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * abs(level))),
        "solarize": lambda: ImageOps.solarize(picture, round(255 * (1 - abs(level)), 6)),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "identity": lambda: picture,
    }
    return tensor(done[name]())


def ours(name, x, level):
    strength = torch.full((len(x),), level, dtype=torch.float64)
    if name == "identity":
        return x
    if name in GEOMETRIC:
        return resampled(x, geometric_move(name, strength, (x.shape[-2], x.shape[-1])))
    return BYTES.closed(photometric(name, BYTES.opened(x), strength, BYTES), x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_pils(name, channels):
    """Values to 1 of 255; where pixels move, all but one in two hundred (ties between two pixels) are the same."""
    x = pictures(channels=channels)
    for level in (-1.0, -1 / 3, 0.1, 1.0):
        expected = torch.stack([by_pil(name, one, level) for one in x])
        apart = (ours(name, x, level).int() - expected.int()).abs()
        if name in GEOMETRIC:
            assert (apart > 0).float().mean() < 0.005, level
        else:
            assert apart.max() <= 1, level


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_floats_are_those_on_bytes(name):
    """Shares of the largest value, to the rounding of bytes: 1.5 of 255, or a level of the table of equalizing."""
    x, unit = pictures(), Pixels(1, whole=False)
    for level in (-0.5, 0.9):
        strength = torch.full((len(x),), level, dtype=torch.float64)
        if name in (*GEOMETRIC, "identity"):
            continue
        floats = photometric(name, x.double() / 255, strength, unit) * 255
        step = {"posterize": 2.0 ** round(4 * abs(level))}.get(name, 1.5)
        assert (floats - ours(name, x, level)).abs().max() <= step


def test_magnitude_zero_is_the_identity_where_it_can_be():
    x = pictures().clamp(max=254)
    for name in set(OPERATIONS) - {"autocontrast", "equalize"}:
        assert torch.equal(ours(name, x, 0.0), x), name
        assert torch.equal(ours(name, x, -0.0), x), name
    assert torch.equal(views.RandAugment(n=0)(x, keyed()), x)
    assert torch.equal(views.Affine(0, 0, (1.0, 1.0))(x, keyed()), x)
    assert torch.equal(views.Weak(0, 0)(x, keyed()), x)


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    """14 000 draws: each operation within five standard deviations of its share, and so is each sign."""
    seen = Counter()

    def count(self, out, codes, strength, pixels):
        seen.update(zip((OPERATIONS[c] for c in codes.tolist()), strength.sign().tolist(), strict=True))
        return torch.empty(0)

    monkeypatch.setattr(views.RandAugment, "_round", count)
    views.RandAugment(2, 10)(torch.zeros(7000, 1, 1, 1), keyed())
    bound = 5 * math.sqrt(14000 / 28)
    assert set(seen) == {(name, sign) for name in OPERATIONS for sign in (-1.0, 1.0)}
    assert all(abs(n - 500) < bound for n in seen.values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_type_shape_range_and_input_are_kept(name, channels, dtype):
    x = pictures(channels=channels)
    x = x if dtype == torch.uint8 else (x.float() / 255).to(dtype)
    before, view = x.clone(), views.named(name)
    out = view(x, keyed())
    assert out.dtype == dtype and out.shape == x.shape and torch.equal(x, before)
    assert out.min() >= 0 and out.max() <= (255 if dtype == torch.uint8 else 1)
    assert not torch.equal(out, x) and torch.equal(out, view(x, keyed()))
    assert not torch.equal(out, view(x, keyed(1)))
    assert pickle.loads(pickle.dumps(view)) == view


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", [n for n in IMAGES if n != "mosaic"])
def test_a_sample_becomes_the_same_whoever_its_neighbours_are(name, dtype):
    """It hangs on the key, its place in the batch and itself; mosaic mixes samples."""
    x = pictures(40) if dtype == torch.uint8 else pictures(40).float() / 255
    others, view = x.flip(0).clone(), views.named(name)
    others[7] = x[7]
    alone = view(x, keyed())[7]
    assert torch.equal(alone, view(others, keyed())[7])
    assert torch.equal(alone, view(x[:8], keyed())[7])


@pytest.mark.parametrize("name", ["noise", "mask"])
def test_a_row_becomes_the_same_whoever_its_neighbours_are(name):
    x, view = torch.randn(40, 5, generator=keyed(2)), views.named(name)
    assert torch.equal(view(x, keyed())[:9], view(x[:9], keyed()))


def test_a_stated_range():
    """Sixteen levels, as scikit-learn's digits have: inverted at 16, not at 255."""
    x = torch.tensor([0, 4, 16], dtype=torch.uint8).view(1, 1, 1, 3)
    pixels = Pixels.of(x, 16)
    out = photometric("solarize", pixels.opened(x), torch.tensor([0.5]), pixels)
    assert out.flatten().tolist() == [0, 4, 0]


def test_weak_is_a_flip_and_a_window():
    x = torch.arange(1, 129, dtype=torch.uint8).view(2, 1, 8, 8)
    for seed in range(5):
        u = torch.rand(2, 3, generator=keyed(seed), dtype=torch.float64)
        out = views.Weak(padding=1)(x, keyed(seed))
        for i in range(2):
            one = x[i].flip(-1) if u[i, 0] < 0.5 else x[i]
            top, left = (u[i, 1:] * 3).long().tolist()
            assert torch.equal(
                out[i], torch.nn.functional.pad(one, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
            )
    table = torch.randn(3, 4)
    assert views.Weak()(table, keyed()) is table


def test_cutout_is_one_square():
    x = torch.full((200, 3, 16, 12), 9, dtype=torch.uint8)
    out = views.Cutout(0.5)(x, keyed())
    hidden = (out == 127).all(1)
    assert torch.equal(hidden[:, None].expand_as(out), out != 9)
    rows, columns = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), rows * columns) and rows.max() == columns.max() == 6
    assert rows.min() < 6  # over the border


def test_named_views_hold_what_their_classes_take():
    for name, node in OPTIONS.items():
        if name == "own":
            continue
        taken = set(inspect.signature(get_object(node._target_)).parameters)
        assert {str(k) for k in node} - {"_target_"} == taken, name
    with pytest.raises(ConfigError, match=r"data.augment=stron: .*nearest is 'strong'"):
        views.named("stron")


def test_images_are_refused_tables():
    with pytest.raises(ConfigError, match=r"Strong shows images .* got \(3, 4\) \(float32\).*=noise"):
        views.Strong()(torch.zeros(3, 4), keyed())
    with pytest.raises(ConfigError, match="m from 0 to 30"):
        views.Strong(m=31)


def test_of_a_tree_the_leaves_that_suit():
    x = {"image": pictures(), "age": torch.ones(6, 2)}
    out = views.Strong()(x, keyed())
    assert torch.equal(out["image"], views.Strong()(x["image"], keyed())) and out["age"] is x["age"]


def test_a_strong_view_of_a_batch_of_64_takes_less_than_50_ms():
    x, view, generator = pictures(64, 3, 32, 32), views.Strong(), keyed()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(7):
            start = time.process_time()
            view(x, generator)
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(before)
    assert min(times) < 0.05
