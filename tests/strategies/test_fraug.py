"""FRAug's pieces and a whole local update against arrays of the authors' code; schedules, class means, distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fraug_golden import Classifier, arrays, golden_job, named
from problems import (
    method,
)
from torch import Tensor
from torch.nn import functional as F

from clients.fraug import (
    DISTANCES,
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
from fedsim.task.vectors import FlatModel

DTYPES = ((torch.float64, 1e-9), (torch.float32, 1e-5))
each_dtype = pytest.mark.parametrize(("dtype", "atol"), DTYPES, ids=("float64", "float32"))


# -- pieces ------------------------------------------------------------------------------------------------------------


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


# -- a whole client round ----------------------------------------------------------------------------------------------


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
            FlatModel(Generator(5, 4, 3), dtype, aligned=False),
        ),
        "R": (state["rtnet"], state["rtnet/buffers"], FlatModel(RTNet(5, 4, 3), dtype, aligned=False)),
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
    assert float(job.meter.losses[0]) == pytest.approx(float(z["it0/loss_S_0_CE"]), abs=1e-9)


# -- schedules, labels, class means ------------------------------------------------------------------------------------


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


# -- distances: edge cases and cost ------------------------------------------------------------------------------------


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


# -- what each step may change -----------------------------------------------------------------------------------------


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
