"""Where two runs part: settings, data, cohorts, weights; then the first message or update that differs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedsim.data.shards import Shards
from fedsim.errors import ConfigError, DataError
from fedsim.replay.again import Stop, computed, weights_hashes
from fedsim.report.runs import Run, flatten, load_runs
from fedsim.run.machine import difference, machine
from fedsim.run.provenance import entries, entry_of

SAME, PARTED, INCOMPARABLE = 0, 1, 2
MACHINE = ("fedsim", "versions", "cpu", "threads", "gpu")  # of an entry of provenance.json


def diff(
    a: str | Path,
    b: str | Path,
    *,
    metrics_only: bool = False,
    handed: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What is known of where the runs in two folders part, as ``fedsim diff --json`` prints it.

    ``code`` is 0 where the weights agree in all common rounds, 1 where they do not, 2 where the runs cannot be compared
    or not be computed again, with the reason as ``error``. ``metrics_only`` computes nothing. ``handed``: what was
    handed over in Python to either run, without which such a run cannot be computed again.
    """
    one, other = (_read(Path(place)) for place in (a, b))
    found: dict[str, Any] = {"a": str(a), "b": str(b), **recorded(one, other)}
    if found["layout"]:
        return found | {"code": INCOMPARABLE, "error": "the models have different parameters"}
    weights = found["weights"]
    if not weights["rounds"]:
        return found | {"code": INCOMPARABLE, "error": "the runs have no finished round in common"}
    if weights["first"] is None:
        return found | {"code": SAME}
    if metrics_only:
        return found | {"code": PARTED}
    try:
        return found | {"code": PARTED} | inside(one.dir, other.dir, weights["first"], handed or ({}, {}))
    except ConfigError as error:
        return found | {"code": INCOMPARABLE, "error": str(error)}


def _read(folder: Path) -> Run:
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: no run folder: it has no metrics.jsonl")
    return load_runs([folder])[0]


