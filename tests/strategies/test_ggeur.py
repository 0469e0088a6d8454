"""GGEUR as a strategy: phase 0, late clients, generated rows in training, bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Network, classes, classification, hashes, recorded
from torch import Tensor, nn

from clients.geometry import class_geometry, class_statistics
from clients.ggeur import pack, unpack, unpack_geometry
from fedsim.config.compose import compose
from strategies.ggeur import augment

SIX = "strategy.target=6"


def dense(x: Tensor) -> Tensor:
    c = x.double() - x.double().mean(0)
    return c.T @ c / len(x)


def geometry_in(state: dict[str, Any]) -> Any:
    return unpack_geometry(state, 0.0)


# -- phase 0 ------------------------------------------------------------------------------------------------------


def test_phase_0_gives_the_pooled_shape_of_every_class() -> None:
    problem = classification()
    x, y = (torch.cat(parts) for parts in zip(*problem.clients, strict=True))
    run, _ = recorded("ggeur", problem, SIX, "dtype=float64")
    geometry = geometry_in(run.states[0])
    for label in range(3):
        torch.testing.assert_close(geometry.covariance(label), dense(x[y == label]), rtol=0, atol=1e-12)
    assert run.states[0]["ggeur/n"].tolist() == torch.bincount(y).tolist()
    assert torch.equal(run.states[0]["ggeur/A"], run.states[-1]["ggeur/A"])


def test_phase_0_is_reported_apart_from_the_rounds() -> None:
    _, result = recorded("ggeur", classification(), SIX)
    _, plain = recorded("fedavg", classification())
    phases = [row.get("phase0") for row in result.rows]
    assert phases[0]["bytes_up"] > 0 and phases[0]["bytes_down"] > 0 and phases[0]["seconds"] > 0
    assert phases[1:] == [None, None, None]
    for key in ("bytes_up", "bytes_down"):
        assert [row[key] for row in result.rows] == [row[key] for row in plain.rows]
        assert result.summary["phase0"][key] == phases[0][key]
        assert result.summary[key] == sum(row[key] for row in plain.rows)


def test_bytes_up_are_those_of_the_factors() -> None:
    """Per client 3 counts of 8 bytes, its domain and weight (8 each), float32 means and triangles; then a receipt."""
    problem = classification()
    _, result = recorded("ggeur", problem, SIX)
    expected = 0
    for _, y in problem.clients:
        expected += 3 * 8 + 16 + 8
        for n in torch.bincount(y, minlength=3).tolist():
            r = min(max(n - 1, 0), 4)
            expected += 4 * (r * 4 - r * (r - 1) // 2 + (4 if n else 0))
    assert result.rows[0]["phase0"]["bytes_up"] == expected


def test_statistics_survive_the_journey() -> None:
    x, y = classes((9,))[0]
    found = class_statistics(x, y, 4)
    back = unpack(*(v[None] if k == "n" else v for k, v in pack(found, torch.float64).items()), full=False)[0]
    assert torch.equal(back.n, found.n) and torch.equal(back.mean, found.mean)
    assert all(torch.equal(a, b) for a, b in zip(back.factors, found.factors, strict=True))


def test_late_clients_are_merged_exactly(tmp_path: Path) -> None:
    """Clients 4 and 5 miss phase 0; once they take part, the geometry is that of everybody."""
    cohorts = [[0, 1], [2, 3], [0, 4], [4, 5]]
    problem = classification(cohorts=cohorts)
    whole, _ = recorded("ggeur", problem, SIX, "dtype=float64")
    late, result = missing_at_first(problem, (4, 5), tmp_path)
    x, y = (torch.cat(parts) for parts in zip(*problem.clients[:5], strict=True))
    for label in range(3):
        found = geometry_in(late.states[2]).covariance(label)
        torch.testing.assert_close(found, dense(x[y == label]), rtol=0, atol=1e-12)
        everybody = geometry_in(whole.states[-1]).covariance(label)
        torch.testing.assert_close(
            geometry_in(late.states[3]).covariance(label), everybody, rtol=0, atol=1e-12
        )
    assert [row.get("statistics_missing") for row in result.rows] == [2, None, 1, 0]
    told = [(f["client"], f["task"], f["kind"]) for f in result.rows[0]["failures"]]
    assert told == [(4, "statistics", "failed"), (5, "statistics", "failed")]
    assert "phase0" not in result.rows[1] and result.rows[2]["phase0"]["bytes_down"] > 0
    versions = [float(s["ggeur/version"]) for s in late.states]
    assert versions == [1, 1, 2, 3]


def test_late_statistics_may_be_kept_without_renewing_the_geometry(tmp_path: Path) -> None:
    problem = classification(cohorts=[[0, 1], [2, 3], [0, 4], [4, 5]])
    run, _ = missing_at_first(problem, (4, 5), tmp_path, "strategy.refresh=false")
    assert torch.equal(run.states[0]["ggeur/A"], run.states[3]["ggeur/A"])
    assert float(run.states[3]["ggeur/n"].sum()) == sum(len(y) for _, y in problem.clients)


def missing_at_first(problem: Any, clients: Any, folder: Path, *overrides: str) -> Any:
    """A run in which the statistics of ``clients`` fail in round 1."""
    from problems import Recorded, method

    inner = method("ggeur", SIX, *overrides)
    inner.client = Unavailable(inner.client, clients)
    strategy = Recorded(inner)
    settings = ["dtype=float64", "failures.policy=skip", f"dir={folder / 'run'}"]
    return strategy, problem.run("strategy=ggeur", *settings, strategy=strategy)


class Unavailable:
    def __init__(self, inner: Any, clients: Any):
        self.inner, self.clients = inner, clients

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def statistics(self, job: Any) -> Any:
        if job.round == 0 and job.client in self.clients:
            raise RuntimeError("not yet there")
        return self.inner.statistics(job)


# -- training -----------------------------------------------------------------------------------------------------


class Watched(Network):
    """Notes the inputs it is trained on."""

    seen: list[Tensor] = []  # noqa: RUF012 - shared by the copies that workers make

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(x.detach().clone())
        return super().forward(x)


def watched(problem: Any, *overrides: str) -> tuple[Tensor, Any]:
    """All training inputs of a run, and its result."""
    Watched.seen.clear()
    result = problem.run("strategy=ggeur", *overrides, model=Watched(*problem.model))
    return torch.cat(Watched.seen), result


def test_clients_train_on_their_rows_and_the_generated_ones() -> None:
    problem = classification(cohorts=[[0]], settings=("rounds=1", "clients_per_round=1"))
    settings = ["client.epochs=1", "client.batch_size=1000", "client.shuffle=false", "dtype=float64"]
    x, y = (t.double() if t.is_floating_point() else t for t in problem.clients[0])
    pooled = [torch.cat(parts) for parts in zip(*problem.clients, strict=True)]
    geometry = class_geometry(class_statistics(*pooled, 3))
    from clients.noise import KeyedNoise
    from fedsim import rng

    expected, labels = augment(x, y, geometry, target=9, noise=KeyedNoise(rng.key(0, "ggeur/rows", 0, 0)))
    seen, result = watched(problem, "strategy.target=9", *settings)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)
    table = result.per_client
    count = table[(table.metric == "generated_rows")].value.tolist()
    assert count == [len(labels) - len(y)]
    assert table[table.metric == "weight"].value.tolist()[-1] == len(labels)


def test_no_target_is_the_base_itself() -> None:
    for base in ("fedavg", "scaffold"):
        name = f"strategy@strategy.base={base}"
        _, wrapped = recorded("ggeur", classification(), "strategy.target=0", name)
        _, plain = recorded(base, classification())
        assert hashes(wrapped) == hashes(plain)


def test_held_rows_and_rows_made_in_the_batch_loop_agree() -> None:
    problem = classification()
    _, held = recorded("ggeur", problem, "strategy.target=40", "dtype=float64")
    _, made = recorded("ggeur", problem, "strategy.target=40", "dtype=float64", "strategy.memory_mb=0")
    for name, value in held.weights.items():
        torch.testing.assert_close(made.weights[name], value, rtol=0, atol=1e-12)


def test_the_same_rows_every_round_unless_redrawn() -> None:
    problem = classification(cohorts=[[0], [0]], settings=("rounds=2", "clients_per_round=1"))
    settings = [SIX, "client.epochs=1", "client.batch_size=1000", "client.shuffle=false"]
    seen, _ = watched(problem, *settings)
    assert torch.equal(*seen.chunk(2))
    seen, _ = watched(problem, *settings, "strategy.redraw=true")
    first, second = seen.chunk(2)
    assert torch.equal(first[:7], second[:7]) and not torch.equal(first, second)


def test_generated_rows_of_unit_embeddings_are_of_unit_length_again() -> None:
    clients = [(nn.functional.normalize(x, dim=1), y) for x, y in classes()]
    problem = classification(clients=clients, cohorts=[[0]], settings=("rounds=1", "clients_per_round=1"))
    settings = [SIX, "client.epochs=1", "client.batch_size=1000", "client.shuffle=false"]
    plain, _ = watched(problem, *settings)
    unit, _ = watched(problem, *settings, "strategy.renormalize=true")
    torch.testing.assert_close(unit, nn.functional.normalize(plain, dim=1))
    assert float((plain.norm(dim=1) - 1).abs().max()) > 0.05


def test_controls() -> None:
    """``none`` copies own rows; ``own`` keeps to the span of the client's own rows."""
    problem = classification(cohorts=[[2]], settings=("rounds=1", "clients_per_round=1"))
    settings = ["client.epochs=1", "client.batch_size=1000", "client.shuffle=false", SIX]
    copies, _ = watched(problem, *settings, "strategy.shape=none")
    assert len(torch.unique(copies, dim=0)) == 3 < len(copies)
    own, _ = watched(problem, *settings, "strategy.shape=own")
    x, y = problem.clients[2]
    for label in torch.unique(y).tolist():
        rank = int((y == label).sum()) - 1
        made = own[3:][generated_labels(y) == label] - x[y == label].mean(0)
        assert int(torch.linalg.matrix_rank(made, tol=1e-4)) <= rank


