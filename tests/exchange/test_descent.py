"""The way down by differences: what clients start from, what each is sent, and what a resumed run knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks import Fail, hooked
from problems import classification, network

from fedsim.exchange.codecs import top_k
from fedsim.exchange.compression import sign
from fedsim.exchange.descent import held_model
from fedsim.exchange.payload import Outcome, Payload
from fedsim.task.layout import Layout

SIZE, FRAME = 43, 8 + 4 * 5 + 4  # numbers of the little network, bytes of a tenth of them
WHOLE, NUMBER = 4 * SIZE, 8  # bytes of a model, and of what else a message says
COHORTS = [[0, 1, 2], [0, 1], [0, 2], [2, 3], [0, 1, 2, 3]]
DOWN = ("compression=top_k", "compression.rate=1", "compression.down={codec: top_k, rate: 0.1}")
SENT = [  # in each round: models and frames; who missed frames is sent these, but no more bytes than a model has
    3 * WHOLE,
    2 * FRAME,
    (1 + 2) * FRAME,
    1 * FRAME + FRAME + WHOLE,
    4 * FRAME + FRAME + 2 * FRAME,
]
MARKS = [0, 0, 0, 1, 0]  # clients that are told that they are sent all


def problem(**changes: Any) -> Any:
    given = ("rounds=5", "client.epochs=1", "strategy.weighting=uniform")
    return classification(cohorts=COHORTS, settings=given, **changes)


def given_model(job: Any) -> torch.Tensor:
    return job.model.layout.compact(job.message.arrays["w"]).clone()


def bytes_down(rounds: Any) -> list[int]:
    return [row["bytes_down"] for row in rounds]


def test_clients_start_from_what_frames_moved_and_are_sent_what_they_miss() -> None:
    seen = dict[int, torch.Tensor]()
    strategy = hooked("fedavg", lambda job: seen.update({job.round: given_model(job)}))
    result = problem().run(*DOWN, strategy=strategy)
    held = seen[0].double().numpy()
    for t in range(1, 5):
        ahead = strategy.states[t - 1]["w"].double().numpy() - held
        places = top_k(ahead, 5)
        held[places] = (held[places] + np.float32(ahead[places])).astype(np.float32)
        np.testing.assert_array_equal(seen[t].numpy(), held.astype(np.float32))
    clients = np.array([len(c) for c in COHORTS])
    assert bytes_down(result.rows) == [
        s + NUMBER * (n + m) for s, n, m in zip(SENT, clients, MARKS, strict=True)
    ]


def test_a_client_that_failed_is_not_taken_to_hold_the_model() -> None:
    lost = hooked("fedavg", Fail([1], rounds=[1]))
    rows = problem().run(*DOWN, "failures.policy=skip", strategy=lost).rows
    through = problem().run(*DOWN).rows
    assert bytes_down(rows)[4] == bytes_down(through)[4] + FRAME


def test_a_resumed_run_and_other_chunks_send_the_same(tmp_path: Path) -> None:
    option = (*DOWN, "privacy=client", "privacy.z=0.5", "privacy.delta=1e-2", "privacy.mechanism=gaussian")
    through = problem().run(*option)
    problem().run(*option, "rounds=3", f"dir={tmp_path}", "checkpoint.every=1")
    again = problem().run(*option, f"dir={tmp_path}", "checkpoint.every=1")
    apart = problem().run(*option, "engine.chunks=3", "engine.vectorize=off")
    for other in (again, apart):
        assert [r["cohort"] for r in other.rows] == COHORTS
        assert bytes_down(other.rows) == bytes_down(through.rows)
    assert again.rows[-1]["weights_hash"] == through.rows[-1]["weights_hash"]


@pytest.mark.parametrize("codec", ["random_k", "sign", "low_rank", "top_k"])
def test_what_frames_leave_out_is_in_the_next_ones(codec: str) -> None:
    """Of a model that no longer moves, what clients hold comes ever closer to it."""
    layout = Layout(network("tanh"), torch.float32)
    numbers = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    start, w = (layout.expand(v) for v in numbers)
    held = held_model(sign(down={"codec": codec}), 0, layout)
    assert held is not None
    for number in range(61):
        descent = held.descend(Payload({"w": w if number else start}), "fit", [0])
        assert descent is not None and descent.number == number
        held.sent(descent, [Outcome(0, "ok")])
    assert float((descent.w - w).norm()) < 0.1 * float((start - w).norm())
