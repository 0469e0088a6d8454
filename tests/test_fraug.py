"""FRAug against arrays of the authors' code, its order of steps and schedules, and what the sharing modes promise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN, method
from torch import Tensor, nn
from torch.nn import functional as F

from clients.fraug import (
    DISTANCES,
    FRAugClient,
    Generator,
    LocalUpdate,
    RTNet,
    entropy,
    non_saturating,
)
from fedsim.build import typed
from fedsim.config import ClientConfig
from fedsim.data.local import Batch
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