def generated_labels(y: Tensor) -> Tensor:
    return torch.cat([torch.full((6 - n,), c) for c, n in enumerate(torch.bincount(y).tolist()) if n])


@pytest.mark.parametrize("base", ["fedprox", "feddyn", "fedadam", "moon", "fedntd", "fedproto", "fedspeed"])
def test_every_base_trains_on_more_rows(base: str) -> None:
    settings = [] if base != "fedproto" else ["strategy.base.share=model"]
    name = f"strategy@strategy.base={base}"
    more, _ = recorded("ggeur", classification(), SIX, name, *settings)
    plain, _ = recorded("ggeur", classification(), "strategy.target=0", name, *settings)
    assert not torch.equal(more.states[-1]["w"], plain.states[-1]["w"])
    assert set(plain.states[-1]) == set(more.states[-1])


def test_vectorised_clients_get_their_rows_too() -> None:
    problem = classification(cohorts=[range(6)] * 2)
    settings = [SIX, "rounds=2", "dtype=float64"]
    _, looped = recorded("ggeur", problem, *settings)
    _, together = recorded("ggeur", problem, *settings, "engine.vectorize=on")
    for name, value in looped.weights.items():
        torch.testing.assert_close(together.weights[name], value, rtol=0, atol=1e-10)


def test_the_method_is_named_after_both() -> None:
    assert compose(["strategy=ggeur", "strategy@strategy.base=scaffold"]).method == "ggeur+scaffold"
    assert compose(["strategy=scaffold"]).method == "scaffold"
