"""FedLoGe against the authors' code, and what it promises about what travels, what stays and what is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import GOLDEN, Network, Problem, Recorded, method
from torch import nn
from torch.nn import functional as F

from clients.fedloge import FedLoGeClient
from fedsim.heads import Head


@dataclass(frozen=True, kw_only=True)
class Given(FedLoGeClient):
    """With the golden heads instead of drawn ones."""

    z: dict

    def classifier(self, num_classes, dim):
        return Head(torch.tensor(self.z["sse_W"]), torch.tensor(self.z["sse_b"]))

    def private(self, job):
        if job.state:
            return super().private(job)
        weight, bias = (torch.tensor(self.z[f"phi_{n}0_{job.client}"]) for n in "Wb")
        return torch.cat([weight.reshape(-1), bias])


def test_one_round_of_the_authors_code():
    with np.load(GOLDEN / "fedloge_stage1.npz") as file:
        z = dict(file)
    model = Network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    initial = {"0.weight": z["A0"], "0.bias": z["a0"], "2.weight": z["psi_W0"], "2.bias": z["psi_b0"]}
    clients = [(torch.tensor(z[f"X{k}"]), torch.tensor(z[f"y{k}"])) for k in range(3)]
    inner = method("fedloge")
    inner.client = Given(**vars(inner.client), z=z)
    strategy = Recorded(inner)
    settings = (
        "rounds=1",
        "dtype=float64",
        "client.lr=0.03",
        "client.momentum=0.5",
        "client.epochs=5",
        "client.batch_size=10",
        "client.shuffle=false",
        "client.weight_decay=0",
        "client.clip_norm=null",
        "clients_per_round=3",
    )
    problem = Problem(model, clients, settings, initial={k: torch.tensor(v) for k, v in initial.items()})
    result = problem.run(strategy=strategy)
    got = result.weights | {}
    w = strategy.states[-1]["w"]
    expected = np.concatenate([z[n].reshape(-1) for n in ("A_glob", "a_glob", "psi_W_glob", "psi_b_glob")])
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-12)
    for k in range(3):
        phi = np.concatenate([z[f"phi_W_{k}"].reshape(-1), z[f"phi_b_{k}"]])
        np.testing.assert_allclose(strategy.kept[-1][k]["phi"], phi, rtol=0, atol=1e-12)
        row = result.per_client.query("client == @k and metric == 'train_loss'")
        assert row.value.item() == pytest.approx(float(z[f"loss_{k}"]), abs=1e-12)
    realigned = 1.7 * F.normalize(torch.tensor(z["psi_W_glob"]), dim=1)
    np.testing.assert_allclose(got["2.weight"], realigned, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got["2.bias"], z["psi_b_glob"], rtol=0, atol=1e-12)
