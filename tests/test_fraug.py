"""FRAug against arrays of the authors' code, its order of steps and schedules, and what the sharing modes promise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    GOLDEN,
    Recorded,
    classes,
    classification,
    hashes,
    hooked,
    method,
    network,
    recorded,
)
from torch import Tensor, nn
from torch.nn import functional as F

from clients.fraug import (
    DISTANCES,
    FRAugClient,
    Generator,
    LocalUpdate,
    RTNet,
    balanced_labels,
    entropy,
    mmd_kernel,
    non_saturating,
    ratio,
    synthetic_weight,
    update_prototypes,
)
from fedsim import build
from fedsim.build import typed
from fedsim.config import ClientConfig
from fedsim.data.local import Batch
from fedsim.errors import ClientError, ConfigError
from fedsim.job import Job
from fedsim.localpart import LocalPart
from fedsim.payload import Payload
from fedsim.settings import compose
from fedsim.task import Task
from fedsim.vectors import FlatModel

DTYPES = ((torch.float64, 1e-9), (torch.float32, 1e-5))
each_dtype = pytest.mark.parametrize(("dtype", "atol"), DTYPES, ids=("float64", "float32"))
LAYERS = {
    "decoder.fc0": "fc0",
    "decoder.local_bn0": "bn0",
    "decoder.fc1": "fc1",
    "decoder.local_bn1": "bn1",
    "encoder.fc0": "fc0",
    "encoder.bn0": "bn0",
    "decoder.bn1": "bn1",
    "enc": "enc",
    "bn0": "bn0",
    "classifier": "head",
}


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"fraug_{name}.npz") as z:
        return dict(z)


def named(z: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """A state dict under our names from the arrays below ``prefix``."""
    out = {}
    for key in z:
        if key.startswith(prefix):
            layer, _, name = key.removeprefix(prefix).rpartition(".")
            out[f"{LAYERS[layer]}.{name}"] = torch.tensor(z[key])
    return out


# -- pieces -------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("k", range(3))
def test_distances_and_losses_are_the_authors(k: int, dtype: torch.dtype, atol: float) -> None:
    z = arrays("losses")
    x, y, logits = (torch.tensor(z[f"{n}{k}"], dtype=dtype) for n in ("x", "y", "logits"))
    targets = torch.tensor(z[f"targets{k}"])
    x.requires_grad_()
    for ours, theirs in (("MMD_kernel", "mmd_gauss"), ("MMD", "mmd_meancov")):
        value = DISTANCES[ours](x, y)
        (gradient,) = torch.autograd.grad(value, x)
        np.testing.assert_allclose(value.detach(), z[f"{theirs}{k}"], rtol=0, atol=atol)
        np.testing.assert_allclose(gradient, z[f"{theirs}_grad_x{k}"], rtol=0, atol=atol)
    np.testing.assert_allclose(DISTANCES["L1"](x, y).detach(), z[f"l1_{k}"], rtol=0, atol=atol)
    np.testing.assert_allclose(DISTANCES["L2"](x, y).detach(), z[f"l2_{k}"], rtol=0, atol=atol)
    np.testing.assert_allclose(entropy(logits), z[f"entropy{k}"], rtol=0, atol=atol)
    np.testing.assert_allclose(non_saturating(logits, targets), z[f"nonsat{k}"], rtol=0, atol=atol)
    np.testing.assert_allclose(F.cross_entropy(logits, targets), z[f"ce{k}"], rtol=0, atol=atol)


@each_dtype
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", ["bn", "nobn"])
def test_networks_are_the_authors(case: str, mode: str, dtype: torch.dtype, atol: float) -> None:
    z = arrays("nets")
    generator, rtnet = Generator(5, 4, 3), RTNet(5, 4, 3, final_bn=case == "bn")
    for net, name in ((generator, "G"), (rtnet, "R")):
        net.to(dtype).train(mode == "train").load_state_dict(named(z, f"{case}/{name}/"))
    noise, u = (torch.tensor(z[f"{case}/{n}"], dtype=dtype) for n in ("z", "u"))
    y = torch.tensor(z[f"{case}/y"])
    v = generator(noise, y)
    np.testing.assert_allclose(v.detach(), z[f"{case}/{mode}/v"], rtol=0, atol=atol)
    u_hat = rtnet(v, u, y).detach()
    np.testing.assert_allclose(u_hat, z[f"{case}/{mode}/u_hat"], rtol=0, atol=atol)


# -- a whole client round -----------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.bn0, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn0(self.enc(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass
class GivenJob(Job):
    """A job with the golden mini-batches."""

    given: list[Batch] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return len(self.given)

    def batches(self) -> Iterator[Batch]:
        for batch in self.given:
            yield batch
            self.steps += 1

    def weight(self, weighting: str) -> float:
        return 21.0


class GivenNoise(LocalUpdate):
    def latent(self, count: int) -> Tensor:
        return next(self.given)


class GoldenClient(FRAugClient):
    """The client with the golden noise."""

    def local_update(self, job: Job) -> LocalUpdate:
        run = GivenNoise(self.options, job)
        z = arrays("local_update_pacs_like")
        run.given = (torch.tensor(z[f"z{i}"], dtype=run.prototypes.dtype) for i in range(15))
        return run


def golden_job(dtype: torch.dtype, batches: int = 3) -> tuple[Any, GivenJob, FRAugClient]:
    z = arrays("local_update_pacs_like")
    settings = {"rounds": 300, "gamma": 0.01, "latent_dim": 4, "share_model": "all"}
    strategy = method("fraug", *(f"strategy.{k}={v}" for k, v in settings.items()))
    before = {}
    models = {"model": Classifier(), "G": Generator(5, 4, 3), "R": RTNet(5, 4, 3)}
    for name, net in models.items():
        net.to(dtype).load_state_dict(named(z, f"before/{name}/"))
        before[name] = FlatModel(net, dtype)
    chosen = {"lr": 0.01, "lr_decay": 1, "momentum": 0.5, "weight_decay": 0, "clip_norm": "null"}
    local = typed(compose([f"client.{k}={v}" for k, v in chosen.items()]).client, ClientConfig)
    pairs = [(torch.tensor(z[f"x{i}"], dtype=dtype), torch.tensor(z[f"y{i}"])) for i in range(batches)]
    job = GivenJob(
        client=0,
        round=250,
        task=Task(before["model"].module),
        model=before["model"],
        local=local,
        seed=0,
        message=Payload(
            {
                "w": before["model"].w.clone(),
                "buffers": before["model"].buffers.clone(),
                "generator": before["G"].w.clone(),
                "generator_buffers": before["G"].buffers.clone(),
            }
        ),
        state={
            "rtnet": before["R"].w.clone(),
            "rtnet/buffers": before["R"].buffers.clone(),
            "prototypes": torch.tensor(z["before/class_mean"], dtype=dtype),
        },
        source=None,  # type: ignore[arg-type]
        local_part=LocalPart(),
        given=[Batch(x, y) for x, y in pairs],
    )
    return z, job, GoldenClient(weighting="samples", options=strategy.client.options)


@each_dtype
def test_a_whole_local_update_is_the_authors(dtype: torch.dtype, atol: float) -> None:
    """Three iterations: the classifier, the generator and the RTNet with their statistics, and the class means.

    The authors' three iterations are draws 750, 751, 752 of the labels, since a round has three.
    """
    z, job, client = golden_job(dtype)
    client.setup(job.task, job.layout)
    update = client.fit(job)
    state = update.state
    got = {
        "model": (job.anchor + update.arrays["delta"], job.model.buffers, FlatModel(Classifier(), dtype)),
        "G": (
            job.message.arrays["generator"] + update.arrays["generator"],
            update.arrays["generator_buffers"],
            FlatModel(Generator(5, 4, 3), dtype),
        ),
        "R": (state["rtnet"], state["rtnet/buffers"], FlatModel(RTNet(5, 4, 3), dtype)),
    }
    for name, (w, buffers, net) in got.items():
        after = {k: v.numpy() for k, v in named(z, f"after/{name}/").items()}
        for part in (net.layout.named(w), net.layout.named_buffers(buffers)):
            for key, value in part.items():
                np.testing.assert_allclose(
                    value.detach(), after[key], rtol=0, atol=atol, err_msg=f"{name} {key}"
                )
    np.testing.assert_allclose(state["prototypes"], z["after/class_mean"], rtol=0, atol=atol)
    assert job.model.module.training


def test_losses_of_the_first_iteration_are_the_authors() -> None:
    z, job, client = golden_job(torch.float64)
    run = client.local_update(job)
    run.step(job.start(), job.given[0])
    expected = {
        "real": "S_0_CE_real",
        "synthetic": "S_0_CE_G",
        "generator": "G_0_CE",
        "generator_distance": "G_0_dist",
        "rtnet": "FT_0_CE",
        "rtnet_distance": "FT_0_dist",
    }
    for ours, theirs in expected.items():
        assert float(run.losses[ours][0]) == pytest.approx(float(z[f"it0/loss_{theirs}"]), abs=1e-9), ours
    assert float(job.losses[0]) == pytest.approx(float(z["it0/loss_S_0_CE"]), abs=1e-9)


# -- schedules, labels, class means -------------------------------------------------------------------------------


def test_schedules_are_those_of_the_paper_settings() -> None:
    assert synthetic_weight(0) == pytest.approx(0.0498, abs=1e-4)  # gamma 0.01 over 300 rounds
    assert synthetic_weight(230) < 0.5 == synthetic_weight(231)
    assert ratio(299) == pytest.approx(np.exp(-0.01))
    assert {synthetic_weight(t, 300, 0.002) for t in range(300)} == {0.5}
    assert ratio(7, form="avg") == 0.5
    assert [ratio(t, gamma=0.5, form="1overx") for t in (0, 2)] == [0.0, 0.5]
    short = method("fraug", "strategy.rounds=30")  # a shorter run keeps gamma * rounds, hence the ramp
    assert [short.ratio(t) for t in (0, 29)] == pytest.approx([np.exp(-3), np.exp(-0.1)])


def test_warm_up_and_a_given_weight() -> None:
    late = method("fraug", "strategy.warmup_rounds=2", "strategy.schedule=avg")
    assert [late.weight(t) for t in range(4)] == [0, 0, 0.5, 0.5]
    assert method("fraug", "strategy.lam=0.2").weight(0) == 0.2


def test_labels_go_round_all_classes_even_with_small_batches() -> None:
    assert balanced_labels(0, 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(1, 7, 3).tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert balanced_labels(5, 2, 3).tolist() == [1, 2]
    drawn = torch.cat([balanced_labels(d, 2, 5) for d in range(5)])
    assert torch.bincount(drawn).tolist() == [2] * 5


def test_class_means_by_hand() -> None:
    m = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[1.0, 3.0], [3.0, 5.0], [10.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 2])
    expected = [[0.7 + 0.6, 0.7 + 1.2], [2, 2], [3, 0]]
    np.testing.assert_allclose(update_prototypes(m, u, y), expected, atol=1e-15)
    first = torch.tensor([False, False, True])
    np.testing.assert_allclose(update_prototypes(m, u, y, first=first)[2], [10, 0], atol=0)


# -- distances: edge cases and cost -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_embeddings_have_no_distance_and_a_finite_gradient(dtype: torch.dtype) -> None:
    x = torch.full((4, 3), 1e3, dtype=dtype, requires_grad=True)
    value = mmd_kernel(x, x.detach()[:2])
    assert float(value.detach()) == 0
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


def test_kernel_distance_of_sets_of_unequal_size_against_its_definition() -> None:
    rng = np.random.default_rng(3)
    x, y = 50 + rng.normal(size=(4, 3)), 50 + rng.normal(size=(6, 3))
    pooled = np.concatenate((x, y))
    apart = ((pooled[:, None] - pooled[None]) ** 2).sum(-1)
    b0 = apart.sum() / (10**2 - 10) / 4
    k = sum(np.exp(-apart / (b0 * 2**i)) for i in range(5))
    expected = k[:4, :4].mean() + k[4:, 4:].mean() - 2 * k[:4, 4:].mean()
    np.testing.assert_allclose(mmd_kernel(torch.tensor(x), torch.tensor(y)), expected, atol=1e-12)
    single = mmd_kernel(torch.tensor(x).float(), torch.tensor(y).float())  # far from the origin, in float32
    np.testing.assert_allclose(single, expected, atol=1e-5)


def test_distances_never_hold_a_difference_per_pair_and_coordinate() -> None:
    n, dim = 32, 512
    seen: list[int] = []

    def note(t: Tensor) -> Tensor:
        seen.append(t.numel())
        return t

    x = torch.randn(n, dim, requires_grad=True)
    for name in ("MMD_kernel", "MMD"):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            DISTANCES[name](x, torch.randn(n, dim)).backward()
    assert max(seen) <= max((2 * n) ** 2, 2 * n * dim, dim * dim) < (2 * n) ** 2 * dim / 4


# -- what each step may change ------------------------------------------------------------------------------------


def networks_of(run: LocalUpdate) -> dict[str, Tensor]:
    return {"theta": run.job.model.weights, "omega": run.G.weights, "phi": run.R.weights}


def changed(run: LocalUpdate, act: Any) -> tuple[set[str], set[str]]:
    """Networks whose parameters, and whose statistics, ``act`` changed."""
    before = {k: (v.w.clone(), v.buffers.clone()) for k, v in networks_of(run).items()}
    act()
    after = networks_of(run)
    return tuple({k for k in before if not torch.equal(before[k][i], after[k][i])} for i in (0, 1))


def test_each_step_moves_its_own_network_and_statistics_only() -> None:
    _, job, client = golden_job(torch.float64)
    w, batch, run = job.start(), job.given[0], client.local_update(job)
    assert changed(run, lambda: run.classifier_step(w, batch)) == ({"theta"}, {"theta"})
    u = job.model.module.features(batch.x).detach()
    run.model.eval()
    assert changed(run, lambda: run.generator_step(batch, u)) == ({"omega"}, {"omega"})
    run.G.module.eval()
    assert changed(run, lambda: run.rtnet_step(batch, u)) == ({"phi"}, {"phi"})


def test_synthetic_embeddings_train_the_head_only() -> None:
    """The extractor's gradient is ``1 - lam`` times that of the real loss alone; the head's is not."""
    steps = {}
    for lam in (0.0, 0.25):
        _, job, client = golden_job(torch.float64)
        w, run = job.start(), client.local_update(job)
        run.lam, start = lam, job.start().clone()
        run.classifier_step(w, job.given[0])
        steps[lam] = job.layout.named(w - start)
    for name, step in steps[0.25].items():
        same = torch.allclose(step, 0.75 * steps[0.0][name], rtol=1e-10, atol=0)
        assert same != name.startswith("head"), name


LOCAL = (
    ("client.clip_norm=null",),
    ("client.clip_norm=0.5", "client.weight_decay=0.01"),
    ("client.clip_norm=null", "client.momentum=0.5", "strategy.reset_momentum=true"),
)


@pytest.mark.parametrize("local", LOCAL, ids=["plain", "clipped", "momentum"])
@pytest.mark.parametrize(("share", "peer"), [("fedbn", "fedbn"), ("silobn", "silobn"), ("all", "fedavg")])
def test_without_synthetic_loss_the_classifier_is_the_baselines_bit_for_bit(
    share: str, peer: str, local: tuple[str, ...]
) -> None:
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


# -- sharing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["fedbn", "silobn", "all"])
def test_what_stays_with_a_client_under_each_sharing_mode(share: str) -> None:
    problem = classification("bn", cohorts=[[0, 1, 2]] * 2)
    strategy = Recorded(method("fraug", f"strategy.share_model={share}"))
    policy = f"buffers={strategy.inner.buffers}"
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


# -- options and controls -----------------------------------------------------------------------------------------

OPTIONS = (
    "latent=uniform",
    "latent_dim=7",
    "draws=3",
    "interpolate=false",
    "schedule=1overx",
    "dist_generator=MMD",
    "dist_generator=L2",
    "dist_rtnet=MMD_kernel",
    "rtnet_loss=non_saturating",
    "rtnet_loss=none",
    "rtnet_bn=false",
    "proto_momentum=0.5",
    "proto_init=first",
    "unseen_classes=drop",
    "reset_momentum=true",
    "momentum=0",
    "lam=0.3",
    "lam_generator=3",
    "lam_rtnet=3",
    "lr_generator=0.01",
    "lr_rtnet=0.01",
    "warmup_rounds=1",
    "share_model=silobn",
    "share_generator=no_bn",
    "use_generator=false",
    "use_rtnet=false",
)


def test_every_option_changes_the_run() -> None:
    clients = classes((10, 16, 9))
    clients[0] = (clients[0][0], clients[0][1].clamp(max=1))  # a client without class 2
    problem = classification("bn", clients=clients, settings=("clients_per_round=3", "rounds=3"))
    local = ("client.epochs=2", "client.batch_size=5", "client.momentum=0.5")
    plain = problem.run("strategy=fraug", *local)
    ends = {o: hashes(problem.run("strategy=fraug", *local, f"strategy.{o}"))[-1] for o in OPTIONS}
    assert len({hashes(plain)[-1], *ends.values()}) == len(OPTIONS) + 1


WRONG = {
    "rounds=0": "rounds=0: must be at least 1",
    "schedule=linear": "schedule=linear: choose one of exp, avg, 1overx",
    "gamma=-1": "gamma=-1: must not be negative",
    "lam=0.7": r"lam=0.7: must be in \[0, 0.5\]",
    "latent=cauchy": "latent=cauchy: choose one of normal, uniform",
    "latent_dim=0": "latent_dim=0: must be at least 1",
    "draws=0": "draws=0",
    "lr_rtnet=0": "lr_rtnet=0: must be positive",
    "momentum=1": r"momentum=1: must be in \[0, 1\)",
    "dist_generator=cosine": "dist_generator=cosine: choose one of MMD_kernel, MMD, L1, L2",
    "proto_momentum=0": "proto_momentum=0",
    "share_model=none": "share_model=none: choose one of fedbn, silobn, all",
    "unseen_classes=guess": "unseen_classes=guess: choose one of keep, drop",
}


@pytest.mark.parametrize(("option", "message"), WRONG.items(), ids=WRONG)
def test_impossible_options_are_refused_by_name(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{message}"):
        classification().run("strategy=fraug", f"strategy.{option}")


def test_controls_leave_out_their_network_on_the_wire_and_in_the_state() -> None:
    problem = classification("bn", cohorts=[[0, 1]])
    found = {
        control: recorded("fraug", problem, "rounds=1", *control)
        for control in ((), ("strategy.use_generator=false",), ("strategy.use_rtnet=false",))
    }
    traffic = [r.rows[0]["bytes_up"] for _, r in found.values()]
    d, generator = 5 * (4 + 1) + 2 * 5 + 3 * (5 + 1), Generator(5, 2, 3)
    size = sum(p.numel() for p in generator.parameters()) + 4 * 5  # with its statistics
    assert traffic == [4 * 2 * (d + 10 + size) + 16, 4 * 2 * (d + 10) + 16, traffic[0]]
    states = [s.kept[0][0] for s, _ in found.values()]
    assert ["rtnet" in s for s in states] == [True, True, False]
    assert ["generator/momentum" in s for s in states] == [True, False, True]
    assert ["generator" in s.states[0] for s, _ in found.values()] == [True, False, True]


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


# -- edge cases ---------------------------------------------------------------------------------------------------


def test_single_samples_are_skipped_and_short_batches_used() -> None:
    """Five samples in batches of 4: the fifth alone would break BatchNorm; a client with one sample does nothing."""
    problem = classification("bn", clients=classes((5, 1)), cohorts=[[0, 1]])
    strategy, result = recorded("fraug", problem, "rounds=1", "client.epochs=1")
    table = result.per_client.query("metric == 'train_loss'")
    assert table.client.tolist() == [0]
    assert not result.rows[0]["failures"]
    assert strategy.kept[0][1]["prototypes"].abs().sum() == 0
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
        with pytest.raises(ClientError, match=r"model\.features.*model\.head.*lacks them"):
            classification(model=model).run("strategy=fraug")


@pytest.mark.parametrize("name", ["fraug", "fedbn", "silobn"])
def test_a_client_that_never_took_part_is_measured_with_statistics_of_its_own(name: str) -> None:
    """Client 1 never trains: its BatchNorm statistics are those of its training samples under the shared weights."""
    problem = classification("bn", clients=classes((10, 9)), cohorts=[[0]], test=None)
    settings = ["rounds=1", "evaluation.holdout=0.3", "evaluation.clients_every=1", "dtype=float64"]
    result = problem.run(f"strategy={name}", *settings)
    table = result.per_client.query("metric == 'evaluate/loss' and client == 1")
    data = build.given_clients(compose(["evaluation.holdout=0.3"]), problem.clients, None)
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
