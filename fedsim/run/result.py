"""What a run leaves behind, for whoever goes on with it in Python."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedsim.config.compose import load, plain
from fedsim.errors import ConfigError, DataError
from fedsim.rng import undisturbed
from fedsim.run import initial, modelcard, samples
from fedsim.run.given import Given
from fedsim.run.key import finished_in
from fedsim.run.modelcard import Card
from fedsim.run.personal import Source, personal
from fedsim.run.resolve import code_of
from fedsim.server.weightsfile import BEST, LAST, read
from fedsim.tracking import read_rows
from fedsim.tracking.information import copied
from fedsim.tracking.rows import lasting, rows_of, stream_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

AT = ("last", "best_val")
SHOWN = ("accuracy", "loss", "clients/accuracy", "clients/loss", "sim_seconds")  # in a cell, of the summary


@dataclass(repr=False)
class RunResult:
    """What a run leaves behind; everything but ``weights`` is read from its folder ``dir``."""

    dir: Path
    weights: dict[str, Tensor]  # state dict of the final global model
    summary: dict[str, Any]
    held: list[dict[str, Any]] = field(repr=False)  # the rows of metrics.jsonl, without cohorts
    label: str = "run"
    source: Source | None = None  # what the run was made of
    card: Card | None = field(default=None)  # model.json

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one a round. The ids of each ``cohort`` are not held in memory but read from there
        when they are asked for, and left out where the file is gone."""
        path = self.dir / "metrics.jsonl"
        try:
            cohorts = {row["round"]: row["cohort"] for row in stream_rows(path) if "cohort" in row}
        except (OSError, DataError):
            cohorts = {}
        return [
            {**copied(row), **({"cohort": cohorts[row["round"]]} if row.get("round") in cohorts else {})}
            for row in self.held
        ]

    @property
    def history(self) -> pd.DataFrame:
        """One row a round."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def per_client(self) -> pd.DataFrame:
        """Tidy table: round, client, metric, value."""
        import pandas as pd

        return pd.DataFrame(
            read_rows(self.dir / "clients.jsonl"), columns=["round", "client", "metric", "value"]
        )

    def plot(self) -> Figure:
        """Accuracy and loss against rounds."""
        from fedsim.report import figure_of

        return figure_of({self.label: [self.held]})

    def model(self, client: int | None = None, *, at: str = "last", best: bool = False) -> nn.Module:
        """The trained model: the class that was handed over or configured, in evaluation mode, on the CPU, a copy.

        ``client``: the one that this client would be measured with, from what it kept and the global model. ``at``:
        ``last``, or ``best_val``, after the best round on validation data; ``best=True`` is the same.

        Raises:
            ConfigError: no such client, no personal models, no validation data, or another ``model`` than was trained.
        """
        if at not in AT:
            raise ConfigError(f"at={at!r}: choose one of {', '.join(AT)}")
        best = best or at == "best_val"
        source = self._made_of
        if client is not None:
            if best:
                raise ConfigError(
                    f"client={client}: what clients keep is there of the last round only; leave best_val out"
                )
            return personal(source, self.dir, client, int(self.summary["rounds"]))
        state = self.best_weights() if best else self.weights
        with undisturbed():
            return modelcard.filled(source.config, source.given, self.card, state, self.dir)

    def best_weights(self) -> dict[str, Tensor]:
        """State dict of the global model after the best round on validation data.

        Raises:
            ConfigError: if the run had none.
        """
        if not (self.dir / BEST).exists():
            raise ConfigError(
                f"{self.dir}: no weights of a best validation round; type evaluation.validation=0.1 (never chosen by "
                "test data)"
            )
        return read(self.dir / BEST)

    def export(self, to: str = "state_dict", *, out: str | Path | None = None, **options: Any) -> Path:
        """Write the model as a file; see :func:`fedsim.run.formats.export`. Returns its path."""
        from fedsim.run.formats import export

        return export(self, to, out=None if out is None else Path(out), **options)

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets no part of what was handed over: ``load_run`` takes it again."""
        return {**vars(self), "source": None}

    @property
    def _made_of(self) -> Source:
        if self.source is None:
            raise ConfigError(
                f"{self.dir}: this result comes from another process; fedsim.load_run({str(self.dir)!r}) has models"
            )
        return self.source

    def _facts(self) -> dict[str, str]:
        values = {k: self.summary[k] for k in SHOWN if self.summary.get(k) is not None}
        return {"rounds": str(self.summary.get("rounds", len(self.held)))} | {
            k: f"{v:.4g}" for k, v in values.items()
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{k}={v}" for k, v in self._facts().items())
        return f"RunResult({self.label}, {facts}, dir={str(self.dir)!r})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        facts = {"method": self.label, **self._facts(), "folder": str(self.dir)}
        lines = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
        return f"<table>{''.join(lines)}</table>"


def load_run(
    folder: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    **handed: Any,
) -> RunResult:
    """The result of a finished run, from its folder.

    ``model``, and what else was handed over in Python (arguments of ``fedsim.simulate``), is needed again where models
    are asked for: ``model`` for any, the rest for clients' own. It must be the same as then.

    Raises:
        ConfigError: if there is no finished run, or another one than what is handed over would give.
    """
    if not isinstance(folder, str | Path):
        raise ConfigError(f"load_run: got {type(folder).__name__}, expected the path of a run's folder")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: not a folder")
    if not (folder / "config.yaml").is_file():
        several = "; fedsim.load reads the runs in it" if any(folder.glob("*/config.yaml")) else ""
        raise ConfigError(f"{folder}: no run folder: it has no config.yaml{several}")
    config = load(folder / "config.yaml")
    found = finished_in(folder, config, stoppable=True)
    if found is None or not (folder / LAST).is_file():
        raise ConfigError(f"{folder}: this run is not finished; the same command goes on where it stopped")
    given = samples.admitted(config, initial.trainable(config, Given(model=model, **handed)))
    card = modelcard.read(folder)
    if edited := [k for k, code in (config.code or {}).items() if code_of(plain(config)).get(k) != code]:
        log.warning("%s: the code of %s was edited since", folder, ", ".join(edited))
    config.dir = str(folder)
    state, rows = read(folder / LAST), [lasting(row) for row in rows_of(folder, found.rounds)]
    label = str(found.summary.get("method", "run"))
    return RunResult(folder, state, dict(found.summary), rows, label, Source(config, given), card)
