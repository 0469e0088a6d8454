"""Hospitals with data of their own under one contract: on a grid in this process, with the bits of the simulation."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy, node, wait_until
from real import ROOT, events, federation, hashes, left_over, start_node, wait

import fedsim
from fedsim.config.compose import compose
from fedsim.errors import ConfigError, EngineError
from fedsim.flower import contract
from fedsim.flower import nodes as nodes_module
from fedsim.flower.introductions import Known
from fedsim.run import samples

COLUMNS = (
    "age: {type: integer, unit: years, range: [0, 120]}, chol: {unit: mg/dl, range: [80, 600], missing: 220}"
)
AGREED = f"data.contract={{classes: [a, b, c], normalize: agreed, columns: {{{COLUMNS}}}}}"
SMALL = ("rounds=2", "model=linear", "client.epochs=1", "data=table", "data.ids=hospital")
HEAD = "hospital,chol,age,target"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)
    monkeypatch.setattr(nodes_module, "AGAIN", 0.1)


def patients(hospital: int, count: int, classes: str) -> list[str]:
    rng = np.random.default_rng(hospital)
    rows = []
    for k in range(count):
        kind = classes[k % len(classes)]
        chol = "" if k % 7 == 6 else f"{rng.normal(200 + 30 * 'abc'.index(kind), 10):.1f}"
        rows.append(f"{hospital},{chol},{rng.integers(20, 90)},{kind}")
    return rows


HOSPITALS = [patients(0, 20, "abc"), patients(1, 14, "ac"), patients(2, 17, "cb")]


def laid(folder: Path, *files: list[str], head: str = HEAD) -> dict[int, dict[str, Any]]:
    """Files of the hospitals and of the server under ``folder``; the nodes."""
    (folder / "server").mkdir(parents=True)
    (folder / "server/test.csv").write_text("\n".join([HEAD, *patients(9, 12, "abc")]) + "\n")
    nodes = {}
    for k, rows in enumerate(files):
        own = rows if rows[0].startswith("hospital") else [head, *rows]
        (folder / f"h{k}.csv").write_text("\n".join(own) + "\n")
        nodes[10 + k] = node(folder, k, **{"data-path": str(folder / f"h{k}.csv"), "own-data": True})
    return nodes


def hospitals(folder: Path, *overrides: str, nodes: dict[int, dict[str, Any]], **grid: Any) -> Any:
    settings = (*SMALL, f"data.path={folder / 'server'}", "data.target=target", *overrides)
    return deploy(folder, *settings, clients=len(nodes), nodes=nodes, **grid)


def together(folder: Path, *overrides: str) -> Any:
    """The simulation of the same data, in one file, dealt out by hospital."""
    whole = folder / "whole"
    whole.mkdir()
    (whole / "train.csv").write_text("\n".join([HEAD, *(row for rows in HOSPITALS for row in rows)]) + "\n")
    (whole / "test.csv").write_text((folder / "server/test.csv").read_text())
    settings = [*SMALL, f"data.path={whole}", "data.target=target", "num_clients=3", "partition=natural"]
    return fedsim.simulate([*settings, "engine=serial", "tracker=quiet", *overrides])


def test_a_hospital_without_a_class_takes_part_and_the_bits_are_those_of_the_simulation(
    tmp_path: Path,
) -> None:
    nodes = laid(tmp_path, *HOSPITALS)
    more = (
        AGREED,
        "clients_per_round=3",
        "strategy=scaffold",
        "evaluation.holdout=0.2",
        "evaluation.clients_every=1",
    )
    run, _ = hospitals(tmp_path, *more, nodes=nodes)
    alone = together(tmp_path, *more)
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    for key in ("accuracy", "loss", "clients/accuracy", "bytes_up", "bytes_down"):
        assert [r[key] for r in run.rows] == [r[key] for r in alone.rows], key
    told = json.loads((tmp_path / "run/contract.json").read_text())
    assert told["classes"] == ["a", "b", "c"] and told["columns"] == ["age", "chol"]
    config = compose(
        [*SMALL, f"data.path={tmp_path / 'whole'}", "data.target=target", "num_clients=3", *more[:1]]
        + ["partition=natural", "evaluation.holdout=0.2"]
    )
    norm = samples.split(config, samples.dataset(config)).dataset.normalize
    assert norm is not None and told["normalize"] == [1.0, list(norm.mean), list(norm.std)]
    said = [e for e in events(tmp_path / "run") if e["event"] == "contract"]
    assert said[0]["normalize"] == told["normalize"]


def test_given_constants_are_those_of_the_simulation_too(tmp_path: Path) -> None:
    given = AGREED.replace("agreed", "{mean: {age: 50, chol: 220}, std: {age: 20, chol: 40}}")
    hospitals(tmp_path, given, "clients_per_round=2", nodes=laid(tmp_path, *HOSPITALS))
    alone = together(tmp_path, given, "clients_per_round=2")
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]


def wrong(folder: Path) -> dict[int, dict[str, Any]]:
    """Client 0 is as agreed; 1 has another unit and a column too many; 2 a class that nobody knows."""
    units = ["hospital,chol,age,target,room", *(f"1,{4 + k / 10},{30 + k},a,{k}" for k in range(10))]
    return laid(folder, HOSPITALS[0], units, [*HOSPITALS[2], "2,200,50,malign"])


def test_all_that_is_wrong_with_all_nodes_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refused:
        hospitals(tmp_path, AGREED, "clients_per_round=3", nodes=wrong(tmp_path))
    text = str(refused.value)
    assert "client 1: column 'room': not agreed; leave it out" in text
    assert "client 1: column 'chol' in mg/dl: 10 of 10 values are outside 80 to 600, e.g. in row 1" in text
    assert "is the unit another than mg/dl?" in text
    assert (
        "client 2: target 'target': 1 of 18, e.g. in row 18, name none of the classes agreed (a, b, c)"
        in text
    )
    assert "client 0:" not in text and "malign" not in text
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_may_go_on_without_those_who_differ(tmp_path: Path) -> None:
    more = (AGREED, "clients_per_round=2", "failures.policy=skip")
    run, _ = hospitals(tmp_path, *more, nodes=wrong(tmp_path))
    assert [row["cohort"] for row in run.rows] == [[0], [0]]
    said = [e for e in events(tmp_path / "run") if e["event"] == "without"]
    assert [e["clients"] for e in said] == [[1, 2]] and "client 2: target" in " ".join(said[0]["reasons"])


def test_versions_layout_and_base_are_compared(tmp_path: Path) -> None:
    more = AGREED[:-1] + ", layout: abcdef, base: '0123', versions: {python: '2.7', torch: '1'}}"
    with pytest.raises(EngineError) as refused:
        hospitals(tmp_path, more, "clients_per_round=1", nodes=laid(tmp_path, HOSPITALS[0]))
    text = str(refused.value)
    assert f"client 0: python: version {sys.version.split()[0]}, agreed is 2.7; install that one" in text
    assert "client 0: torch: version" in text and "agreed is abcdef" in text
    assert "client 0: base model: sha256 none, agreed is 0123" in text


def test_what_was_agreed_in_one_run_can_be_demanded_in_the_next(tmp_path: Path) -> None:
    hospitals(tmp_path, AGREED, "clients_per_round=1", nodes=laid(tmp_path, HOSPITALS[0]))
    told = json.loads((tmp_path / "run/contract.json").read_text())
    python = ".".join(told["versions"]["python"].split(".")[:2])
    more = AGREED[:-1] + f", layout: {told['layout']}, versions: {{python: '{python}'}}}}"
    run, _ = hospitals(
        tmp_path / "next", more, "clients_per_round=1", nodes=laid(tmp_path / "next", HOSPITALS[0])
    )
    assert len(run.rows) == 2


def said_of_itself(client: int, change: Any) -> Any:
    """Changes what a node says of that client."""

    def alter(message: Any, content: Any) -> None:
        if "node" in content and content["node"]["client"] == client:
            change(content["node"])

    return alter


def test_the_record_of_what_was_agreed_is_the_servers(tmp_path: Path) -> None:
    """Not what the first node says of its layout; versions are text."""

    def lie(about: Any) -> None:
        told = json.loads(about["contract"]) | {
            "layout": "evil",
            "base": "evil",
            "versions": {"torch": ["1"] * 999},
        }
        about["contract"] = json.dumps(told)

    for folder, change in ((tmp_path / "a", lambda about: None), (tmp_path / "b", lie)):
        hospitals(
            folder,
            AGREED,
            "clients_per_round=1",
            nodes=laid(folder, *HOSPITALS),
            alter=said_of_itself(0, change),
        )
    honest, told = (json.loads((tmp_path / k / "run/contract.json").read_text()) for k in "ab")
    assert told.pop("nodes")["0"].keys() == {"torch"} and honest.pop("nodes") and told == honest


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_node_that_has_no_data_of_its_own_among_those_that_have(policy: str, tmp_path: Path) -> None:
    def change(about: Any) -> None:
        about["own"], about["counts"] = False, []

    more = (AGREED, "clients_per_round=2", f"failures.policy={policy}")
    about = {"nodes": laid(tmp_path, *HOSPITALS), "alter": said_of_itself(1, change)}
    if policy == "stop":
        with pytest.raises(ConfigError, match=r"clients \[0, 2\] have own-data, the others do not"):
            hospitals(tmp_path, *more, **about)
        return
    run, _ = hospitals(tmp_path, *more, **about)
    assert [row["cohort"] for row in run.rows] == [[0, 2], [0, 2]]
    said = [e for e in events(tmp_path / "run") if e["event"] == "without"]
    assert [e["reasons"] for e in said] == [["client 1: own-data=false, which most nodes say otherwise"]]


def test_without_a_contract_nodes_are_compared_with_the_server(tmp_path: Path) -> None:
    bare = f"data.contract={{columns: {{{COLUMNS}}}, classes: [a, b, c]}}"
    nodes = laid(tmp_path, HOSPITALS[0])
    about = {"classes": ["a", "b", "c"], "columns": ["age", "chol"], "dtype": "float64", "normalize": []}
    config = compose([*SMALL, f"data.path={tmp_path / 'server'}", "data.target=target", bare])
    data = samples.dataset(config)
    known = Known(1, 0, 20, [], True, "", "", "host", "i", contract=json.dumps(about))
    assert contract.difference(known, config, data) == ""
    for what, other in (
        ("classes", ["a", "b", "d"]),
        ("dtype", "uint8"),
        ("normalize", [1.0, [3.0], [2.0]]),
        ("columns", ["age"]),
    ):
        bad = dataclasses.replace(known, contract=json.dumps(about | {what: other}))
        assert contract.difference(bad, config, data).startswith(f"{what}: its data have {json.dumps(other)}")
    for text in ("[]", "[" * 100_000, '{"classes": ' + "[" * 200 + "]" * 200 + "}"):
        assert "cannot be read" in contract.difference(
            dataclasses.replace(known, contract=text), config, data
        )
    assert nodes


NO_STATISTICS = (
    *(None, "[", '[9, ["1", "1"], ["9", "9"]]', '[20, ["1"], ["9"]]'),
    '[20, ["9000", "4000"], ["9999999", "999999"]]',  # a mean age of 450
    '[20, ["900", "4000"], ["9999999", "999999"]]',  # a mean square beyond 120 years
    "[20, [1, 2], [3, 4]]",
    "[" * 9000 + "]" * 9000,
)


@pytest.mark.parametrize("moments", NO_STATISTICS)
def test_statistics_that_cannot_be_those_of_its_samples_are_refused(moments: Any, tmp_path: Path) -> None:
    laid(tmp_path, HOSPITALS[0])
    config = compose([*SMALL, f"data.path={tmp_path / 'server'}", "data.target=target", AGREED])
    about = {"classes": ["a", "b", "c"], "columns": ["age", "chol"], "dtype": "float64", "moments": moments}
    known = Known(1, 0, 20, [], True, "", "", "host", "i", contract=json.dumps(about))
    assert contract.difference(known, config, samples.dataset(config)).startswith("its statistics")


def test_a_run_goes_on_with_the_data_it_began_with_only(tmp_path: Path) -> None:
    nodes = laid(tmp_path, *HOSPITALS)
    more = (AGREED, "clients_per_round=3")
    hospitals(tmp_path, *more, nodes=nodes)
    first = hashes(tmp_path / "run")
    hospitals(tmp_path, *more, "rounds=3", nodes=nodes)
    assert hashes(tmp_path / "run")[:2] == first
    (tmp_path / "h1.csv").write_text("\n".join([HEAD, *HOSPITALS[1][:-1]]) + "\n")
    with pytest.raises(EngineError, match="client 1: its data are others than when the run began"):
        hospitals(tmp_path, *more, "rounds=4", nodes=nodes)


def test_what_else_is_wrong_with_own_data_stays_in_the_nodes_log(tmp_path: Path, caplog: Any) -> None:
    nodes = laid(tmp_path, HOSPITALS[0])
    (tmp_path / "h0.csv").write_bytes(b"hospital,age\n\xff\xfesecret")
    with pytest.raises(EngineError) as refused:
        hospitals(tmp_path, AGREED, "clients_per_round=1", nodes=nodes)
    assert "client 0: its data cannot be read; the node's log says why" in str(refused.value)
    assert "h0.csv" not in str(refused.value) and "h0.csv is not a readable CSV" in caplog.text
    (tmp_path / "h0.csv").write_text(f"{HEAD}\n")
    with pytest.raises(EngineError, match="client 0: its data have no samples; the node's log says why"):
        hospitals(tmp_path, AGREED, "clients_per_round=1", nodes=nodes)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_real_nodes_agree_on_statistics_and_have_the_bits_of_the_simulation(tmp_path: Path) -> None:
    nodes, more = laid(tmp_path, *HOSPITALS), (AGREED, "clients_per_round=3")
    settings = [*SMALL, f"data.path={tmp_path / 'server'}", "data.target=target", "num_clients=3"]
    with federation(tmp_path, nodes=0) as fed:
        for k, about in enumerate(nodes.values()):
            start_node(fed, tmp_path, k, **{"data-path": about["data-path"], "own-data": True})
        run = fed.submit(ROOT, shlex.join([*settings, *more, "tracker=quiet", f"dir={tmp_path / 'run'}"]))
        assert wait(fed, run, tmp_path / "run")["status"] == "done"
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in together(tmp_path, *more).rows]
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
