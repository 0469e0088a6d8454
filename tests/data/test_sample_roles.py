"""Which samples are for what: validation sets, labels that are there and labels that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.federated import FederatedData
from fedsim.data.labelled import Labelled
from fedsim.data.sample_roles import (
    NO_LABEL,
    by_domain,
    kept,
    left_out,
    only_rows,
    stratified,
    validation_rows,
    withheld,
)
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError

SIZES = (40, 30, 20, 11)  # of the classes


def data(y: torch.Tensor | None = None, names: tuple[str, ...] = ("a", "b", "c", "d")) -> Dataset:
    y = torch.arange(4).repeat_interleave(torch.tensor(SIZES)) if y is None else y
    return Dataset(
        Samples(torch.arange(len(y)).float()[:, None], y), classes=names if not y.is_floating_point() else ()
    )


def spec(**values: Any) -> Labelled:
    found = Labelled.of(values)
    assert found is not None
    return found


def counts(rows: np.ndarray) -> list[int]:
    return np.bincount(data().train.y.numpy()[rows], minlength=4).tolist()


def test_a_validation_set_has_every_class_in_proportion_and_no_seed() -> None:
    rows = validation_rows(data(), 0.25)
    assert len(rows) == 25 and (np.diff(rows) > 0).all()
    assert all(abs(n - 0.25 * size) < 1 for n, size in zip(counts(rows), SIZES, strict=True))
    assert np.array_equal(rows, validation_rows(data(), 0.25))


def test_of_numbers_to_be_predicted_any_samples_validate() -> None:
    assert len(validation_rows(data(torch.rand(50)), 0.1)) == 5


@pytest.mark.parametrize(
    ("share", "said"), [(0.001, "that is 0 of 101 .* at least 0.0099"), (0.999, "give less")]
)
def test_a_validation_set_of_nothing_or_everything_is_refused(share: float, said: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.validation={share}: .*{said}"):
        validation_rows(data(), share)


def test_strata_of_one_sample_are_drawn_as_often_as_others() -> None:
    hits = np.zeros(20)
    for seed in range(400):
        hits[stratified(np.arange(20), 20, 5, np.random.default_rng(seed))] += 1
    assert hits.sum() == 2000 and hits.min() > 60 and hits.max() < 145


def test_rows_domain_by_domain() -> None:
    domain = np.array([1, 0, 1, 0, 2])
    found = Dataset(
        Samples(torch.zeros(5, 1), torch.zeros(5)),
        groups={"train": {"domain": domain}},
        group_names={"domain": ("x", "y", "z")},
    )
    rows, spans = by_domain(found, np.array([0, 1, 3]))
    assert rows.tolist() == [1, 3, 0] and spans == {"x": slice(0, 2), "y": slice(2, 3)}


def test_shards_without_some_clients_or_some_rows() -> None:
    shards = Shards.of([np.array([0, 1]), np.array([2]), np.array([3, 4, 5])])
    assert [p.tolist() for p in map(left_out(shards, {1}).part, range(3))] == [[0, 1], [], [3, 4, 5]]
    assert [p.tolist() for p in map(kept(shards, {1}).part, range(3))] == [[], [2], []]
    assert [p.tolist() for p in map(only_rows(shards, np.array([1, 4, 5])).part, range(3))] == [
        [1],
        [],
        [4, 5],
    ]


@pytest.mark.parametrize(
    ("y", "there"),
    [
        (torch.tensor([3, 1, 2]), NO_LABEL),
        (torch.tensor([0.5, 0.2, 0.1]), float("nan")),
        (torch.tensor([True, True, True]), False),
    ],
)
def test_withheld_targets_are_overwritten_in_a_copy(y: torch.Tensor, there: Any) -> None:
    whole = Samples(torch.zeros(3, 1), y.clone())
    found = withheld(whole, np.array([0, 2]))
    assert found.x is whole.x and torch.equal(whole.y, y) and found.y[1] == y[1]
    expected = torch.tensor([there, there], dtype=y.dtype)
    assert torch.equal(found.y[[0, 2]].nan_to_num(-1), expected.nan_to_num(-1))


# -- labelled -----------------------------------------------------------------------------------------------------

EVERYTHING = np.arange(101)


def test_the_server_gets_a_share_of_every_class_or_as_many_of_each() -> None:
    share = counts(spec(at="server", share=0.2).of_server(data(), EVERYTHING, 0))
    assert sum(share) == 20 and all(abs(n - 0.2 * size) <= 1 for n, size in zip(share, SIZES, strict=True))
    assert counts(spec(at="server", count=24).of_server(data(), EVERYTHING, 0)) == [6, 6, 6, 6]
    assert counts(spec(at="server", count=60).of_server(data(), EVERYTHING, 0))[3] == 11  # all it has
    free = spec(at="server", count=24, per_class=False).of_server(data(), EVERYTHING, 0)
    assert len(free) == 24 and counts(free) != [6, 6, 6, 6]


def test_labels_are_drawn_by_the_seed() -> None:
    first, again, other = (
        spec(at="server", count=24).of_server(data(), EVERYTHING, s).tolist() for s in (0, 0, 1)
    )
    assert first == again != other


def test_clients_have_labels_for_a_share_of_their_own_and_at_least_one() -> None:
    parts = [np.arange(0, 101, 2), np.array([1]), np.array([], dtype=np.int64), np.array([3, 5, 7])]
    known, unknown = spec(at="client", share=0.1).of_clients(data(), Shards.of(parts), 0)
    assert known.sizes.tolist() == [5, 1, 0, 1] and unknown.sizes.tolist() == [46, 0, 0, 2]
    for client, part in enumerate(parts):
        both = np.concatenate((known.part(client), unknown.part(client)))
        assert sorted(both.tolist()) == part.tolist()
    alone, _ = spec(at="client", share=0.1).of_clients(data(), Shards.of(parts[:1]), 0)
    assert np.array_equal(alone.part(0), known.part(0))  # what one client has does not hang on the others


def test_copies_of_a_sample_have_a_label_together() -> None:
    known, unknown = spec(at="client", count=2).of_clients(
        data(), Shards.of([np.array([1, 1, 2, 2, 3, 3])]), 0
    )
    assert len(known.index) == 4 and not set(known.index) & set(unknown.index)


@pytest.mark.parametrize("names", [[0, 2], ["a", "c"]])
def test_other_classes_have_no_labels_at_all(names: list[Any]) -> None:
    shards = Shards.of([np.arange(101)])
    known, unknown = spec(at="client", share=0.5, classes=names).of_clients(data(), shards, 0)
    assert counts(known.index) == [20, 0, 10, 0] and len(unknown.index) == 71


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"at": "clients", "share": 0.1}, "data.labelled.at=clients: must be one of client, server"),
        ("client", "data.labelled=client: expected"),
        ({"share": 0.1}, "data.labelled.share: without effect; add data.labelled.at"),
        ({"at": "client", "share": 1.5}, "data.labelled.share=1.5: must be between 0 and 1"),
        ({"at": "client", "count": 0}, "data.labelled.count=0: must be a whole number"),
        ({"at": "client", "count": 3, "share": 0.1}, "not together with data.labelled.share"),
        (
            {"at": "client", "shares": 0.1},
            "unknown key 'data.labelled.shares'; nearest is 'data.labelled.share'",
        ),
        ({"at": "client", "share": 0.1, "classes": []}, r"data.labelled.classes=\[\]: must be a list"),
        ({"at": "client", "share": 0.1, "per_class": 1}, "data.labelled.per_class=1: must be true or false"),
    ],
)
def test_impossible_settings_are_refused(values: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Labelled.of(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 200}, "count=200: 101 samples can have labels"),
        ({"count": 101}, "count=101: the server leaves clients none"),
        ({"count": 2, "classes": ["e"]}, "there is no class 'e'"),
        ({"count": 2, "classes": [7]}, "there is no class 7"),
    ],
)
def test_what_the_data_cannot_give_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"data.labelled.*{said}"):
        spec(at="server", **values).of_server(data(), EVERYTHING, 0)


def test_clients_without_any_labelled_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no client has a sample of the classes \['d'\]"):
        spec(at="client", share=0.5, classes=["d"]).of_clients(data(), Shards.of([np.arange(50)]), 0)


def test_data_without_roles_are_handed_on_as_they_are() -> None:
    whole = FederatedData(data(), Shards.of([np.arange(101)]))
    assert whole.handed() is whole and whole.unlabelled(0, torch.float32) is None
