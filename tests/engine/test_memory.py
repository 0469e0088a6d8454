"""Values in memory that processes share: what arrives, when a block is free again, what a stranger sees."""

from __future__ import annotations

import gc
import multiprocessing
import os
from typing import Any

import pytest
import torch

from fedsim.engine.ray.transport.memory import (
    IN_BAND,
    SUPPORTED,
    Address,
    Block,
    FreeBlocks,
    OpenBlocks,
    Packed,
)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no anonymous files here: Ray's object store is used")
BIG = IN_BAND // 4 + 1  # float32 numbers that do not fit into the pickle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7), (IN_BAND, 3)])
def test_what_is_written_is_read(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = {"a": (torch.rand(shape) * 9).to(dtype), "b": [1, "x", torch.arange(BIG).float()[::2]]}
    block = Block()
    again = Block(block.address).read(block.write(value))
    assert again["b"][:2] == [1, "x"] and again["a"].dtype == dtype
    torch.testing.assert_close(again["a"], value["a"], rtol=0, atol=0)
    torch.testing.assert_close(again["b"][2], value["b"][2], rtol=0, atol=0)


def test_a_block_grows_and_what_was_read_before_stays_in_place() -> None:
    block, small, large = Block(), torch.rand(BIG), torch.rand(100 * BIG)
    reader = Block(block.address)
    first = reader.read(block.write(small))
    assert torch.equal(first, small)
    assert torch.equal(reader.read(block.write(large)), large)
    assert torch.equal(first, large[:BIG])  # a view of the block: the writer must wait until it is given back


def test_a_block_is_given_back_with_the_last_array() -> None:
    blocks = FreeBlocks()
    block = blocks.take()
    value = block.read(
        block.write({"a": torch.rand(BIG), "b": torch.rand(BIG)}), done=lambda: blocks.give(block)
    )
    kept = value.pop("b")[3:5]
    del value
    gc.collect()
    assert blocks.take() is not block
    del kept
    gc.collect()
    assert blocks.take() is block


def test_a_value_without_large_arrays_needs_no_block() -> None:
    blocks = FreeBlocks()
    block = blocks.take()
    packed = block.write({"a": torch.rand(3)})
    assert packed.spans == ()
    value = block.read(packed, done=lambda: blocks.give(block))
    assert blocks.take() is block and value["a"].shape == (3,)


def test_a_long_pickle_lies_in_the_block_too() -> None:
    """A packed value itself stays small, so that a pipe holds several."""
    block = Block()
    for value in (list(range(IN_BAND)), [torch.full((IN_BAND,), float(i)) for i in range(300)]):
        packed = block.write(value)
        assert packed.head == b"" and len(packed.spans) == 1
        again = Block(block.address).read(packed)
        assert [float(torch.as_tensor(v).sum()) for v in again] == [
            float(torch.as_tensor(v).sum()) for v in value
        ]


def _read(packed: Packed, answer: Any) -> None:
    answer.put(float(OpenBlocks().read(packed).sum()))


def test_another_process_maps_the_same_memory() -> None:
    value, block = torch.ones(1000 * BIG), Block()
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_read, args=(block.write(value), answer))
    process.start()
    assert answer.get(timeout=60) == value.sum().item()
    process.join()


def test_a_stranger_finds_nothing_and_touches_nothing() -> None:
    """Same numbers on another machine: no such process or descriptor, or another file."""
    block, other = Block(), Block()
    here = block.address
    foreign = os.open(os.devnull, os.O_RDWR)
    try:
        for address in (
            Address(here.pid, 10_000, here.name),
            Address(2**22 + 1, here.fd, here.name),
            Address(here.pid, foreign, here.name),
            Address(here.pid, other.fd, here.name),
            Address(here.pid, other.fd, other.address.name[:-1]),
        ):
            with pytest.raises(OSError):
                Block(address)
    finally:
        os.close(foreign)
    assert os.fstat(other.fd).st_size == 0
    opened = Block(here)
    assert os.fstat(opened.fd).st_ino == os.fstat(block.fd).st_ino
