"""Under privacy what the server tells others hardly hangs on one client's samples: with a clip bound of nearly nothing
everything that was clipped and noised is nearly the same, so that whatever is not stands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composing import compose_quickly
from problems import Pair, classes, classification
from registry import TABLE, Entry
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.server.exchanger import Exchanger, Inquiry

OF_SERVER = {"semifl", "fedsto"}  # train on samples of the server's, which are no client's
LEVELS = {
    "client": ("privacy=client",),
    "adaptive": (
        "privacy=client",
        "privacy.clip=adaptive",
        "privacy.adaptive.start=1e-7",
        "privacy.adaptive.noise=2",
        "participation=bernoulli",
    ),
    "local": ("privacy=local",),
    "record": ("privacy=record",),
}
DAILY = {("scaffold", "client"), ("fedloge", "adaptive"), ("fednova", "local"), ("fedspeed", "record")}
CASES = [
    pytest.param(
        e, level, id=f"{e.label}-{level}", marks=[] if (e.label, level) in DAILY else pytest.mark.nightly
    )
    for e in TABLE
    for level in LEVELS
    if e.label not in OF_SERVER
]


def others() -> list[Pair]:
    """The same clients, of which the first has other samples."""
    (x, y), *rest = classes()
    return [(x.flip(0) * -2.3 + 1.1, (y + 1) % 3), *rest]


def told(entry: Entry, level: str, clients: list[Pair], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Arrays and numbers of all messages that others than the first client receive."""
    found: dict[str, Tensor] = {}
    run = Exchanger.run

    def noting(self: Exchanger, inquiry: Inquiry, round: int) -> Any:
        shared, at = inquiry.broadcast.payload, f"{round}/{inquiry.broadcast.task}"
        parts = {"all": shared} | {str(c): p for c, p in inquiry.message.each.items() if c}
        for who, part in parts.items():
            found.update({f"{at}/{who}/{k}": t.double().clone() for k, t in part.arrays.items()})
            numbers = {k: v for k, v in part.values.items() if isinstance(v, int | float)}
            found.update({f"{at}/{who}/{k}": torch.tensor(float(v)) for k, v in numbers.items()})
        return run(self, inquiry, round)

    strategy = compose_quickly(list(entry.arguments)).strategy
    nodes = {"strategy": strategy, "strategy.base": strategy.get("base")}
    uniform = [
        f"{at}.weighting=uniform" for at, node in nodes.items() if node is not None and "weighting" in node
    ]
    clip = () if level == "adaptive" else ("privacy.clip=1e-7",)
    steps = () if entry.strategy == "fedsgd" else ("client.steps=3",)
    with monkeypatch.context() as patch:
        patch.setattr(Exchanger, "run", noting)
        classification(clients=clients).run(
            *entry.arguments, *uniform, *LEVELS[level], "privacy.z=1", "privacy.delta=1e-2", *clip, *steps
        )
    return found


@pytest.mark.parametrize(("entry", "level"), CASES)
def test_nothing_leaves_but_what_is_covered(
    entry: Entry, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        one = told(entry, level, classes(), monkeypatch)
    except ConfigError as refusal:
        pytest.skip(f"refused by name: {refusal}")
    other = told(entry, level, others(), monkeypatch)
    assert one.keys() == other.keys()
    far = {k: float((one[k] - other[k]).abs().max()) for k in one if one[k].numel()}
    assert {k: v for k, v in far.items() if not v < 1e-5} == {}
