"""Batched augmentation against one sample at a time."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn import functional as F

from fedsim.data.augment import Compose, Flip, PadCrop, flip_and_crop


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_equals_a_loop_over_samples(dtype, p):
    x = torch.randint(1, 256, (40, 3, 6, 5), generator=keyed(9)).to(dtype)
    before = x.clone()
    out = Compose((Flip(p), PadCrop(2, p)))(x, keyed())

    draws = keyed()
    mirrored = torch.rand(40, generator=draws) < p
    moved = torch.rand(40, generator=draws) < p
    offsets = torch.randint(0, 5, (2, 40), generator=draws)
    for i in range(40):
        image = x[i].flip(-1) if mirrored[i] else x[i]
        if moved[i]:
            top, left = offsets[:, i].tolist()
            image = F.pad(image, (2, 2, 2, 2))[:, top : top + 6, left : left + 5]
        assert torch.equal(out[i], image)
    assert out.dtype == dtype and torch.equal(x, before)


def test_key_decides_and_share_is_p():
    x = torch.arange(4000.0).view(2000, 1, 1, 2)
    assert torch.equal(Flip(0.3)(x, keyed(1)), Flip(0.3)(x, keyed(1)))
    share = (Flip(0.3)(x, keyed(1)) != x).any(-1).float().mean()
    assert abs(float(share) - 0.3) < 0.04


def test_transforms_travel_between_processes():
    augment = flip_and_crop()
    assert pickle.loads(pickle.dumps(augment)) == augment
