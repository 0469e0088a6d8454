"""What large models can do without: memory lent, and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import classification, hashes
from torch import nn

from fedsim.exchange.fold import Folder, combine
from fedsim.task.copies import copied
from fedsim.task.room import drop, emptied, lend, on_disk, rest
from fedsim.task.vectors import FlatModel


def test_a_model_that_is_lent_its_parameters_has_the_same_values_in_one_place() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flat = FlatModel(copied(model))
    lend(flat, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    at = flat.w.data_ptr()
    assert all(at <= p.data_ptr() < at + flat.w.nbytes for p in model.parameters())
    assert torch.equal(FlatModel(copied(model)).w, flat.w)


def test_an_emptied_model_computes_again_once_it_is_loaded() -> None:
    flat = FlatModel(nn.Linear(3000, 100))
    w, x = flat.w.clone(), torch.ones(2, 3000)
    wanted = flat.module(x)
    emptied(flat)
    assert not flat.w.any()
    flat.load(w)
    assert torch.equal(flat.module(x), wanted)
    flat.check()  # everything lies where it was


def test_a_model_on_disk_is_there_whenever_it_is_looked_at(tmp_path: Path) -> None:
    flat = FlatModel(nn.Linear(3000, 100))
    w, x = flat.w.clone(), torch.ones(2, 3000)
    wanted, model = flat.module(x), copied(flat.module)
    on_disk(flat, tmp_path)
    lend(flat, model)
    for _ in range(2):
        assert torch.equal(flat.weights.w, w) and torch.equal(flat.module(x), wanted)
        assert torch.equal(model(x), wanted)
        rest()
    assert list(tmp_path.iterdir()) == []


def test_dropped_memory_reads_as_zeros_and_can_be_written() -> None:
    t = torch.ones(1_000_003)
    inner = t[1:-1]
    drop(inner)
    assert (t[0], t[-1]) == (1, 1) and not inner.any()
    assert (inner + 1).sum() == len(inner)


class Owner(Folder):
    def owns(self, array: torch.Tensor) -> bool:
        return len(array) > 2


def test_sums_in_the_place_of_owned_updates_have_the_bits_of_others() -> None:
    fold = {"delta": ("mean",), "c": ("sum",), "both": ("mean", "sum"), "short": ("mean",)}
    updates = [
        {name: torch.randn(2 if name == "short" else 5, generator=torch.Generator().manual_seed(seed)) for name in fold}
        for seed in range(4)
    ]  # fmt: skip
    totals = []
    for kind in (Folder, Owner):
        given = [{k: v.clone() for k, v in update.items()} for update in updates]
        parts = [kind(fold) for _ in range(2)]
        for k, (update, weight) in enumerate(zip(given, (3.0, 0.7, 1.0, 5.0), strict=True)):
            parts[k // 2].add(update, weight)
        totals.append(combine(part.cpu() for part in parts))
        if kind is Owner:
            assert totals[1]["delta", "mean"] is given[0]["delta"] and totals[1]["c", "sum"] is given[0]["c"]
            assert torch.equal(given[0]["both"], updates[0]["both"])
            assert torch.equal(given[0]["short"], updates[0]["short"])
    assert totals[0].keys() == totals[1].keys()
    assert all(torch.equal(v, totals[1][k]) for k, v in totals[0].items())


def test_a_run_of_a_large_model_has_the_same_bits_and_leaves_modules_of_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large is everything here: initial vector and model lie on disk, as one. FedKSeed goes back to it every round."""
    words = ("strategy=fedkseed", "strategy.lr=0.01", "strategy.pool=5", "strategy.local_steps=3", "rounds=3")
    given = classification().model
    assert isinstance(given, nn.Module)
    before = {k: v.clone() for k, v in given.state_dict().items()}

    def bits() -> list[list[str]]:
        kinds = (lambda: copied(given), given)
        return [hashes(classification(model=kind).run(*words)) for kind in kinds]

    small = bits()
    monkeypatch.setattr("fedsim.task.room.LARGE", 0)
    seen = list[int]()
    monkeypatch.setattr("fedsim.task.room.lend", lambda flat, model: (seen.append(1), lend(flat, model)))
    places = [p.data_ptr() for p in given.parameters()]
    assert bits() == small and seen == [1]
    assert [p.data_ptr() for p in given.parameters()] == places
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
