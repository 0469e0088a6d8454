"""FedoSSL's rounds against independent code, and its options."""

from __future__ import annotations

from typing import Any

import fedossl_numpy as oracle
import numpy as np
import pytest
import torch
from hooks import hooked
from openworlds import FEW, OPEN, problem, run
from problems import classes, hashes, network

from fedsim.errors import ConfigError
from fedsim.rng import torch_rng

# -- one client, step by step ------------------------------------------------------------------------------------------


class OneClient:
    """The network of ``problem`` in NumPy, trained on full batches, labelled samples first."""

    def __init__(self, x: Any, y: Any, known: int):
        self.x, self.y, self.known = x, y, known
        start = [p.detach().double().numpy() for p in network("tanh", 4, 4).parameters()]
        self.shapes = [p.shape for p in start]
        self.w = np.concatenate([p.ravel() for p in start])
        self.memory: list[Any] = []

    def forward(self, w: Any, x: Any) -> tuple[Any, Any]:
        ends = np.cumsum([int(np.prod(s)) for s in self.shapes])
        parts = np.split(w, ends[:-1])
        a, b, c, d = (p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))
        z = np.tanh(x @ a.T + b)
        return z, z @ c.T + d

    def round(self, m: Any, steps: int, lr: float, **options: Any) -> None:
        p = oracle.softmax(self.forward(self.w, self.x[self.known :])[1])
        counts = np.bincount(p.argmax(1), minlength=4) + np.bincount(self.y[: self.known], minlength=4)
        self.counts, self.u = counts, float((1 - p.max(1)).mean())
        for _ in range(steps):
            z, _ = self.forward(self.w, self.x)
            self.memory += list(oracle.unit(z))
            cosines = oracle.unit(z) @ oracle.unit(z).T
            np.fill_diagonal(cosines, -np.inf)
            fixed = None if m is None else oracle.q(z, m)

            partners = cosines.argmax(1)

            def loss(w: Any, q: Any = fixed, partners: Any = partners, counts: Any = counts) -> float:
                views = (*self.forward(w, self.x), *self.forward(w, self.x))
                return oracle.objective(
                    views, self.y, counts, self.u, m, q_fixed=q, partners=partners, **options
                )

            self.w = self.w - lr * oracle.slope(loss, self.w)


def test_two_rounds_of_one_client_are_those_of_the_equations() -> None:
    seen: list[tuple[Any, Any]] = []

    def note(job: Any) -> None:
        seen.append((job.data.everything(), job.unlabelled.everything().x))

    options = ("strategy.gamma=0.5", "strategy.tau=0.3", "strategy.memory=30")
    strategy = hooked("fedossl", note, *FEW, *options)
    few = ("clients_per_round=1", "rounds=2", "client.batch_size=20", "client.shuffle=false", "client.lr=0.2")
    given = problem(clients=classes((20,), num_classes=4, seed=2))
    result = given.run("strategy=fedossl", OPEN, *few, strategy=strategy)
    (x, y), unlabelled = seen[0]
    assert 0 < len(y) < 20 and set(y.tolist()) == {0, 1}
    inputs = torch.cat([x, unlabelled]).double().numpy()
    labels = np.concatenate([y.numpy(), np.full(len(unlabelled), -100)])
    one, m = OneClient(inputs, labels, len(y)), None
    for number in range(2):
        one.round(m, 2, 0.2, gamma=0.5, tau=0.3)
        rows = np.array(one.memory)[-30:]
        memory = np.array([rows[(i - len(one.memory)) % 30] for i in range(30)])  # a ring
        start = torch.randperm(30, generator=torch_rng(0, "fit/centroids", number, 0))[:3].numpy()
        local = oracle.local_centroids(memory, memory[start])
        if m is None:
            drawn = torch.randn((4, 5), generator=torch_rng(0, "server/m", 0), dtype=torch.float64)
            m = oracle.unit(drawn.numpy())
        m = oracle.global_centroids(local, m, 4)
        z = oracle.unit(one.forward(one.w, inputs[: len(y)])[0])
        means = np.array([z[y.numpy() == c].mean(0) if c < 2 else np.zeros(5) for c in range(4)])
        m = oracle.aligned(m, means, [0, 1])
        kept, state = strategy.kept[number][0], strategy.states[number]
        np.testing.assert_allclose(kept["memory"], memory, rtol=0, atol=1e-7)
        assert int(kept["fill"]) == (40, 50)[number]
        assert kept["counts"].tolist() == one.counts.tolist()
        np.testing.assert_allclose(kept["uncertainty"], one.u, rtol=0, atol=1e-7)
        np.testing.assert_allclose(state["m"], m, rtol=0, atol=1e-6)
    found = torch.cat([v.flatten() for v in result.weights.values()])
    np.testing.assert_allclose(found, one.w, rtol=0, atol=1e-7)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "alpha=0.5",
        "beta=0",
        "gamma=0.5",
        "tau=0.9",
        "form=inverse",
        "form=flat",
        "margin=false",
        "entropy=false",
        "hard=true",
        "ce_weight=0",
        "cluster_weight=0",
        "cal_start=3",
        "ce_start=3",
        "partner=class",
        "view=strong",
        "centroids=2",
        "memory=12",
        "server_steps=5",
        "min_count=6",
        "server_lr=0.5",
        "weighting=uniform",
    ],
)
def test_every_option_has_a_say(option: str) -> None:
    noise = "view@views.strong=noise" if "strong" in option else "seed=0"
    assert run(f"strategy.{option}", noise)[-1] != run()[-1]


def test_calibration_begins_when_it_is_told() -> None:
    plain, late, never = run(), run("strategy.cal_start=3"), run("strategy.cal_start=4")
    assert plain[0] == late[0]  # nobody has centroids yet
    assert plain[1] != late[1] == never[1]
    assert late[2] != never[2]
    half, whole = run("strategy.ce_start=3"), run("strategy.ce_weight=0")
    assert half[1] == whole[1] and half[2] != whole[2]


def test_fed_ao_is_the_objective_without_its_two_remedies_and_sends_models_only() -> None:
    small = problem().run("strategy=fed_ao", OPEN)
    same = problem().run("strategy=fedossl", "strategy.beta=0", "strategy.gamma=0", OPEN)
    assert hashes(small) == hashes(same) != run("strategy.beta=0")
    plain = problem().run("strategy=fedavg", OPEN)
    for key in ("bytes_up", "bytes_down"):
        assert [r[key] for r in small.rows] == [r[key] for r in plain.rows]


def test_as_code_is_a_preset() -> None:
    said = ("beta=0", "hard=true", "cluster_weight=0.5", "cal_start=5", "ce_start=7", "partner=class")
    rest = ("weighting=uniform", "bn=local")
    options = [f"strategy.{o}" for o in (*said, *rest)]
    few = [o for o in FEW if "cal_start" not in o]
    rows = [
        hashes(problem().run(f"strategy={name}", *few, OPEN, "rounds=7", *more))
        for name, more in (("fedossl_as_code", ()), ("fedossl", options))
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("alpha=-1", "must not be negative"),
        ("tau=0", r"\(0, 1\]"),
        ("form=other", "choose one of printed, inverse, flat"),
        ("partner=other", "choose one of nearest, class"),
        ("centroids=0", "at least 1"),
        ("memory=2", "centroids are rows of it"),
        ("min_count=-1", "must not be negative"),
        ("ce_start=0", "must not come before cal_start"),
        ("bn=all_local", "choose average or local"),
    ],
)
def test_impossible_options_are_refused(option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(f"strategy.{option}")
