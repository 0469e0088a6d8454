"""What exchanges take of virtual time: who answers and when, before anybody trains; what it took, afterwards.

An exchange is planned and settled as a whole; clients of an asynchronous server depart one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedsim.exchange.downlink import part_bytes
from fedsim.exchange.packing import row_bytes, sent_bytes
from fedsim.exchange.payload import Outcome
from fedsim.server.exchanger import Exchanger, Inquiry

if TYPE_CHECKING:
    from fedsim.system.clock import Clock
    from fedsim.system.schedule import Schedule
    from fedsim.topology.traffic import Traffic


class Departure(NamedTuple):
    """A client that starts now, and what will become of it."""

    client: int
    seconds: float  # until it answers or is lost
    lost: str  # why it will be, or empty
    steps: int  # local steps it is asked for
    joules: float
    bytes_down: int
    battery: float | None  # share that will be left, where it has one


def plan(
    clock: Clock,
    exchanger: Exchanger,
    inquiry: Inquiry,
    number: int,
    wanted: int | None = None,
    traffic: Traffic | None = None,
) -> Schedule:
    """Who will answer an exchange that starts now, and when; see ``Clock.plan``."""
    if clock.predicts:
        _try_out(clock, exchanger, inquiry)
    message, works = inquiry.message, inquiry.works
    layout = exchanger.context.architecture(inquiry.broadcast.architecture).layout
    legs = exchanger.legs(inquiry)
    size = legs.down + sent_bytes(inquiry.broadcast.payload, layout) + row_bytes(message.rows, layout)
    standing, parts = inquiry.broadcast.standing, message.each
    down = [size + part_bytes(parts.get(c), standing, layout) for c in works]
    return clock.plan(
        works,
        down if traffic is None else traffic.received[list(works)],
        None if traffic is None or traffic.sent is None else traffic.sent[list(works)],
        kind=inquiry.kind,
        round=inquiry.broadcast.round,
        number=number,
        wanted=wanted,
        trips=legs.trips,
    )


def settle(clock: Clock, schedule: Schedule, inquiry: Inquiry, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """All outcomes of an exchange in client order, those who were lost among them, with their times and energy."""
    everybody = sorted([*outcomes, *schedule.lost(inquiry.broadcast.task)], key=lambda o: o.client)
    clock.settle(schedule, everybody, inquiry.kind)
    return everybody


def departures(clock: Clock, exchanger: Exchanger, inquiry: Inquiry, number: int) -> Iterator[Departure]:
    """What will become of each client of an exchange whose answers are not waited for."""
    _try_out(clock, exchanger, inquiry)
    schedule = plan(clock, exchanger, inquiry, number)
    for i, client in enumerate(inquiry.clients):
        seconds = float(schedule.end[i])
        joules = schedule.energy(i, seconds, clock.fleet)
        spent = Outcome(client, "ok", joules=joules)
        clock.drain([spent])
        yield Departure(
            client=client,
            seconds=seconds,
            lost=schedule.dropped.get(client, ""),
            steps=schedule.works[client].steps,
            joules=joules,
            bytes_down=int(schedule.bytes_down[i]),
            battery=spent.battery,
        )


def _try_out(clock: Clock, exchanger: Exchanger, inquiry: Inquiry) -> None:
    """Measure on one client what an exchange takes whose kind was not seen yet."""
    if inquiry.kind not in clock.facts:
        clock.learn(inquiry.kind, exchanger.try_out(inquiry), inquiry.works)
