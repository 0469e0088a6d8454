"""Arrays in pieces: the bytes of Flower's own arrays, none of them copied, none of them taken twice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry, inflate_object_from_contents

from fedsim.flower.headers import header, tensor
from fedsim.flower.pieces import MOST, SMALL, PieceArray, array_of, leave_apart, record_of

LONG = torch.arange(MOST // 4 + SMALL, dtype=torch.float32)  # more than one piece


@pytest.fixture
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (Array.__qualname__, ArrayRecord.__qualname__):
        monkeypatch.setitem(inflatable_class_registry, name, inflatable_class_registry[name])
    leave_apart()


def sent(record: ArrayRecord) -> dict[str, bytes]:
    """Contents of the objects that a record travels as, by their hashes."""
    return {key: part.deflate() for key, part in get_all_nested_objects(record).items()}


def received(record: ArrayRecord, contents: dict[str, bytes]) -> Any:
    return inflate_object_from_contents(record.object_id, dict(contents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64, torch.int64])
def test_lent_numbers_have_the_bytes_of_an_array(dtype: torch.dtype) -> None:
    numbers = [LONG[:5].to(dtype), LONG[5:5].to(dtype), LONG[: SMALL + 1].to(dtype), LONG[:7].to(dtype)]
    whole = torch.cat(numbers)
    array = array_of(numbers, tuple(whole.shape))
    assert array.data == Array(whole.numpy()).data
    assert isinstance(array, PieceArray) and array.nbytes == len(array.data)
    assert array.start(200) == array.data[:200] and array.start(10**9) == array.data


def test_long_numbers_are_not_copied_and_what_is_short_is_put_together() -> None:
    array = array_of([LONG[:3], LONG, LONG[:4], LONG[:5]], (len(LONG) + 12,))
    assert isinstance(array, PieceArray)
    shared = [np.shares_memory(np.frombuffer(piece, np.uint8), LONG.numpy()) for piece in array.pieces]
    assert shared == [False, True, True, False]  # header and 3 numbers; two pieces; 9 numbers
    assert max(map(len, array.pieces)) == MOST


def test_flower_itself_reads_what_is_lent() -> None:
    record = record_of({"=v": array_of([LONG], tuple(LONG.shape))})
    back = received(record, sent(record))
    assert type(back) is ArrayRecord
    assert np.array_equal(back["=v"].numpy(), LONG.numpy())


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("own", [True, False])
def test_what_arrives_stays_in_pieces(own: bool) -> None:
    array = array_of([LONG], tuple(LONG.shape)) if own else Array(LONG.numpy())
    record = record_of({"=v": array, "=w": Array(np.ones(2))})
    back = received(record, sent(record))
    assert type(back) is ArrayRecord and list(back) == ["=v", "=w"]
    assert isinstance(back["=v"], PieceArray) and len(back["=v"].pieces) > 1
    assert torch.equal(tensor(back["=v"], header("v", back["=v"])), LONG)


@pytest.mark.usefixtures("_apart")
def test_a_piece_that_is_named_often_is_there_once() -> None:
    record = record_of({"=v": Array(np.arange(3.0))})
    contents = sent(record)
    (key,) = [k for k, content in contents.items() if content.startswith(b"Array ")]
    head, body = contents[key].split(b"\x00", 1)
    about = json.loads(body) | {"arraychunk_ids": [0] * 1000}
    text = json.dumps(about).encode()
    contents[key] = b" ".join([*head.split(b" ")[:2], str(len(text)).encode()]) + b"\x00" + text
    back = received(record, contents)["=v"]
    assert len(back.pieces) == 1000 and len(set(map(id, back.pieces))) == 1
    assert len(back.start(150)) == 150


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("ids", [[1], [0, -2], ["0"], None, [], 3])
def test_pieces_that_are_not_there_are_an_error(ids: Any) -> None:
    record = record_of({"=v": Array(np.arange(3.0))})
    contents = sent(record)
    (key,) = [k for k, content in contents.items() if content.startswith(b"Array ")]
    head, body = contents[key].split(b"\x00", 1)
    text = json.dumps(json.loads(body) | {"arraychunk_ids": ids}).encode()
    contents[key] = b" ".join([*head.split(b" ")[:2], str(len(text)).encode()]) + b"\x00" + text
    with pytest.raises(
        (ValueError, LookupError, TypeError)
    ):  # what the exchange takes for an unreadable reply
        received(record, contents)
