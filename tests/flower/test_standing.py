"""What messages stand on is sent to a node once and kept there; a node that lost it is sent it again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import GONE, Spoiler, deploy, node
from real import events, hashes
from test_wire import LAYOUT, equal, everything

import fedsim
from fedsim.cli.main import command
from fedsim.exchange.payload import Payload
from fedsim.flower import nodes as nodes_module
from fedsim.flower.standing import StandingFile, content

GEOMETRY = ("strategy=ggeur", "strategy.target=6", "rounds=4", "clients_per_round=3", "model=mlp")
SETTINGS = (*GEOMETRY, "client.epochs=1")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "REFRESH", 0.0)


@pytest.fixture(scope="module")
def alone() -> fedsim.RunResult:
    return fedsim.simulate(["num_clients=3", "engine=serial", "tracker=quiet", *SETTINGS])


def down(result: fedsim.RunResult) -> list[int]:
    """Bytes sent in each round after the first, which hands the geometry out."""
    return [row["bytes_down"] + row.get("phase0", {}).get("bytes_down", 0) for row in result.rows[1:]]


def lacking(folder: Path) -> list[tuple[int, int]]:
    return [(e["round"], e["client"]) for e in events(folder) if e["event"] == "lacking"]


def test_a_payload_of_every_type_is_kept_as_it_came(tmp_path: Path) -> None:
    kept, file = everything(), StandingFile(tmp_path, "run", 3, LAYOUT)
    file.write(kept)
    found = file.read(content(kept, LAYOUT))
    assert found is not None
    assert equal(found, kept)
    assert list(tmp_path.rglob("*.*")) == [tmp_path / "run/client-3/standing.safetensors"]
    assert StandingFile(tmp_path, "run", 3, LAYOUT).read(content(Payload(), LAYOUT)) is None
    whole = file.path.read_bytes()
    for damage in (
        whole.replace(b'"names":"[', b'"names":"{', 1),
        whole.replace(b'"values"', b'"valued"', 1),
        whole[:99],
    ):
        assert damage != whole
        file.path.write_bytes(damage)
        assert file.read(content(kept, LAYOUT)) is None
    file.path.write_bytes(whole)
    for other in (StandingFile(tmp_path, "run", 2, LAYOUT), StandingFile(tmp_path, "other", 3, LAYOUT)):
        other.path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.path, other.path)
        assert other.read(content(kept, LAYOUT)) is None  # stamped with another client or run


def test_content_tells_apart_what_differs() -> None:
    ones, zeros = torch.ones(2), torch.zeros(2)
    different = [
        Payload({"a": ones}),
        Payload({"b": ones}),
        Payload({"a": zeros}),
        Payload({"a": ones.double()}),
        Payload({"a": ones.view(2, 1)}),
        Payload({"a": ones}, {"v": 1}),
        Payload({"a": ones}, {"v": 1.0}),
        Payload({"a": ones}, {"v": True}),
        Payload({"a": ones}, {"v": "1"}),
        Payload({"a": ones}, {"v": b"1"}),
    ]
    assert len({content(p, LAYOUT) for p in different}) == len(different)


def forget(path: Path) -> None:
    path.unlink()


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def alter(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        about = f.metadata()
    save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata=about)


@pytest.mark.parametrize("harm", [forget, tear, alter])
def test_a_node_that_lost_it_is_sent_it_again(
    harm: Callable[[Path], None], alone: fedsim.RunResult, tmp_path: Path
) -> None:
    def act(message: Any) -> None:
        (path,) = (tmp_path / "state-1").rglob("standing.safetensors")
        harm(path)

    run, _ = deploy(tmp_path, *SETTINGS, spoil=Spoiler(act, (3, 1)))
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    assert lacking(tmp_path / "run") == [(3, 1)]
    second, third, fourth = (a - b for a, b in zip(down(run), down(alone), strict=True))
    own = alone.rows[2]["bytes_down"] // 3  # the message in vain
    standing = alone.rows[0]["phase0"]["bytes_down"] // 3
    assert (second, third, fourth) == (0, own + standing, 0)
    assert command(["verify", str(tmp_path / "run")]) == 0


def test_a_node_that_returns_empty_is_sent_it_again(alone: fedsim.RunResult, tmp_path: Path) -> None:
    from flwr.app import Error

    nodes = {100 + c: node(tmp_path, c) for c in range(3)}

    def die(message: Any) -> Any:
        del nodes[101]
        nodes[201] = node(tmp_path / "elsewhere", 1)
        return Error(GONE, "node unavailable")

    deploy(tmp_path, *SETTINGS, nodes=nodes, spoil=Spoiler(die, (3, 1)))
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    assert lacking(tmp_path / "run") == [(3, 1)]


def test_restarts_of_nodes_and_server_send_nothing_twice(alone: fedsim.RunResult, tmp_path: Path) -> None:
    def stop(message: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(tmp_path, *SETTINGS, spoil=Spoiler(stop, (3, 2)))
    again = {200 + c: node(tmp_path, c) for c in range(3)}  # other node ids, the same folders
    run, grid = deploy(tmp_path, *SETTINGS, nodes=again)
    assert hashes(tmp_path / "run") == [r["weights_hash"] for r in alone.rows]
    assert lacking(tmp_path / "run") == []
    assert down(run) == down(alone)
    assert {ask["round"] for _, kind, ask in grid.log if kind == "train"} == {2, 3}
    assert 0 <= grid.bytes_down - sum(down(run)[1:]) < 2000 * 2 * 3


def test_a_node_that_joins_late_is_sent_it_once(tmp_path: Path) -> None:
    nodes = {100 + c: node(tmp_path, c) for c in range(2)}

    def join(message: Any) -> None:
        nodes[102] = node(tmp_path, 2)

    settings = (*SETTINGS, "engine.wait_for=2", "engine.deadline=0.5")
    _, grid = deploy(tmp_path, *settings, nodes=nodes, spoil=Spoiler(join, (2, 0)))
    sent = [(ask["round"] + 1, ask["task"]) for n, kind, ask in grid.log if n == 102 and kind == "train"]
    assert [place for place in sent if place[1] == "receive"] == [sent[1]]
    assert [task for _, task in sent] == ["statistics", "receive", *["fit"] * (len(sent) - 2)]
    assert len(sent) >= 4
    assert lacking(tmp_path / "run") == []
    assert command(["verify", str(tmp_path / "run")]) == 0
