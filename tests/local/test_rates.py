"""Schedules of the local rate against torch's, over rounds and over a client's steps; what they make of a run's key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose_quickly
from problems import classification, hashes
from torch.optim import lr_scheduler as theirs

from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig
from fedsim.errors import CheckpointError, ClientError, ConfigError
from fedsim.local.optimiser import LocalSteps
from fedsim.local.rates import RateSchedule, prepared, round_lr
from fedsim.run.key import run_key
from fedsim.server.round import Round

Make = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("value", "make"),
    [
        ("cosine", lambda o: theirs.CosineAnnealingLR(o, 40)),
        (
            {"shape": "cosine", "floor": 0.1, "over": 50},
            lambda o: theirs.CosineAnnealingLR(o, 50, eta_min=0.2),
        ),
        ({"shape": "linear", "floor": 0.1}, lambda o: theirs.LinearLR(o, 1.0, 0.1, total_iters=40)),
        ({"shape": "step", "every": 7}, lambda o: theirs.StepLR(o, 7, 0.1)),
        ({"shape": "step", "at": [5, 9], "gamma": 0.5}, lambda o: theirs.MultiStepLR(o, [5, 9], 0.5)),
        ({"shape": "constant", "warmup": 10}, lambda o: theirs.LinearLR(o, 1 / 11, 1.0, total_iters=10)),
        *(
            (
                {"shape": "cosine", "warmup": warmup},
                lambda o: theirs.SequentialLR(
                    o,
                    [theirs.LinearLR(o, 1 / 9, 1.0, total_iters=8), theirs.CosineAnnealingLR(o, 32)],
                    milestones=[8],
                ),
            )
            for warmup in (8, 0.2)
        ),
    ],
)
def test_factors_are_those_of_torch(value: Any, make: Make) -> None:
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, other = RateSchedule.of(value, "s"), make(opt)
    assert schedule is not None
    found, expected = list[float](), list[float]()
    for t in range(40):
        found.append(2.0 * schedule.factor(t, 40))
        expected.append(opt.param_groups[0]["lr"])
        opt.step()
        other.step()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_beyond_its_end_a_schedule_stays_where_it_is() -> None:
    cosine = RateSchedule("cosine", floor=0.25, over=4)
    assert [cosine.factor(t, 99) for t in (4, 5, 100)] == [0.25] * 3
    assert RateSchedule("cosine", warmup=9).factor(3, 4) == 0.4  # a client with fewer steps than the warm-up


def test_over_rounds_server_and_clients_have_one_rate() -> None:
    settings = ["client.lr=0.2", "client.lr_decay=0.9", "client.round_schedule={shape: linear, floor: 0.5}"]
    local = prepared(as_dataclass(compose_quickly(settings).client, ClientConfig), 4)
    for t, factor in enumerate((1, 0.875, 0.75, 0.625)):
        assert round_lr(local, t) == pytest.approx(0.2 * 0.9**t * factor, rel=1e-15)
        assert LocalSteps(local, t).lr == round_lr(local, t) == Round(t, (), 1, 0, local).lr


def test_within_a_round_each_client_goes_by_its_own_steps() -> None:
    """One client of 8 samples, 2 epochs of 4: the rates 1, 3/4, 1/2, 1/4 of 0.3."""
    problem = classification(cohorts=[[0]], clients=[classification().clients[1]])
    both = ("dtype=float64", "rounds=1", "client.lr=0.3", "client.batch_size=6", "client.shuffle=false")
    whole = problem.run(*both, "client.epochs=2", "client.schedule=linear")
    x, y = problem.clients[0]
    model = problem.model.double()  # type: ignore[union-attr]
    for t in range(4):
        part = slice(0, 6) if t % 2 == 0 else slice(6, 12)
        loss = torch.nn.functional.cross_entropy(model(x[part].double()), y[part])  # type: ignore[operator]
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data.sub_(g, alpha=0.3 * (1 - t / 4))
    torch.testing.assert_close(dict(whole.weights), dict(model.state_dict()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        ("client.schedule=cosine",),
        ("client.schedule={shape: linear, warmup: 2}", "client.momentum=0.9", "client.clip_norm=0.5"),
        ("client.groups={0.*: {lr: 0.3}, *.bias: {weight_decay: 0}}", "client.weight_decay=0.1"),
        (
            "client.groups={0.*: {frozen: true}, 2.*: {lr: 2, weight_decay: 0.1}}",
            "client.schedule=cosine",
            "client.momentum=0.9",
            "client.nesterov=true",
            "client.decoupled=true",
            "client.weight_decay=0.2",
        ),
        ("client.round_schedule=cosine", "strategy=scaffold"),
    ],
)
def test_vectorised_chunks_agree_with_the_loop(settings: tuple[str, ...]) -> None:
    problem = classification(cohorts=[range(6)] * 4)
    loop, together = (problem.run("dtype=float64", *settings, f"engine.vectorize={v}") for v in ("off", "on"))
    for k, v in loop.weights.items():
        torch.testing.assert_close(together.weights[k], v, rtol=0, atol=1e-12)


def test_accumulation_runs_one_by_one() -> None:
    problem = classification(cohorts=[range(6)])
    with pytest.warns(UserWarning, match="client.accumulate adds up"):
        on = problem.run("rounds=1", "engine.vectorize=on", "client.accumulate=2")
    assert hashes(on) == hashes(problem.run("rounds=1", "client.accumulate=2"))


def test_rounds_are_part_of_the_key_where_the_schedule_depends_on_them(tmp_path: Path) -> None:
    def keys(*settings: str) -> int:
        return len({run_key(compose_quickly([*settings, f"rounds={r}"])) for r in (4, 5)})

    for open_ in ("cosine", "linear", "{shape: constant, warmup: 0.1}"):
        assert keys(f"client.round_schedule={open_}") == 2
    for fixed in ("{shape: cosine, over: 4}", "{shape: step, every: 2}", "{shape: constant, warmup: 2}"):
        assert keys(f"client.round_schedule={fixed}") == 1
    assert keys("client.schedule=cosine") == 1
    place = f"dir={tmp_path}"
    classification().run(place, "rounds=2", "client.round_schedule=cosine")
    with pytest.raises(CheckpointError, match="rounds"):
        classification().run(place, "rounds=3", "client.round_schedule=cosine")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cosin", "client.schedule.shape=cosin: must be one of .*; nearest is 'cosine'"),
        ("3", "client.schedule=3: must name a shape"),
        ("{warmup: 3}", "must name a shape"),
        (
            "{shape: cosine, warm: 3}",
            "unknown key 'client.schedule.warm'; nearest is 'client.schedule.warmup'",
        ),
        ("{shape: cosine, every: 3}", "client.schedule.every=3: cosine does not read it"),
        ("{shape: cosine, warmup: 2.5}", "client.schedule.warmup=2.5: must be a whole number, or a share"),
        ("{shape: cosine, floor: 2}", "client.schedule.floor=2: must be in"),
        ("{shape: step}", "needs either client.schedule.every or client.schedule.at"),
        ("{shape: step, at: 3}", "client.schedule.at=3: must be a list"),
        ("{shape: step, every: 0}", "client.schedule.every=0: must be a whole number"),
        ("{shape: step, every: 2, gamma: 0}", "client.schedule.gamma=0: must be in"),
    ],
)
def test_impossible_schedules_are_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(f"client.schedule={value}")


def test_a_schedule_without_batches_of_the_job_says_so() -> None:
    local = prepared(as_dataclass(compose_quickly(["client.schedule=cosine"]).client, ClientConfig), 4)
    with pytest.raises(ClientError, match=r"it goes by the steps of job\.batches"):
        LocalSteps(local, 0)(torch.zeros(2), torch.ones(2))
