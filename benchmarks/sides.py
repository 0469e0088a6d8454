"""The frameworks that ``overhead`` compares: each runs a workload and calls ``pairs.round_done`` after every round."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pairs import Pairs
from benchmarks.workloads import Workload

Weights = dict[str, Tensor]


def settings(work: Workload, rounds: int) -> list[str]:
    """A workload in fedsim's words: nothing but training."""
    return [
        "strategy=fedavg",
        f"rounds={rounds}",
        f"clients_per_round={work.cohort}",
        f"client.lr={work.lr}",
        "client.lr_decay=1",
        "client.epochs=1",
        f"client.batch_size={work.batch}",
        "client.weight_decay=0",
        "client.clip_norm=null",
        "evaluation.every=1000000",
        "checkpoint.every=0",
        "tracker=quiet",
    ]


def fedsim(engine: str, workers: int, extra: Sequence[str], pairs: Pairs) -> Weights:
    """FedAvg through the public interface; a round includes its log, its weights hash and its metrics.jsonl row."""
    import fedsim as package

    class RoundTimer:
        def round(self, row: dict[str, Any], clients: Sequence[Any]) -> None:
            pairs.round_done(row["cohort"])

    work = pairs.work
    x, y = work.data()
    n = work.samples
    with tempfile.TemporaryDirectory() as out:
        result = package.simulate(
            [
                f"engine={engine}",
                # what Ray's start costs is `startup`'s to say
                *([f"engine.workers={workers}", "engine.early=false"] if engine == "ray" else []),
                *settings(work, pairs.rounds),
                f"out={out}",
                *extra,
            ],
            model=work.model(),
            clients=[(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)],
            callbacks=[RoundTimer()],
        )
    return result.weights


def flower(pairs: Pairs, gpus: float = 0.0) -> Weights:
    """Flower's message API and its own FedAvg in its simulation, one client application per core; with ``gpus`` each
    has that share of a GPU and trains there."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    work, final = pairs.work, dict[str, Any]()
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return _flower_train(work, "cuda" if gpus else "cpu", message, context)

    class RoundTimer(FedAvg):
        def configure_train(self, server_round: int, *args: Any, **named: Any) -> Any:
            if server_round > 1:
                pairs.round_done()
            return super().configure_train(server_round, *args, **named)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = RoundTimer(
            fraction_train=work.cohort / work.clients,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,
            min_available_nodes=work.clients,
        )
        start = ArrayRecord(work.model().state_dict())
        result = strategy.start(grid=grid, initial_arrays=start, num_rounds=pairs.rounds)
        pairs.round_done()
        final.update(result.arrays.to_torch_state_dict())

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=work.clients,
        backend_config={
            "init_args": {
                "address": "local",
                "num_cpus": os.cpu_count(),
                "num_gpus": 1 if gpus else 0,
                "include_dashboard": False,
                "log_to_driver": False,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
        },
    )
    return final


@functools.cache
def _resident(work: Workload, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.set_num_threads(1)
    x, y = work.data()
    return work.model().train().to(device), x.to(device), y.to(device)


def _flower_train(work: Workload, device: str, message: Any, context: Any) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    model, x, y = _resident(work, device)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    n = work.samples
    order = torch.randperm(n).add_(context.node_config["partition-id"] * n)
    for rows in order.split(work.batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": n})}
    )
    return Message(content=content, reply_to=message)


def pfl(pairs: Pairs) -> Weights:
    """pfl-research: its PyTorch model, simulated backend and FederatedAveraging, in one process."""
    import numpy as np
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    work = pairs.work
    x, y = work.data()
    n, module = work.samples, work.model()
    module.loss = lambda x, y: nn.functional.cross_entropy(module.train()(x), y)
    module.metrics = lambda x, y: {}
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))

    class RoundTimer(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            pairs.round_done()
            return False, Metrics()

    def client(i: int) -> Any:
        rows = torch.from_numpy(np.random.permutation(n)) + i * n
        return PyTorchTensorDataset((x[rows], y[rows]))

    data = FederatedDataset(client, MinimizeReuseUserSampler(list(range(work.clients))))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=pairs.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch),
        callbacks=[RoundTimer()],
        send_metrics_to_platform=False,
    )
    return module.state_dict()


SIDES: dict[str, tuple[int, Callable[..., Weights]]] = {  # processes, and how to run it
    "fedsim-ray": (2, functools.partial(fedsim, "ray", 2)),
    "fedsim-serial": (1, functools.partial(fedsim, "serial", 1)),
    "flower": (2, lambda extra, pairs: flower(pairs)),
    "pfl": (1, lambda extra, pairs: pfl(pairs)),
}
