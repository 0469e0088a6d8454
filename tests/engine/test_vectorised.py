"""Clients computed at once: every rule that declares itself so against the loop, and what is never done silently."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import classification, hashes, method, recorded
from together import DeclaredClient, run
from torch import Tensor

import clients
from clients.base import Client
from clients.ditto import DittoClient
from clients.dual import DualClient
from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.engine.vectorised import ChunkJob
from fedsim.errors import ClientError
from fedsim.local.job import Job

DECLARED = {  # every built-in class that may run vectorised, by a strategy that uses it
    "SGDClient": ("fedavg",),
    "FineTuneClient": ("fedavg_ft",),
    "LocalNormClient": ("fedbn",),
    "DualClient": ("feddyn",),
    "FedSpeedClient": ("fedspeed", "strategy.alpha=0.5", "strategy.beta=0.2"),
    "FedProxClient": ("fedprox",),
    "FedCMClient": ("mofedsam",),
    "FedNovaClient": ("fednova",),
    "SAMClient": ("fedsam",),
    "ScaffoldClient": ("scaffold",),
    "GradientClient": ("fedsgd", "client.steps=1"),
    "LocalClient": ("local_only",),
    "OneShotClient": ("one_shot",),
    "PeerClient": ("gossip", "topology=ring", "clients_per_round=6", "strategy.momentum=keep"),
}
ALL_AT_ONCE = [range(6)] * 3


def built_in(base: type = Client) -> Iterator[type]:
    """Client classes below ``base`` that are fedsim's own."""
    for module in pkgutil.walk_packages(clients.__path__, "clients."):
        importlib.import_module(module.name)
    for cls in base.__subclasses__():
        if cls.__module__.startswith("clients."):
            yield cls
        yield from built_in(cls)


def test_the_table_names_every_class_that_declares_itself_vectorisable() -> None:
    assert {cls.__name__ for cls in built_in() if cls.vectorisable} == DECLARED.keys()


@pytest.mark.parametrize("more", [(), ("client.momentum=0.5", "client.clip_norm=0.3", "client.min_epochs=1")])
@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_rule_agrees_with_the_loop(
    name: str, more: tuple[str, ...], trained: list[set[int]]
) -> None:
    strategy, *settings = DECLARED[name]
    settings = [s for s in (*settings, *more) if not ("min_epochs" in s and "client.steps=1" in settings)]
    assert type(method(strategy, *settings).client).__name__ == name
    problem = classification(cohorts=ALL_AT_ONCE)
    (loop, one), (together, many) = (
        recorded(strategy, problem, "rounds=3", "dtype=float64", f"engine.vectorize={v}", *settings)
        for v in ("off", "on")
    )
    assert len(trained) == (2 if strategy == "one_shot" else 6)  # two chunks, once or in three rounds
    assert all(trained)
    for k, v in loop.states[-1].items():
        if isinstance(v, Tensor):
            torch.testing.assert_close(together.states[-1][k], v, rtol=0, atol=1e-12)
    for kept, other in zip(loop.kept[-1], together.kept[-1], strict=True):
        torch.testing.assert_close(dict(other), dict(kept), rtol=0, atol=1e-12)
    for metric in ("steps", "clipped"):
        a, b = (r.per_client.query(f"metric == '{metric}'").value.tolist() for r in (one, many))
        assert a == b
    assert len(one.per_client.query("metric == 'steps'")) > 0


# -- who may ---------------------------------------------------------------------------------------------------------


def test_a_declaration_is_not_inherited_past_a_change_of_the_rule() -> None:
    changes: dict[str, Any] = {
        k: lambda self, *a: None for k in ("fit", "begin", "step", "finish", "prepare")
    }
    for name, function in changes.items():
        assert not type("Changed", (SGDClient,), {name: function}).vectorisable
    assert not type("Changed", (DualClient,), {"gradient": changes["step"]}).vectorisable
    assert not type("Changed", (SGDClient,), {"keeps": changes["step"]}).vectorisable
    mixin = type("Mixin", (), {"step": changes["step"]})
    assert not type("Mixed", (mixin, SGDClient), {}).vectorisable
    assert not type(
        "Grandchild", (type("Changed", (SGDClient,), {"step": changes["step"]}),), {}
    ).vectorisable
    assert type("Measured", (SGDClient,), {"evaluate": changes["step"], "lr": 3}).vectorisable
    assert type("Declared", (SGDClient,), {"step": changes["step"], "vectorisable": True}).vectorisable
    assert not Client.vectorisable
    assert not DittoClient.vectorisable


