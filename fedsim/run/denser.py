"""More evaluations of a finished run, without training again: from the checkpoints that it kept.

A run that is asked for with another ``evaluation.every`` or ``clients_every`` is another run. If one that differs in
nothing else is finished, has measured no other rounds and has kept the checkpoints of all that are to be measured, its
rows are taken over, and the rest is measured. Rows equal those of a run from the start, but for the seconds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.config.compose import load
from fedsim.errors import ConfigError, LockedError
from fedsim.rng import key as key_of
from fedsim.rng import seed_global
from fedsim.run.holdings import alone, is_run
from fedsim.run.key import finished_in, marked, run_key
from fedsim.run.provenance import PROVENANCE
from fedsim.server import checkpoint, weightsfile
from fedsim.server.loop import Loop
from fedsim.server.measuring import measured
from fedsim.server.round import Round
from fedsim.tracking import Row, read_rows
from fedsim.tracking.jsonl import replaced
from fedsim.tracking.rows import ClientRows, packed, stream_rows, to_json

log = logging.getLogger(__name__)

PLAN = ("every", "clients_every")
MARKER = "measured_from.json"  # in a folder whose rows are yet to be completed


def take_over(folder: Path, config: DictConfig, mark: str) -> None:
    """Begin the run folder with what a finished run left that differs only in how often it was measured, if there is
    one beside it with the checkpoints that are needed. Call with the folder locked."""
    if config.dir or config.resume != "auto" or config.evaluation.stop_at_target:
        return
    if checkpoint.latest(folder / "checkpoint") is not None or not folder.parent.is_dir():
        return
    named = folder.name.rpartition("-")[0] + "-"  # method and seed, which are the same
    for other in sorted(path for path in folder.parent.iterdir() if path.name.startswith(named)):
        if other == folder or len(checkpoint.there(other / "checkpoint")) < 2 or not is_run(other):
            continue
        try:
            with alone(other):
                if (plan := _plan_of(other, config, mark)) is not None:
                    _copy(other, folder, plan, marked(run_key(config), mark))
                    log.info("%s: measured from the checkpoints of %s, not computed again", folder, other)
                    return
        except LockedError:
            continue


def _plan_of(other: Path, config: DictConfig, mark: str) -> dict[str, int] | None:
    """What a finished run measured, if it is this run but for that and has all checkpoints that are needed."""
    try:
        recorded = load(other / "config.yaml")
    except ConfigError:
        return None
    plan = {name: int(recorded.evaluation[name]) for name in PLAN}
    was = marked(run_key(recorded), mark)
    for name in PLAN:
        recorded.evaluation[name] = config.evaluation[name]
    if run_key(recorded) != run_key(config) or (found := finished_in(other, recorded)) is None:
        return None
    plan["rounds"] = found.rounds
    kept = {
        checkpoint.rounds_of(p) for p in checkpoint.there(other / "checkpoint") if checkpoint.key_of(p) == was
    }
    wanted = {name: int(config.evaluation[name]) for name in PLAN} | {"rounds": int(config.rounds)}
    if found.rounds > config.rounds or "stopped" in found.summary or found.rounds not in kept:
        return None
    if any(_parts(plan, n) - _parts(wanted, n) for n in range(1, found.rounds)):
        return None  # what was not asked for would count in means of the last evaluations
    if lacking := [
        n for n in range(1, found.rounds + 1) if _parts(wanted, n) - _parts(plan, n) and n not in kept
    ]:
        log.info("%s has no checkpoint of round %d: it cannot be measured there", other, lacking[0])
        return None
    return plan


def _parts(plan: dict[str, int], number: int) -> set[str]:
    """What a plan measures after a round: the common samples, those of clients."""
    last, clients = number == plan["rounds"], plan["clients_every"]
    common = last or number % plan["every"] == 0
    own = bool(clients) and (last or number % clients == 0)
    return {name for name, on in (("common", common), ("clients", own)) if on}


def _copy(other: Path, folder: Path, plan: dict[str, int], key: str) -> None:
    """Rows, and checkpoints under the new key; what is never written again is linked."""
    for name in ("metrics.jsonl", "clients.jsonl", weightsfile.BEST, PROVENANCE):
        if (other / name).is_file():
            shutil.copy2(other / name, folder / name)
    scratch = folder / ".checkpoint.part"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(other / "checkpoint", scratch, copy_function=_linked)
    for path in checkpoint.there(scratch):
        checkpoint.change_key(path, key)
    (folder / MARKER).write_text(json.dumps(plan))
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    scratch.rename(folder / "checkpoint")


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def complete_rows(loop: Loop) -> None:
    """Measure what the rows of a folder that was taken over lack. The loop is to be restored afterwards."""
    folder = loop.folder
    if not (folder / MARKER).exists():
        return
    plan = json.loads((folder / MARKER).read_text())
    wanted = {name: int(getattr(loop.evaluation, name)) for name in PLAN} | {"rounds": loop.rounds}
    rows: dict[int, Row] = {int(row["round"]): row for row in read_rows(folder / "metrics.jsonl")}
    more: dict[int, ClientRows] = {}
    for path in checkpoint.there(folder / "checkpoint"):
        number = checkpoint.rounds_of(path)
        if number in rows and _parts(wanted, number) - _parts(plan, number):
            loop.restore(path)
            rows[number], more[number] = _measured(loop, rows[number])
    _best(loop, [rows[number] for number in sorted(rows)], set(more))
    replaced(folder / "clients.jsonl", _clients(folder / "clients.jsonl", more))
    replaced(folder / "metrics.jsonl", (to_json(rows[number]) for number in sorted(rows)))
    (folder / MARKER).unlink()


def _measured(loop: Loop, row: Row) -> tuple[Row, ClientRows]:
    """The row of the round that the loop stands after, with what is measured there; and its clients' rows."""
    run, index = loop.server, loop.done - 1
    cohort = () if loop.strategy.traits.asynchronous else tuple(row["cohort"])
    server = run.begin(Round(index, cohort, run.num_clients, run.seed, run.local))
    seed_global(key_of(run.seed, "server/round", index))
    last = loop.done == loop.rounds
    found = measured(
        server, loop.strategy, loop.state, loop.evaluation, last, lambda: loop.models()["global"]
    )
    own = server.record.row(loop.done, found, cohort, row["weights_hash"], 0.0)
    merged = {
        "round": loop.done,
        **found,
        **{k: v for k, v in row.items() if k != "round" and k not in found},
    }
    merged["failures"] = [*row["failures"], *own["failures"]]
    if "nan" in own:
        merged["nan"] = row.get("nan", {}) | own["nan"]
    return merged, server.record.client_rows(loop.done)


def _clients(path: Path, more: dict[int, ClientRows]) -> Iterator[str]:
    """Lines of clients.jsonl, what was measured after what the round had; measured twice, it stands once."""
    if not path.exists():
        return
    for number, rows in groupby(stream_rows(path), key=lambda row: int(row["round"])):
        new = more.get(number, ())
        again = {(row["client"], row["metric"]) for row in new}
        yield from packed(chain((r for r in rows if (r["client"], r["metric"]) not in again), new))


def _best(loop: Loop, rows: list[Any], at: set[int]) -> None:
    """The weights of the best validated round, where that is one of those measured now."""
    best = [row["round"] for i, row in enumerate(rows, start=1) if weightsfile.is_best(rows[:i])]
    if not best or best[-1] not in at:
        return
    loop.restore(loop.folder / "checkpoint" / f"round-{best[-1]:06d}")
    about = {"round": str(best[-1])}
    weightsfile.save(
        loop.folder / weightsfile.BEST, loop.server.task, loop.server.dtype, loop.models()["global"], about
    )
