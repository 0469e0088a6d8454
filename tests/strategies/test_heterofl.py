"""HeteroFL: which part of the model a width is, and the mean over those who hold a parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, classes, classification, hashes, network
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config.compose import compose
from fedsim.errors import ConfigError
from fedsim.local.kinds import Kinds
from fedsim.models import CNN, LeNet, ResNet18
from fedsim.system.cost import forward_flops
from fedsim.task.layout import Layout
from fedsim.task.submodels import narrow

HALF = "client.classes=[{share: 0.5, width: 1}, {share: 0.5, width: 0.5}]"


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_places_of_a_width_by_hand() -> None:
    """Linear(4, 5), Tanh, Linear(5, 3) at 0.4: rows 0, 1 of the first layer, columns 0, 1 of the last."""
    model = network()
    sub, places = narrow(model, 0.4, torch.randn(2, 4))
    first = [*range(8), 20, 21]  # weight (5, 4), bias (5,)
    last = [25, 26, 30, 31, 35, 36, 40, 41, 42]  # weight (3, 5), bias (3,)
    layout = Layout(model)
    assert places.tolist() == layout.compact(torch.arange(layout.dim))[first + last].tolist()
    torch.testing.assert_close(flat(sub), layout.expand(flat(model))[places])


@pytest.mark.parametrize("width", [0.5, 0.25, 1 / 16])
@pytest.mark.parametrize(
    "model",
    [
        lambda: LeNet((3, 32, 32), 10),
        lambda: CNN((1, 28, 28), 10),
        lambda: ResNet18((3, 32, 32), 10, norm="group", groups=2, stem="cifar"),
    ],
    ids=["lenet", "cnn", "resnet18"],
)
def test_a_submodel_computes_the_first_units(model: Any, width: float) -> None:
    """Setting all parameters outside to zero leaves a network whose cut units stay silent (without norms)."""
    whole = model()
    size = 28 if isinstance(whole, CNN) else 32
    x = torch.randn(2, 1 if isinstance(whole, CNN) else 3, size, size)
    sub, places = narrow(whole, width, x)
    assert len(places) == Layout(sub).size == len(set(places.tolist()))
    torch.testing.assert_close(flat(sub), Layout(whole).expand(flat(whole))[places])
    assert sub(x).shape == whole(x).shape
    if not isinstance(whole, ResNet18):
        layout = Layout(whole)
        kept = torch.zeros(layout.dim)
        kept[places] = flat(sub)
        torch.nn.utils.vector_to_parameters(layout.compact(kept), whole.parameters())
        torch.testing.assert_close(sub(x), whole(x), rtol=1e-4, atol=1e-5)
    assert forward_flops(sub, x) < 1.6 * width * forward_flops(model(), x)


def test_layers_that_have_no_width_are_named() -> None:
    lstm = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(ConfigError, match=r"LSTM\(4, 4\) cannot be cut to a width"):
        narrow(lstm, 0.5, torch.randn(2, 3, 4))
    with pytest.raises(ConfigError, match="running statistics have no width; use GroupNorm"):
        classification("bn").run("strategy=heterofl", "buffers=local")


@pytest.mark.parametrize("rows", ["width", "classes"])
def test_parameters_are_averaged_over_those_who_hold_them(rows: str) -> None:
    """One full-batch step a client; the reference cuts, trains and averages with plain tensors.

    The authors average a class's row of the head over the clients with the class alone (``classes``).
    """
    clients = classes((6, 5, 8, 7))
    problem = Problem(
        network(), clients, ("rounds=1", "clients_per_round=4", "dtype=float64", "client.steps=1")
    )
    plain = ["client.batch_size=100", "client.lr=0.1", "client.lr_decay=1", "client.weight_decay=0"]
    plain += [
        "client.clip_norm=null",
        "strategy.scale=true",
        "strategy.mask=true",
        "client.classes_by=random",
        f"strategy.output_rows={rows}",
    ]
    result = problem.run("strategy=heterofl", HALF, *plain)
    member = Kinds.of(_local(HALF), 4, 0, None).member
    assert sorted(member.tolist()) == [0, 0, 1, 1]
    layout = Layout(network(), torch.float64)
    w = layout.expand(flat(network().double()))
    total, count = torch.zeros_like(w), torch.zeros_like(w)
    for c, (x, y) in enumerate(clients):
        width = (1.0, 0.5)[member[c]]
        sub, places = narrow(network().double(), width, x.double())
        hidden = sub[0](x.double()) / width
        keep = torch.tensor([float((y == k).any()) for k in range(3)], dtype=torch.float64)
        F.cross_entropy(sub[2](torch.tanh(hidden)) * keep, y).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in sub.parameters()])
        total[places] -= 0.1 * gradient
        if rows == "classes":
            whole = torch.nn.utils.parameters_to_vector(
                [torch.ones(5, 4), torch.ones(5), keep[:, None].repeat(1, 5), keep]
            )
            count[places] += layout.expand(whole.double())[places]
        else:
            count[places] += 1
    expected = layout.compact(w + total / count.clamp(min=1))
    got = torch.cat([result.weights[n].reshape(-1) for n, _ in network().named_parameters()])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def _local(*overrides: str) -> Any:
    from fedsim.config.parts import as_dataclass
    from fedsim.config.schema import ClientConfig

    return as_dataclass(compose([*overrides]).client, ClientConfig)


def test_one_width_is_fedavg() -> None:
    problem = classification()
    plain = ["strategy.weighting=samples"]
    full = problem.run("strategy=heterofl", "strategy.mask=false", *plain)
    averaged = problem.run("strategy=fedavg", *plain)
    for name, value in averaged.weights.items():
        torch.testing.assert_close(full.weights[name], value, rtol=0, atol=1e-6)


def test_an_attack_on_the_data_reaches_the_sub_model() -> None:
    settings = ("strategy=heterofl", "client.classes=[{share: 1, width: 1}]", "rounds=1")
    every = classification(cohorts=[range(6)])
    poisoned = classification(clients=[(x, 2 - y) for x, y in classes()], cohorts=[range(6)])
    attacked = hashes(every.run(*settings, "attack=label_flip", "attack.fraction=1"))
    assert attacked == hashes(poisoned.run(*settings))
    assert attacked != hashes(every.run(*settings))


def test_narrow_clients_send_less_and_are_faster(tmp_path: Path) -> None:
    """At 0.5: 3 of 5 hidden units, 27 of 43 parameters; (3*4 + 3*3) / (5*4 + 5*3) = 0.6 of the products."""
    (tmp_path / "fleet.csv").write_text("speed,down,up\n" + "1,1e9,1e9\n" * 6)
    fleet = ["system=table", f"system.devices.path={tmp_path / 'fleet.csv'}", "rounds=1", "client.steps=5"]
    result = classification(cohorts=[range(6)]).run("strategy=heterofl", HALF, *fleet, "client.batch_size=3")
    table = result.per_client.pivot_table(index="client", columns="metric", values="value")
    member = Kinds.of(_local(HALF), 6, 0, None).member
    assert table.bytes_up.tolist() == [4 * (43, 27)[k] + 8 for k in member]
    share = table.gradients / table.samples
    assert share.tolist() == pytest.approx([(1, 0.6)[k] for k in member])
    assert result.rows[0]["sim_seconds"] == pytest.approx(table.gradients.max())
    np.testing.assert_allclose(table.sim_seconds, table.gradients, rtol=1e-6)


def test_any_number_of_workers_and_resuming_give_the_same_bits(ray: str) -> None:
    problem = classification()
    serial = hashes(problem.run("strategy=heterofl", HALF))
    assert len(set(serial)) == 4
    assert hashes(problem.run("strategy=heterofl", HALF, ray, "engine.workers=2")) == serial


def test_classes_do_their_own_amount_of_work() -> None:
    kinds = "client.classes=[{share: 1, epochs: 1, batch_size: 2}, {share: 2, steps: 3}]"
    result = classification(cohorts=[range(6)]).run(kinds, "rounds=1")
    steps = result.per_client.query("metric == 'steps'").sort_values("client").value.tolist()
    member = Kinds.of(_local(kinds), 6, 0, None).member
    assert sorted(member.tolist()) == [0, 0, 1, 1, 1, 1]
    assert steps == [(-(-n // 2), 3)[k] for n, k in zip((7, 12, 3, 10, 6, 11), member, strict=True)]


def test_classes_by_speed_give_the_slowest_the_first(tmp_path: Path) -> None:
    (tmp_path / "fleet.csv").write_text("speed,down,up\n" + "".join(f"{s},1,1\n" for s in (5, 1, 4, 2, 6, 3)))
    kinds = ["client.classes=[{share: 0.5, steps: 1}, {share: 0.5, steps: 4}]", "client.classes_by=speed"]
    fleet = ["system=table", f"system.devices.path={tmp_path / 'fleet.csv'}"]
    result = classification(cohorts=[range(6)]).run(*kinds, *fleet, "rounds=1")
    steps = result.per_client.query("metric == 'steps'").sort_values("client").value.tolist()
    assert steps == [4, 1, 4, 1, 4, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["client.classes=[{share: 1, epoch: 2}]"],
            r"client.classes\[0\]: unknown key 'epoch'; nearest is 'epochs'",
        ),
        (["client.classes=[{epochs: 2}]"], r"client.classes\[0\]: needs a share"),
        (
            ["client.classes=[{share: 1, epochs: 0}]"],
            r"client.classes\[0\].epochs=0: must be a positive whole number",
        ),
        (["client.classes=[{share: 1, width: 2}]"], r"client.classes\[0\].width=2: must be in \(0, 1\]"),
        ([HALF], "a width needs a method that trains parts of the model; strategy=heterofl"),
        ([HALF, "client.classes_by=speed"], "client.classes_by=speed: needs devices"),
    ],
)
def test_impossible_classes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(*overrides)
