"""The golden client round of FRAug as a job of the simulator: batches and noise as given, everything else real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from problems import (
    GOLDEN,
    method,
)
from torch import Tensor, nn
from torch.nn import functional as F

from clients.fraug import (
    FRAugClient,
    Generator,
    LocalUpdate,
    RTNet,
)
from fedsim.config.compose import compose
from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig
from fedsim.data.local import Batch
from fedsim.exchange.payload import Payload
from fedsim.local.job import Job
from fedsim.local.kept import LocalPart
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

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
            self.meter.steps += 1

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
        before[name] = FlatModel(net, dtype, aligned=name == "model")
    chosen = {"lr": 0.01, "lr_decay": 1, "momentum": 0.5, "weight_decay": 0, "clip_norm": "null"}
    local = as_dataclass(compose([f"client.{k}={v}" for k, v in chosen.items()]).client, ClientConfig)
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
