"""Boxes and maps that move with their images, by hand; noise and masks of tables and texts."""

from __future__ import annotations

import pytest
import torch

from fedsim.data import views
from fedsim.data.augment import Compose, Flip, PadCrop
from fedsim.data.dataset import Normalize
from fedsim.data.views.geometry import corners, moved, translations, unmoved
from fedsim.data.views.randaugment import geometric_move
from fedsim.errors import ConfigError


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def spots(count=12, size=16, seed=0):
    """Black images with one bright rectangle each, its box, and a second place for a box that is none."""
    generator = keyed(seed)
    x = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    boxes, labels = torch.zeros(count, 2, 4), torch.full((count, 2), -1)
    for i in range(count):
        left, top = torch.randint(0, size - 7, (2,), generator=generator).tolist()
        width, height = torch.randint(3, 7, (2,), generator=generator).tolist()
        x[i, :, top : top + height, left : left + width] = 200
        boxes[i, 0] = torch.tensor([left, top, left + width, top + height])
        labels[i, 0] = i % 3
    return x, {"boxes": boxes, "labels": labels, "scores": torch.arange(2.0 * count).view(count, 2)}


def around(image):
    """The box around what is bright."""
    rows, columns = (image > 100).any(0).any(1).nonzero(), (image > 100).any(0).any(0).nonzero()
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize(
    "view",
    [views.Weak(padding=3), Flip(), PadCrop(3), Compose((Flip(), PadCrop(2)))],
    ids=lambda v: type(v).__name__,
)
def test_boxes_are_where_the_pixels_are(view):
    x, y = spots()
    shown, targets = views.seen(view, x, y, keyed(5))
    assert torch.equal(shown, view(x, keyed(5))) and targets["scores"] is y["scores"]
    assert targets["boxes"].dtype == y["boxes"].dtype and not torch.equal(shown, x)
    for i in range(len(x)):
        if targets["labels"][i, 0] >= 0:
            assert targets["boxes"][i, 0].tolist() == around(shown[i])
        assert targets["labels"][i, 1] == -1 and not targets["boxes"][i, 1].any()
    assert (targets["labels"][:, 0] >= 0).sum() > 8


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_boxes_of_geometric_operations_lie_around_the_pixels(name):
    """To a pixel: a box is drawn around the four corners, pixels are the nearest ones."""
    x, y = spots(size=32)
    back = geometric_move(name, torch.linspace(-1, 1, 12, dtype=torch.float64), (32, 32))
    shown = views.geometry.resampled(x, back)
    targets = moved(y, back, (32, 32), 0.9)
    kept = [i for i in range(12) if targets["labels"][i, 0] >= 0]
    assert len(kept) > 3
    for i in kept:
        apart = targets["boxes"][i, 0] - torch.tensor(around(shown[i]))
        assert (apart[:2] > -1.5).all() and (apart[:2] <= 1).all() and (apart[2:].abs() <= 1.5).all()


def test_flip_by_hand():
    y = {"boxes": torch.tensor([[[1.0, 2, 4, 7]]]), "labels": torch.tensor([[3]])}
    _, out = Flip(1.0).with_targets(torch.zeros(1, 1, 8, 10), y, keyed())
    assert out["boxes"].tolist() == [[[6, 2, 9, 7]]] and out["labels"].tolist() == [[3]]


def test_translation_by_hand_clips_and_drops():
    """Three pixels right in an image of 10: a box of 4 keeps 3/4, then 1/2 of another, and 0 of the third."""
    back = translations(torch.tensor([3.0]), torch.tensor([0.0]))
    y = {
        "boxes": torch.tensor([[[4.0, 0, 8, 2], [5, 0, 9, 2], [8, 0, 10, 2]]]),
        "labels": torch.tensor([[0, 1, 2]]),
    }
    for visible, labels in ((0.0, [0, 1, -1]), (0.5, [0, 1, -1]), (0.6, [0, -1, -1]), (0.8, [-1, -1, -1])):
        out = moved(y, back, (5, 10), visible)
        assert out["labels"].tolist() == [labels]
        assert out["boxes"][0, 0].tolist() == ([7, 0, 10, 2] if labels[0] == 0 else [0, 0, 0, 0])


def test_a_turn_by_hand():
    """A quarter turn counterclockwise of an image of 10: (x, y) goes to (y, 10 - x)."""
    back = geometric_move("rotate", torch.tensor([3.0], dtype=torch.float64), (10, 10))
    box = corners(torch.tensor([[[1.0, 2, 3, 6]]]), back)
    assert torch.allclose(box, torch.tensor([[[2.0, 7, 6, 9]]], dtype=torch.float64), atol=1e-12)
    assert torch.equal(corners(box, unmoved(1)), box)


def test_mosaic_corners():
    """One shade an image and no resizing: quarters meet in one point; each box ends there or is clipped to it."""
    shades = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1) * 50 + 50
    x = shades.expand(4, 1, 20, 20).contiguous()
    y = {
        "boxes": torch.tensor([[[12.0, 14, 20, 20]], [[0, 0, 6, 4]], [[0, 0, 20, 20]], [[9, 9, 11, 11]]]),
        "labels": torch.arange(4).view(4, 1),
        "scores": torch.arange(4.0).view(4, 1),
    }
    view = views.Mosaic(scale=1.0, bilinear=False, visible=0.0)
    shown, out = views.seen(view, x, y, keyed(3))
    u = torch.rand(4, 6, generator=keyed(3), dtype=torch.float64)
    assert out["boxes"].shape == (4, 4, 4) and out["scores"].shape == (4, 4)
    for i in range(4):
        right, down = ((0.25 + 0.5 * u[i, 1:3]) * 20).round().long().tolist()
        shown_there = [i, *(u[i, 3:] * 4).long().tolist()]
        frames = [(0, 0, right, down), (right, 0, 20, down), (0, down, right, 20), (right, down, 20, 20)]
        for k, (whose, (left, top, end, bottom)) in enumerate(zip(shown_there, frames, strict=True)):
            assert (shown[i, 0, top:bottom, left:end] == shades[whose].item()).all()
            shift = (right - 20 if k in (0, 2) else right, down - 20 if k < 2 else down) * 2
            box = y["boxes"][whose, 0] + torch.tensor(shift)
            box = torch.minimum(
                torch.maximum(box, torch.tensor([left, top] * 2)), torch.tensor([end, bottom] * 2)
            )
            if (box[2:] > box[:2]).all():
                assert out["boxes"][i, k].tolist() == box.tolist() and out["labels"][i, k] == whose
                assert out["scores"][i, k] == whose
            else:
                assert out["labels"][i, k] == -1
    assert torch.equal(shown, view(x, keyed(3)))


