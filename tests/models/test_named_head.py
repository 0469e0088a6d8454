"""A head named by ``model.head``: methods that need features and a head, on models that have neither name."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import problems
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim.errors import ConfigError
from fedsim.models.split import features_and_output, features_of, head_of, with_head
from fedsim.run import initial, samples
from fedsim.task.layout import Layout
from fedsim.tracking.rows import scalars

SPLIT_METHODS = ("fedper", "fedrep", "fedrod", "moon", "fedproto", "fedloge", "fedetf", "fraug")


class Net(nn.Module):
    """A user's model: its classifier is ``classifier``, or nested in ``net``."""

    def __init__(self, nested: bool):
        super().__init__()
        body, out = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
        self.net = nn.ModuleDict({"body": body, **({"fc": out} if nested else {})})
        if not nested:
            self.classifier = out

    def forward(self, x):
        return self.last()(self.net["body"](x))

    def last(self):
        return self.classifier if hasattr(self, "classifier") else self.net["fc"]


class Named(Net):
    """The same with the names that methods ask for."""

    @property
    def head(self):
        return self.last()

    def features(self, x):
        return self.net["body"](x)


def built(kind: type[Net], nested: bool) -> Net:
    torch.manual_seed(3)
    return kind(nested)


LOGIT_METHODS = ("fedrod", "fedproto", "fedetf", "fedntd", "logit_adjust", "heterofl", "fedossl", "fens")


@pytest.mark.parametrize("nested", [False, True])
def test_features_are_what_goes_into_the_named_head(nested):
    name = "net.fc" if nested else "classifier"
    mine = built(Net, nested)
    model = with_head(mine, name)
    x = torch.randn(6, 4)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        z, out = features_and_output(one, x)
        assert torch.equal(z, one.net["body"](x)) and torch.equal(out, one(x))
        assert torch.equal(features_of(one, x), z)
        assert head_of(one) is one.get_submodule(name) and not head_of(one)._forward_pre_hooks
        assert list(one.state_dict()) == list(mine.state_dict())
        assert Layout(one).head == {f"{name}.weight", f"{name}.bias"}
    assert head_of(mine) is None  # what was handed over is left as it is


def test_under_vmap_every_model_has_its_own_features():
    model = with_head(built(Net, True), "*.fc")
    params = {k: torch.stack([v, 2 * v]) for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 4)

    def features(p, x):
        return torch.func.functional_call(_Features(model), {f"model.{k}": v for k, v in p.items()}, (x,))

    z = torch.vmap(features)(params, x)
    for i in range(2):
        alone = copy.deepcopy(model)
        alone.load_state_dict({k: v[i] for k, v in params.items()})
        torch.testing.assert_close(z[i], features_of(alone, x[i]))


class _Features(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return features_of(self.model, x)


@pytest.mark.parametrize("method", SPLIT_METHODS)
def test_a_method_computes_what_it_does_with_a_model_that_has_the_names(method):
    expected = problems.classification(model=built(Named, True)).run(f"strategy={method}", "rounds=3")
    found = problems.classification(model=built(Net, True)).run(
        f"strategy={method}", "rounds=3", "model.head=net.fc"
    )
    assert problems.hashes(found) == problems.hashes(expected)
    assert list(found.weights) == list(built(Net, True).state_dict())


class Told(NamedTuple):
    """What models of libraries return."""

    logits: torch.Tensor
    hidden: torch.Tensor


class Telling(Net):
    """Its logits are part of what it returns."""

    def forward(self, x):
        h = self.net["body"](x)
        return Told(self.last()(h), h)


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_logits_by_name_are_logits(name):
    """The same bits and numbers, by class too, as of a model that returns the logits alone."""
    settings = [f"strategy={name}", "model.head=classifier", "rounds=1", "evaluation.by_class=true"]
    settings += ["evaluation.every=1"]
    plain, telling = (
        problems.classification(model=built(kind, False)).run(*settings) for kind in (Net, Telling)
    )
    assert problems.hashes(plain) == problems.hashes(telling)
    numbers = [{k: v for k, v in scalars(r.rows[-1]).items() if "seconds" not in k} for r in (plain, telling)]
    assert repr(numbers[0]) == repr(numbers[1])


class Several(nn.Linear):
    """Gives more than its logits, from a sample that has a name."""

    def forward(self, pixels):
        return super().forward(pixels), pixels


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("fedntd", "FedNTD computes with logits .B, C., but Several gives a tuple"),
        ("logit_adjust", "LogitAdjust computes with logits"),
        ("ggeur", "GGEUR computes with samples that are one tensor"),
    ],
)
def test_what_a_method_cannot_compute_with_is_refused(strategy, words):
    clients = [({"pixels": x}, y) for x, y in problems.classes()]
    problem = problems.classification(model=lambda: Several(4, 3), clients=clients, test=None)
    with pytest.raises(ConfigError, match=words):
        problem.run(f"strategy={strategy}", loss=lambda out, y: F.cross_entropy(out[0], y))


@pytest.mark.slow
def test_on_rays_workers_the_same_bits():
    problem = problems.classification(model=built(Net, False))
    settings = ("strategy=moon", "rounds=3", "model.head=classifier")
    serial = problem.run(*settings)
    assert problems.hashes(problem.run(*settings, "engine=ray", "engine.workers=2")) == problems.hashes(
        serial
    )


def test_a_configured_model_and_a_factory_have_it_too():
    problem = problems.classification(model=lambda: built(Net, False))
    assert problem.run("strategy=fedper", "rounds=1", "model.head=classifier").rows
    config = problems.compose_quickly(["model=mlp", "model.head='layers.*'"])
    data = samples.dataset(problems.compose_quickly(["data=digits"]))
    assert head_of(initial.model(config, data, None)).in_features == 64


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clasifier", "is no module of Net; nearest is 'classifier'"),
        ("net.body.*", "fits net.body.0, net.body.1; give one"),
        ("net", "calls it 0 times"),
    ],
)
def test_a_name_that_is_no_head_is_refused(name, words):
    problem = problems.classification(model=built(Net, False))
    with pytest.raises(ConfigError, match=words):
        problem.run("strategy=fedper", f"model.head={name}")


def test_features_that_are_no_vectors_are_refused():
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"is \(2, 2, 2\) for two samples, expected \(2, d\)"):
        problems.classification(model=model).run("strategy=moon", "model.head='1'")


def test_without_a_name_the_way_is_said():
    with pytest.raises(ConfigError, match=r"model\.head=NAME"):
        problems.classification(model=built(Net, False)).run("strategy=moon")


def halved(model, x):
    return model(x["x"] / 2)


class Halving(Net):
    """What ``halved`` makes of the model."""

    def forward(self, x):
        return super().forward(x / 2)


@pytest.mark.parametrize("method", [*SPLIT_METHODS, "analytic", "feddf"])
def test_a_forward_pass_of_ones_own_is_where_features_come_from(method):
    clients = problems.classes((9, 9, 9, 9))
    settings = ["engine=serial", *problems.QUIET, "rounds=1", "clients_per_round=4", f"strategy={method}"]
    settings += ["model.head=classifier"] + ["data.server={share: 0.2, labelled: false}"] * (
        method == "feddf"
    )

    def hashed(model, clients, **given):
        torch.manual_seed(0)
        return (
            fedsim.simulate(settings, model=model(False), clients=clients, **given)
            .history["weights_hash"]
            .iloc[-1]
        )

    plain = hashed(Halving, clients)
    assert hashed(Net, [({"x": x}, y) for x, y in clients], forward=halved) == plain
