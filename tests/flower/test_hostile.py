"""Replies that were altered on the way: the run goes on without that client, which is named; nobody else is hurt."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
import alterations
from alterations import ARRAYS, FIELDS, FOREIGN, WEIGHTS, Change, delta, put, values
from localgrid import asked, deploy
from real import events, hashes

from fedsim.cli.main import command
from fedsim.errors import ClientError
from fedsim.flower import asking
from fedsim.flower import nodes as nodes_module

TINY = (
    "clients_per_round=3",
    "model=linear",
    "client.steps=1",
    "failures.policy=skip",
    "evaluation.every=100",
)
HOSTILE = 1  # the client whose replies are altered


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


def of_the_hostile(message: Message, task: str) -> bool:
    return asked(message) is not None and (
        (message.content["ask"]["client"], message.content["broadcast"]["task"]) == (HOSTILE, task)
    )


def without(folder: Path, *settings: str, task: str = "fit") -> list[str]:
    """The weights' hash of each round of a run in which the hostile client never answers that task."""

    def broken(message: Message) -> Error | None:
        return Error(2, "gone") if of_the_hostile(message, task) else None

    deploy(folder, *TINY, *settings, spoil=broken)
    return hashes(folder / "run")


def attacked(folder: Path, changes: Sequence[Change], *settings: str, task: str = "fit") -> Any:
    """A run in whose round r the hostile client's reply is altered by the r-th of ``changes``."""

    def alter(message: Message, content: RecordDict) -> RecordDict | None:
        return changes[asked(message)[0] - 1](content) if of_the_hostile(message, task) else None  # type: ignore[index]

    return deploy(folder, *TINY, f"rounds={len(changes)}", *settings, alter=alter)[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    most = max(map(len, (FIELDS, WEIGHTS, ARRAYS, FOREIGN)))
    return without(tmp_path_factory.mktemp("reference"), f"rounds={most}")


@pytest.mark.parametrize(
    "table", [FOREIGN, FIELDS, WEIGHTS, ARRAYS], ids=["foreign", "fields", "weights", "arrays"]
)
def test_a_reply_that_is_none_is_its_clients_failure(
    table: list[tuple[str, Change, str]], reference: list[str], tmp_path: Path
) -> None:
    run = attacked(tmp_path, [change for _, change, _ in table])
    for (name, _, reason), row in zip(table, run.rows, strict=True):
        assert [f["client"] for f in row["failures"]] == [HOSTILE], name
        assert re.search(reason, row["failures"][0]["reason"]), (name, row["failures"][0]["reason"])
        assert row["weights_hash"] == reference[row["round"] - 1], name
    told = {e["round"]: e for e in events(tmp_path / "run") if e["event"] == "absent"}
    assert sorted(told) == list(range(1, len(table) + 1))
    assert all(told[row["round"]]["reason"] == row["failures"][0]["reason"] for row in run.rows)
    assert alterations.UNPICKLED == []
    assert command(["verify", str(tmp_path / "run")]) == 0


def test_a_reply_of_an_earlier_round_is_not_taken_again(reference: list[str], tmp_path: Path) -> None:
    kept: list[RecordDict] = []

    def replay(content: RecordDict) -> RecordDict:
        kept.append(content)
        return kept[0]

    run = attacked(tmp_path, [put("outcome", client=0), replay, replay])
    assert [len(row["failures"]) for row in run.rows] == [1, 0, 1]
    assert "its reply is of round 1, but 2 was asked" in run.rows[2]["failures"][0]["reason"]
    assert hashes(tmp_path / "run")[0] == reference[0]


def test_the_place_of_an_honest_client_cannot_be_taken(tmp_path: Path) -> None:
    """Today's worst: a reply in the name of another one, which came first and dropped the honest one."""
    run = attacked(tmp_path, [put("outcome", client=0)] * 2)
    for row in run.rows:
        assert [f["client"] for f in row["failures"]] == [HOSTILE]
    heard = run.per_client[run.per_client.metric == "weight"]
    assert set(heard[heard.value > 0].client) == {0, 2}


def test_under_the_policy_stop_the_client_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ClientError, match=r"client 1 failed in round 1: its reply is not taken: outcome lacks 'kind'"
    ):
        attacked(tmp_path, [alterations.drop("outcome", "kind")], "failures.policy=stop")


