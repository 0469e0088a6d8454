"""Targets as people have them: which become class ids, which stay numbers, and what is said about the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.data.containers import array
from fedsim.data.dataset import Dataset, Samples
from fedsim.data.door import admit
from fedsim.data.labels import TargetRules, targets
from fedsim.errors import DataError

OWN = TargetRules(own_loss=True)


def read(*parts, rules=TargetRules()):  # noqa: B008
    """The targets of clients 0, 1, ... as lists, and the names of the classes."""
    names = [f"client {i}" for i in range(len(parts))]
    found, classes = targets(names, [array(n, p) for n, p in zip(names, parts, strict=True)], rules)
    assert len({t.dtype for t in found}) == 1
    return [t.tolist() for t in found], classes


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", ">i4", "float32"]
)
def test_integers_of_any_width_and_whole_floats_are_class_ids(dtype):
    found, classes = read(np.array([0, 2, 1]).astype(dtype), np.array([[1], [0]]).astype(dtype))
    assert found == [[0, 2, 1], [1, 0]] and classes == ("0", "1", "2")


def test_ids_that_are_int64_from_0_stay_the_same_tensor():
    y = torch.tensor([0, 3, 1])
    (found,), classes = targets(["client 0"], [y], TargetRules())
    assert found is y and classes == ("0", "1", "2", "3")


def test_bool_and_signs_are_two_classes():
    assert read([True, False], [False, False]) == ([[1, 0], [0, 0]], ("0", "1"))
    assert read([-1, 1], [1.0, -1.0]) == ([[0, 1], [1, 0]], ("-1", "1"))


def test_text_is_numbered_over_all_participants():
    found, classes = read(["dog", "cat"], np.array([b"ant"]), [["cat"]])
    assert found == [[2, 1], [0], [1]] and classes == ("ant", "cat", "dog")


def test_ids_that_start_above_0_are_numbered_over_all_unless_the_model_has_outputs_for_them():
    assert read([1, 3], [2, 1]) == ([[0, 2], [1, 0]], ("1", "2", "3"))
    assert read([10, 500], [10, 10]) == ([[0, 1], [0, 0]], ("10", "500"))
    assert read([1, 3], [2, 1], rules=TargetRules(outputs=lambda: 4)) == (
        [[1, 3], [2, 1]],
        ("0", "1", "2", "3"),
    )
    assert read([1, 3], [2, 1], rules=TargetRules(outputs=lambda: 3))[1] == ("1", "2", "3")


def test_a_participant_without_samples_changes_nobodys_labels():
    assert read([1, 0], np.array([]), [2]) == ([[1, 0], [], [2]], ("0", "1", "2"))
    assert read(["b", "a"], []) == ([[1, 0], []], ("a", "b"))


def test_probabilities_stay():
    p = [[0.25, 0.75], [1.0, 0.0]]
    assert read(p) == ([p], ())


def test_sequences_may_ignore_some_of_their_labels():
    assert read([[0, 5, -100], [1, 1, 2]]) == ([[[0, 5, -100], [1, 1, 2]]], ())


def test_with_a_loss_of_ones_own_numbers_keep_their_values():
    assert read([-1, 1], [1, 1], rules=OWN) == ([[-1, 1], [1, 1]], ())
    assert read([0.5, 2.0], np.array([], dtype=np.float32), rules=OWN) == ([[0.5, 2.0], []], ())
    assert read([[1], [0]], rules=OWN) == ([[[1], [0]]], ())
    assert read(np.array([0, 1], np.int32), rules=OWN) == ([[0, 1]], ("0", "1"))
    assert read([0, 10**15], [7, 3], rules=OWN) == ([[0, 10**15], [7, 3]], ())


def test_large_ids_do_not_cost_their_range():
    assert read([0, 10**12, 0, 0], [0, 10**12]) == ([[0, 1, 0, 0], [0, 1]], ("0", str(10**12)))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([[0, 1], [0, -100]], r"client 1, row 1: label -100 \(ignore\); drop"),
        ([[0, 1], [2, -1]], r"client 1, row 1: label -1; classes are numbered from 0"),
        ([[0.0, 1.0], [1.0, 0.5]], r"client 1, row 1: target 0\.5 is a number.*loss="),
        ([[0.0, float("nan")]], r"client 0, row 1: the target is NaN; fill or drop"),
        ([["a", "b"], [0, 1]], r"client 0 has labels as text, client 1 as numbers"),
        ([["a", None]], r"client 0, row 1 is empty"),
        ([["a", " "]], r"client 0, row 1: the label is empty"),
        ([[[0.2, 0.2], [1.0, 0.0]]], r"client 0, row 0: targets of shape \(2,\) are floats.*loss="),
        ([[[0, -100], [-100, -100]]], r"client 0, row 1: every label is -100"),
        ([[[0, -2]]], r"client 0, row 0: label -2"),
        ([np.array([1j])], "complex"),
        ([np.arange(100, 400)], r"300 different values in 300 samples.*mse_loss"),
    ],
)
def test_what_can_be_no_label_is_refused_by_client_row_and_remedy(parts, words):
    with pytest.raises(DataError, match=words):
        read(*parts)


def test_labels_beyond_the_named_classes_are_refused():
    with pytest.raises(DataError, match=r"client 0, row 1: label 2; the data set names 2 classes.*0 to 1"):
        read([0, 2], rules=TargetRules(known=("a", "b")))


@pytest.mark.parametrize(
    ("kind", "parts", "words"),
    [
        ("numbers", ([1.5], ["9", "10"]), "client 1: targets are text, but this task takes numbers"),
        ("numbers", ([1.5], [0.5, float("nan")]), "client 1, row 1: the target is NaN; fill or drop"),
        ("labels", ([[1, 0]], [[0, 1], [1, -1]]), r"client 1, row 1: the target -1 is no label.*\(y > 0\)"),
        ("labels", ([[1.0, 2.0]],), "client 0, row 0: the target 2 is no label"),
        ("labels", (["a"],), "client 0: targets are text, but this task takes 0 and 1"),
    ],
)
def test_tasks_say_what_their_targets_are(kind, parts, words):
    with pytest.raises(DataError, match=words):
        read(*parts, rules=TargetRules(own_loss=True, kind=kind))


def test_numbered_targets_are_the_numbers_again_where_a_task_predicts_numbers():
    data = Dataset(Samples(torch.zeros(3, 2), torch.tensor([1, 0, 2])), classes=("10", "20.5", "9"))
    rules = TargetRules(own_loss=True, kind="numbers")
    assert admit(data, rules).train.y.tolist() == [20.5, 10.0, 9.0]
    with pytest.raises(
        DataError, match=r"the targets are classes \(a, b, c, \.\.\.\), but this task predicts"
    ):
        admit(replace(data, classes=("a", "b", "c")), rules)
