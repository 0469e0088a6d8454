"""FedDF. Lin, Kong, Stich, Jaggi: Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020, in
one shot: FedAvg of the models learns from their mean on samples of the server's, whose labels nobody looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.data.trees import tree_map
from fedsim.errors import ConfigError
from fedsim.rng import torch_rng
from fedsim.server.depot import Uploads
from fedsim.server.exchanges import Server
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.distilling import Adam, passes, trained
from strategies.ensembles import cosine, mean_probabilities, soft_loss, uniform
from strategies.one_shot import OneShot, check_images, teachers

READ = 512  # samples that teachers look at together
DATA, AVERAGES = ("server", "noise"), ("logits", "probabilities")


@dataclass(kw_only=True)
class FedDF(OneShot):
    """``mean_b KL(softmax(zbar/T) || softmax(s/T))`` by Adam, its rate falling to 0 over ``steps``, spread over rounds.

    Args:
        epochs: rounds that the steps are spread over.
        steps: of the whole run.
        batch_size: samples.
        lr: Adam's.
        T: temperature, without a factor T^2.
        average: what the teacher is the mean of, ``logits`` or ``probabilities``.
        data: ``server``: the server's own samples (``data.server``); ``noise``: standard normal numbers.
        noise_samples: how many of these.
    """

    traits: ClassVar[Traits] = replace(
        OneShot.traits, horizon=True, unread={"noise_samples": ("data", ("server",))}
    )
    epochs: int
    steps: int
    batch_size: int
    lr: float
    T: float
    average: str
    data: str
    noise_samples: int

    def __post_init__(self) -> None:
        for name, known in (("data", DATA), ("average", AVERAGES)):
            check((value := getattr(self, name)) in known, name, value, f"choose one of {', '.join(known)}")
        for name in ("epochs", "steps", "noise_samples"):
            check((value := getattr(self, name)) >= 1, name, value, "must be at least 1")
        check(self.batch_size >= 2, "batch_size", self.batch_size, "must be at least 2")
        for name in ("lr", "T"):
            check((value := getattr(self, name)) > 0, name, value, "must be positive")
        super().__post_init__()

    @property
    def averages(self) -> bool:
        """Where no client trains the run's model, the student begins as it was drawn."""
        return False

    def init(self, server: Server) -> State:
        """Refuses to begin without samples to learn from."""
        if self.data == "server" and server.data is None:
            raise ConfigError(
                "data.server: FedDF learns from samples of the server's; type +data@data.server=OPTION for another "
                "data set, 'data.server={share: 0.1, labelled: false}' for a part of this one, or strategy.data=noise"
            )
        if self.data == "noise":
            check_images(server, "strategy.data=noise")
        return super().init(server)

    def begun(self, server: Server, state: State, uploads: Uploads) -> State:
        """FedAvg of the models, and Adam at rest."""
        state = super().begun(server, state, uploads)
        return state | {"adam/m": torch.zeros_like(state["w"]), "adam/v": torch.zeros_like(state["w"])}

    def epoch(self, server: Server, state: State, uploads: Uploads, e: int) -> State:
        """The e-th part of the steps."""
        first, last = (min(i, self.epochs) * self.steps // self.epochs for i in (e, e + 1))
        if first == last:
            return state
        shop = server.workshop
        with shop.at_work("feddf", e):
            target = shop.kept(f"feddf/{uploads.hash}", lambda: self._targets(server, uploads))
            student = shop.student
            student.load(state["w"].to(shop.device), state["buffers"].to(shop.device))
            m, v = (state[f"adam/{k}"].clone().to(shop.device) for k in "mv")
            step = Adam(m, v, lambda t: cosine(self.lr, t, self.steps), first)
            batches = self._batches(server, target, first, last)
            loss = trained(student, batches, lambda s, t: soft_loss(t, s, self.T), step)
            found = {"w": student.w.clone().cpu(), "buffers": student.buffers.clone().cpu()}
            student.forget()
        server.log["server/train_loss"] = loss
        return state | found | {"adam/m": m.cpu(), "adam/v": v.cpu()}

    def _batches(self, server: Server, target: Tensor, first: int, last: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and the teacher's logits of steps ``first`` to ``last``, in passes keyed by number."""
        n = len(target)
        smallest = min(2, n)
        each = n // self.batch_size + (n % self.batch_size >= smallest)
        for number in range(first // each, -(-last // each)):
            order = passes(n, self.batch_size, torch_rng(server.seed, "server/feddf", number), smallest)
            for at, rows in enumerate(order, start=number * each):
                if first <= at < last:
                    yield self._read(server, rows), target[rows.to(target.device)]

    def _targets(self, server: Server, uploads: Uploads) -> Tensor:
        """The teacher's logits (n, C) of all samples."""
        shop, models = server.workshop, teachers(server, uploads)
        n = self.noise_samples if self.data == "noise" else len(server.data or ())
        mean = uniform if self.average == "logits" else mean_probabilities
        out = []
        with torch.no_grad():
            for rows in torch.split(torch.arange(n), READ):
                x = self._read(server, rows)
                out.append(mean(torch.stack([shop.logits(model, x) for model in models])))
        return torch.cat(out)

    def _read(self, server: Server, rows: Tensor) -> Any:
        shop = server.workshop
        if self.data == "noise":
            shape = (self.noise_samples, *shop.shape)
            noise: Tensor = shop.kept("feddf/noise", lambda: _noise(server.seed, shape).to(shop.dtype))
            return noise[rows].to(shop.device)
        assert server.data is not None
        return tree_map(lambda t: t.to(shop.device), server.data.read(rows).x)


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch_rng(seed, "server/feddf/noise"), dtype=torch.float64)
