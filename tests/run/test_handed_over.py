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
        (
            {"augment": lambda x, generator: x[:, :2]},
            r"augment: .* returned x as \(B, 2\) float32, expected \(B, 4\) float32.*Linear and its loss",
        ),
        (
            {"augment": lambda x, generator: x.long()},
            r"returned x as \(B, 4\) int64, expected \(B, 4\) float32",
        ),
        ({"augment": lambda x, generator: [x]}, r"returned x as \[0\]"),
        ({"augment": lambda x, generator: x.to_sparse()}, "returned a sparse tensor"),
        ({"augment": lambda x, generator: x / 0}, "NaN or infinity for finite samples"),
        ({"metrics": {"m": lambda output, y: (1.0, -1)}}, r"'m' gave \(sum, count\) = \(1, -1\)"),
        ({"metrics": {"m": lambda output, y: (1.0, float("nan"))}}, r"'m' gave .* = \(1, nan\)"),
        ({"metrics": {"m": lambda output, y: (1.0, 0)}}, "'m' gave a sum of 1 over a count of 0"),
        ({"metrics": {"m": lambda output, y: "0.5"}}, "'m' gave str; expected one number"),
    ],
)
def test_functions_that_cannot_be_called_are_named_before_round_1(handed: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(**handed)


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        ("abcd", "domains: got str; expected a list"),
        ({"a": 0, "b": 1}, "domains: got dict"),
        (5, "domains: got int"),
        ([0, 0, 1, 1, 2, 2], r"domains: client 0 has 0 \(int\); a name is text, e\.g\. '0'"),
        (["a", "a", None, "b", "b", "b"], "domains: client 2 has None"),
        (["a", "a", "", "b", "b", "b"], "domains: client 2 has ''"),
        (["a"], "domains: 1 names for 6 clients"),
    ],
)
def test_names_of_domains_that_are_none_are_named(domains: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(domains=domains)


def test_names_of_domains_go_with_clients_and_may_be_an_array() -> None:
    with pytest.raises(ConfigError, match=r"domains: names the domain of each of clients="):
        simulate(domains=["a"], clients=None, data=classes()[0])
    assert simulate(domains=np.array(["a", "b"] * 3)).rows


def test_augmentations_of_another_size_that_can_be_trained_on_are_taken() -> None:
    clients = [(x.view(-1, 1, 2, 2), y) for x, y in classes()]
    grown = simulate(
        model=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)),
        clients=clients,
        augment=lambda x, generator: x.repeat_interleave(2, dim=2),
    )
    assert len(grown.rows) == 1


def test_an_augmentation_that_scales_bytes_is_refused() -> None:
    clients = [((x * 1000).clamp(0, 255).byte(), y) for x, y in classes()]
    with pytest.raises(ConfigError, match=r"augment: .* keep them in 0\.\.255"):
        simulate(clients=clients, augment=lambda x, generator: x.float() / 255)


def test_a_metric_without_a_finite_number_is_named_each_round(caplog: pytest.LogCaptureFixture) -> None:
    run = simulate(test=classes()[0], metrics={"rare": lambda output, y: (0.0, 0)})
    assert np.isnan(run.rows[-1]["rare"])
    assert "round 1: rare: no finite number" in caplog.text


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
