"""Batched augmentation against one sample at a time."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from problems import classes, classification, hashes
from torch.nn import functional as F
from torch.utils.data import Dataset

from fedsim.data.augment import Compose, Flip, PadCrop, flip_and_crop
from fedsim.errors import ConfigError


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


OWN, NOTES = np.random.default_rng(0), []


class Shaken:
    def __init__(self):
        self.own = keyed()

    def __call__(self, x, generator):
        return x + torch.rand(x.shape, generator=self.own)


class Drawn(Dataset):
    """Samples whose transform draws from ``draw``."""

    def __init__(self, pair, draw):
        self.pair, self.draw = pair, draw

    def __len__(self):
        return len(self.pair[0])

    def __getitem__(self, row):
        return self.pair[0][row] * self.draw(), self.pair[1][row]


@pytest.mark.parametrize(
    ("augment", "named"),
    [
        (lambda x, generator: x * float(OWN.random()), "'OWN'"),
        (Compose((Shaken(),)), "attribute 'own' of Shaken has changed"),
        (
            (lambda own: lambda x, _: x + torch.rand(x.shape, generator=own))(keyed()),
            "closure variable 'own'",
        ),
    ],
)
def test_an_augmentation_with_a_generator_of_its_own_is_refused_by_name(augment, named):
    with pytest.raises(
        ConfigError, match=rf"augment: the same samples and seeds give another batch.*{named}"
    ):
        classification().run("rounds=1", augment=augment)


def test_a_data_set_with_a_generator_of_its_own_is_refused():
    def clients(draw):
        return {"clients": [Drawn(pair, draw) for pair in classes()], "test": None}

    with pytest.raises(
        ConfigError, match="data: the same samples and seeds give another batch the second time"
    ):
        classification().run("rounds=1", **clients(lambda: float(OWN.random())))
    classification().run("rounds=1", **clients(lambda: float(torch.rand(())) + random.random()))


def test_one_that_only_takes_notes_is_said_and_changes_nothing(caplog):
    plain = classification().run("rounds=1", augment=lambda x, generator: x)
    noting = classification().run("rounds=1", augment=lambda x, generator: NOTES.append(1) or x)
    assert hashes(noting) == hashes(plain) and "'NOTES'" in caplog.text
