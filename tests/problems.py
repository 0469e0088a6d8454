"""Tiny problems for the tests of the core, and the shortest way to run one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composing import compose_quickly
from hydra.utils import instantiate
from torch import Tensor, nn

import fedsim
from fedsim.config.parts import part
from fedsim.exchange.packing import pack
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.layout import Layout

GOLDEN = Path(__file__).parent / "golden"
QUIET = ("tracker=quiet", "evaluation.every=1000", "checkpoint.every=0")
Pair = tuple[Tensor, Tensor]


class Quadratic(nn.Module):
    """One vector ``x`` (d,); a sample is a pair (A, b) whose gradient is ``A x - b``, A not necessarily symmetric."""

    def __init__(self, d: int = 6, start: Sequence[float] | None = None):
        super().__init__()
        value = torch.zeros(d)
        self.x = nn.Parameter(value if start is None else torch.tensor(start, dtype=torch.float64))

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.x, a


def linear_loss(output: tuple[Tensor, Tensor], b: Tensor) -> Tensor:
    """A loss whose gradient is the mean over the batch of ``A x - b``."""
    x, a = output
    gradient = (a @ x.detach() - b).mean(0)
    return (x * gradient).sum()


@dataclass(frozen=True)
class Problem:
    """What ``fedsim.simulate`` takes in Python, and the settings that go with it."""

    model: nn.Module | Callable[[], nn.Module]
    clients: Sequence[Pair]
    settings: Sequence[str] = ()
    loss: Callable[..., Tensor] | None = None
    test: Pair | None = None
    initial: Mapping[str, Tensor] | None = None
    cohorts: Sequence[Sequence[int]] | None = None

    def run(self, *overrides: str, **given: Any) -> fedsim.RunResult:
        """Run it quietly on the serial engine, unless ``overrides`` say otherwise."""
        parts = {k: getattr(self, k) for k in ("model", "clients", "loss", "test", "initial", "cohorts")}
        return fedsim.simulate(["engine=serial", *QUIET, *self.settings, *overrides], **{**parts, **given})


def quadratic(**changes: Any) -> Problem:
    """The golden problem: 4 clients in R^6, 8 steps a round over two fixed mini-batches, 6 given cohorts."""
    z = golden()
    parts: dict[str, Any] = {
        "model": Quadratic(6),
        "clients": [(torch.tensor(a), torch.tensor(b)) for a, b in zip(z["A"], z["b"], strict=True)],
        "settings": (
            "dtype=float64",
            "client=fedspeed_paper",
            "rounds=6",
            "client.batch_size=1",
            "client.epochs=4",
            "client.shuffle=false",
        ),
        "loss": linear_loss,
        "initial": {"x": torch.tensor(z["x0"])},
        "cohorts": [np.flatnonzero(row).tolist() for row in z["active"]],
    }
    return Problem(**{**parts, **changes})


def golden() -> dict[str, np.ndarray]:
    """Inputs and outputs of the authors' code on the quadratic problem."""
    with np.load(GOLDEN / "fedspeed_quad.npz") as z:
        return dict(z)


def classes(
    sizes: Sequence[int] = (7, 12, 3, 10, 6, 11), *, features: int = 4, num_classes: int = 3, seed: int = 0
) -> list[Pair]:
    """A little classification problem: clients of different sizes and label mixes; no batch of 4 leaves one over."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, features))
    out = []
    for n in sizes:
        y = rng.choice(num_classes, n, p=rng.dirichlet(np.ones(num_classes)))
        x = centres[y] + 0.5 * rng.normal(size=(n, features))
        out.append((torch.tensor(x, dtype=torch.float32), torch.tensor(y)))
    return out


class Network(nn.Sequential):
    """Layers whose last one is the head."""

    def features(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self[:-1], x)

    @property
    def head(self) -> nn.Module:
        return self[-1]


class NaNAbove(nn.Module):
    """Passes on what is below a million; the rest becomes NaN, as an overflow in a model would."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x < 1e6, x, torch.nan)


def network(kind: str = "tanh", features: int = 4, num_classes: int = 3, *first: nn.Module) -> nn.Module:
    """A smooth two-layer network behind ``first``: ``tanh``, or with BatchNorm (``bn``) or dropout (``dropout``)."""
    extra: list[nn.Module] = {"tanh": [], "bn": [nn.BatchNorm1d(5)], "dropout": [nn.Dropout(0.5)]}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Network(*first, nn.Linear(features, 5), *extra, nn.Tanh(), nn.Linear(5, num_classes))


