"""What travels and what is refused (the rules that keep simulation and Flower equal), and how updates are folded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.errors import ClientError
from fedsim.exchange.fold import Folder, combine, fold_kinds
from fedsim.exchange.payload import Message, Outcome, Payload, Replies, Update


@pytest.mark.parametrize(
    ("array", "shape", "dtype"),
    [
        (torch.zeros(0), (0,), torch.float32),
        (torch.tensor(2.5), (), torch.float32),
        (np.array(2.5), (), torch.float64),
        (np.float32([[1, 2]]), (1, 2), torch.float32),
        (torch.tensor([True]), (1,), torch.bool),
        (torch.zeros(2, dtype=torch.float16), (2,), torch.float16),
        (torch.zeros(2, dtype=torch.complex64), (2,), torch.complex64),
        (np.arange(6).reshape(2, 3).T, (3, 2), torch.int64),
        (np.arange(4)[::-1], (4,), torch.int64),
    ],
)
def test_arrays_that_travel(array: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = Payload.of({"layer/0.weight": array}).arrays["layer/0.weight"]
    assert (tuple(out.shape), out.dtype) == (shape, dtype)
    np.testing.assert_array_equal(out.numpy(), np.asarray(array))


def test_arrays_travel_without_their_graph() -> None:
    assert not Payload.of({"w": torch.ones(2, requires_grad=True) * 2}).arrays["w"].requires_grad


@pytest.mark.parametrize(
    "array",
    [
        [1.0, 2.0],
        3.0,
        None,
        np.array([None]),
        np.array(["a"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        torch.zeros(2, dtype=torch.bfloat16),
    ],
)
def test_arrays_that_are_refused(array: Any) -> None:
    with pytest.raises(ClientError, match="array 'w'"):
        Payload.of({"w": array})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor(4), 4),
        (float("nan"), pytest.approx(float("nan"), nan_ok=True)),
        ((1, 2), [1, 2]),
        ([np.int64(1), 2], [1, 2]),
        ([], []),
        ("text", "text"),
        (b"\x00\x01", b"\x00\x01"),
    ],
)
def test_values_that_travel_become_plain(value: Any, expected: Any) -> None:
    out = Payload.of(values={"v": value}).values["v"]
    assert out == expected
    assert type(out) in (bool, int, float, str, bytes, list)


@pytest.mark.parametrize("value", ["", [1, 2.0], [True], [[1]], {"a": 1}, object(), 1 + 2j, np.zeros(2), {1}])
def test_values_that_are_refused(value: Any) -> None:
    with pytest.raises(ClientError, match="value 'v'"):
        Payload.of(values={"v": value})


def test_absent_is_a_missing_key_and_names_are_not_empty() -> None:
    assert Payload.of(values={"v": None, "u": 1}).values == {"u": 1}
    for name in ("", 3):
        with pytest.raises(ClientError, match="non-empty strings"):
            Payload.of({name: torch.zeros(1)})  # type: ignore[dict-item]


def test_bytes_by_hand() -> None:
    """4 floats (16) + 3 int64 (24) + 1 bool (1) | int 8 + float 8 + 'é' 2 + 3 bytes + list of 2 ints 16."""
    p = Payload.of(
        {"a": torch.zeros(2, 2), "b": np.arange(3), "c": torch.tensor(True)},
        {"i": 1, "f": 0.5, "s": "é", "b": b"abc", "l": [1, 2]},
    )
    assert p.nbytes == 16 + 24 + 1 + 8 + 8 + 2 + 3 + 16
    assert Payload().nbytes == 0


def test_a_message_is_a_shared_part_and_a_part_per_client() -> None:
    m = Message.of({"w": np.zeros(2)}, {"k": np.int64(1)}, each={3: Payload.of(values={"mine": 1})})
    assert m.shared.values == {"k": 1}
    assert m.each[3].values == {"mine": 1}


def test_the_weight_travels_with_the_update() -> None:
    assert Update({"delta": torch.ones(2)}, weight=3).payload.values == {"weight": 3.0}
    assert Update({"delta": torch.ones(2)}, weight=3).payload.nbytes == 8 + 8


def fold(kinds: dict[str, Any], *updates: tuple[dict[str, Any], float]) -> Folder:
    folder = Folder(fold_kinds(kinds))
    for arrays, weight in updates:
        checked = Payload.of(arrays).arrays
        folder.check(checked)
        folder.add(checked, weight)
    return folder


def replies(folded: Any, weights: list[float]) -> Replies:
    return Replies([Outcome(i, "ok", weight=w) for i, w in enumerate(weights)], folded)


def test_mean_sum_and_stack_by_hand() -> None:
    a, b, c = (torch.tensor(v) for v in ([1.0, 2.0], [3.0, 4.0], [5.0, 12.0]))
    kinds = {"x": ("mean", "sum", "stack")}
    parts = [fold(kinds, ({"x": a}, 1), ({"x": b}, 2)), fold(kinds, ({"x": c}, 5))]
    r = replies(combine(parts), [1, 2, 5])
    assert r.total("x").tolist() == [9, 18]
    assert r.mean("x").tolist() == [(1 + 6 + 25) / 8, (2 + 8 + 60) / 8]
    assert r.stack("x").tolist() == [[1, 2], [3, 4], [5, 12]]
    assert r.weights.tolist() == [1, 2, 5]


def test_a_mean_of_equal_weights_may_come_from_the_sum() -> None:
    r = replies(
        combine([fold({"x": "sum"}, ({"x": torch.tensor([1.0])}, 2), ({"x": torch.tensor([4.0])}, 2))]),
        [2, 2],
    )
    assert r.mean("x").tolist() == [2.5]
    unequal = replies(r.folded, [1, 2])
    with pytest.raises(ClientError, match="no 'mean' of 'x'"):
        unequal.mean("x")


def test_what_was_not_folded_is_refused_by_name() -> None:
    r = replies(combine([fold({"x": "sum"}, ({"x": torch.zeros(1)}, 1))]), [1])
    with pytest.raises(ClientError, match=r"no 'stack' of 'x' \(folded: x: sum\)"):
        r.stack("x")
    with pytest.raises(ClientError, match="positive total weight"):
        replies({}, [0.0]).mean("x")
    with pytest.raises(ClientError, match="'median' is no kind of fold"):
        fold_kinds({"x": "median"})


def test_sums_go_in_client_order_and_then_in_chunk_order() -> None:
    """1e8 + 1 - 1e8 in float32 depends on the order: (1e8 + 1) is 1e8."""
    big, one = torch.tensor([1e8]), torch.tensor([1.0])
    kinds = {"x": "sum"}
    within = combine([fold(kinds, ({"x": big}, 1), ({"x": one}, 1), ({"x": -big}, 1))])
    assert within["x", "sum"].tolist() == [0.0]
    across = combine([fold(kinds, ({"x": big}, 1), ({"x": -big}, 1)), fold(kinds, ({"x": one}, 1))])
    assert across["x", "sum"].tolist() == [1.0]


def test_folding_owns_its_sums() -> None:
    """Updates are views of a buffer that the next client overwrites."""
    buffer = torch.tensor([1.0, 2.0])
    kinds = {"x": ("mean", "sum", "stack")}
    folder = fold(kinds, ({"x": buffer}, 2))
    buffer.fill_(100)
    out = combine([folder])
    assert [out["x", k].reshape(-1).tolist() for k in ("mean", "sum", "stack")] == [[2, 4], [1, 2], [1, 2]]
    first = fold({"x": "sum"}, ({"x": torch.ones(2)}, 1))
    second = fold({"x": "sum"}, ({"x": torch.ones(2)}, 1))
    combine([first, second])
    assert first.sums["x", "sum"].tolist() == [1, 1]  # a part may lie in shared memory: never written to


@pytest.mark.parametrize(
    ("array", "kind", "expected"),
    [
        (torch.tensor([True, False]), "sum", [3, 0]),
        (torch.tensor([200, 1], dtype=torch.uint8), "sum", [600, 3]),
        (torch.tensor([60000.0, 1.0], dtype=torch.float16), "sum", [180000.0, 3.0]),
        (torch.tensor([2**30 + 1, 1]), "mean", [3.0 * (2**30 + 1), 3.0]),
    ],
)
def test_sums_do_not_overflow(array: torch.Tensor, kind: str, expected: list[float]) -> None:
    out = combine([fold({"x": kind}, *[({"x": array}, 1.0)] * 3)])
    assert out["x", kind].tolist() == expected


def test_updates_that_do_not_match_are_refused_before_anything_is_added() -> None:
    folder = fold({"x": "sum", "y": "stack"}, ({"x": torch.ones(2), "y": torch.ones(1)}, 1))
    for arrays, told in (
        ({"x": torch.ones(2)}, r"holds \['x'\], but the strategy folds \['x', 'y'\]"),
        ({"x": torch.ones(2), "y": torch.ones(1), "z": torch.ones(1)}, "'z'"),
        ({"x": torch.ones(1), "y": torch.ones(1)}, r"'x' has shape \(1,\)"),
        ({"x": torch.ones(2), "y": torch.ones(2)}, r"'y' has shape \(2,\)"),
        ({"x": torch.ones(2, dtype=torch.int64), "y": torch.ones(1)}, "'x' has .*int64.*float32"),
    ):
        with pytest.raises(ClientError, match=told):
            folder.check(arrays)
    assert combine([folder])["x", "sum"].tolist() == [1, 1]


def test_chunks_of_different_shapes_are_not_broadcast() -> None:
    parts = [fold({"x": "sum"}, ({"x": torch.ones(n)}, 1)) for n in (3, 1)]
    with pytest.raises(ClientError, match="'x' has shape"):
        combine(parts)


def test_only_those_who_contributed_count() -> None:
    outcomes = [Outcome(1, "ok", 2.0), Outcome(2, "failed"), Outcome(5, "refused"), Outcome(7, "ok", 3.0)]
    r = Replies(outcomes, {})
    assert (r.clients, len(r), r.weights.tolist()) == ([1, 7], 2, [2.0, 3.0])
