import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from problems import QUIET, classes, network

import fedsim
from fedsim.errors import CheckpointError, DataError
from fedsim.exchange.payload import Outcome
from fedsim.server.roundlog import RoundLog
from fedsim.tracking import RunInfo, Trackers, read_rows
from fedsim.tracking import jsonl as module
from fedsim.tracking.jsonl import JsonlTracker
from fedsim.tracking.rows import ClientRows, packed, scalars, to_json


def info(folder, start_round=0):
    return RunInfo(folder, "fedavg-s0-abc", "sweep", "fedavg", {"seed": 0}, rounds=5, start_round=start_round)


def write(folder, rounds, start_round=0, status="done"):
    tracker = JsonlTracker()
    tracker.start(info(folder, start_round))
    for at in rounds:
        clients = [{"round": at, "client": c, "metric": "loss", "value": at + c / 10} for c in (3, 5)]
        tracker.round({"round": at, "accuracy": at / 10, "cohort": [3, 5]}, clients)
    if status:
        tracker.end({"status": status, "accuracy": 0.5})
    return tracker


def test_a_row_a_round_and_a_tidy_row_per_client_metric(tmp_path):
    write(tmp_path, [1, 2])
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"round": 1, "accuracy": 0.1, "cohort": [3, 5]},
        {"round": 2, "accuracy": 0.2, "cohort": [3, 5]},
    ]
    assert [(r["round"], r["client"], r["value"]) for r in read_rows(tmp_path / "clients.jsonl")] == [
        (1, 3, 1.3),
        (1, 5, 1.5),
        (2, 3, 2.3),
        (2, 5, 2.5),
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        "name": "fedavg-s0-abc",
        "group": "sweep",
        "method": "fedavg",
        "rounds": 5,
        "status": "done",
        "accuracy": 0.5,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clients.jsonl", "metrics.jsonl", "summary.json"]


def test_a_client_has_a_line_a_round_of_less_than_half_the_bytes_of_its_rows(tmp_path):
    values = [(4, {"train_loss": 0.123456, "steps": 5.0, 'évaluate/"x': math.nan}), (7, {"train_loss": 0.5})]
    rows = ClientRows(3, [*values, (7, {"train_loss": 0.25, "samples": 8}), (9, {})])
    (tmp_path / "a.jsonl").write_text(rows.text())
    (tmp_path / "b.jsonl").write_text("".join(f"{line}\n" for line in packed(rows)))
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[2]) == {
        "round": 3,
        "client": 7,
        "values": {"train_loss": 0.25, "samples": 8},
    }
    assert str(read_rows(tmp_path / "a.jsonl")) == str(list(rows))
    (tmp_path / "old.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
    assert str(read_rows(tmp_path / "old.jsonl")) == str(list(rows))
    outcome = Outcome(client=123, kind="ok", metrics={"train_loss": 0.6931471805599453, "steps": 5.0})
    record = RoundLog([outcome] * 20).client_rows(10)
    assert 2 * len(record.text()) < sum(len(to_json(row)) + 1 for row in record)


def test_resume_cuts_later_rounds_and_the_torn_line(tmp_path):
    write(tmp_path, [1, 2, 3], status="interrupted")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "accu')
    with (tmp_path / "clients.jsonl").open("a") as file:
        file.write('{"round": 2, "client": 9')
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    tracker = write(tmp_path, [3, 4], start_round=2, status="")
    assert not (tmp_path / "summary.json").exists()  # the run goes on: its old end is void
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["round"] for r in read_rows(tmp_path / "clients.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]
    tracker.end({"status": "done"})


def test_a_fresh_run_in_an_old_folder_starts_empty(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [1])
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1]
    assert len(read_rows(tmp_path / "clients.jsonl")) == 2


def test_resume_says_which_lines_and_rounds_are_missing(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\nrubbish\n{"round": 2}\n')
    write(tmp_path, [], start_round=4)
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "removed unreadable lines [2]" in caplog.text
    assert "ends at round 2, but the run goes on after round 4" in caplog.text


def test_an_unreadable_line_before_the_last_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 2}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2"):
        read_rows(tmp_path / "x.jsonl")


def test_kill_9_loses_no_finished_round(tmp_path):
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from fedsim.tracking import RunInfo
        from fedsim.tracking.jsonl import JsonlTracker
        tracker = JsonlTracker()
        tracker.start(RunInfo(Path({str(tmp_path)!r}), "n", "g", "m", {{}}, 9))
        for at in (1, 2, 3):
            tracker.round({{"round": at}}, [{{"round": at, "client": 0, "metric": "a", "value": 1.0}}])
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(read_rows(tmp_path / "clients.jsonl")) == 3


def test_numbers_of_numpy_and_torch_and_non_finite_ones(tmp_path):
    row = {
        "round": np.int64(1),
        "loss": torch.tensor(math.nan),
        "accuracy": np.float32(0.5),
        "worst": -math.inf,
        "norms": np.array([1.0, math.inf]),
        "flag": np.bool_(True),
        "per_domain": {0: torch.tensor([1, 2])},
        "path": tmp_path,
    }
    line = to_json(row)
    strict = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert (strict["loss"], strict["worst"]) == ("NaN", "-Infinity")
    (tmp_path / "x.jsonl").write_text(line)
    (back,) = read_rows(tmp_path / "x.jsonl")
    assert math.isnan(back.pop("loss"))
    assert back == {
        "round": 1,
        "accuracy": 0.5,
        "worst": -math.inf,
        "norms": [1.0, math.inf],
        "flag": True,
        "per_domain": {"0": [1, 2]},
        "path": str(tmp_path),
    }


def test_scalars_flatten_and_count():
    row = {
        "round": 2,
        "accuracy": torch.tensor(0.5),
        "domains": {"photo": 0.25},
        "weights_hash": "ab",
        "cohort": [1, 2, 3],
        "failures": [{"client": 1, "kind": "failed"}, {"client": 2, "kind": "dropped"}],
    }
    assert scalars(row) == {
        "round": 2,
        "accuracy": 0.5,
        "domains/photo": 0.25,
        "cohort_size": 3,
        "failures": 2,
        "failures/dropped": 1,
        "failures/failed": 1,
    }


class FullDisk(module.FileIO):
    """Takes five bytes of what it gets and then refuses, while ``full``."""

    full = False

    def write(self, data):
        if FullDisk.full:
            super().write(bytes(data)[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_full_disk_is_reported_each_time_and_nothing_is_lost(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "FileIO", FullDisk)
    trackers = Trackers([JsonlTracker()])
    trackers.start(info(tmp_path))
    with caplog.at_level(logging.ERROR):
        for at in range(1, 6):
            monkeypatch.setattr(FullDisk, "full", at in (2, 3))
            trackers.round({"round": at}, [{"round": at, "client": 0, "metric": "a", "value": 1.0}])
    assert len(caplog.records) == 2
    assert "NOT being written" in caplog.text and "No space left" in caplog.text
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [r["round"] for r in read_rows(tmp_path / "clients.jsonl")] == [1, 2, 3, 4, 5]


def test_rows_that_wait_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FileIO", FullDisk)
    monkeypatch.setattr(module, "MAX_PENDING", 20)
    tracker = JsonlTracker()
    tracker.start(info(tmp_path))
    monkeypatch.setattr(FullDisk, "full", True)
    for at in (1, 2, 3):
        with pytest.raises(OSError, match="No space"):
            tracker.round({"round": at}, [])
    monkeypatch.setattr(FullDisk, "full", False)
    with pytest.raises(OSError, match="newer ones are lost"):
        tracker.round({"round": 4}, [])
    tracker.round({"round": 5}, [])
    assert [r["round"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 5]


def test_a_folder_that_cannot_be_written_at_first(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    tracker = JsonlTracker()
    with pytest.raises(OSError):
        tracker.start(info(tmp_path / "run"))
    with pytest.raises(OSError):
        tracker.round({"round": 1}, [])
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    tracker.round({"round": 2}, [])
    assert [r["round"] for r in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_rows_that_cannot_be_written_end_the_run_and_the_next_call_goes_on(tmp_path, monkeypatch):
    class Fills:
        def round(self, row, clients):
            FullDisk.full = row["round"] >= 2

    def run(name, *callbacks):
        settings = [*QUIET[:2], "engine=serial", "rounds=3", "clients_per_round=2", "checkpoint.every=1"]
        return fedsim.simulate(
            [*settings, f"dir={tmp_path / name}"], model=network, clients=classes(), callbacks=callbacks
        )

    monkeypatch.setattr(module, "FileIO", FullDisk)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl could not be written .*round 2 is still there"
    ):
        run("a", Fills())
    FullDisk.full = False
    again = run("a")
    assert [r["round"] for r in read_rows(tmp_path / "a" / "metrics.jsonl")] == [1, 2, 3]
    assert again.rows[-1]["weights_hash"] == run("b").rows[-1]["weights_hash"]