def classification(kind: str = "tanh", **changes: Any) -> Problem:
    """Six clients of sizes 3 to 12, three of them a round for four rounds, short last batches included."""
    parts: dict[str, Any] = {
        "model": network(kind),
        "clients": classes(),
        "test": classes((11,), seed=1)[0],
        "settings": (
            "rounds=4",
            "clients_per_round=3",
            "client.epochs=2",
            "client.batch_size=4",
            "engine.chunks=2",
        ),
    }
    return Problem(**{**parts, **changes})


def method(name: str, *overrides: str) -> Any:
    """The configured strategy object, for wrapping and for calling by hand."""
    of_method = [o for o in overrides if of_strategy(o) or o.startswith("aggregator")]
    config = compose_quickly((f"strategy={name}", *of_method))
    built = instantiate(config.strategy, _convert_="all")
    built.aggregator = part(config.aggregator, "aggregator")
    return built


def of_strategy(override: str) -> bool:
    """Whether an override says which strategy is built, or how."""
    return override.startswith(("strategy.", "strategy@"))


def noted(state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A copy of a state, its flat vectors without padding."""
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    return {**state, **pack(tensors, layout)[0]}


@dataclass
class Recorded:
    """A strategy that notes its state and its clients' states after every round."""

    inner: Any
    states: list[dict[str, Any]] = field(default_factory=list)
    kept: list[list[Mapping[str, Tensor]]] = field(default_factory=list)
    aggregator: Any = None

    @property
    def client(self) -> Any:
        return self.inner.client

    @property
    def traits(self) -> Traits:
        """The inner one's, but the policy for BatchNorm is the configured one: tests try others."""
        return replace(self.inner.traits, buffers=None)

    def setup(self, task: Any, layout: Any) -> None:
        self.layout = layout
        self.inner.setup(task, layout)

    def init(self, server: Server) -> dict[str, Any]:
        return self.inner.init(server)

    def round(self, server: Server, state: dict[str, Any], round: Round) -> dict[str, Any]:
        state = self.inner.round(server, state, round)
        self.states.append(noted(state, self.layout))
        kept = [server.states.get(c) for c in range(server.num_clients)]  # proposed ones count
        self.kept.append([noted(state, self.layout) for state in kept])
        return state

    def models(self, state: dict[str, Any]) -> Any:
        return self.inner.models(state)

    def evaluate(self, server: Server, state: dict[str, Any]) -> dict[str, float]:
        return self.inner.evaluate(server, state)

    def evaluate_clients(self, server: Server, state: dict[str, Any]) -> dict[str, float]:
        return self.inner.evaluate_clients(server, state)

    def series(self, name: str) -> np.ndarray:
        """``(rounds, d)`` of one entry of the server state."""
        return np.stack([s[name].numpy() for s in self.states])

    def of_clients(self, name: str, d: int) -> np.ndarray:
        """``(rounds, m, d)`` of one entry of the client states; zeros where a client has none."""
        zero = torch.zeros(d)
        return np.stack([[k.get(name, zero).double().numpy() for k in kept] for kept in self.kept])


def recorded(name: str, problem: Problem, *overrides: str) -> tuple[Recorded, fedsim.RunResult]:
    """Run a configured strategy and keep what it went through."""
    strategy = Recorded(method(name, *overrides))
    rest = [o for o in overrides if not of_strategy(o)]
    return strategy, problem.run(f"strategy={name}", *rest, strategy=strategy)


def hashes(result: fedsim.RunResult) -> list[str]:
    """The weights' hash after each round."""
    return [row["weights_hash"] for row in result.rows]


def guessed_boxes(output: Tensor, **options: Any) -> dict[str, Tensor]:
    """Of logits (B, C) one "box" a sample: the likeliest class, sure by its probability; for methods of detection."""
    p, label = output.softmax(dim=1).max(dim=1, keepdim=True)
    return {"boxes": p[..., None].expand(-1, -1, 4), "labels": label, "scores": p, "objectness": p.sqrt()}


def guessed_losses(output: Tensor, y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses (B,) by part on such boxes."""
    lost = torch.nn.functional.cross_entropy(output, y["labels"][:, 0].clamp(min=0), reduction="none")
    off = output.logsumexp(1).sigmoid() - y["objectness"][:, 0]
    return {
        "class": lost * y["classed"][:, 0],
        "objectness": off.square(),
        "box": (output[:, 0] - y["boxes"][:, 0, 0]).square() * y["boxed"][:, 0],
    }
