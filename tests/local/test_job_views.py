"""``job.view``: what a client's views are keyed by, and how a configuration names them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from composing import compose_quickly
from problems import QUIET, hashes

import fedsim
from clients.sgd import SGDClient
from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig
from fedsim.data import views
from fedsim.data.dataset import Dataset, Normalize, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.local import Batch
from fedsim.data.shards import Shards
from fedsim.errors import ClientError, ConfigError
from fedsim.exchange.payload import Payload
from fedsim.local.job import Job
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel
from strategies.fedavg import FedAvg

X = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
Y = torch.arange(40) % 3
SCALE = Normalize(1 / 255, (0.5,), (0.5,))


def job(client=0, round=0, seed=0, **more):
    """A job over forty bytes images of two clients."""
    source = FederatedData(
        Dataset(Samples(X, Y), classes=("a", "b", "c"), normalize=SCALE),
        Shards.of([torch.arange(20).numpy(), torch.arange(20, 40).numpy()]),
    )
    model = FlatModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))
    return Job(
        client=client,
        round=round,
        task=Task(model.module),
        model=model,
        local=as_dataclass(compose_quickly(["client.batch_size=5", "client.epochs=1"]).client, ClientConfig),
        seed=seed,
        message=Payload({"w": model.w.clone()}),
        state={},
        source=source,
        views={"weak": views.Weak(), "strong": views.Strong(), "noise": views.Noise()},
        **more,
    )


def batch():
    return Batch(SCALE(X[:5], torch.float32), Y[:5])


def test_a_view_is_keyed_by_client_round_seed_and_name():
    first = job().view("strong", batch())
    assert torch.equal(first.x, job().view("strong", batch()).x) and first.y is not None
    for other in (job(client=1), job(round=1), job(seed=1)):
        assert not torch.equal(first.x, other.view("strong", batch()).x)
    assert not torch.equal(job().view("weak", batch()).x, first.x)


def test_twice_in_a_step_are_two_views_and_other_views_do_not_matter():
    one = job()
    pair = [one.view("strong", batch()).x for _ in range(2)]
    assert not torch.equal(*pair)
    other = job()
    other.view("weak", batch()), other.rng("mine")
    assert torch.equal(other.view("strong", batch()).x, pair[0])


def test_steps_and_phases_are_other_views():
    def walked(times):
        """Views of the first batch of each step, ``times`` of them in a step."""
        one, seen = job(), []
        for phase in range(2):
            for _ in one.batches(f"phase {phase}"):
                seen.append(one.view("strong", batch()).x)
                for _ in range(times - 1):
                    one.view("strong", batch())
            one.restart()
        return seen

    once, often = walked(1), walked(3)
    assert len(once) == 8 and len({x.numpy().tobytes() for x in once}) == 8
    assert all(map(torch.equal, once, often))


def test_values_are_those_of_the_stored_images():
    shown = job().view("noise", batch()).x
    plain = shown * 0.5 + 0.5 - X[:5].float() / 255
    assert abs(float(plain.std()) - 0.1) < 0.01


def test_an_unknown_view_is_refused():
    with pytest.raises(
        ConfigError, match=r"views.stong: there is no such view; nearest is 'strong'.*\+view@views"
    ):
        job().view("stong", batch())


@dataclass(frozen=True, kw_only=True)
class Shown(SGDClient):
    """Local SGD on a view of each batch."""

    name: str

    def step(self, job, w, batch):
        return job.descend(w, job.view(self.name, batch))


@dataclass(kw_only=True)
class OnViews(FedAvg):
    server_lr: float = 1.0
    weighting: str = "samples"
    name: str = "strong"

    def make_client(self):
        return Shown(weighting=self.weighting, name=self.name)


def run(*overrides, name="strong"):
    base = (
        "data=digits",
        "model=linear",
        "engine=serial",
        "num_clients=4",
        "clients_per_round=2",
        "rounds=2",
    )
    client = "client.steps=2"
    return fedsim.simulate([*base, client, *QUIET, *overrides], strategy=OnViews(name=name))


def test_views_of_the_configuration_reach_clients(tmp_path):
    usual = hashes(run())
    assert usual == hashes(run()) and usual != hashes(run("views.strong.m=20"))
    assert hashes(run(name="weak")) != usual != hashes(run("view@views.weak=unchanged", name="weak"))
    plain = hashes(run("view@views.strong=unchanged"))
    assert plain == hashes(run("view@views.weak=noise", "views.strong=unchanged"))
    with pytest.raises(ClientError, match=r"views.other: there is no such view"):
        run(name="other")
    assert hashes(run("+view@views.other=noise", name="other")) != usual


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("(x, y, generator): return x", "own returned 8 samples, expected a pair"),
        ("(x, y, generator): return x[:3], y", "own returned 3 samples, expected 8, as it was given"),
        ("(x, y, generator): return x, y[:3]", "own returned 3 targets, expected 8, as it was given"),
        (
            "(x, generator): return x[..., :4]",
            r"own returned x as \(B, 1, 8, 4\) float32, expected \(B, 1, 8, 8\)",
        ),
        ("(x, generator): return x.mine", "own cannot show a batch of shape .*has no attribute 'mine'"),
        ("(x, generator): return x / 0", "own returned NaN or infinity"),
    ],
)
def test_views_of_ones_own_are_tried_before_the_first_round(code, said, tmp_path, monkeypatch):
    (tmp_path / "own_views_tried.py").write_text(f"def own{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_views_tried", raising=False)
    with pytest.raises(ConfigError, match=f"^views.mine: {said}"):
        run("+views.mine={_target_: hydra.utils.get_method, path: own_views_tried.own}", name="mine")


def test_views_that_cannot_be_built_are_refused_before_the_first_round():
    with pytest.raises(ConfigError, match=r"views.strong: RandAugment .*m from 0 to 30"):
        run("views.strong.m=40")
    with pytest.raises(ConfigError, match=r"views.strong.m=a: must be a whole number"):
        run("views.strong.m=a")
    with pytest.raises(ConfigError, match=r"unknown key 'views.strong.k'"):
        run("+views.strong.k=4")
    with pytest.raises(ConfigError, match=r"views.strong=stron: there is no such view"):
        run("views.strong=stron")


def test_augment_names_a_view():
    def augmented(value):
        return hashes(run(f"data.augment={value}", "view@views.strong=unchanged"))

    assert augmented("strong") != augmented("false") != augmented("weak") != augmented("strong")
    with pytest.raises(ConfigError, match=r"data.augment=stron: there is no such view"):
        augmented("stron")
