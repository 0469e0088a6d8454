"""What is measured where classes have no names, by hand and against every possible matching."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from blobs import run
from sklearn.metrics import normalized_mutual_info_score

from fedsim.errors import ConfigError
from fedsim.task.matching import kinds_of_classes, matched_accuracy, mutual_information, open_world
from fedsim.task.metrics import confusion_of

# class 0 and 1 are seen, 2 everybody's, 3 somebody's; ids as guessed
Y = np.repeat([0, 1, 2, 3], [4, 2, 4, 2])
GUESS = np.array([0, 0, 0, 2, 1, 1, 3, 3, 3, 0, 0, 3])
KINDS = kinds_of_classes(np.array([5, 1, 0, 0]), np.array([3, 1, 3, 2]), 3, "all")


def counts(y: np.ndarray, guess: np.ndarray, classes: int = 4) -> np.ndarray:
    return confusion_of(torch.tensor(y), torch.tensor(guess), classes).numpy()


def test_each_kind_is_matched_on_its_own_samples() -> None:
    found = open_world(counts(Y, GUESS), KINDS)
    assert found["seen"] == 5 / 6  # as they are named
    assert found["LU"] == 3 / 4  # id 3 is class 2
    assert found["GU"] == 1 / 2  # id 0 or 3 is class 3
    assert found["AU"] == 4 / 6  # id 3 is class 2, id 0 class 3
    assert found["all"] == 8 / 12  # ids 0, 1, 3 are classes 0, 1, 2
    nmi = normalized_mutual_info_score(Y[6:], GUESS[6:])
    np.testing.assert_allclose(found["NMI"], nmi, rtol=0, atol=1e-12)


def test_matching_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        table = rng.integers(0, 20, (4, 4))
        best = max(sum(table[i, j] for i, j in enumerate(order)) for order in permutations(range(4)))
        assert matched_accuracy(table) == best / table.sum()


def test_ids_beyond_the_classes_and_empty_kinds() -> None:
    table = counts(np.array([0, 0, 1]), np.array([5, 9, 1]), 2)
    assert table.tolist() == [[0, 0, 2], [0, 1, 0]]
    assert matched_accuracy(table) == 1.0
    none = kinds_of_classes(np.array([1, 1]), np.array([1, 1]), 1, "all")
    assert open_world(table, none).keys() == {"all", "seen"}
    assert mutual_information(np.array([[3, 0]])) == 1.0


def test_who_has_a_class_says_of_which_kind_it_is() -> None:
    holders = np.array([5, 5, 5, 2, 1, 0])
    labelled = np.array([9, 0, 0, 0, 0, 0])
    everybody, several = (kinds_of_classes(labelled, holders, 5, k) for k in ("all", "multi"))
    assert np.flatnonzero(everybody["LU"]).tolist() == [1, 2]
    assert np.flatnonzero(everybody["GU"]).tolist() == [3, 4, 5]
    assert np.flatnonzero(several["LU"]).tolist() == [1, 2, 3]
    assert np.flatnonzero(several["GU"]).tolist() == [4, 5]
    for kinds in (everybody, several):
        assert np.flatnonzero(kinds["AU"]).tolist() == [1, 2, 3, 4, 5]


OPEN = "data.labelled={at: client, share: 0.5, classes: [0]}"
HELD = ("partition=holders", "partition.holders=[[2,2]]")


def test_any_method_is_measured_so_where_the_split_leaves_classes_without_labels() -> None:
    first = run(OPEN, *HELD, "evaluation.every=1").rows[-1]
    assert {"all", "seen", "AU", "LU", "GU"} <= first.keys()
    several = run(OPEN, *HELD, "evaluation.local_unseen=multi").rows[-1]
    assert "GU" not in several and several["LU"] == several["AU"] == first["AU"]
    assert several["weights_hash"] == first["weights_hash"]
    assert "all" not in run("data.labelled={at: client, share: 0.5}").rows[-1]
    with pytest.raises(ConfigError, match=r"evaluation\.local_unseen"):
        run(OPEN, "evaluation.local_unseen=some")
