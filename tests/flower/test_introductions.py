"""Who may be which client, and what a node may say of itself before it gets work."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy, node
from real import events, hashes

from fedsim.errors import ConfigError, EngineError
from fedsim.flower import nodes as nodes_module
from fedsim.flower.binding import Binding
from fedsim.flower.introductions import Known, Limits, known
from fedsim.flower.wire import WIRE

TINY = ("rounds=1", "clients_per_round=3", "model=linear", "client.steps=1")
NAMES = {100: "hospital0", 101: "hospital1", 102: "hospital2"}
BOUND = "engine.nodes={hospital0: 0, hospital1: [1], hospital2: [2]}"
HONEST = {
    "wire": WIRE,
    "client": 1,
    "samples": 5,
    "counts": [2, 3],
    "own": True,
    "partition": "p",
    "layout": "[]",
}
HONEST |= {"host": "ward", "instance": "i"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)


def introduced(**changes: Any) -> Known:
    about = {k: v for k, v in {**HONEST, **changes}.items() if v is not None}
    return known(7, RecordDict({"node": ConfigRecord(about)}), Limits(3, samples=1000, classes=lambda: 2))[0]


def test_an_honest_introduction_is_taken_as_it_is() -> None:
    assert introduced() == Known(7, **{k: v for k, v in HONEST.items() if k != "wire"})
    assert introduced(own=False, counts=[]).samples == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"samples": 10**12},
            "it says that it has 1000000000000 samples; engine.most_samples=1000 is the most",
        ),
        ({"samples": -1}, "it says that it has -1 samples"),
        ({"samples": 4}, "it says that it has 4 samples, but its classes have 5"),
        ({"samples": 5.0}, "'samples' is float, expected int"),
        ({"samples": True}, "'samples' is bool, expected int"),
        ({"counts": [0] * 1_000_000}, "its counts of 1000000 classes are none"),
        ({"counts": [2, 3, 0]}, "its data have 3 classes, the server's 2"),
        ({"counts": [-5, 10]}, "its counts of 2 classes are none"),
        ({"counts": ["2", "3"]}, "its counts of 2 classes are none"),
        ({"own": False}, "it counts its classes, but has no data of its own"),
        ({"client": 3}, "partition-id=3: the run has 3 clients"),
        ({"client": -1}, "partition-id=-1: the run has 3 clients"),
        ({"client": None}, "its introduction lacks 'client'"),
        ({"admin": True}, "its introduction holds 'admin', which is not known"),
        ({"host": "h" * 300}, "'host' is too long"),
        ({"host": "ward\nclient 2 is fine"}, "'host' is too long, or no text"),
        ({"wire": 1}, f"its fedsim speaks version 1 to nodes, this one {WIRE}"),
        ({"id": 100}, "holds 'id', which is not known"),
    ],
)
def test_an_impossible_introduction_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        introduced(**changes)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "content",
    [RecordDict(), RecordDict({"node": MetricRecord({"client": 1})}), RecordDict({"me": ConfigRecord()})],
)
def test_what_is_no_introduction_is_refused(content: RecordDict) -> None:
    with pytest.raises(ConfigError, match="its introduction is none"):
        known(7, content, Limits(3))


def test_a_node_that_lies_about_its_samples_takes_no_part(tmp_path: Path) -> None:
    def alter(message: Any, content: RecordDict) -> None:
        if "node" in content and message.metadata.dst_node_id == 101:
            content["node"]["samples"] += 1

    with pytest.raises(
        EngineError, match=r"node 101 on .*: it says that it has \d+ samples; its part of the data has"
    ):
        deploy(tmp_path, *TINY, alter=alter)


def test_a_registered_key_is_its_clients_and_nobody_elses(tmp_path: Path) -> None:
    run, _ = deploy(tmp_path / "a", *TINY, BOUND, names=NAMES)
    deploy(tmp_path / "b", *TINY)
    assert hashes(tmp_path / "a/run") == hashes(tmp_path / "b/run")
    assert run.rows[0]["failures"] == []
    with pytest.raises(EngineError) as error:
        deploy(tmp_path / "c", *TINY, BOUND, names={**NAMES, 101: "hospital2", 102: "hospital1"})
    assert (
        "node 101 is refused: it says that it is client 1, which is bound to 'hospital1'; its key 'hospital2' is bound "
        "to 2 (engine.nodes)" in str(error.value)
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hospital7", "its key 'hospital7' is bound to no client by engine.nodes; nearest is"),
        ("", "registered without a name"),
    ],
)
def test_a_key_that_is_bound_to_nothing_is_refused_and_the_run_goes_on(
    name: str, reason: str, tmp_path: Path
) -> None:
    """It says that it is client 1, and came first."""
    nodes = {99: node(tmp_path / "evil", 1), **{100 + c: node(tmp_path, c) for c in range(3)}}
    deploy(tmp_path, *TINY, BOUND, nodes=nodes, names={**NAMES, 99: name})
    told = events(tmp_path / "run")
    assert [reason in e["reason"] for e in told if e["event"] == "refused" and e["node"] == 99] == [True]
    assert {e["client"]: e["node"] for e in told if e["event"] == "joined"} == {0: 100, 1: 101, 2: 102}


def test_a_stranger_does_not_end_the_wait_for_others(tmp_path: Path) -> None:
    """The node of client 1 comes once the stranger has long been refused."""
    nodes = {99: node(tmp_path / "evil", 1), **{100 + c: node(tmp_path, c) for c in (0, 2)}}
    late = node(tmp_path, 1)

    class Slow(Binding):
        def stranger(self, name: str, names: Any) -> str:
            if (why := super().stranger(name, names)) and next(tries) == 8:
                nodes[101] = late
            return why

    tries, bound = (
        count(),
        Binding({"hospital0": frozenset({0}), "hospital1": frozenset({1}), "hospital2": frozenset({2})}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Binding, "of", staticmethod(lambda *given: Slow(bound.clients)))
        run, _ = deploy(
            tmp_path, *TINY, BOUND, "failures.policy=skip", nodes=nodes, names={**NAMES, 99: "hospital9"}
        )
    assert run.rows[0]["cohort"] == [0, 1, 2]


def test_a_bound_node_that_says_nothing_of_sense_is_all_its_clients(tmp_path: Path) -> None:
    nodes = {100: node(tmp_path, 0), 101: {"clients": "1 2", "state-dir": str(tmp_path / "both")}}

    def alter(message: Any, content: RecordDict) -> None:
        if "node" in content and message.metadata.dst_node_id == 101:
            content["node.1"] = content["node"]

    two = "engine.nodes={hospital0: 0, hospital1: [1, 2]}"
    run, _ = deploy(tmp_path, *TINY, two, "failures.policy=skip", nodes=nodes, names=NAMES, alter=alter)
    assert run.rows[0]["cohort"] == [0]


def test_two_live_nodes_of_one_name_are_both_refused(tmp_path: Path) -> None:
    nodes = {99: node(tmp_path / "evil", 1), **{100 + c: node(tmp_path, c) for c in range(3)}}
    with pytest.raises(EngineError, match="node 101 is refused: 'hospital1' is the name of two live keys"):
        deploy(tmp_path, *TINY, BOUND, nodes=nodes, names={**NAMES, 99: "hospital1"})


def test_one_node_is_one_client(tmp_path: Path) -> None:
    """A node that first was client 1 says later that it is client 2, whose own node has not come."""
    nodes = {100 + c: node(tmp_path, c) for c in range(2)}
    asked: list[int] = []

    def alter(message: Any, content: RecordDict) -> None:
        if "node" in content and message.metadata.dst_node_id == 101:
            asked.append(1)
            content["node"]["client"] = 1 if len(asked) == 1 else 2
        if len(asked) == 1:
            nodes[201] = node(tmp_path / "rival", 1)

    with pytest.raises(EngineError, match="it says that it is client 2, but it is client 1 already"):
        deploy(tmp_path, *TINY, "engine.start=5", nodes=nodes, alter=alter)


def test_bindings_are_read_from_a_file_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "nodes.yaml"
    file.write_text("hospital0: 0\nhospital1: [1, 2]\n")
    twice, latin = tmp_path / "twice.yaml", tmp_path / "latin.yaml"
    twice.write_text("hospital0: 0\nhospital0: 1\n")
    latin.write_bytes("h\xf4pital: 0\n".encode("latin-1"))
    assert Binding.of(str(file), 3).clients == {"hospital0": {0}, "hospital1": {1, 2}}
    assert Binding.of(None, 3).clients == {}
    for given, reason in (
        ({"a": [3]}, "a: client 3: the run has 3 clients"),
        ({"a": [0], "b": [0]}, "client 0 is bound to a and to b"),
        ({"a": "first"}, "a: first: expected clients"),
        ({"a": []}, "expected clients"),
        ([0, 1], "expected names with their clients"),
        (str(tmp_path / "none.yaml"), "none.yaml: cannot be read"),
        (str(twice), "twice.yaml, line 2: no valid YAML .found duplicate key hospital0"),
        (str(latin), "latin.yaml: cannot be read .no UTF-8"),
        ("", "engine.nodes=: expected names with their clients"),
        ({None: [0]}, "None is no name of a key"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Binding.of(given, 3)
    file.write_text("a: 0\nb: 1\na: 2\n")
    with pytest.raises(ConfigError, match=r"^engine\.nodes=.*nodes\.yaml.*(twice|duplicate)"):
        Binding.of(str(file), 3)
    some = Binding.of({"a": [0], "b": [2]}, 3)
    some.check_enough(2, 3)
    with pytest.raises(ConfigError, match=r"no key is bound to client 1, .*engine\.wait_for=2"):
        some.check_enough(3, 3)
