"""What a method needs of model, data and settings is found out before anything is started."""

from __future__ import annotations

import pytest
import torch
from composing import compose_quickly
from problems import classification
from torch import nn

from fedsim.errors import ConfigError
from fedsim.run import participants


class Bare(nn.Module):
    """A model that does not show its features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("name", ["fedloge", "fedetf", "fedper", "fedrod", "fedproto", "moon", "fraug"])
def test_a_model_without_features_is_named_before_the_engine_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.api.start_engine", lambda config: pytest.fail("the engine was started"))
    with pytest.raises(ConfigError, match=r"model: \w+ needs model.features.*Bare lacks them.*model=mlp"):
        classification(model=Bare()).run(f"strategy={name}")


@pytest.mark.parametrize("name", ["fedntd", "fedproto", "logit_adjust", "fedrod", "fedetf", "fraug", "ggeur"])
def test_data_without_class_labels_are_named_before_the_engine_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.api.start_engine", lambda config: pytest.fail("the engine was started"))
    problem = classification()
    numbers = [(x, y.float()) for x, y in problem.clients]
    with pytest.raises(ConfigError, match=r"data: \w+ needs class labels.*strategy=fedavg"):
        classification(clients=numbers, test=None, loss=nn.functional.l1_loss).run(f"strategy={name}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=fedbuff"], "strategy: an asynchronous method needs devices.*add system=lognormal"),
        (["strategy=gossip_async", "topology=ring", "system=lognormal"], "system: asynchronous peers"),
        (["strategy=gossip"], "topology: this method's peers need a graph"),
        (["strategy=fedavg", "topology=ring"], "topology: FedAvg talks through a server"),
        (
            ["strategy=fedsgd"],
            "client.steps=None: clients of FedSGD send one gradient a round; add client.steps=1",
        ),
        (
            ["strategy=heterofl", "system=lognormal", "system.over_selection=2", "system.stragglers=drop"],
            "system.over_selection: HeteroFL waits for all; leave it at 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named_before_data_are_loaded(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        participants.strategy(compose_quickly(tuple(overrides)), None)
