"""TensorBoard event files in the run folder (extra ``tensorboard``)."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.tracking.base import Row, RunInfo, Tracker
from fedsim.tracking.rows import scalars

log = logging.getLogger(__name__)


class TensorboardTracker(Tracker):
    """Scalars against the round, and a histogram over clients for each of their metrics.

    Without the package one line says so and nothing is written. After a resume (or a fresh run in an old
    folder) TensorBoard hides the rounds that are run again.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        """Open a writer in ``<run folder>/tensorboard`` and store the configuration as text."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            log.warning(
                "tracker.tensorboard=true is ignored (%s): pip install 'fedsim-lab[tensorboard]'", error
            )
            return
        folder = str(run.dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=run.start_round + 1, flush_secs=10)
        config = json.dumps(run.config, indent=2, default=str)
        self._writer.add_text("config", f"```json\n{config}\n```", run.start_round)

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Write the round's numbers at step ``row["round"]``."""
        if self._writer is None:
            return
        numbers = scalars(row)
        step = int(numbers.pop("round"))
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        values: dict[str, list[float]] = defaultdict(list)
        for entry in clients:
            value = float(entry["value"])
            if math.isfinite(value):  # a histogram has no place for the others
                values[str(entry["metric"])].append(value)
        for metric, over_clients in values.items():
            self._writer.add_histogram(f"clients/{metric}", np.asarray(over_clients), step)

    def end(self, summary: Row) -> None:
        """Close the writer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
