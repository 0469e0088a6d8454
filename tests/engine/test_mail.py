"""Mail between processes: what arrives, when a slot is free again, what a stranger sees."""

from __future__ import annotations

import gc
import multiprocessing
from typing import Any

import pytest
import torch

from fedsim.engine.ray.mail import POSSIBLE, SMALL, Box, Mail, Place, Slot, Slots

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="no anonymous files here: Ray's object store is used")
BIG = SMALL // 4 + 1  # float32 numbers that do not fit into the pickle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7), (SMALL, 3)])
def test_what_is_written_is_read(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = {"a": (torch.rand(shape) * 9).to(dtype), "b": [1, "x", torch.arange(BIG).float()[::2]]}
    slot = Slot()
    again = Slot(slot.place).read(slot.write(value))
    assert again["b"][:2] == [1, "x"] and again["a"].dtype == dtype
    torch.testing.assert_close(again["a"], value["a"], rtol=0, atol=0)
    torch.testing.assert_close(again["b"][2], value["b"][2], rtol=0, atol=0)


def test_a_slot_grows_and_what_was_read_before_stays_in_place() -> None:
    slot, small, large = Slot(), torch.rand(BIG), torch.rand(100 * BIG)
    reader = Slot(slot.place)
    first = reader.read(slot.write(small))
    assert torch.equal(first, small)
    assert torch.equal(reader.read(slot.write(large)), large)
    assert torch.equal(first, large[:BIG])  # a view of the slot: the writer must wait until it is given back


def test_a_slot_is_given_back_with_the_last_array() -> None:
    slots = Slots()
    slot = slots.take()
    value = slot.read(slot.write({"a": torch.rand(BIG), "b": torch.rand(BIG)}), done=lambda: slots.give(slot))
    kept = value.pop("b")[3:5]
    del value
    gc.collect()
    assert slots.take() is not slot
    del kept
    gc.collect()
    assert slots.take() is slot


def test_mail_without_large_arrays_needs_no_slot() -> None:
    slots = Slots()
    slot = slots.take()
    mail = slot.write({"a": torch.rand(3)})
    assert mail.spans == ()
    value = slot.read(mail, done=lambda: slots.give(slot))
    assert slots.take() is slot and value["a"].shape == (3,)


def test_a_long_pickle_lies_in_the_slot_too() -> None:
    """A mail itself stays small, so that a pipe holds several."""
    slot = Slot()
    for value in (list(range(SMALL)), [torch.full((SMALL,), float(i)) for i in range(300)]):
        mail = slot.write(value)
        assert mail.head == b"" and len(mail.spans) == 1
        again = Slot(slot.place).read(mail)
        assert [float(torch.as_tensor(v).sum()) for v in again] == [
            float(torch.as_tensor(v).sum()) for v in value
        ]


def _read(place: Place, mail: Mail, probe: Any, answer: Any) -> None:
    box = Box()
    answer.put((float(box[place].read(mail).sum()), box.reaches(probe)))


def test_another_process_maps_the_same_memory() -> None:
    probe, value, slot = Slots().probe(), torch.ones(1000 * BIG), Slot()
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_read, args=(slot.place, slot.write(value), probe, answer))
    process.start()
    assert answer.get(timeout=60) == (value.sum().item(), True)
    process.join()


def test_a_stranger_is_not_reached() -> None:
    """Same numbers on another machine: no such file, or another content."""
    probe = Slots().probe()
    assert probe is not None and Box().reaches(probe)
    other = Slot()
    other.write(torch.zeros(2 * SMALL, dtype=torch.uint8))
    for place in (other.place, Place(probe.place.pid, 10_000, 1), Slot().place):
        probe.place = place
        assert not Box().reaches(probe)
    assert not Box().reaches(None)
