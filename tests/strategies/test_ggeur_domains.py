"""GGEUR over several domains: prototypes pooled by domain, rows of the other domains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Recorded, classes, classification, hashes, method

SIX = "strategy.target=6"


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