def recorded(one: Run, other: Run) -> dict[str, Any]:
    """What two run folders say of each other, without anything being computed."""
    last = [(entries(run.dir) or [{}])[-1] for run in (one, other)]
    hashes = [entry.get("data_hash") for entry in last]
    weights = [weights_hashes(run.dir) for run in (one, other)]
    common = sorted(weights[0].keys() & weights[1].keys())
    whole = [max(w, default=0) for w in weights]
    cohorts = [{int(r["round"]): r.get("cohort") for r in run.rows} for run in (one, other)]
    parted = next((t for t in common if weights[0][t] != weights[1][t]), None)
    shorter = None if parted or whole[0] == whole[1] else "A" if whole[0] < whole[1] else "B"
    settings = [dict(run.settings) | {"seed": run.seed} for run in (one, other)]
    return {
        "settings": _pairs(*settings),
        "versions": _pairs(*(dict(flatten({k: entry.get(k) for k in MACHINE})) for entry in last)),
        "data": None if None in hashes else hashes[0] == hashes[1],
        "partition": _partition(one, other),
        "layout": _layout(one, other),
        "cohorts": {"first": next((t for t in common if cohorts[0][t] != cohorts[1][t]), None)},
        "weights": {"rounds": len(common), "first": parted, "prefix": shorter},
    }


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Both values of every key in which they differ."""
    keys = dict.fromkeys((*one, *other))
    return {k: [one.get(k), other.get(k)] for k in keys if one.get(k) != other.get(k)}


def _partition(one: Run, other: Run) -> dict[str, Any]:
    """Whether all clients hold the same rows, and the first that does not; ``same`` is ``None`` where nothing says."""
    try:
        a, b = (Shards.load(run.dir / "partition.npz") for run in (one, other))
    except DataError:
        hashes = [run.summary.get("partition_hash") for run in (one, other)]
        return {"same": None if None in hashes else hashes[0] == hashes[1], "client": None}
    if a.hash() == b.hash():
        return {"same": True, "client": None}
    both = range(min(len(a), len(b)))
    unlike = (c for c in both if a.part(c).tolist() != b.part(c).tolist())
    return {"same": False, "client": next(unlike, len(both))}


def _layout(one: Run, other: Run) -> dict[str, list[Any]]:
    """Parameters that only one model has, or in another shape; nothing where a run has no weights yet."""
    shapes = []
    for run in (one, other):
        try:
            with safe_open(run.dir / "weights.safetensors", "pt") as file:
                shapes.append({k: file.get_slice(k).get_shape() for k in file.keys()})  # noqa: SIM118 - no dict
        except (OSError, SafetensorError):
            return {}
    return _pairs(*shapes)


def inside(
    a: Path, b: Path, round: int, handed: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> dict[str, Any]:
    """``start`` (whether both began with the same model) and ``inside``: what first differs within ``round``.

    Raises:
        ConfigError: if one of them cannot be computed again, or not with the bits that were recorded.
    """
    from fedsim.replay.recorder import Recorder, first_difference

    with tempfile.TemporaryDirectory(prefix="fedsim-diff-") as place:
        heard, failed = [], list[set[tuple[int, str]]]()
        for name, run, more in zip("AB", (a, b), handed, strict=True):
            stop, folder = Stop(round), Path(place) / name
            folder.mkdir()
            recorder = Recorder(stop, folder)
            with computed(run, stop, recorder.worker, more or None) as result:
                _check(name, run, {r["round"]: r["weights_hash"] for r in result.rows}, round)
                failed.append({(f["client"], f["kind"]) for f in result.rows[-1]["failures"]})
            heard.append(recorder)
        found = _unless_lost(first_difference(*heard), *failed)
    same_start = heard[0].start == heard[1].start
    return {"start": same_start, "inside": {"round": round, **(found or {"kind": "server"})}}


def _unless_lost(
    found: dict[str, Any] | None, one: set[tuple[int, str]], other: set[tuple[int, str]]
) -> dict[str, Any] | None:
    """``found``, or where it is nothing, or that a client was asked in one run alone: the first client whose answer
    was lost or refused in one run, of those that each run names with a kind."""
    lost = sorted(one ^ other)
    if not lost or (
        found is not None and ("only_in" not in found or found["client"] not in {c for c, _ in lost})
    ):
        return found
    client, why = lost[0]
    return {"kind": "failure", "client": client, "failure": why, "only_in": "A" if lost[0] in one else "B"}


def _check(name: str, run: Path, now: Mapping[int, str], until: int) -> None:
    """Refuse to look into a round that came out otherwise than it is recorded."""
    then = weights_hashes(run)
    if all(now.get(t) == then[t] for t in then if t <= until):
        return
    entry = entry_of(run, until)
    threads = int((entry or {}).get("threads") or 1)
    why = None if entry is None else difference(entry, machine(threads, "cpu"))
    said = why or "on a machine like this one; is its code or data what it was?"
    raise ConfigError(f"{name} ({run}) cannot be reproduced here ({said})")


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of ``fedsim diff``."""
    for title in ("settings", "versions"):
        pairs = [f"{k} {_short(x)} against {_short(y)}" for k, (x, y) in found[title].items()]
        if pairs:
            yield f"{title:<10} {'; '.join(pairs)}"
    weights, first = found["weights"], found["weights"]["first"]
    same, different = _alike(found)
    if first:
        same[-1:] = [*same[-1:], f"weights up to round {first - 1}"]
    if different:
        yield f"{'different':<10} {'; '.join(different)}"
    if same:
        yield f"{'same':<10} {', '.join(same)}"
    for name, (x, y) in found["layout"].items():
        yield f"{'layout':<10} {name}: {_short(x)} against {_short(y)}"
    if first is None and weights["rounds"]:
        prefix = {"A": ": A is a prefix of B", "B": ": B is a prefix of A"}.get(weights["prefix"], "")
        yield f"{'weights':<10} the same in all {weights['rounds']} common rounds{prefix}"
    elif first:
        yield f"round {first:<4} {_difference(found.get('inside'))}"


def _alike(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is known to be the same, and what to differ, of what a run begins with."""
    client, cohort = found["partition"]["client"], found["cohorts"]["first"]
    partition = "partition" + (f", first at client {client}" if client is not None else "")
    facts = [
        ("data", "data", found["data"]),
        ("partition", partition, found["partition"]["same"]),
        ("start", "start", found.get("start")),
        ("cohorts", f"cohorts, first in round {cohort}", cohort is None),
    ]
    return [s for s, _, ok in facts if ok], [d for _, d, ok in facts if ok is False]


def _difference(inside: Mapping[str, Any] | None) -> str:
    if inside is None:
        return "the weights after it differ"
    if inside["kind"] == "server":
        return "all messages and updates are the same: the server's step, or a sum, differs"
    if inside["kind"] == "failure":
        return f"client {inside['client']} {inside['failure']}: only in {inside['only_in']}"
    what = {"message": "message to", "update": "update of", "sent": "what is sent of the update of"}[
        inside["kind"]
    ]
    exchange = f", exchange {inside['exchange'] + 1} ({inside['task']})" if inside["exchange"] else ""
    head = f"first difference: {what} client {inside['client']}{exchange}, {inside['vector']}"
    if "only_in" in inside:
        return f"{head}: only in {inside['only_in']}"
    if "shapes" in inside:
        return f"{head}: {' against '.join(inside['shapes'])}"
    if "entries" not in inside:
        return head
    tensor = f", {inside['tensor']}" if inside["tensor"] else ""
    differ, total = inside["entries"]
    most = f", at most {inside['largest']:.2g}" if "largest" in inside else ""
    ulps = f" ({inside['ulps']} ulp)" if "ulps" in inside and "nonfinite" not in inside else ""
    most += f", {inside['nonfinite']} not finite" if "nonfinite" in inside else ""
    return f"{head}{tensor}: {differ} of {total} entries{most}{ulps}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
