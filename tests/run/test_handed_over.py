"""What is handed over in Python and cannot work is said in one line before anything starts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from problems import QUIET, classes
from torch import nn

import fedsim
from clients.base import Client
from fedsim.errors import ClientError, ConfigError, DataError
from strategies.fedavg import FedAvg


def simulate(**handed: Any) -> fedsim.RunResult:
    handed = {"model": lambda: nn.Linear(4, 3), "clients": classes()} | handed
    return fedsim.simulate([*QUIET, "engine=serial", "rounds=1", "clients_per_round=4"], **handed)


def test_a_generator_of_clients_trains_as_their_list_and_a_number_is_named() -> None:
    clients = classes()
    torch.manual_seed(0)
    listed = simulate(model=nn.Linear(4, 3), clients=clients)
    torch.manual_seed(0)
    read = simulate(model=nn.Linear(4, 3), clients=(c for c in clients))
    assert read.rows[-1]["weights_hash"] == listed.rows[-1]["weights_hash"]
    with pytest.raises(DataError, match="clients: got int; expected a list"):
        simulate(clients=5)


@pytest.mark.parametrize(
    ("handed", "words"),
    [
        ({"forward": "x"}, "forward: is a str; expected a function"),
        ({"forward": lambda model: model}, "forward: .*<lambda> cannot compute two samples"),
        ({"augment": "flip"}, "augment='flip': expected a function"),
        ({"augment": lambda x: x}, "augment: .*<lambda> cannot show a batch of shape .* It is called as"),
        ({"augment": lambda x, generator: {}["key"]}, "augment: .* KeyError: 'key'"),
        ({"augment": lambda x, generator: None}, "returned None"),
        ({"augment": lambda x, generator: x[:1]}, "returned 1 samples"),
    ],
)
def test_functions_that_cannot_be_called_are_named_before_round_1(handed: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(**handed)


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.bfloat16()).float())  # type: ignore[no-any-return]


def test_a_cast_to_a_type_that_is_not_trained_in_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"'first\.weight' is bfloat16, but is trained in float32"):
        simulate(model=Narrow)


class Unregistered(nn.Module):
    def __init__(self, *, registered: bool) -> None:
        super().__init__()
        layers = [nn.Linear(4, 5)]
        self.layers = nn.ModuleList(layers) if registered else layers
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers[0](x))  # type: ignore[no-any-return]


def test_layers_in_a_plain_list_are_said_not_to_be_trained() -> None:
    with pytest.warns(
        UserWarning, match=r"shape \(5, 4\), \(5,\) that have a gradient, but are no parameters"
    ):
        simulate(model=Unregistered(registered=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(model=Unregistered(registered=True))


class Arrays(Client):
    def init_state(self, layout: Any) -> Any:
        return {"mean": np.zeros(3)}


class Shorter(FedAvg):
    def update(self, state: Any, replies: Any, round: Any) -> Any:
        new = super().update(state, replies, round)
        return new | {"w": new["w"][:-1]}


def test_state_of_another_kind_is_named() -> None:
    strategy = FedAvg(server_lr=1.0, weighting="samples")
    strategy.client = Arrays()
    with pytest.raises(
        ClientError, match=r"Arrays.init_state returned \['mean'\] as ndarray of shape \(3,\)"
    ):
        simulate(strategy=strategy)
    with pytest.raises(
        fedsim.errors.StrategyError, match=r"expected a tensor of shape \(32,\), torch.float32$"
    ):
        simulate(strategy=Shorter(server_lr=1.0, weighting="samples"))
