"""GGEUR as a strategy: phase 0, generated rows in training, late clients, edge cases, bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Network, classes, classification, hashes, recorded
from torch import Tensor, nn

from clients.geometry import class_geometry, class_statistics
from clients.ggeur import pack, unpack, unpack_geometry
from fedsim.config.compose import compose
from fedsim.errors import ConfigError
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


# -- several domains ----------------------------------------------------------------------------------------------


def domains(num: int = 2) -> Any:
    """Clients 0, 1 in domain a, 2, 3 in b, 4, 5 in c; client 3 has one class only."""
    clients = classes()
    x, y = clients[3]
    clients[3] = (x, torch.full_like(y, 2))
    return clients, ["a", "a", "b", "b", "c", "c"]


def test_prototypes_pool_the_clients_of_a_domain() -> None:
    clients, names = domains()
    run, _ = recorded_domains(clients, names)
    state = run.states[-1]
    for q, name in enumerate("abc"):
        x, y = (
            torch.cat(parts)
            for parts in zip(*(c for c, n in zip(clients, names, strict=True) if n == name), strict=True)
        )
        for label in range(3):
            n = int((y == label).sum())
            assert int(state["ggeur/domain_n"][q, label]) == n
            if n:
                mean = x[y == label].double().mean(0)
                torch.testing.assert_close(state["ggeur/prototypes"][q, label], mean, rtol=0, atol=1e-12)


def recorded_domains(clients: Any, names: Any, *overrides: str) -> Any:
    from problems import Recorded, method

    strategy = Recorded(method("ggeur", SIX, "strategy.per_prototype=3", *overrides))
    problem = classification(clients=clients)
    return strategy, problem.run(
        "strategy=ggeur", "dtype=float64", "rounds=2", strategy=strategy, domains=names
    )


def test_every_client_gets_rows_of_the_other_domains() -> None:
    clients, names = domains()
    _, result = recorded_domains(clients, names, "strategy.target=0")
    table = result.per_client.query("metric == 'generated_rows'")
    present = {n: set() for n in "abc"}
    for (_, y), name in zip(clients, names, strict=True):
        present[name] |= set(y.tolist())
    for row in table.itertuples():
        others = [present[n] for n in "abc" if n != names[row.client]]
        assert row.value == 3 * sum(map(len, others))


def test_one_domain_only_has_no_second_step() -> None:
    clients, _ = domains()
    one, _ = recorded_domains(clients, ["a"] * 6)
    none, _ = recorded_domains(clients, None)
    assert torch.equal(one.states[-1]["w"], none.states[-1]["w"])


# -- edges --------------------------------------------------------------------------------------------------------


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
            found = geometry_in(run.states[0]).covariance(label)
            expected = geometry_in(clipped.states[0]).covariance(label)
            assert torch.allclose(found, expected, atol=1e-7) == close
            assert float(torch.linalg.eigvalsh(found)[0]) > -1e-9


def test_rows_that_are_not_finite_are_named() -> None:
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


@pytest.mark.slow
def test_several_domains_and_a_late_client_on_ray(ray: str, tmp_path: Path) -> None:
    """The standing message reaches every worker, a new version replaces the old one; killed and resumed too."""
    clients, names = domains()
    problem = replace(classification(clients=clients), settings=("rounds=4", "clients_per_round=3"))
    settings = [
        "strategy=ggeur",
        SIX,
        "strategy.per_prototype=3",
        "strategy.memory_mb=0",
        "checkpoint.every=1",
    ]
    serial = problem.run(*settings, domains=names)
    for workers in (1, 3):
        parallel = problem.run(*settings, ray, f"engine.workers={workers}", domains=names)
        assert hashes(parallel) == hashes(serial)

    class Stop:
        def round(self, row: dict[str, Any], rows: list[Any]) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    place = f"dir={tmp_path / 'run'}"
    with pytest.raises(KeyboardInterrupt):
        problem.run(*settings, place, ray, "engine.workers=2", domains=names, callbacks=[Stop()])
    resumed = problem.run(*settings, place, ray, "engine.workers=2", domains=names)
    assert hashes(resumed) == hashes(serial)
