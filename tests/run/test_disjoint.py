"""Parts of the training samples that share none, and the server's own part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from composing import compose_quickly
from problems import classification

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import Portion, Roles
from fedsim.data.shards import Shards, Stated
from fedsim.errors import ConfigError, DataError
from fedsim.run.disjoint import check, with_server_part

DATA = Dataset(
    Samples(torch.arange(12.0).view(12, 1), torch.arange(12) % 3),
    Samples(torch.tensor([[3.0]]), torch.zeros(1, dtype=torch.int64)),
    classes=("a", "b", "c"),
)


def dealt(*parts: list[int], **roles: Portion) -> FederatedData:
    return FederatedData(DATA, Shards.of([np.array(p) for p in parts]), roles=Roles(**roles))


def test_an_overlap_is_named_by_both_places() -> None:
    found = check(dealt([0, 1], [2, 3, 3], server=Portion(torch.tensor([5]))))
    assert found["by_place"] == {"client 0": 2, "client 1": 2, "the server": 1} and found["disjoint"]
    assert found["equal_inputs"] == {"places": 0, "test": 1}
    with pytest.raises(DataError, match=r"sample 2 is in two places, client 0 and client 1 \(1 such pairs\)"):
        check(dealt([1, 2], [2, 3]))
    with pytest.raises(DataError, match=r"sample 3 is in two places, client 1 and the server"):
        check(dealt([1, 2], [3], server=Portion(torch.tensor([3, 4]))))


def test_samples_that_the_server_brings_are_none_of_the_test_set() -> None:
    """Known by their content; the first of both places is named."""
    own, alike = torch.tensor([[0.5], [7.0], [3.0]]), DATA.train.labels[:3]
    found = check(dealt([0, 1], server=Portion(torch.tensor([0, 1]), Samples(own, alike))))
    assert found["by_place"] == {"client 0": 2, "the server": 2} and found["samples"] == 4
    assert found["equal_inputs"] == {"places": 0, "test": 0}  # row 7 is nobody's
    found = check(dealt([0, 7], server=Portion(torch.tensor([0, 1]), Samples(own.double()))))
    assert found["equal_inputs"] == {"places": 1, "test": 0}
    with pytest.raises(
        DataError, match=r"sample 2 of the server's own is sample 0 of the test set \(1 such\)"
    ):
        check(dealt([0, 1], server=Portion(torch.arange(3), Samples(own, alike))))
    given = check(dealt([0, 1], validation=Portion(torch.arange(3), Samples(own, alike))))
    assert given["equal_inputs"] == {"places": 0, "test": 1}


def test_of_samples_that_lie_elsewhere_nothing_is_claimed(caplog: pytest.LogCaptureFixture) -> None:
    """Stand-ins of several clients are the same rows, and no overlap; what the server brings is looked at."""
    data, own = dealt([0], [1]), Samples(torch.tensor([[3.0]]), torch.zeros(1, dtype=torch.int64))
    away = replace(data, shards=Stated.of_counts(np.array([[2, 1, 0], [1, 0, 4]])))
    found = check(away)
    assert (found["disjoint"], found["by_place"]) == (None, {})
    assert "it cannot be checked that no two of them" in caplog.text
    with pytest.raises(DataError, match="sample 0 of the server's own is sample 0 of the test set"):
        check(replace(away, roles=Roles(server=Portion(torch.tensor([0]), own))))


def test_equal_inputs_in_two_places_are_counted() -> None:
    data = dealt([0], [1])
    same = replace(data, dataset=replace(DATA, train=Samples(torch.zeros(12, 1), DATA.train.labels)))
    assert check(same)["equal_inputs"] == {"places": 1, "test": 0}


def test_a_run_holds_the_proof_and_a_split_with_overlap_is_refused(tmp_path: Path) -> None:
    found = classification().run("strategy=one_shot", "rounds=1", f"dir={tmp_path}/run")
    proof = json.loads((found.dir / "disjoint.json").read_text())
    assert proof["disjoint"] and proof["places"] == 6 and proof["samples"] == 49


def test_the_servers_part_is_the_same_for_all_seeds_and_has_no_labels() -> None:
    rows = np.arange(12)
    parts = []
    for seed in (0, 1):
        config = compose_quickly(("data.server={share: 0.25, labelled: false}", f"seed={seed}"))
        left, roles = with_server_part(config, DATA, rows, Roles())
        assert roles.server is not None
        parts.append(roles.server.rows.tolist())
        assert sorted([*left.tolist(), *parts[-1]]) == rows.tolist()
        x, y = roles.server.read(DATA, torch.float32).everything()
        assert x[:, 0].tolist() == parts[-1] and y is None
    assert parts[0] == parts[1] and sorted(i % 3 for i in parts[0]) == [0, 1, 2]
    for share in ("nan", "null", "true"):
        with pytest.raises(ConfigError, match=r"expected \{share: 0\.1, labelled: false\}"):
            with_server_part(compose_quickly((f"data.server={{share: {share}}}",)), DATA, rows, Roles())
    with pytest.raises(ConfigError, match=r"data\.server\.share=1\.5: that is 18 of 12 samples"):
        with_server_part(compose_quickly(("data.server={share: 1.5}",)), DATA, rows, Roles())


def test_feddf_learns_from_the_servers_part() -> None:
    server = "data.server={share: 0.2, labelled: false}"
    found = classification().run("strategy=feddf", "strategy.steps=4", server, "rounds=2")
    assert "server/train_loss" in found.rows[0]
