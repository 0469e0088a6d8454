import io
import logging
import re

import pytest
from rich.console import Console

from fedsim.tracking import RunInfo
from fedsim.tracking.console import ConsoleTracker

FAILED = {"client": 17, "kind": "failed", "reason": "Traceback:\n  file x\nValueError: bad [batch]\n"}
REFUSED = {"client": 4, "kind": "refused", "reason": "no samples"}
DROPPED = {"client": 9, "kind": "dropped", "reason": "offline"}


def play(mode, rounds=3, terminal=False, failures=(), status="done", start_round=0, folder="runs/x"):
    console = Console(
        file=io.StringIO(), width=140, force_terminal=terminal, record=True, color_system="standard"
    )
    tracker = ConsoleTracker(mode, console)
    tracker.phase("loading mnist")
    tracker.start(RunInfo(folder, "fedavg-s0", "g", "fedavg", {}, rounds, start_round))
    for at in range(start_round + 1, rounds + 1):
        row = {"round": at, "bytes_up": 1_000_000, "bytes_down": 500_000, "seconds": 0.5, "failures": []}
        if at % 2:
            row |= {"accuracy": at / (rounds + 1), "loss": 1 / at}
        if at == 2:
            row["failures"] = list(failures)
        tracker.round(row, [])
    tracker.end({"status": status, "error": "disk full" if status == "failed" else None})
    return console


def test_plain_lines():
    console = play("auto")  # not a terminal
    assert console.export_text().splitlines() == [
        "loading mnist ...",
        "fedavg-s0: 3 rounds, in runs/x",
        "fedavg  round 1/3  accuracy 25.00%  loss 1  1.5 MB  0.50 s/round  ETA 0:00:01",
        "fedavg  round 2/3  accuracy 25.00%  loss 1  3.0 MB  0.50 s/round  ETA 0:00:00",
        "fedavg  round 3/3  accuracy 75.00%  loss 0.3333  4.5 MB  0.50 s/round  ETA 0:00:00",
        "fedavg-s0 done: round 3/3, accuracy 75.00%",
    ]


def test_a_resumed_run_goes_on_counting():
    rows = [{"round": 1, "accuracy": 0.9, "bytes_up": 1e6}, {"round": 2, "loss": 2.0, "bytes_down": 2e6}]
    console = Console(file=io.StringIO(), width=140, record=True)
    tracker = ConsoleTracker("plain", console)
    tracker.start(RunInfo("runs/x", "fedavg-s0", "g", "fedavg", {}, 3, 2, history=rows))
    tracker.round({"round": 3, "bytes_up": 5e5, "seconds": 0.5, "accuracy": 0.8}, [])
    tracker.end({"status": "done"})
    assert console.export_text().splitlines() == [
        "fedavg-s0: 3 rounds, after round 2, in runs/x",
        "fedavg  round 3/3  accuracy 80.00%  loss 2  3.5 MB  0.50 s/round  ETA 0:00:00",
        "fedavg-s0 done: round 3/3, accuracy 80.00%",
    ]


def test_plain_lines_of_a_long_run_are_few_and_hold_the_first_and_the_last():
    lines = [line for line in play("plain", rounds=2001).export_text().splitlines() if "s/round" in line]
    found = [int(re.search(r"round +(\d+)/2001", line)[1]) for line in lines]
    assert found[0] == 1 and found[-1] == 2001
    assert len(found) < 110


def test_failures_name_client_round_and_reason_and_dropouts_are_counted():
    text = play("plain", failures=[FAILED, REFUSED, DROPPED]).export_text()
    assert "round 2: client 17 failed: ValueError: bad [batch]" in text
    assert "round 2: client 4 refused: no samples" in text
    assert "client 9" not in text
    assert "1 dropped, 1 failed, 1 refused" in text


def test_a_diverged_run_says_nan():
    console = Console(file=io.StringIO(), width=140, record=True)
    tracker = ConsoleTracker("plain", console)
    tracker.start(RunInfo("runs/x", "n", "g", "m", {}, 1))
    tracker.round({"round": 1, "accuracy": float("nan"), "loss": float("inf")}, [])
    tracker.end({"status": "done"})
    text = console.export_text()
    assert "accuracy nan%  loss inf" in text and "accuracy nan%\n" in text


def test_many_failures_are_cut_short():
    text = play("plain", failures=[FAILED] * 12).export_text()
    assert text.count("client 17") == 5
    assert "round 2: 7 more, see metrics.jsonl" in text


@pytest.mark.parametrize("status", ["done", "failed"])
def test_quiet_prints_failures_only(status):
    lines = play("quiet", failures=[FAILED], status=status).export_text().splitlines()
    expected = ["round 2: client 17 failed: ValueError: bad [batch]"]
    if status == "failed":
        expected.append("fedavg-s0 failed: round 3/3, accuracy 75.00%, disk full")
    assert lines == expected


def test_rich_shows_a_live_line_and_leaves_failures_behind():
    console = play("auto", terminal=True, failures=[FAILED], start_round=1)
    drawn = console.file.getvalue()
    assert "round 3/3" in drawn and "loading mnist" in drawn and "━" in drawn
    text = console.export_text(styles=True)
    assert "\x1b[1;31mfailed" in text  # bold red
    assert "after round 1" in text


def test_log_lines_go_through_the_live_display_and_handlers_are_put_back(monkeypatch):
    import sys

    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    handler = logging.StreamHandler(out)
    logging.getLogger().addHandler(handler)
    try:
        tracker = ConsoleTracker("rich", Console(file=out, force_terminal=True, width=100))
        tracker.start(RunInfo("runs/x", "n", "g", "m", {}, 3))
        assert handler.stream is not out
        logging.getLogger("x").warning("worker lost")
        tracker.end({"status": "done"})
        assert handler.stream is out
        assert "worker lost" in out.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)