def numbers(name: str, make: Any) -> Change:
    """``make`` of the array ``name``."""

    def change(content: RecordDict) -> None:
        record = content["outcome.update"]
        key = next(k for k in record if k[1:] == name)
        record[key] = Array(make(record[key].numpy()))

    return change


N = "its reply is not taken: "
METHODS: dict[str, tuple[tuple[str, ...], str, list[tuple[Change, str]]]] = {
    "fednova": ((), "fit", [
        (alterations.drop("outcome.update.values", "work"), "the update lacks the value 'work'"),
        (values(work="much"), "value 'work' is str, expected"),
        (values(work=float("nan")), "value 'work' is nan"),
        (values(work=1e6), "work=1000000.0: must be positive and at most"),
        (values(work=-1.0), "work=-1.0: must be positive"),
    ]),
    "scaffold": ((), "fit", [
        (numbers("c", lambda c: c[:1]), "array 'c': .* is no packed vector"),
        (numbers("c", lambda c: c.astype(np.float64)), r"'c' has shape .*, torch.float64; expected .*, torch.float32"),
        (numbers("c", lambda c: c * np.float32("nan")), "non-finite values in c"),
    ]),
    "ifca": (("strategy.k=2", "strategy.start=random", "strategy.restarts=1"), "fit", [
        (values(cluster=10**9), "cluster=1000000000: must be a number from 0 to 1"),
        (values(cluster=-1), "cluster=-1"),
        (values(cluster="first"), "value 'cluster' is str, expected int"),
    ]),
    "qfedavg": ((), "training_loss", [
        (values(loss=-1.0), "loss=-1.0: must not be negative"),
        (values(loss=1e300), "value 'loss' is 1e.300, expected a finite number"),
        (values(size=1e9), r"size=1000000000.0: must lie between"),
    ]),
    "logit_adjust": (("strategy.prior=all",), "counts", [
        (numbers("counts", lambda c: c * 0 - 1), "'counts' holds negative"),
    ]),
    "ggeur": (("strategy.target=6",), "statistics", [
        (values(domain=10**12), "domain=1000000000000: must be a number from -1"),
    ]),
    "fedcm": ((), "fit", [
        (values(steps=0), "steps=0: must lie between 1 and"),
        (values(steps=-3), "steps=-3: must lie"),
        (values(steps=10**6), "steps=1000000: must lie"),
    ]),
    "fedossl": ((), "fit", [
        (numbers("centroids", lambda c: c * 0 + 1e15), "'centroids' has rows longer than 1"),
        (numbers("means", lambda m: m * 0 + 9), "'means' has rows longer than 1"),
        (numbers("rows", lambda n: n * 0 - 1), "'rows' is -1, expected"),
        (numbers("present", lambda p: p * 0 + 0.5), "'present' holds other numbers"),
    ]),
    "co_boosting": (("strategy.labels=present", "strategy.epochs=1"), "counts", [
        (numbers("counts", lambda c: c * 0 + 1e15), "'counts' counts 1e.16 samples of"),
    ]),
    "uniform": (("strategy=fedavg", "strategy.weighting=uniform"), "fit", [
        (lambda c: (put("outcome", weight=2.0)(c), values(weight=2.0)(c))[0], "its weight is 2; expected 0 to 1"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_reads_is_judged_by_the_method(method: str, tmp_path: Path) -> None:
    settings, task, table = METHODS[method]
    settings = settings if "strategy=fedavg" in settings else (f"strategy={method}", *settings)
    run = attacked(tmp_path / "a", [change for change, _ in table], *settings, task=task)
    for (_, reason), row in zip(table, run.rows, strict=True):
        assert HOSTILE in [f["client"] for f in row["failures"]]
        assert any(re.search(reason, f["reason"]) for f in row["failures"]), (reason, row["failures"])
    assert hashes(tmp_path / "a/run") == without(tmp_path / "b", *settings, f"rounds={len(table)}", task=task)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (numbers("n", lambda n: n * 1000), "'n' counts"),
        (numbers("mean", lambda m: m[:-1]), "'mean' has .* rows, but .* classes have samples"),
        (numbers("factor", lambda f: f[:-1]), "'factor' has .* numbers, expected"),
        (numbers("mean", lambda m: m[:, :1]), r"'mean' has shape .*; expected \('n', 64\)"),
    ],
)
def test_statistics_that_do_not_belong_together_are_not_merged(
    change: Change, reason: str, tmp_path: Path
) -> None:
    run = attacked(tmp_path, [change], "strategy=ggeur", "strategy.target=6", task="statistics")
    assert [(f["client"], bool(re.search(reason, f["reason"]))) for f in run.rows[0]["failures"]] == [
        (HOSTILE, True)
    ]


def test_clients_of_several_widths_are_judged_by_their_own(tmp_path: Path) -> None:
    """The narrow client's update is whole, and the wide one's place cannot be filled with a narrow one."""
    settings = (
        "strategy=heterofl",
        "model=mlp",
        "client.classes=[{share: 0.67, width: 1}, {share: 0.33, width: 0.5}]",
    )
    run = attacked(tmp_path, [lambda c: None, delta(lambda d: d[: len(d) // 2])], *settings)
    assert [len(row["failures"]) for row in run.rows] == [0, 1]
    assert "; expected (" in run.rows[1]["failures"][0]["reason"]


def test_a_client_that_says_for_ever_that_it_lacks_something_is_heard_once(tmp_path: Path) -> None:
    settings = ("strategy=qfedavg",)

    def lacking(content: RecordDict) -> None:
        put("flags", lacks=True)(content)
        put("outcome", kind="failed")(content)
        for name in ("outcome.update", "outcome.update.values"):
            content.pop(name, None)

    run = attacked(tmp_path, [lacking], *settings)
    assert [(f["client"], "nothing is missing" in f["reason"]) for f in run.rows[0]["failures"]] == [
        (HOSTILE, True)
    ]
    assert [e["client"] for e in events(tmp_path / "run") if e["event"] == "lacking"] == [HOSTILE]


def test_a_node_that_breaks_off_for_ever_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is back at once each time; without a deadline nothing else would end that."""
    monkeypatch.setattr(asking, "LOSSES", 3)

    def gone(message: Message) -> Error | None:
        return Error(5, "unavailable") if of_the_hostile(message, "fit") else None

    run, grid = deploy(tmp_path, *TINY, "rounds=1", "engine.deadline=null", spoil=gone)
    assert [f["client"] for f in run.rows[0]["failures"]] == [HOSTILE]
    assert "its node was lost 3 times in one exchange" in run.rows[0]["failures"][0]["reason"]
    assert sum(kind == "train" for _, kind, _ in grid.log) == 5


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_a_lost_state_is_that_of_a_client_that_keeps_one(method: str, tmp_path: Path) -> None:
    """By ``engine.lost_state=stop`` it ends the run, which is noted; where there is no state, it is a failure."""

    def lost(content: RecordDict) -> None:
        put("flags", lost=True, stateful=False)(content)
        put("outcome", kind="failed")(content)
        for name in ("outcome.update", "outcome.update.values"):
            content.pop(name, None)

    about = (tmp_path, [put("flags", stateful=True), lost], f"strategy={method}", "engine.lost_state=stop")
    if method == "scaffold":
        with pytest.raises(ClientError, match="client 1: it says that its state is lost"):
            attacked(*about)
        assert [e["client"] for e in events(tmp_path / "run") if e["event"] == "absent"] == [HOSTILE]
        return
    run = attacked(*about)
    assert "clients of this method keep none" in run.rows[1]["failures"][0]["reason"]
