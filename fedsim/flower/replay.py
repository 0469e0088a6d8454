"""A deployment computed again as a simulation: on its recorded cohorts, without the clients that did not answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim.engine.assignments import Chunk, ChunkResult, Plan
from fedsim.engine.base import SerialEngine
from fedsim.engine.worker import Worker
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Outcome
from fedsim.tracking import read_rows

Place = tuple[int, int, int]  # round from 0, exchange in the round, client


@dataclass
class DeploymentRecord:
    """What happened in a deployment that its configuration does not say."""

    cohorts: list[list[int]]
    absent: dict[Place, str] = field(default_factory=dict)  # no update came: why
    restarted: set[Place] = field(default_factory=set)  # the node had lost the client's state

    @staticmethod
    def of(folder: Path) -> DeploymentRecord | None:
        """Read the record of a deployment; None if ``folder`` holds a simulation.

        Raises:
            ConfigError: if nodes brought their own data, which are not here, or the record is damaged.
        """
        if not (folder / "deployment.json").exists():
            return None
        try:
            return DeploymentRecord._read(folder)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{folder}: the record of this deployment is damaged ({error!r})") from error

    @staticmethod
    def _read(folder: Path) -> DeploymentRecord:
        if json.loads((folder / "deployment.json").read_text())["own_data"]:
            raise ConfigError(
                f"{folder}: the nodes of this deployment brought their own data; to compute it again, hand them over: "
                "fedsim.simulate(..., clients=[...], cohorts=[...])"
            )
        out = DeploymentRecord([row["cohort"] for row in read_rows(folder / "metrics.jsonl")])
        for row in read_rows(folder / "nodes.jsonl"):
            out._take(row)
        return out

    def _take(self, row: dict[str, Any]) -> None:
        kind, index = row["event"], row.get("round", 0) - 1
        if kind in ("run", "exchange") and row.get("exchange", 0) == 0:  # a round begun again replaces itself
            self.absent = {k: v for k, v in self.absent.items() if k[0] < index}
            self.restarted = {k for k in self.restarted if k[0] < index}
        elif kind == "absent":
            self.absent[index, row["exchange"], row["client"]] = row["reason"]
        elif kind == "restarted":
            self.restarted.add((index, row["exchange"], row["client"]))


class ReplayEngine(SerialEngine):
    """The serial engine, with what happened in the deployment put in."""

    def __init__(self, record: DeploymentRecord, worker: Callable[[Plan], Worker] = Worker) -> None:
        super().__init__(worker)
        self._record = record
        self._round, self._exchange = -1, -1

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """As in a serial engine; absent clients are not run."""
        if method != "run":
            yield from super().map(method, shared, items, costs)
            return
        self._exchange = self._exchange + 1 if shared.round == self._round else 0
        self._round = shared.round
        where = self._round, self._exchange
        results = super().map(method, shared, [self._present(chunk, where) for chunk in items], costs)
        for chunk, result in zip(items, results, strict=True):
            yield self._with_absent(chunk, result, where)

    def _present(self, chunk: Chunk, where: tuple[int, int]) -> Chunk:
        here = [c for c in chunk.clients if (*where, c) not in self._record.absent]
        kept = {c: s for c, s in chunk.states.items() if (*where, c) not in self._record.restarted}
        return replace(chunk, clients=here, states=kept)

    def _with_absent(self, chunk: Chunk, result: ChunkResult, where: tuple[int, int]) -> ChunkResult:
        came, absent = {o.client: o for o in result.outcomes}, self._record.absent
        outcomes = [came.get(c) or Outcome(c, "dropped", reason=absent[(*where, c)]) for c in chunk.clients]
        return replace(result, outcomes=outcomes)
