"""FedoSSL in runs: clients' steps against independent code, options, who sees what, what is kept, what is measured."""

from __future__ import annotations

from typing import Any

import fedossl_numpy as oracle
import numpy as np
import pytest
import torch
from hooks import hooked
from problems import Problem, Recorded, classes, hashes, network, recorded

from fedsim.errors import ConfigError
from fedsim.rng import torch_rng
from fedsim.task.vectors import FlatModel

OPEN = "data.labelled={at: client, share: 0.5, per_class: false, classes: [0, 1]}"
FEW = (
    "strategy.centroids=3",
    "strategy.memory=20",
    "strategy.server_steps=4",
    "strategy.cal_start=1",
    "strategy.min_count=1",
)


def problem(clients: Any = None, **changes: Any) -> Problem:
    """Four classes, two of which have labels."""
    settings = ("rounds=3", "clients_per_round=3", "client.epochs=2", "client.batch_size=8", "dtype=float64")
    parts: dict[str, Any] = {
        "model": network("tanh", 4, 4),
        "clients": classes((20, 24, 16), num_classes=4) if clients is None else clients,
        "settings": settings,
        "test": classes((40,), num_classes=4, seed=1)[0],
    }
    return Problem(**{**parts, **changes})


def run(*settings: str, strategy: str = "fedossl", **changes: Any) -> list[str]:
    return hashes(problem(**changes).run(f"strategy={strategy}", *FEW, OPEN, *settings))


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
        counts = np.bincount(p.argmax(1), minlength=4) + np.bincount(self.y[: self.known], minlength=4.0)
        self.counts, self.u = counts, float((1 - p.max(1)).mean())
        for _ in range(steps):
            z, _ = self.forward(self.w, self.x)
            self.memory += list(oracle.unit(z))
            cosines = oracle.unit(z) @ oracle.unit(z).T
            np.fill_diagonal(cosines, -np.inf)
            fixed = None if m is None else oracle.q(z, m)

            def loss(
                w: Any, q: Any = fixed, partners: Any = cosines.argmax(1), counts: Any = counts
            ) -> float:
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


# -- who sees what, what is kept ---------------------------------------------------------------------------------------


def test_labels_of_unlabelled_samples_change_no_bit() -> None:
    clients, noted = classes((20, 24, 16), num_classes=4), dict[int, Any]()

    def note(job: Any) -> None:
        noted[job.client] = job.unlabelled.index

    given = problem(clients)
    first = given.run("strategy=fedossl", OPEN, strategy=hooked("fedossl", note, *FEW))
    y = torch.cat([part for _, part in clients])
    other = torch.tensor([1, 0, 3, 2])
    for rows in noted.values():
        assert len(rows)
        y[rows] = other[y[rows]]
    changed = [(x, part) for (x, _), part in zip(clients, y.split([20, 24, 16]), strict=True)]
    assert hashes(first) == run(clients=changed)


def test_a_client_with_one_kind_of_samples_takes_part_and_one_with_none_refuses() -> None:
    x, y = classes((24,), num_classes=4)[0]
    y = torch.arange(24) % 2
    clients = [(x, y), (x[:8], torch.full((8,), 2)), (x[:0], y[:0]), (x[:8], y[:8])]
    sides = dict[int, tuple[int, int]]()

    def note(job: Any) -> None:
        sides[job.client] = (len(job.data), len(job.unlabelled))

    given = problem(clients, cohorts=[range(4)] * 2)
    result = given.run("strategy=fedossl", OPEN, "rounds=2", strategy=hooked("fedossl", note, *FEW))
    assert sides[1] == (0, 8) and sides[0][0] > 0 and sides[0][1] > 0
    assert [(f["client"], f["kind"], f["reason"]) for f in result.rows[1]["failures"]] == [
        (2, "refused", "no samples")
    ]
    weights = result.per_client.query("metric == 'weight' and round == 1").set_index("client").value
    assert weights.to_dict() == {0: 24.0, 1: 8.0, 3: 8.0}
    whole = problem(clients[3:], cohorts=[[0]] * 3).run("strategy=fedossl", *FEW)  # all have labels
    assert len(set(hashes(whole))) == 3