def test_a_sample_that_is_no_mosaic_keeps_its_boxes():
    x, y = spots()
    shown, out = views.seen(views.Mosaic(p=0.0), x, y, keyed())
    assert torch.equal(shown, x) and torch.equal(out["boxes"][:, :2], y["boxes"])
    assert torch.equal(out["labels"][:, :2], y["labels"]) and (out["labels"][:, 2:] == -1).all()


def test_maps_of_pixels_move_along():
    x, _ = spots()
    classes = (x[:, 0] > 100).long()
    for view in (
        views.Weak(padding=3),
        views.RandAugment(4, 20),
        Flip(),
        PadCrop(3),
        views.Mosaic(scale=1.0, bilinear=False),
    ):
        shown, out = views.seen(view, x, classes, keyed(2))
        assert (
            torch.equal(shown, view(x, keyed(2))) and out.dtype == torch.int64 and out.shape == classes.shape
        )
        if not isinstance(view, views.RandAugment):  # whose other operations change the values
            known = out >= 0
            assert (
                torch.equal((shown[:, 0] > 100)[known], (out == 1)[known]) and not shown[:, 0][~known].any()
            )
    plain = torch.arange(12)
    assert views.seen(views.Weak(), x, plain, keyed())[1] is plain


def test_functions_of_ones_own():
    def joint(x, y, generator):
        return x + 1, y + torch.randint(0, 5, (1,), generator=generator)

    x, y = torch.zeros(2), torch.zeros(2)
    view = views.as_view(joint, "views.mine")
    expected = torch.randint(0, 5, (1,), generator=keyed())
    assert torch.equal(views.seen(view, x, y, keyed())[1], expected.expand(2))
    alone = views.as_view(lambda x, generator: x + 2, "views.mine")
    assert views.seen(alone, x, y, keyed())[0].tolist() == [2, 2]
    with pytest.raises(ConfigError, match=r"views.mine=5: a view is a name"):
        views.as_view(5, "views.mine")


def test_prepared_batches_are_shown_in_their_plain_range():
    x, scale = spots()[0], Normalize(1 / 255, (0.4,), (0.2,))
    prepared, view = scale(x, torch.float64), views.Strong()
    shown, _ = views.seen_prepared(view, prepared, torch.arange(12), keyed(), scale, x)
    expected = (view(x.double() / 255, keyed()) - 0.4) / 0.2
    assert torch.allclose(shown, expected, atol=1e-12)
    plain, _ = views.seen_prepared(view, x.double(), torch.arange(12), keyed(), None, x)
    assert torch.allclose(plain, view(x.double() / 255, keyed()) * 255, atol=1e-12)
    floats = torch.rand(12, 1, 16, 16, generator=keyed(4))
    assert torch.equal(
        views.seen_prepared(view, floats, None, keyed(), None, floats)[0], view(floats, keyed())
    )


def test_noise_and_masks_of_tables():
    x = torch.randn(4000, 3, generator=keyed(1))
    apart = views.Noise(0.5)(x, keyed()) - x
    assert abs(float(apart.mean())) < 0.03 and abs(float(apart.std()) - 0.5) < 0.02
    masked = views.MaskedFeatures(0.3, -9.0)(x, keyed()) == -9
    assert abs(float(masked.float().mean()) - 0.3) < 0.02
    swapped = views.SwappedFeatures(0.3)(x, keyed())
    assert abs(float((swapped != x).float().mean()) - 0.3) < 0.02
    for column in range(3):
        assert set(swapped[:, column].tolist()) <= set(x[:, column].tolist())


def test_tokens_hidden_and_left_out():
    ids = torch.arange(1, 7).repeat(3000, 1)
    ids[:, 5] = 0
    hidden = views.Tokens(mask=0.25, mask_id=99)(ids, keyed())
    share = (hidden == 99).float().mean(0)
    assert (share[:5] - 0.25).abs().max() < 0.03 and share[5] == 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "label": torch.arange(3000)}
    out = views.Tokens(mask=0.0, delete=0.6)(batch, keyed())
    for row, mask in zip(out["input_ids"][:50].tolist(), out["attention_mask"][:50].tolist(), strict=True):
        kept = [t for t in row if t]
        assert kept and kept == sorted(set(kept)) and row == kept + [0] * (6 - len(kept))
        assert mask == [1] * len(kept) + [0] * (6 - len(kept))
    assert out["label"] is batch["label"]
    left = (out["input_ids"] != 0).sum().item() / (5 * 3000)
    assert abs(left - (0.4 + 0.6**5 / 5)) < 0.02
    with pytest.raises(ConfigError, match="mask_id"):
        views.Tokens()
    with pytest.raises(ConfigError, match="looks for 'input_ids' in samples that hold text"):
        views.Tokens(mask=0.0)({"text": ids}, keyed())
