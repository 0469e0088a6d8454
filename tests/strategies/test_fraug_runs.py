"""FRAug in the simulator: FedBN as its special case, sharing modes, momentum and edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hooks import hooked
from problems import Recorded, classes, classification, hashes, method, network, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from clients.fraug import (
    FRAugClient,
    LocalUpdate,
)
from fedsim.config.compose import compose
from fedsim.errors import ConfigError
from fedsim.local.job import Job
from fedsim.run import samples

# -- without synthetic loss --------------------------------------------------------------------------------------------

PLAIN = ("client.clip_norm=null",)
CLIPPED = ("client.clip_norm=0.5", "client.weight_decay=0.01")
MOMENTUM = ("client.clip_norm=null", "client.momentum=0.5", "strategy.reset_momentum=true")
PEERS = {
    "fedbn": ("fedbn", PLAIN),
    "fedbn-clipped": ("fedbn", CLIPPED),
    "fedbn-momentum": ("fedbn", MOMENTUM),
    "silobn": ("silobn", CLIPPED),
    "all": ("fedavg", MOMENTUM),
}


@pytest.mark.parametrize("case", PEERS)
def test_without_synthetic_loss_the_classifier_is_the_baselines_bit_for_bit(case: str) -> None:
    share, (peer, local) = case.split("-")[0], PEERS[case]
    common = [o for o in local if not o.startswith("strategy")] + ["evaluation.holdout=0.3"]
    problem = classification(
        "bn", clients=classes((10, 16, 9, 13, 10, 14)), cohorts=[[0, 1, 2], [1, 3, 5]] * 2
    )
    ours = problem.run("strategy=fraug", "strategy.lam=0", f"strategy.share_model={share}", *local, *common)
    theirs = problem.run(f"strategy={peer}", *common)
    assert hashes(ours) == hashes(theirs)
    for name, value in theirs.weights.items():
        assert torch.equal(ours.weights[name], value)
    assert [r["train_loss"] for r in ours.rows] == [r["train_loss"] for r in theirs.rows]
    with_noise = problem.run("strategy=fraug", f"strategy.share_model={share}", *local, *common)
    assert hashes(with_noise) != hashes(theirs)


def test_personal_models_of_lam_zero_are_fedbns_too() -> None:
    problem = classification("bn", clients=classes((10, 16, 9, 13, 10, 14)))
    settings = ["client.clip_norm=null", "evaluation.holdout=0.3", "evaluation.clients_every=1"]
    runs = [problem.run(*m, *settings) for m in (["strategy=fraug", "strategy.lam=0"], ["strategy=fedbn"])]
    pick = [r.per_client.query("metric == 'evaluate/loss'").value.tolist() for r in runs]
    assert pick[0] == pick[1]


# -- sharing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["fedbn", "silobn", "all"])
def test_what_stays_with_a_client_under_each_sharing_mode(share: str) -> None:
    problem = classification("bn", cohorts=[[0, 1, 2]] * 2)
    strategy = Recorded(method("fraug", f"strategy.share_model={share}"))
    policy = f"buffers={strategy.inner.traits.buffers}"
    result = problem.run("strategy=fraug", "rounds=2", policy, strategy=strategy)
    start = network("bn").state_dict()
    moved = {k for k, v in result.weights.items() if not torch.equal(v, start[k])}
    affine, statistics = {"1.weight", "1.bias"}, {"1.running_mean", "1.running_var"}
    own = [strategy.kept[-1][c] for c in (0, 1)]
    assert statistics <= moved if share == "all" else not statistics & moved
    assert affine <= moved if share != "fedbn" else not affine & moved
    assert ("local/buffers" in own[0]) == (share != "all") and ("local/0" in own[0]) == (share == "fedbn")
    for name in {"rtnet", "rtnet/buffers", "prototypes", *(k for k in own[0] if k.startswith("local/"))}:
        assert not torch.equal(own[0][name], own[1][name]), name


@pytest.mark.parametrize("share", ["all", "no_bn"])
def test_everybody_starts_from_the_same_generator_but_for_its_own_norms(share: str) -> None:
    inner = method("fraug", f"strategy.share_generator={share}")
    found: list[dict[str, Tensor]] = []

    def look(job: Job) -> None:
        net = inner.client.local_update(job).G
        found.append({k: v.clone() for k, v in net.layout.named(net.w).items()})

    strategy = hooked("fraug", look, f"strategy.share_generator={share}")
    classification("bn", cohorts=[[0, 1]] * 2).run("strategy=fraug", "rounds=2", strategy=strategy)
    one, other = found[2:]
    for name, value in one.items():
        assert torch.equal(value, other[name]) == (share == "all" or "bn" not in name), name
    first, second = (s["generator_buffers"] for s in strategy.states)
    assert torch.equal(first, second) == (share == "no_bn")


def test_generators_are_averaged_by_samples() -> None:
    problem = classification("bn", cohorts=[[0, 1], [1]])
    both, one = (
        recorded("fraug", problem, "rounds=1", f"strategy.weighting={w}", "dtype=float64")[0]
        for w in ("samples", "uniform")
    )
    alone = [
        recorded("fraug", classification("bn", cohorts=[[c]]), "rounds=1", "dtype=float64")[0].states[0]
        for c in (0, 1)
    ]
    for name in ("w", "generator", "generator_buffers", "buffers"):
        weighted = (7 * alone[0][name] + 12 * alone[1][name]) / 19
        torch.testing.assert_close(both.states[0][name], weighted, rtol=0, atol=1e-12)
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(one.states[0][name], mean, rtol=0, atol=1e-12)


def test_a_robust_aggregator_rules_over_the_generator_too() -> None:
    strategy = method("fraug")
    strategy.aggregator = lambda updates, weights=None: updates[0]
    kept = Recorded(strategy)
    classification("bn", cohorts=[[0, 1, 2]]).run("strategy=fraug", "rounds=1", strategy=kept)
    alone = recorded("fraug", classification("bn", cohorts=[[0]]), "rounds=1")[0]
    for name in ("w", "generator"):
        torch.testing.assert_close(kept.states[0][name], alone.states[0][name], rtol=0, atol=1e-7)


# -- momentum ----------------------------------------------------------------------------------------------------------


def test_momentum_goes_on_across_rounds_unless_reset() -> None:
    problem = classification("bn", cohorts=[[0]] * 2)
    runs = {}
    for reset in ("true", "false"):
        strategy, _ = recorded(
            "fraug", problem, "rounds=2", f"strategy.reset_momentum={reset}", "client.momentum=0.5"
        )
        runs[reset] = strategy
    assert torch.equal(runs["true"].states[0]["w"], runs["false"].states[0]["w"])
    assert not torch.equal(runs["true"].states[1]["w"], runs["false"].states[1]["w"])
    assert {"momentum", "generator/momentum", "rtnet/momentum"} <= set(runs["false"].kept[0][0])
    assert not {k for k in runs["true"].kept[0][0] if "momentum" in k}


# -- edge cases --------------------------------------------------------------------------------------------------------


def test_single_samples_are_skipped_and_short_batches_used() -> None:
    """Five samples in batches of 4: the fifth alone would break BatchNorm; a client with one sample refuses."""
    problem = classification("bn", clients=classes((5, 1)), cohorts=[[0, 1]])
    strategy, result = recorded("fraug", problem, "rounds=1", "client.epochs=1")
    table = result.per_client.query("metric == 'train_loss'")
    assert table.client.tolist() == [0]
    assert [(f["client"], f["reason"]) for f in result.rows[0]["failures"]] == [(1, "no local steps")]
    assert not strategy.kept[0][1]
    short = classification("bn", clients=classes((6, 8)), cohorts=[[0]])
    assert recorded("fraug", short, "rounds=1", "client.epochs=1")[1].per_client.query(
        "metric == 'steps'"
    ).value.tolist() == [2]


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_a_class_that_a_client_lacks_is_counted_and_drawn_or_dropped(policy: str) -> None:
    x, y = classes((12,))[0]
    problem = classification("bn", clients=[(x, y.clamp(max=1)), (x, y)], cohorts=[[0, 1]])
    strategy = method("fraug", f"strategy.unseen_classes={policy}")
    drawn: list[Tensor] = []

    class Watched(LocalUpdate):
        def labels(self, draw: int, count: int) -> Tensor:
            out = super().labels(draw, count)
            if self.job.client == 0:
                drawn.append(out)
            return out

    class Watching(FRAugClient):
        def local_update(self, job: Job) -> LocalUpdate:
            return Watched(self.options, job)

    strategy.client = Watching(weighting="samples", options=strategy.client.options)
    result = problem.run("strategy=fraug", "rounds=1", strategy=strategy)
    counted = result.per_client.query("metric == 'unseen_classes'").value.tolist()
    assert counted == [1, 0]
    assert sorted(torch.cat(drawn).unique().tolist()) == ([0, 1, 2] if policy == "keep" else [0, 1])


def test_without_batch_norm_in_the_backbone_everything_is_shared() -> None:
    problem = classification()
    runs = [problem.run("strategy=fraug", f"strategy.share_model={s}") for s in ("fedbn", "silobn", "all")]
    assert hashes(runs[0]) == hashes(runs[1]) == hashes(runs[2])


def test_a_model_without_representation_is_refused() -> None:
    for model in (nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3))):
        with pytest.raises(ConfigError, match=r"model\.features.*model\.head.*lacks them"):
            classification(model=model).run("strategy=fraug")


@pytest.mark.parametrize("name", ["fraug", "fedbn", "silobn"])
def test_a_client_that_never_took_part_is_measured_with_statistics_of_its_own(name: str) -> None:
    """Client 1 never trains: its BatchNorm statistics are those of its training samples under the shared weights."""
    problem = classification("bn", clients=classes((10, 9)), cohorts=[[0]], test=None)
    settings = ["rounds=1", "evaluation.holdout=0.3", "evaluation.clients_every=1", "dtype=float64"]
    result = problem.run(f"strategy={name}", *settings)
    table = result.per_client.query("metric == 'evaluate/loss' and client == 1")
    data = samples.given_clients(compose(["evaluation.holdout=0.3"]), problem.clients, None)
    x, y = problem.clients[1]
    start = len(problem.clients[0][1])
    train, held = (torch.as_tensor(s.part(1)) - start for s in (data.shards, data.holdout))
    model: Any = network("bn").double()
    model.load_state_dict(result.weights)
    z = model[0](x[train].double()).detach()
    model[1].running_mean.copy_(z.mean(0))
    model[1].running_var.copy_(z.var(0))
    expected = F.cross_entropy(model.eval()(x[held].double()), y[held])
    np.testing.assert_allclose(table.value.tolist(), [expected.item()], rtol=0, atol=1e-12)


def test_local_only_keeps_its_statistics() -> None:
    strategy, _ = recorded("local_only", classification("bn", cohorts=[[0]] * 2), "buffers=local", "rounds=2")
    first, second = (kept[0]["local/buffers"] for kept in strategy.kept)
    assert not torch.equal(first, second)
    assert float((second[:5]).abs().sum()) > 0


@pytest.mark.slow
def test_other_sharing_modes_give_the_same_bits_on_ray_and_after_a_stop(ray: str, tmp_path: Any) -> None:
    problem = classification("dropout")
    settings = [
        "strategy=fraug",
        "strategy.share_generator=no_bn",
        "strategy.proto_init=first",
        "client.momentum=0.5",
    ]
    expected = hashes(problem.run(*settings))
    assert hashes(problem.run(*settings, ray, "engine.workers=2")) == expected

    class Stop:
        def round(self, row: dict[str, Any], clients: list[Any]) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problem.run(*settings, f"dir={tmp_path}", callbacks=[Stop()])
    assert hashes(problem.run(*settings, f"dir={tmp_path}")) == expected
