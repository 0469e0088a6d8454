"""Checkpoints: whole or not at all, checked when read, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.errors import CheckpointError
from fedsim.server import checkpoint
from fedsim.server.clientstore import ClientStore

STATE: dict[str, Any] = {
    "w": torch.arange(4.0, dtype=torch.float64),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(2),
    "empty": torch.zeros(0),
    "strided": torch.arange(6.0).view(2, 3).t(),
    "round": 3,
    "lr": 0.1,
    "name": "a",
    "seen": [1, 2],
    "nested": {"a": [0.5, None]},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    clients = ClientStore(tmp_path, 0)
    clients.propose(1, 2, {"h": torch.ones(3)})
    clients.accept()
    return checkpoint.save(tmp_path, 3, STATE, clients, "key")


def test_what_is_saved_comes_back_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    found = checkpoint.load(saved, "key")
    assert found.rounds == 3
    assert found.state.keys() == STATE.keys()
    for name, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert found.state[name].dtype == value.dtype
            assert torch.equal(found.state[name], value)
        else:
            assert found.state[name] == value
    clients = ClientStore(tmp_path, 0)
    clients.restore(found.clients)
    assert clients.get(1)["h"].tolist() == [1, 1, 1]
    assert clients.last_round(1) == 2


def test_the_newest_replaces_the_older_and_leftovers_are_ignored(saved: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".round-000005.tmp"
    partial.mkdir()
    (partial / "checkpoint.json").write_text("{")
    assert checkpoint.latest(tmp_path) == saved
    newer = checkpoint.save(tmp_path, 10, STATE, ClientStore(tmp_path, 0), "key")
    assert checkpoint.latest(tmp_path) == newer
    assert not saved.exists()
    assert not partial.exists()
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_kill_before_the_rename_leaves_the_old_checkpoint(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 4, STATE | {"round": 4}, ClientStore(tmp_path, 0), "key")
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == saved
    assert checkpoint.load(saved, "key").state["round"] == 3


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_file_is_refused(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{saved.name} is damaged.*resume=never"):
        checkpoint.load(saved, "key")
    for other in ("größe".encode("latin-1"), b"[]"):  # neither UTF-8 nor an index
        (saved / name).write_bytes(other)
        with pytest.raises(CheckpointError, match=rf"{saved.name} is damaged.*resume=never"):
            checkpoint.load(saved, "key")
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(saved, "key")


@pytest.mark.parametrize("at", [-1, -20, 9, 100])
def test_a_changed_byte_is_refused(saved: Path, at: int) -> None:
    raw = bytearray((saved / "state.safetensors").read_bytes())
    raw[at] ^= 1
    (saved / "state.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        checkpoint.load(saved, "key")


def test_a_foreign_key_or_format_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another configuration \(key key, this run is other\)"):
        checkpoint.load(saved, "other")
    meta = json.loads((saved / "checkpoint.json").read_text())
    (saved / "checkpoint.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, expected 2 or 1"):
        checkpoint.load(saved, "key")


@pytest.mark.parametrize("name", ["../../planted", "/etc/passwd", "states-1.safetensors/../x", ""])
def test_clients_states_lie_beside_the_checkpoint_and_nowhere_else(saved: Path, name: str) -> None:
    """A run folder may come from elsewhere, and its segments are copied where it is computed again."""
    about = json.loads((saved / "checkpoint.json").read_text())
    assert checkpoint.segments_of(saved) == {"states-000000.safetensors"}
    about["clients"] = {"clients": {"1": [name, 2]}, "sha256": {name: "0" * 64}}
    (saved / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
        checkpoint.segments_of(saved)
    with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
        ClientStore(saved.parent, 0).restore(checkpoint.load(saved, "key").clients)


def test_entries_may_share_memory(tmp_path: Path) -> None:
    w = torch.arange(6.0)
    shared = {"w": w, "ema": w, "part": w[:3], "rest": w[3:]}
    path = checkpoint.save(tmp_path, 1, shared, ClientStore(tmp_path, 0), "key")
    found = checkpoint.load(path, "key").state
    assert all(torch.equal(found[k], v) for k, v in shared.items())


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (object(), "cannot"),
        ([torch.zeros(1)], "cannot"),
        ({3: 1}, "'extra' has the key 3"),
        ([{(1, 2): 0}], "key"),
    ],
)
def test_state_that_would_not_come_back_as_it_was_is_refused(
    tmp_path: Path, entry: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.save(tmp_path, 1, {"w": torch.zeros(1), "extra": entry}, ClientStore(tmp_path, 0), "key")
    assert checkpoint.latest(tmp_path) is None
