"""Large tensors move to shared memory where they lie; whoever cannot be moved is copied."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.engine.ray import inplace
from fedsim.engine.ray.inplace import InPlace

pytestmark = pytest.mark.skipif(inplace._glibc() is None, reason="another C library")
LARGE = 72 << 20  # bytes: more than glibc maps by itself, or keeps at the end of the heap


def large() -> torch.Tensor:
    return torch.arange(LARGE // 8, dtype=torch.int64).reshape(-1, 4)


def kept() -> bool:
    return any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD"))


@pytest.mark.skipif(kept(), reason="malloc is told otherwise")
def test_a_tensor_stays_where_it_is_and_others_map_its_memory() -> None:
    t, moved = large(), InPlace()
    at, rows, expected = t.data_ptr(), t[100:200], t.clone()
    places = [moved.place(t), moved.place(rows)]
    assert None not in places and len(moved.memories) == 1
    assert t.data_ptr() == at and torch.equal(t, expected)
    there: Any = [place.view(place.memory.map()) for place in places if place is not None]
    assert torch.equal(there[0], expected) and torch.equal(there[1], expected[100:200])
    assert there[0].data_ptr() % 64 == at % 64
    t[0, 0] = -1  # its own page from now on
    there[1][0, 0] = -2
    assert int(there[0][0, 0]) == 0 and int(t[100, 0]) == 400 and int(rows[0, 0]) == 400
    again = InPlace().place(t)
    assert again is not None and int(again.view(again.memory.map())[0, 0]) == -1
    del t, rows
    assert torch.equal(there[0], expected)  # freed, its memory lives on for who maps it


def test_what_is_not_a_block_of_its_own_is_left_alone() -> None:
    array = np.zeros(LARGE // 8)
    for t in (
        torch.zeros(1000),
        torch.from_numpy(array),
        large().t(),
        torch.nn.Parameter(torch.zeros(LARGE // 4)),
        torch.zeros(LARGE // 4).share_memory_(),
        torch.frombuffer(bytearray(LARGE), dtype=torch.uint8),
    ):
        assert InPlace().place(t) is None
