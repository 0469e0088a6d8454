"""The event queue: order, ties, checkpointing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.system.events import EventQueue


def test_ties_come_out_in_the_order_they_went_in() -> None:
    queue = EventQueue()
    for client, time in ((5, 2.0), (3, 1.0), (4, 1.0), (9, 2.0)):
        queue.push(time, "arrives", client)
    assert [queue.pop().client for _ in range(4)] == [3, 4, 5, 9]
    assert queue.now == 2.0 and queue.peek() is None


@pytest.mark.parametrize("time", [0.5, float("nan")])
def test_the_past_is_refused(time: float) -> None:
    queue = EventQueue(now=1.0)
    with pytest.raises(ValueError, match="client 7"):
        queue.push(time, "arrives", 7)


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(0, 30))
def test_a_queue_made_from_items_goes_on_where_the_first_stood(times: list[float], taken: int) -> None:
    queue = EventQueue()
    for client, time in enumerate(times):
        queue.push(time, "wakes", client, client * 2)
    for _ in range(min(taken, len(times))):
        queue.pop()
    again = EventQueue(queue.items(), now=queue.now, sequence=queue.sequence)
    for one in (queue, again):
        one.push(one.now + 1.0, "arrives", 99)
    assert [queue.pop() for _ in range(len(queue))] == [again.pop() for _ in range(len(again))]
    assert queue.now == again.now
