"""Client states: within the memory budget, whatever is proposed, read and saved; segments on disk."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import Hooked
from problems import classification, hashes, method
from safetensors.torch import load_file, save_file
from states import state, value
from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.server import segments
from fedsim.server.clientstore import ClientStore


def held(numel: int) -> int:
    """Bytes of all float32 tensors of ``numel`` elements that are alive in this process."""
    found = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() == numel]
    return 4 * numel * len({o.data_ptr() for o in found if o.dtype == torch.float32})


def test_a_thousand_clients_stay_within_8_mb_while_proposed_accepted_read_and_saved(tmp_path: Path) -> None:
    """64 MB of states; what is proposed in a round is as large as all of them."""
    store, budget, d = ClientStore(tmp_path, 8 << 20), 8 << 20, 16_001
    slack = 4 * 4 * d  # the one being proposed or returned, and its copies
    for t in range(3):
        for c in range(1000):
            store.propose(c, t, {"h": torch.full((d,), 1000.0 * t + c)})
            assert store._bytes <= budget
            if c % 331 == 0:
                assert held(d) <= budget + slack
        store.accept()
        assert held(d) <= budget + slack
        for c in range(0, 1000, 7):
            assert (store.get(c)["h"] == 1000.0 * t + c).all()
            assert store._bytes <= budget
        assert held(d) <= budget + slack
        index = store.flush()
        store.prune()
        assert held(d) <= budget + slack
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 2.5 * 1000 * 4 * d
    revived = ClientStore(tmp_path, budget)
    revived.restore(index)
    assert [float(revived.get(c)["h"][5]) for c in range(1000)] == [2000.0 + c for c in range(1000)]
    assert revived._bytes <= budget and held(d) <= 2 * budget + slack


def test_one_client_is_read_without_reading_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClientStore(tmp_path, 0)
    for c in range(50):
        store.propose(c, 0, state(c))
    store.accept()
    index = store.flush()
    fresh = ClientStore(tmp_path, 0)
    fresh.restore(index)
    read: list[str] = []
    plain = segments._tensor
    monkeypatch.setattr(
        segments, "_tensor", lambda f, kind, at: (read.append(kind.name), plain(f, kind, at))[1]
    )
    assert value(fresh.get(31)) == 31
    assert sorted(read) == ["h", "n"]


DTYPES = {
    "double": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    "half": torch.tensor([[1.5], [2.5], [3.5]], dtype=torch.float16),
    "brain": torch.tensor([0.25, 1e30, -7], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.25),
    "nothing": torch.empty((0, 4)),
    "a/b": torch.arange(6).reshape(2, 3).T,
}


def test_any_dtype_and_shape_comes_back_as_it_was_and_the_library_reads_it_too(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 0)
    store.propose(3, 0, DTYPES)
    store.propose(4, 0, {})
    store.accept()
    index = store.flush()
    revived = ClientStore(tmp_path, 0)
    revived.restore(index)
    assert revived.get(4) == {} and revived.last_round(4) == 0
    library = load_file(tmp_path / index["clients"]["3"][0])
    for name, expected in DTYPES.items():
        for found in (store.get(3)[name], revived.get(3)[name], library[f"3/{name}"]):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_segments_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Written by the library: sorted by its own rules, with metadata."""
    tensors = {f"{c}/{k}": v for c in (2, 10) for k, v in state(c).items()}
    path = tmp_path / "states-000004.safetensors"
    save_file(tensors, path, metadata={"clients": "[2, 10]"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    store = ClientStore(tmp_path, 0)
    store.restore({"clients": {"10": [path.name, 7]}, "sha256": {path.name: digest}})
    assert (value(store.get(10)), store.last_round(10), store.get(2)) == (10, 7, {})
    store.propose(2, 8, state(5))
    store.accept()
    assert (value(store.get(2)), value(store.get(10))) == (5, 10)
    assert path.exists()  # the checkpoint that names it is still the newest


def test_many_small_segments_become_few_and_old_ones_go_before_any_checkpoint(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 0)
    for t in range(40):
        store.propose(t, t, state(t))
        store.accept()
        assert len(list(tmp_path.iterdir())) <= 8
    assert [value(store.get(c)) for c in range(40)] == list(range(40))


def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("a file where the folder should be")
    store = ClientStore(tmp_path / "checkpoint", 0)
    with pytest.raises(CheckpointError, match=r"could not be written to .*checkpoint .*Make room and type"):
        store.propose(0, 0, state(1))


def test_a_round_fetches_states_as_its_chunks_are_sent() -> None:
    """400 clients with states of 30 kB each: 12 MB a round, of which no more than the budget and a chunk."""
    d, peak = 3 * 2501, list[int]()

    def look(job: Any) -> None:
        if job.client % 40 == 0:
            peak.append(held(job.layout.dim))

    features = torch.zeros(1, 2500)
    clients = [(features + c / 1000, torch.tensor([c % 3])) for c in range(400)]
    problem = classification(clients=clients, test=None, model=torch.nn.Linear(2500, 3))
    watched = method("fedspeed")
    watched.client = Hooked(watched.client, look)
    settings = ["rounds=2", "clients_per_round=400", "client.epochs=1", "engine.chunks=40"]
    cohorts = [list(range(400))] * 2
    cold = problem.run(*settings, "checkpoint.memory_mb=4", strategy=watched, cohorts=cohorts)
    assert (
        max(peak) < (4 << 20) + 40 * 4 * d
    )  # a chunk is 17 clients at most; the rest are the model and sums
    assert max(peak) > 2 << 20  # else nothing was measured
    warm = problem.run(*settings, strategy=method("fedspeed"), cohorts=cohorts)
    assert hashes(cold) == hashes(warm)
