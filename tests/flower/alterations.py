"""What a hostile or broken node can make of its reply: each by name, how, and what the server says to it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Change = Callable[[RecordDict], RecordDict | None]
UNPICKLED: list[str] = []


class Mine:
    """Says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return UNPICKLED.append, ("unpickled",)


def put(record: str, **values: Any) -> Change:
    return lambda content: content[record].update(values)


def drop(record: str, name: str = "") -> Change:
    def change(content: RecordDict) -> None:
        del (content[record] if name else content)[name or record]

    return change


def values(**found: Any) -> Change:
    return put("outcome.update.values", **found)


def delta(make: Callable[[np.ndarray], Any], key: str = "") -> Change:
    """``make`` of the numbers sent takes their place: an array, or a whole ``Array``."""

    def change(content: RecordDict) -> None:
        record = content["outcome.update"]
        sent = next(k for k in record if k[1:] == "delta")
        made = make(record.pop(sent).numpy())
        record[key or sent] = made if isinstance(made, Array) else Array(made)

    return change


def raw(data: bytes, shape: tuple[int, ...] = (650,), dtype: str = "float32", stype: str = "") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype or "numpy.ndarray", data=data)


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def stating(shape: tuple[int, ...]) -> Array:
    """A few bytes with a header that says that they are ``shape``."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return raw(file.getvalue() + bytes(64), shape)


def oversized() -> Array:
    text = repr({"descr": "<f4", "fortran_order": False, "shape": (650,)}).encode() + b" " * 100_000 + b"\n"
    return raw(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(2600))


class Repeated(Array):
    """Says that its bytes are one piece of its data ten thousand times."""

    def slice_array(self) -> Any:
        return [*super().slice_array()] * 10_000


def repeated() -> Array:
    return Repeated("float32", (650,), "numpy.ndarray", npy(np.ones(650, np.float32)))


Repeated.__qualname__ = Array.__qualname__


def extra(name: str, record: Any) -> Change:
    return lambda content: content.update({name: record})


def twice(content: RecordDict) -> None:
    content["outcome.update"]["=delta"] = Array(np.zeros(656, np.float32))


def with_one(numbers: np.ndarray, value: float) -> np.ndarray:
    return np.where(np.arange(len(numbers)) == 9, np.float32(value), numbers)


def spoilt(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([numbers, np.ones(6, np.float32)])


OBJECTS = np.array([Mine()] * 3)
N = r"its reply is not taken: "
SHAPE = N + r"'delta' has shape .*; expected \(656,\), torch\.float32"
FOREIGN: list[tuple[str, Change, str]] = [
    ("another client", put("outcome", client=0), N + "its reply is of client 0, but 1 was asked"),
    ("no such client", put("outcome", client=10**6), N + "its reply is of client 1000000"),
    ("another run", put("outcome", run="f" * 16), N + "its reply is of run 'f+', but"),
    ("another round", put("outcome", round=77), N + "its reply is of round 77"),
    ("another exchange", put("outcome", exchange=3), N + "its reply is of exchange 3, but 0 was asked"),
]
FIELDS: list[tuple[str, Change, str]] = [
    ("nothing", lambda content: RecordDict(), N + "the reply lacks 'outcome'"),
    ("no outcome", drop("outcome"), N + "the reply lacks 'outcome'"),
    ("no flags", drop("flags"), N + "the reply lacks 'flags'"),
    ("no metrics", drop("metrics"), N + "the reply lacks 'metrics'"),
    ("no update", drop("outcome.update"), N + "a reply of kind ok lacks an update"),
    ("no values", drop("outcome.update.values"), N + "the update has no values"),
    ("no kind", drop("outcome", "kind"), N + "outcome lacks 'kind'"),
    ("no weight", drop("outcome", "weight"), N + "outcome lacks 'weight'"),
    ("unknown kind", put("outcome", kind="splendid"), N + "outcome.kind='splendid': must be one of"),
    ("dropped", put("outcome", kind="dropped"), N + "outcome.kind='dropped'"),
    ("refused, but sent", put("outcome", kind="refused"), N + "a reply of kind refused holds an update"),
    ("unknown field", put("outcome", fatal="stop"), N + "outcome holds 'fatal', which is not known"),
    ("bytes of its own", put("outcome", bytes_up=10**12), N + "outcome holds 'bytes_up'"),
    ("unknown record", extra("evil", ConfigRecord({"a": 1})), N + "the reply holds 'evil'"),
    ("unknown flag", put("flags", root=True), N + "flags holds 'root'"),
    ("number for a flag", put("flags", stateful=1), N + "flags: 'stateful' is int, expected bool"),
    ("record of another type", extra("flags", MetricRecord({})), N + "the reply: 'flags' is MetricRecord"),
    ("text for a number", put("outcome", samples="9"), N + "outcome: 'samples' is str, expected int"),
    ("number for text", put("outcome", kind=1), N + "outcome: 'kind' is int, expected str"),
    ("list for a number", put("outcome", seconds=[1.0]), N + "outcome: 'seconds' is list"),
    ("negative samples", put("outcome", samples=-1), N + "outcome.samples=-1: must lie between"),
    ("samples beyond count", put("outcome", samples=2**60), N + "outcome.samples="),
    (
        "samples beyond its own",
        put("outcome", samples=10**7),
        N + r"outcome.samples=1e\+07: it has \d+ samples at most",
    ),
    ("gradients beyond", put("outcome", gradients=1e12), N + r"outcome.gradients=1e\+12: it has"),
    ("seconds NaN", put("outcome", seconds=float("nan")), N + "outcome.seconds=nan"),
    ("lacks nothing", put("flags", lacks=True), N + "it says that it lacks"),
    ("the end", put("flags", lost=True), N + "it says that its state is lost and the run must end"),
    ("began again", put("flags", restarted=True), N + "it says that it began again"),
]
WEIGHTS: list[tuple[str, Change, str]] = [
    ("negative", lambda c: (put("outcome", weight=-1.0)(c), values(weight=-1.0)(c))[0], N + "its weight is -1;"),
    ("huge", lambda c: (put("outcome", weight=1e9)(c), values(weight=1e9)(c))[0], N + r"its weight is 1e\+09; exp"),
    ("zero", lambda c: (put("outcome", weight=0.0)(c), values(weight=0.0)(c))[0], N + "its weight is 0"),
    ("tiny", lambda c: (put("outcome", weight=1e-300)(c), values(weight=1e-300)(c))[0], N + "its weight is 1e-3"),
    ("NaN", lambda c: (put("outcome", weight=float("nan"))(c), values(weight=float("nan"))(c))[0], "the weight .nan"),
    ("inf", lambda c: (put("outcome", weight=float("inf"))(c), values(weight=float("inf"))(c))[0], "the weight .inf"),
    ("two weights", put("outcome", weight=2.0), N + "the update's weight is"),
    ("text", put("outcome", weight="9"), N + "outcome: 'weight' is str, expected float"),
    ("another value", values(loss=1.0), N + "the update holds the value 'loss', which was not asked for"),
    ("empty text", values(weight=""), N + "value 'weight'"),
    ("metric of another name", put("metrics", round=3.0), N + "metric 'round' is not known"),
    ("metric as a list", put("metrics", train_loss=[1.0, 2.0]), N + "metric 'train_loss': list, expected one float"),
    ("metric of another type", put("metrics", steps=3), N + "metric 'steps': int, expected one float"),
    ("metric without a name", put("metrics", **{"": 1.0}), N + "metric '': is no name"),
    ("metric of a control name", put("metrics", **{"a\nb": 1.0}), N + "metric 'a b': is no name"),
    ("metrics as text", extra("metrics", ConfigRecord({"train_loss": "low"})), N + "the reply: 'metrics' is Config"),
    ("a thousand metrics", put("metrics", **{f"m{k}": 0.0 for k in range(1001)}), N + "the reply holds 100. metrics"),
]  # fmt: skip
ARRAYS: list[tuple[str, Change, str]] = [
    ("NaN", delta(lambda d: with_one(d, np.nan)), "non-finite values in delta"),
    ("inf", delta(lambda d: with_one(d, -np.inf)), "non-finite values in delta"),
    ("overflowing", delta(lambda d: np.full(650, 3e38, np.float32)), N + r"'delta' holds numbers above 1e\+16"),
    ("one number", delta(lambda d: np.ones(1, np.float32), "=delta"), SHAPE),
    ("a scalar", delta(lambda d: np.ones((), np.float32), "=delta"), SHAPE),
    ("a column", delta(lambda d: np.ones((656, 1), np.float32), "=delta"), SHAPE),
    ("a stack", delta(lambda d: np.stack([d, d])), SHAPE),
    ("nothing", delta(lambda d: np.ones(0, np.float32), "=delta"), SHAPE),
    ("another model", delta(lambda d: d[:-1]), N + r"array 'delta': \(649,\) is no packed vector of kind 'w'"),
    ("padding", delta(spoilt, "=delta"), N + "'delta' holds numbers where the layout has padding"),
    ("float64", delta(lambda d: d.astype(np.float64)), SHAPE),
    ("int64", delta(lambda d: d.astype(np.int64)), SHAPE),
    ("big-endian", delta(lambda d: d.astype(">f4")), N + "array 'delta': >f4 is not accepted"),
    ("text", delta(lambda d: np.array(["a"] * 650)), N + "array 'delta': <U1 is not accepted"),
    ("by columns", delta(lambda d: np.ones((26, 25), np.float32, order="F")), N + ".*by columns is not accepted"),
    ("another name", delta(lambda d: d, "wgamma"), N + "the update holds 'gamma', expected delta"),
    ("no name", delta(lambda d: d, "w"), N + "array 'w': no name"),
    ("unknown packing", delta(lambda d: d, "zdelta"), N + "array 'delta': .* is no packed vector of kind 'z'"),
    ("twice", twice, N + "array '=delta': no name, or twice the same"),
    ("none", lambda c: c["outcome.update"].clear(), N + "the update lacks 'delta'"),
    ("objects", delta(lambda d: raw(npy(OBJECTS, allow_pickle=True), (3,), "object")), N + ".*object is not"),
    ("a pickle", delta(lambda d: raw(pickle.dumps(Mine()))), N + "array 'delta': its bytes are no array"),
    ("garbage", delta(lambda d: raw(b"garbage" * 400)), N + "array 'delta': its bytes are no array"),
    ("no bytes", delta(lambda d: raw(b"")), N + "array 'delta': its bytes are no array"),
    ("half a header", delta(lambda d: raw(npy(d)[:40])), N + "array 'delta': its bytes are no array"),
    ("truncated", delta(lambda d: raw(npy(d)[:-4])), N + r".*\(650,\) of float32 are 2600 bytes, but 2596 arrived"),
    ("more", delta(lambda d: raw(npy(d) + b"more")), N + ".*2600 bytes, but 2604 arrived"),
    ("a header of 100 kB", delta(lambda d: oversized()), N + "array 'delta': its bytes are no array"),
    ("a terabyte, it says", delta(lambda d: stating((2**20, 2**20))), N + ".*4398046511104 bytes, but 64 arrived"),
    ("one piece for ever", delta(lambda d: repeated()), N + ".*are 2600 bytes, but 27279872 arrived"),
    ("negative sizes", delta(lambda d: stating((-1,))), N + r"array 'delta': \(-1,\) is no shape"),
    ("another record", delta(lambda d: raw(npy(d), (65, 10))), N + ".*its record says 'float32'"),
    ("another serialisation", delta(lambda d: raw(npy(d), stype="pickle")), N + ".*: serialised as 'pickle'"),
    ("record of text", extra("outcome.update", ConfigRecord({"wdelta": "0"})), N + "the reply: 'outcome.update' is"),
    ("a second record", extra("outcome.more", ArrayRecord({"wdelta": Array(np.ones(3))})), N + "the reply holds"),
]  # fmt: skip
