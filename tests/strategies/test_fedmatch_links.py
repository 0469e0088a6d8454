"""FedMatch's options of the authors' code: what is too small does not travel, and lr falls on a plateau."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from callbacks import Interrupt
from problems import classes, classification, hashes, recorded
from semi import LABELLED, NOISE

from clients.fedmatch import Sparse, received_psi, sent_psi
from fedsim.errors import ConfigError

SERVER = "data.labelled={at: server, count: 30}"
LOOSE = ("strategy.confidence=0.35", "strategy.lam_2=0.1", "strategy.lam_s=1", *NOISE)
CUT = "strategy.sparse={small: 0.07, change: 0.01}"


def problem(**changes: Any) -> Any:
    return classification(clients=classes((20, 30, 25, 40, 22, 31)), **{"cohorts": [range(6)] * 4, **changes})


def run(*settings: str, **changes: Any) -> Any:
    return problem(**changes).run("strategy=fedmatch", *LOOSE, *settings)


def test_what_is_left_of_vectors() -> None:
    rule, psi = Sparse(0.1, 0.5), torch.tensor([0.05, -0.2, 0.1, 3.0])
    assert rule.kept(psi).tolist() == [0, pytest.approx(-0.2), 0, 3]
    assert rule.moved(psi, torch.tensor([1.0, 0.2, 0.1, 2.0])).tolist() == pytest.approx([-0.95, 0, 0, 1])
    whole = torch.zeros(40)
    whole[[3, 17]] = torch.tensor([1.5, -2.0])
    sent = sent_psi("psi", whole, 40)
    assert sum(t.numel() * t.element_size() for t in sent.values()) == 16
    found = received_psi("psi", sent, torch.ones(40))
    assert found is not None and torch.equal(found, whole)
    assert set(sent_psi("psi", torch.ones(40), 40)) == {"psi"} and received_psi("other", sent, whole) is None


@pytest.mark.parametrize("labels", [LABELLED, SERVER], ids=["at clients", "at the server"])
def test_bytes_are_those_that_are_sent(labels: str) -> None:
    """Less than of whole vectors, both ways; a frame is what the codec's test says."""
    strategy, found = recorded(
        "fedmatch", problem(), *LOOSE, CUT, labels, "strategy.helpers_every=2", "strategy.weighting=uniform"
    )
    dense = run(labels, "strategy.helpers_every=2")
    for row, whole in zip(found.rows, dense.rows, strict=True):
        assert row["bytes_up"] < whole["bytes_up"] and row["bytes_down"] < whole["bytes_down"]
    psi = strategy.series("psi")
    assert all(((p == 0) | (abs(p) > 0.07)).all() for p in psi)
    assert any((a != b).any() for a, b in pairwise(psi))


def test_where_nothing_moves_enough_nothing_but_headers_travels() -> None:
    found = run("strategy.sparse={small: 0, change: 1e6}", LABELLED, "strategy.helpers=0")
    assert len(set(hashes(found))) == 1
    size = sum(v.numel() for v in found.weights.values())
    frame = 8 + 4 + min(-(-(size - 1).bit_length() // 8), -(-size // 8))
    assert [row["bytes_up"] for row in found.rows] == [6 * (2 * frame + 8)] * 4


def test_the_rate_falls_where_validation_no_longer_gets_better(tmp_path: Any) -> None:
    given = (
        LABELLED,
        "evaluation.validation=0.2",
        "strategy.plateau={patience: 1, factor: 4}",
        "client.lr=3",
        "evaluation.every=1",
    )
    strategy, found = recorded("fedmatch", problem(), *LOOSE, *given, "rounds=4")
    lowest, waited, pace = float("inf"), 0, 1.0
    for row, held in zip(found.rows, strategy.series("plateau"), strict=True):
        if row["val/loss"] < lowest:
            lowest, waited = row["val/loss"], 0
        else:
            waited += 1
        if waited == 1:
            waited, pace = 0, pace / 4
        assert held.tolist() == pytest.approx([lowest, waited, pace])
    assert pace < 1
    saved = (*given, f"dir={tmp_path}", "checkpoint.every=1")
    with pytest.raises(KeyboardInterrupt):
        problem().run("strategy=fedmatch", *LOOSE, *saved, callbacks=[Interrupt(3)])
    assert hashes(run(*saved)) == hashes(found) != hashes(run(*given[:2], *given[3:]))


def test_the_server_goes_at_the_same_pace() -> None:
    given = (SERVER, "evaluation.validation=0.2", "client.lr=3")
    usual, falls = (run(*given, *more) for more in ([], ["strategy.plateau={patience: 1, factor: 1000}"]))
    assert hashes(usual)[0] == hashes(falls)[0] and hashes(usual) != hashes(falls)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("strategy.plateau={patience: 2, factor: 3}", "evaluation.validation=0.1"),
        ("strategy.plateau={patience: 0, factor: 3}", "patience"),
        ("strategy.sparse={small: 1}", "small and change"),
        ("strategy.sparse={small: -1, change: 0}", "sparse.small"),
    ],
)
def test_refusals(changed: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(LABELLED, changed)