def test_memory_survives_rounds_without_its_client_and_fills_up() -> None:
    strategy, _ = recorded(
        "fedossl", problem(cohorts=[[0, 1], [1, 2], [0]]), *FEW, "strategy.memory=50", OPEN
    )
    fills = [[int(kept[c].get("fill", 0)) for c in range(3)] for kept in strategy.kept]
    assert fills == [[40, 48, 0], [40, 96, 32], [80, 96, 32]]
    assert torch.equal(strategy.kept[0][0]["memory"], strategy.kept[1][0]["memory"])
    rows = strategy.kept[2][0]["memory"]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(50, dtype=torch.float64))
    assert not strategy.kept[0][0]["memory"][40:].any()


def test_absent_clients_centroids_count_if_they_are_cached() -> None:
    given = problem(cohorts=[[0, 1], [2], [0]])
    cached, plain = (recorded("fedossl", given, *FEW, *more, OPEN)[0] for more in (CACHED, ()))
    assert torch.equal(cached.states[0]["m"], plain.states[0]["m"])
    assert not torch.equal(cached.states[1]["m"], plain.states[1]["m"])
    assert [s["cache/rows"].tolist() for s in cached.states] == [[3, 3, 0], [3, 3, 3], [3, 3, 3]]
    assert torch.equal(cached.states[0]["cache"][1], cached.states[2]["cache"][1])
    assert not torch.equal(cached.states[0]["cache"][0], cached.states[2]["cache"][0])


CACHED = ("strategy.cache_centroids=true",)


def test_a_memory_smaller_than_the_centroids_gives_as_many_as_it_has() -> None:
    clients = [(x[:2], y[:2]) for x, y in classes((9, 9), num_classes=4)]
    given = problem(clients, settings=("rounds=1", "clients_per_round=2", "client.epochs=1"))
    options = (*FEW[:1], "strategy.centroids=5", "strategy.server_steps=2", *CACHED)
    strategy, _ = recorded("fedossl", given, *options)
    assert strategy.states[0]["cache/rows"].tolist() == [2, 2]
    assert not strategy.states[0]["cache"][:, 2:].any()


def test_means_of_too_few_samples_stay_at_the_client() -> None:
    sent: list[dict[str, Any]] = []

    class Watch(Recorded):
        def setup(self, task: Any, layout: Any) -> None:
            super().setup(task, layout)
            update = self.inner.update

            def watched(state: Any, replies: Any, round: Any) -> Any:
                sent.append({k: replies.total(k).clone() for k in ("means", "present")})
                return update(state, replies, round)

            self.inner.update = watched

    from problems import method

    for least in (1, 3, 100):
        built = method("fedossl", *FEW[:4], f"strategy.min_count={least}")
        problem().run("strategy=fedossl", OPEN, "rounds=1", strategy=Watch(built))
    assert sent[0]["present"][2:].tolist() == [0, 0]
    assert sent[0]["present"].sum() > sent[1]["present"].sum() > sent[2]["present"].sum() == 0
    assert not sent[2]["means"].any() and sent[0]["means"][:2].any(dim=1).all()


def test_statistics_stay_with_their_clients_as_in_the_code() -> None:
    given = problem(model=network("bn", 4, 4))
    mine = given.run("strategy=fedossl", "strategy.bn=local", *FEW, OPEN)
    same = given.run("strategy=fedossl", "buffers=local", *FEW, OPEN)
    assert hashes(mine) == hashes(same) != hashes(given.run("strategy=fedossl", *FEW, OPEN))
    start = FlatModel(network("bn", 4, 4)).buffers
    named = [v for k, v in mine.weights.items() if "running" in k]
    assert torch.equal(torch.cat(named).float(), start)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_rows_and_summary_have_the_numbers_of_an_open_world() -> None:
    result = problem().run("strategy=fedossl", *FEW, OPEN, "evaluation.every=1")
    names = ("all", "seen", "AU", "NMI", "pseudo/accuracy")
    for row in result.rows:
        assert all(0 <= row[name] <= 1 for name in names)
    assert result.summary["all"] == result.rows[-1]["all"]
    assert result.summary["best_all"] == max(row["all"] for row in result.rows)
    assert not any(f["task"] == "guess" for row in result.rows for f in row["failures"])
    labelled = problem().run("strategy=fedossl", *FEW, "evaluation.every=1")
    assert not {"AU", "all", "pseudo/accuracy"} & labelled.rows[-1].keys()
