"""What several exchanges a round need: parts reported apart, messages that stand, contributions of any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import classification, hashes

from clients.sgd import SGDClient
from fedsim.errors import ClientError
from fedsim.exchange.fold import Folder, combine, fold_kinds
from fedsim.exchange.payload import Message, NonFinite, Payload, Update
from strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class Two(SGDClient):
    """Answers a first question with as many numbers as it has samples; trains towards what stands."""

    def ask(self, job: Any) -> Update:
        if job.client == 5:
            raise NonFinite("row 7")
        return Update({"numbers": torch.arange(len(job.data)) + 100.0 * job.client})

    def fit(self, job: Any) -> Update:
        assert job.message.arrays["table"].shape == (1000,)
        update = super().fit(job)
        assert job.values["name"] == "standing"
        step = job.layout.expand(job.message.arrays["table"][: job.layout.size])
        return Update({"delta": update.arrays["delta"] + step}, weight=update.weight)


class Asking(FedAvg):
    """A question apart from the round, and a table that clients hold."""

    standing = Payload.of({"table": torch.full((1000,), 0.01)}, {"name": "standing"})

    def make_client(self) -> Any:
        return Two(weighting=self.weighting)

    def round(self, server: Any, state: Any, round: Any) -> Any:
        with server.apart("questions"):
            found = server.exchange(Message(), {"numbers": "cat"}, task="ask")
        answered = list(found.clients)
        expected = [torch.arange(int(server.sizes[c])) + 100.0 * c for c in answered]
        assert torch.equal(found.cat("numbers"), torch.cat(expected))
        message = Message(self.message(state, round).shared, standing=self.standing)
        return self.update(state, server.exchange(message, self.folds, clients=answered), round)


def run(*overrides: str) -> Any:
    problem = classification(cohorts=[[0, 1, 2, 5], [3, 4, 5]], settings=("rounds=2", "engine.chunks=3"))
    return problem.run(*overrides, strategy=Asking(server_lr=1.0, weighting="samples"))


def test_phases_are_counted_apart_and_standing_messages_not_again() -> None:
    result = run()
    d = sum(v.numel() for v in result.weights.values())
    first = result.rows[0]
    assert first["bytes_down"] == 3 * 4 * d and first["bytes_up"] == 3 * (4 * d + 8)
    assert first["questions"]["bytes_up"] == 4 * (7 + 12 + 3) + 3 * 8
    assert first["questions"]["bytes_down"] == 0 and first["questions"]["seconds"] > 0
    assert result.summary["questions"]["bytes_up"] == sum(r["questions"]["bytes_up"] for r in result.rows)
    named = [(f["client"], f["kind"], f["reason"]) for r in result.rows for f in r["failures"]]
    assert named == [(5, "nonfinite", "row 7")] * 2


def test_a_standing_message_reaches_every_worker(ray: str) -> None:
    serial = run()
    for workers in (1, 2):
        assert hashes(run(ray, f"engine.workers={workers}")) == hashes(serial)


def test_contributions_end_to_end_may_differ_in_length_only() -> None:
    parts = []
    for rows in ((2, 3), (1, 3)), ((0, 3),):
        folder = Folder(fold_kinds({"a": "cat"}))
        for shape in rows:
            arrays = {"a": torch.full(shape, float(len(parts)))}
            folder.check(arrays)
            folder.add(arrays, 1.0)
        parts.append(folder)
    assert combine(parts)["a", "cat"].shape == (3, 3)
    with pytest.raises(ClientError, match=r"'a' has shape \(4,\).*other clients sent \(3,\)"):
        parts[0].check({"a": torch.zeros(1, 4)})
    other = Folder(fold_kinds({"a": "cat"}))
    other.add({"a": torch.zeros(1, 4)}, 1.0)
    with pytest.raises(ClientError, match=r"'a' has shape \(4,\)"):
        combine([*parts, other])
