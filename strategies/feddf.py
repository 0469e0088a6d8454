"""FedDF. Lin, Kong, Stich, Jaggi: Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020, in
one shot: FedAvg of the models learns from their mean on samples of the server's, whose labels nobody looks at.

Where clients train several architectures there is a student for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.config.schema import ClientConfig
from fedsim.data.trees import tree_map
from fedsim.errors import ConfigError
from fedsim.rng import torch_rng
from fedsim.server.depot import Uploads
from fedsim.server.exchanges import Server
from fedsim.server.traits import Traits
from fedsim.task.vectors import Weights
from strategies.base import State, check
from strategies.distilling import Adam, passes, trained
from strategies.ensembles import cosine, mean_probabilities, soft_loss, uniform
from strategies.one_shot import OneShot, check_images
from strategies.teaching import outputs, teachers

READ = 512  # samples that teachers look at together
DATA, AVERAGES, STUDENTS = ("server", "noise"), ("logits", "probabilities"), ("each", "one")


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
        students: where clients train several architectures, ``each`` has one, which begins as FedAvg of those like it
            (state ``student/1/w`` and the like, numbers by the same names), or the run's own model alone is ``one``.
        early_stop: a student that has not improved on validation samples for so many rounds is, from then on, what it
            was at its lowest loss; ``None``: never.
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
    students: str = "each"
    early_stop: int | None = None

    def __post_init__(self) -> None:
        check(
            self.data in DATA,
            "data",
            self.data,
            "choose one of server, noise; another data set is the server's: +data@data.server=OPTION",
        )
        for name, known in (("average", AVERAGES), ("students", STUDENTS)):
            check((value := getattr(self, name)) in known, name, value, f"choose one of {', '.join(known)}")
        for name, least in (("epochs", 1), ("steps", 1), ("noise_samples", 2)):
            check((value := getattr(self, name)) >= least, name, value, f"must be at least {least}")
        stop = self.early_stop
        check(stop is None or stop >= 1, "early_stop", stop, "rounds, at least 1, or null")
        check(self.batch_size >= 2, "batch_size", self.batch_size, "must be at least 2")
        for name in ("lr", "T"):
            check((value := getattr(self, name)) > 0, name, value, "must be positive")
        super().__post_init__()

    @property
    def averages(self) -> bool:
        """Where no client trains the run's model, the student begins as it was drawn."""
        return False

    def check_run(self, local: ClientConfig, *, server: bool, validation: bool) -> None:
        """Refuses to begin without samples to learn from."""
        if self.data == "server" and not server:
            raise ConfigError(
                "data.server: FedDF learns from samples of the server's; type +data@data.server=OPTION for another "
                "data set, 'data.server={share: 0.1, labelled: false}' for a part of this one, or strategy.data=noise"
            )
        if self.early_stop is not None and not validation:
            raise ConfigError(
                "strategy.early_stop goes by the loss on validation samples, and there are none; type "
                "evaluation.validation=0.1"
            )

    def init(self, server: Server) -> State:
        """Noise needs images."""
        self.check_run(server.local, server=server.data is not None, validation=server.validator is not None)
        if self.data == "noise":
            check_images(server, "strategy.data=noise")
        return super().init(server)

    def begun(self, server: Server, state: State, uploads: Uploads) -> State:
        """FedAvg of the models, and Adam at rest; for each student."""
        state = super().begun(server, state, uploads)
        others = {m.architecture for m in uploads.models} - {0} if self.students == "each" else set()
        for number in (0, *sorted(others)):
            start = uploads.average_of(number) if number else Weights(state["w"], state["buffers"])
            assert start is not None
            rest = {f"adam/{k}": torch.zeros_like(start.w) for k in "mv"}
            if self.early_stop is not None:
                rest |= {f"best/{k}": v for k, v in start._asdict().items()}
                rest["watched"] = torch.tensor([torch.inf, 0.0], dtype=torch.float64)
            state |= _of(number, {**start._asdict(), **rest})
        return state

    def epoch(self, server: Server, state: State, uploads: Uploads, e: int) -> State:
        """The e-th part of the steps."""
        first, last = (min(i, self.epochs) * self.steps // self.epochs for i in (e, e + 1))
        if first == last:
            return state
        shop = server.workshop
        learning = [n for n in (0, *_others(state)) if not self._stopped(state, n)]
        with shop.at_work("feddf", e):
            if learning:
                target = shop.kept(f"feddf/{uploads.hash}", lambda: self._targets(server, uploads))
            for number in learning:
                state = state | self._taught(server, state, target, number, first, last)
        return state if self.early_stop is None else self._watched(server, state, learning)

    def _taught(
        self, server: Server, state: State, target: Tensor, number: int, first: int, last: int
    ) -> State:
        """A student after steps ``first`` to ``last``."""
        shop, old = server.workshop, _part(state, number)
        student = shop.student_of(number)
        student.load(old["w"].to(shop.device), old["buffers"].to(shop.device))
        m, v = (old[f"adam/{k}"].clone().to(shop.device) for k in "mv")
        step = Adam(m, v, lambda t: cosine(self.lr, t, self.steps), first)
        batches = self._batches(server, target, first, last)
        loss = trained(student, batches, lambda s, t: soft_loss(t, s, self.T), step, shop.logits)
        found = {"w": student.w.clone().cpu(), "buffers": student.buffers.clone().cpu()}
        student.forget()
        server.log[f"{_named(number)}server/train_loss"] = loss
        return _of(number, {**found, "adam/m": m.cpu(), "adam/v": v.cpu()})

    def _stopped(self, state: State, number: int) -> bool:
        return self.early_stop is not None and float(_part(state, number)["watched"][1]) >= self.early_stop

    def _watched(self, server: Server, state: State, learning: Sequence[int]) -> State:
        """What validation samples say of the students that learned: the best so far, and rounds since."""
        for number in learning:
            own = _part(state, number)
            lowest, waited = own["watched"].tolist()
            w, val = Weights(own["w"], own["buffers"]), server.on("val")
            loss = val.score(val.logits(w, number))["loss"]
            if loss < lowest:
                new = {"best/w": w.w, "best/buffers": w.buffers}
                lowest, waited = loss, 0.0
            else:
                waited += 1
                new = {}
                if waited >= self.early_stop:
                    new = {"w": own["best/w"], "buffers": own["best/buffers"]}
            new["watched"] = torch.tensor([lowest, waited], dtype=torch.float64)
            state = state | _of(number, new)
        return state

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Also of the students of other architectures, under their names."""
        out = super().evaluate(server, state)
        for number in _others(state) if out else ():
            own = _part(state, number)
            found = server.score(server.logits(Weights(own["w"], own["buffers"]), number))
            out |= {f"{_named(number)}{k}": v for k, v in found.items()}
        return out

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
        n = self.noise_samples if self.data == "noise" else len(server.data or ())
        mean = uniform if self.average == "logits" else mean_probabilities
        parts = (self._read(server, rows) for rows in torch.split(torch.arange(n), READ))
        return torch.cat([mean(f) for f in outputs(server, teachers(server, uploads), parts)])

    def _read(self, server: Server, rows: Tensor) -> Any:
        shop = server.workshop
        if self.data == "noise":
            shape = (self.noise_samples, *shop.shape)
            noise: Tensor = shop.kept("feddf/noise", lambda: _noise(server.seed, shape).to(shop.dtype))
            return noise[rows].to(shop.device)
        assert server.data is not None
        return tree_map(lambda t: t.to(shop.device), server.data.read(rows).x)


def _named(number: int) -> str:
    """Before what belongs to a student: nothing for that of the run's own model."""
    return f"student/{number}/" if number else ""


def _of(number: int, parts: Mapping[str, Any]) -> State:
    return {_named(number) + k: v for k, v in parts.items()}


def _part(state: State, number: int) -> State:
    name = _named(number)
    return {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}


def _others(state: State) -> list[int]:
    """Numbers of the architectures beside the run's own that have a student."""
    found = (k.split("/") for k in state if k.startswith("student/"))
    return sorted(int(number) for _, number, *rest in found if rest == ["w"])


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch_rng(seed, "server/feddf/noise"), dtype=torch.float64)