@dataclass(frozen=True, kw_only=True)
class NormedClient(SGDClient):
    """Steps along ``g / |g|``, which means something else where g has rows for several clients."""

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        g = job.grad(w, batch)
        return job.sgd(w, g / g.norm())


def test_a_step_that_is_not_declared_runs_one_by_one_and_that_is_said_once() -> None:
    loop = run(NormedClient, "engine.vectorize=off")
    with pytest.warns(UserWarning) as caught:
        on = run(NormedClient, "engine.vectorize=on")
    said = [str(w.message) for w in caught if "vectorize" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("engine.vectorize=on: NormedClient clients run one by one")
    assert "vectorisable = True" in said[0]
    assert "engine.vectorize=off" in said[0]
    assert hashes(on) == hashes(loop)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("strategy=fedper",), "FedPerClient does not declare"),
        (("strategy=moon",), "MoonClient does not declare"),
        (("client=adam",), "client.adam"),
        (("attack=reverse", "attack.fraction=0.34"), "Attacked does not declare"),
    ],
)
def test_what_cannot_be_vectorised_is_named_and_equals_the_loop(settings: tuple[str, ...], why: str) -> None:
    problem = classification(cohorts=[range(6)])
    loop = problem.run("rounds=1", *settings)
    with pytest.warns(UserWarning, match=why):
        on = problem.run("rounds=1", "engine.vectorize=on", *settings)
    assert hashes(on) == hashes(loop)


def test_a_model_that_cannot_be_vectorised_is_named() -> None:
    for kind, why in (("bn", "buffers"), ("dropout", "dropout")):
        with pytest.warns(UserWarning, match=f"since the model has {why}"):
            classification(kind, cohorts=[range(6)]).run("rounds=1", "engine.vectorize=on")


def test_nothing_is_said_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(DeclaredClient, "engine.vectorize=on")
        run(NormedClient, "engine.vectorize=auto")


# -- what a step sees ------------------------------------------------------------------------------------------------


def test_a_step_may_count_its_steps(trained: list[set[int]]) -> None:
    loop, on = (run(DeclaredClient, "client.epochs=3", f"engine.vectorize={v}") for v in ("off", "on"))
    assert all(trained)
    assert len(trained) == 4
    for k, v in loop.weights.items():
        torch.testing.assert_close(on.weights[k], v, rtol=0, atol=1e-12)


@dataclass(frozen=True, kw_only=True)
class BranchingClient(DeclaredClient):
    """Asks for what belongs to one client."""

    vectorisable = True

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        return job.sgd(w, job.grad(w, batch) * (1.0 if job.client == 2 else 0.5))


def test_a_declared_step_that_asks_for_one_client_runs_one_by_one() -> None:
    loop = run(BranchingClient, "engine.vectorize=off")
    with pytest.warns(UserWarning, match=r"in round 1 run one by one.*job\.client belongs to one client"):
        on = run(BranchingClient, "engine.vectorize=on")
    assert hashes(on) == hashes(loop)


@dataclass(frozen=True, kw_only=True)
class WritingClient(DeclaredClient):
    """Writes to its message while several clients are computed at once."""

    vectorisable = True

    def begin(self, job: Job, w: Tensor) -> Tensor:
        if isinstance(job, ChunkJob):
            job.message.arrays["w"].mul_(2)
        return w


def test_the_message_is_read_only_here_too() -> None:
    with pytest.raises(ClientError, match=r"in round 1: its message is read-only, but 'w' was written to"):
        run(WritingClient, "engine.vectorize=on", "failures.policy=skip")


@pytest.mark.parametrize(("kind", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_takes_part(trained: list[set[int]], kind: str, bits: int) -> None:
    problem = classification(cohorts=[range(6)] * 2)
    exact, mixed = (
        problem.run("rounds=2", "engine.vectorize=on", f"client.autocast={a}") for a in ("null", kind)
    )
    loop = problem.run("rounds=2", f"client.autocast={kind}")
    assert len(trained) == 8
    assert all(trained)

    def gap(a: Any, b: Mapping[str, Tensor]) -> float:
        return max(float((a.weights[k] - b[k]).abs().max()) for k in a.weights)

    rounding = 2 ** (1 - bits) * gap(exact, problem.model.state_dict())  # of all that was trained
    assert 1e-5 < gap(mixed, exact.weights) < rounding
    assert gap(mixed, loop.weights) < rounding
    assert all(v.dtype == torch.float32 for v in mixed.weights.values())
