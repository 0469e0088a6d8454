"""GGEUR where classes are missing or small, statistics noisy, rows not finite, options impossible."""

from __future__ import annotations

import pytest
import torch
from problems import classes, classification, recorded
from torch import nn

from clients.ggeur import unpack_geometry
from fedsim.errors import ConfigError

SIX = "strategy.target=6"


def test_a_class_nobody_has_gets_nothing() -> None:
    clients = [(x, torch.where(y == 1, 2, y)) for x, y in classes()]
    run, result = recorded("ggeur", classification(clients=clients), SIX)
    state = run.states[-1]
    assert float(state["ggeur/n"][1]) == 0 and float(state["ggeur/p"][1]) == 0
    assert all(torch.isfinite(v).all() for v in result.weights.values())


def test_accuracy_of_classes_that_a_client_lacks() -> None:
    """Client 0 lacks class 2, client 1 lacks 0 and 1, client 2 none: the mean of two clients' means."""
    clients = [(x, y.clone()) for x, y in classes((8, 8, 8))]
    clients[0][1][:] = torch.tensor([0, 1] * 4)
    clients[1][1][:] = 2
    clients[2][1][:] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    settings = ("rounds=1", "clients_per_round=3", "evaluation.every=1", "evaluation.by_class=true")
    problem = classification(clients=clients, settings=settings, test=classes((30,), seed=1)[0])
    _, result = recorded("ggeur", problem, SIX)
    a, b, c = result.rows[-1]["class_accuracy"]
    assert len({a, b, c}) > 1
    assert result.rows[-1]["absent/accuracy"] == pytest.approx((c + (a + b) / 2) / 2)
    assert result.rows[0]["ranks"] == [4, 4, 4]


def test_small_classes_may_be_kept_back() -> None:
    problem = classification()
    run, _ = recorded("ggeur", problem, SIX, "strategy.min_count=3")
    counts = torch.stack([torch.bincount(y, minlength=3) for _, y in problem.clients])
    expected = torch.where(counts >= 3, counts, 0).sum(0)
    assert run.states[-1]["ggeur/n"].tolist() == expected.tolist()


def test_noise_perturbs_what_is_sent_and_keeps_it_a_covariance() -> None:
    problem = classification()
    exact, _ = recorded("ggeur", problem, SIX, "strategy.clip=100", "dtype=float64")
    plain, _ = recorded("ggeur", problem, SIX, "dtype=float64")
    assert torch.equal(exact.states[0]["ggeur/mean"], plain.states[0]["ggeur/mean"])
    one, two = (
        recorded("ggeur", problem, SIX, "strategy.clip=2", f"strategy.noise={s}", "dtype=float64")[0]
        for s in (1e-9, 0.5)
    )
    clipped, _ = recorded("ggeur", problem, SIX, "strategy.clip=2", "dtype=float64")
    for run, close in ((one, True), (two, False)):
        for label in range(3):
            found = unpack_geometry(run.states[0], 0.0).covariance(label)
            expected = unpack_geometry(clipped.states[0], 0.0).covariance(label)
            assert torch.allclose(found, expected, atol=1e-7) == close
            assert float(torch.linalg.eigvalsh(found)[0]) > -1e-9


def test_rows_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the door, where such data are refused: an encoder may overflow, too."""
    monkeypatch.setattr("fedsim.data.door.first_nonfinite", lambda x: None)
    clients = classes()
    clients[1][0][5, 2] = float("nan")
    _, result = recorded("ggeur", classification(clients=clients, cohorts=[[0, 1]] * 4), SIX)
    first = result.rows[0]["failures"][0]
    assert (first["client"], first["kind"], first["task"]) == (1, "nonfinite", "statistics")
    assert "row 5 of its embeddings is not finite" in first["reason"]


def test_without_classes_it_says_so() -> None:
    clients = [(x, y.float()[:, None]) for x, y in classes()]
    problem = classification(
        clients=clients, test=None, loss=nn.functional.l1_loss, model=lambda: nn.Linear(4, 1)
    )
    with pytest.raises(ConfigError, match="GGEUR needs class labels"):
        problem.run("strategy=ggeur", SIX)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.scale=root", "strategy.scale=root: choose one of sqrt, eigenvalue"),
        ("strategy.noise=1", "strategy.noise=1: needs strategy.clip"),
        ("strategy.energy=0", r"strategy.energy=0: must lie in \(0, 1\]"),
        ("strategy.base.steps=reference", "base.steps=reference"),
        ("strategy.target=-1", "strategy.target=-1"),
    ],
)
def test_impossible_options(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run("strategy=ggeur", "strategy@strategy.base=scaffold", override)
