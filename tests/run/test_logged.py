"""A tracker that is named for a finished run gets its rows, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from problems import classification
from tracking.wandb_file import history, records

from fedsim.cli.main import command
from fedsim.run.key import Finished
from fedsim.run.logged import log_finished

WANDB = ("tracker.wandb.mode=offline",)
SMALL = ("data=blobs", "data.num_samples=60", "data.num_test=20", "model=linear")
TINY = (*SMALL, "num_clients=3", "clients_per_round=2", "rounds=2", "dir=run")


def test_tensorboard_gets_the_rows_of_a_finished_run() -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = classification().run
    first = run("dir=run")
    run("dir=run", "tracker.tensorboard=true")
    written = list(Path("run/tensorboard").iterdir())
    run("dir=run", "tracker.tensorboard=true")
    assert list(Path("run/tensorboard").iterdir()) == written, "once"
    found = events.EventAccumulator("run/tensorboard", size_guidance={"histograms": 0}).Reload()
    assert [e.step for e in found.Scalars("bytes_up")] == [1, 2, 3, 4]
    assert [e.value for e in found.Scalars("bytes_up")] == [row["bytes_up"] for row in first.rows]
    assert [e.step for e in found.Histograms("clients/train_loss")] == [1, 2, 3, 4]


def test_the_command_says_where_the_rows_went(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    quiet = ["engine=serial", "tracker.plots=false", "tracker.console.mode=quiet", *TINY]
    assert command(quiet) == 0
    assert (
        command([*quiet, "tracker=wandb", *WANDB, "tracker.plots=false", "tracker.console.mode=quiet"]) == 0
    )
    assert "already done, skipped: run; its rows are now in run/wandb" in capsys.readouterr().out
    (record,) = Path("run/wandb").glob("offline-run-*/run-*.wandb")
    logged = history(list(records(record)))
    assert [row["round"] for row in logged if "bytes_up" in row] == [1, 2]
    assert command([*quiet, "tracker=wandb", *WANDB]) == 0
    assert "already done, skipped: run\n" in capsys.readouterr().out


def test_rows_come_round_by_round_with_those_of_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Told:
        def __init__(self, *given: Any) -> None:
            pass

        def start(self, run: Any) -> None:
            seen.append((run.dir, run.rounds, run.start_round))

        def round(self, row: Any, clients: Any) -> None:
            seen.append((row["round"], [c["value"] for c in clients]))

        def end(self, summary: Any) -> None:
            seen.append(summary["status"])

    folder = Path("run")
    folder.mkdir()
    rows = [{"round": at} for at in (1, 2, 3)]
    clients = [
        {"round": at, "client": c, "metric": "loss", "value": 10 * at + c} for at in (1, 3) for c in (0, 1)
    ]
    for name, lines in (("metrics", rows), ("clients", clients)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("fedsim.tracking.wandb.WandbTracker", Told)
    log_finished(compose_quickly([*WANDB, "rounds=3"]), Finished(folder, {"status": "done"}, 3, 3))
    assert seen == [(folder, 3, 0), (1, [10, 11]), (2, []), (3, [30, 31]), "done"]
