"""FedoSSL in runs: who sees which labels, what clients keep and send, what is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hooks import hooked
from openworlds import FEW, OPEN, problem, run
from problems import Recorded, classes, hashes, method, network, recorded

from fedsim.data.dataset import Samples
from fedsim.data.local import LocalData
from fedsim.data.mixed import mixed


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
    weights = (
        result.per_client.query("metric == 'weight' and round == 1 and client != 2").set_index("client").value
    )
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
    start = network("bn", 4, 4).state_dict()
    assert all(torch.equal(v.float(), start[k]) for k, v in mine.weights.items() if "running" in k)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_where_labels_are_told_it_is_the_ceiling() -> None:
    found, usual = (
        problem().run("strategy=fedossl", *FEW, OPEN.replace("}", told), "evaluation.every=1")
        for told in (", withhold: false}", "}")
    )
    assert hashes(found) != hashes(usual)
    assert found.rows[-1].keys() ^ usual.rows[-1].keys() == {"pseudo/accuracy"}  # AU, NMI, all in both
    rows, x = torch.arange(5), classes((5,))[0]
    unknown = LocalData(Samples(x[0], x[1]), rows[3:], torch.float32)
    known = LocalData(unknown.samples, rows[:3], torch.float32)
    blind = replace(unknown, samples=Samples(x[0]))
    assert mixed(known, unknown).read(rows).y.tolist() == x[1].tolist()
    assert mixed(known, blind).read(rows).y.tolist() == [*x[1][:3].tolist(), -100, -100]


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
