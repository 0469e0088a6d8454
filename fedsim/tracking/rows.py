"""Rows as JSON text and as flat numbers: what every tracker needs before it writes a round down."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, overload

from fedsim.errors import DataError

OPEN_WORLD = ("all", "seen", "AU", "LU", "GU", "NMI")  # columns where some classes have no labels

_NUMBERS = {int, float}
_TIDY = {"round", "client", "metric", "value"}
_PACKED = {"round", "client", "values"}
_quoted = cache(json.dumps)
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(row: Any) -> str:
    """One line of valid JSON, of a row or of one of its values.

    NaN and infinities become the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``: ``null`` would not
    tell a diverged loss from an infinite one, and ``float()`` reads all three. Numpy and torch scalars
    become numbers, arrays nested lists; anything else unknown becomes ``str(value)`` rather than costing
    the whole row.
    """
    try:
        return json.dumps(row, allow_nan=False, default=_plain)
    except (ValueError, TypeError):  # a non-finite number, or a key that is no string
        return json.dumps(_finite(row), allow_nan=False)


class ClientRows(Sequence[Mapping[str, Any]]):
    """Tidy rows (round, client, metric, value) of ``values``: pairs of a client and its numbers by metric.

    There are hundreds a round, and most runs only write them down: rows are built for those who look at them, ``text``
    does without.
    """

    def __init__(
        self,
        round: int,
        values: Sequence[tuple[int, Mapping[str, float]]],
        hashes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._round, self._values = round, values
        self.hashes = hashes  # rows of hashes.jsonl

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"round": self._round, "client": client, "metric": metric, "value": value}
            for client, values in self._values
            for metric, value in values.items()
        ]

    def __len__(self) -> int:
        return sum(len(values) for _, values in self._values)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._rows[at]

    def text(self) -> str:
        """A line of JSON for each client and exchange, what ``packed`` makes of the rows."""
        out: list[str] = []
        for client, values in self._values:
            numbers = values.values()
            plain = _NUMBERS.issuperset(map(type, numbers)) and math.isfinite(sum(numbers))
            written = zip(map(_quoted, values), map(repr if plain else to_json, numbers), strict=True)
            inner = ", ".join([f"{k}: {v}" for k, v in written])
            if inner:
                out.append(f'{{"round": {self._round}, "client": {client}, "values": {{{inner}}}}}\n')
        return "".join(out)


def packed(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of JSON of ``rows``, of clients' tidy rows one for each client: ``{"round", "client", "values"}``, values
    by metric. A metric that comes again begins another line: it belongs to another exchange."""
    line: dict[str, Any] = {}
    for row in rows:
        is_tidy = row.keys() == _TIDY
        same = is_tidy and line and (line["round"], line["client"]) == (row["round"], row["client"])
        if not same or row["metric"] in line["values"]:
            if line:
                yield to_json(line)
            line = {"round": row["round"], "client": row["client"], "values": {}} if is_tidy else {}
        if is_tidy:
            line["values"][row["metric"]] = row["value"]
        else:
            yield to_json(row)
    if line:
        yield to_json(line)


def tidy(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows (round, client, metric, value) of a line for one client; any other row as it is."""
    if row.keys() != _PACKED:
        return (row,)
    head = {"round": row["round"], "client": row["client"]}
    return ({**head, "metric": metric, "value": value} for metric, value in row["values"].items())


def from_json(line: str | bytes) -> dict[str, Any]:
    """The inverse of :func:`to_json`; raises ``ValueError`` if the line is not one whole JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    text = line if isinstance(line, str) else line.decode()
    return {k: _restore(v) for k, v in row.items()} if any(s in text for s in _NONFINITE) else row


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``.jsonl`` file, in file order; of ``clients.jsonl`` a row for each client and metric.

    A cut-off last line (the process was killed while writing) is left out. Raises ``DataError`` naming the
    line if an earlier one is unreadable, and ``FileNotFoundError`` if there is no such file.
    """
    return list(stream_rows(path))


def lasting(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a round's row is held in memory: all but the ids of its cohort, which are in ``metrics.jsonl``."""
    return {k: v for k, v in row.items() if k != "cohort"}


def rows_of(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The rows of the ``rounds`` finished rounds of the run in ``folder``, and those after them.

    Raises:
        DataError: naming the file, if it is missing or lacks rounds.
    """
    path, remedy = folder / "metrics.jsonl", "give resume=never to run it afresh"
    try:
        rows = read_rows(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); {remedy}") from error
    last = max((int(row.get("round", 0)) for row in rows), default=0)
    if last < rounds:
        raise DataError(f"{path} is damaged: it ends with round {last}, but {rounds} were finished; {remedy}")
    return rows


def stream_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of :func:`read_rows`, one at a time: files of clients' rows can be large."""
    unreadable: tuple[int, ValueError] | None = None
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if unreadable is not None:
                at, error = unreadable
                raise DataError(
                    f"{path}, line {at}: not a JSON object ({error}); remove that line to read the rest"
                ) from error
            try:
                row = from_json(line)
            except ValueError as error:
                unreadable = number, error
            else:
                yield from tidy(row)


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row under flat names: nested mappings joined by ``/``, texts and lists left out.

    ``cohort`` becomes ``cohort_size``; ``failures`` their count, and ``failures/<kind>`` a count per kind.
    """
    flat: dict[str, float] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        value = _plain(value) if hasattr(value, "tolist") else value
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{name}/")
        elif isinstance(value, (int, float)):
            flat[name] = float(value) if isinstance(value, float) else int(value)
        elif name == "cohort" and isinstance(value, (list, tuple)):
            flat["cohort_size"] = len(value)
        elif name == "failures" and isinstance(value, (list, tuple)):
            flat |= _failure_counts(value)
    return flat


def _failure_counts(failures: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    kinds = Counter(str(failure.get("kind", "unknown")) for failure in failures)
    return {"failures": kinds.total(), **{f"failures/{kind}": n for kind, n in sorted(kinds.items())}}


def _plain(value: Any) -> Any:
    """Numpy and torch values as Python numbers or lists (both offer ``tolist``); anything else as text."""
    if hasattr(value, "tolist"):
        return value.detach().tolist() if hasattr(value, "detach") else value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    return str(value)


def _finite(value: Any) -> Any:
    """``value`` built of JSON types only, with non-finite numbers spelled out."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return _finite(_plain(value))


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, list):
        return [_restore(item) for item in value]
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    return value
