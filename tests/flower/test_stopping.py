"""How a run ends that is stopped by Flower, or submitted twice: interrupted, not failed; the first one's files stay."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.run import RunNotRunningException

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import LocalGrid, deploy
from real import LIMIT, ROOT, events, federation, hashes, rows, wait

from fedsim.errors import CheckpointError, LockedError
from fedsim.flower.stopping import StoppableGrid, Stopped, alone, stoppable
from fedsim.tracking.rows import read_rows

SETTINGS = ("rounds=3", "clients_per_round=2", "model=linear", "client.epochs=1")


@pytest.fixture
def flowers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that Flower's own handlers saw: like those, they leave by ``sys.exit``."""
    came: list[int] = []

    def leave(number: int, frame: object) -> None:
        came.append(number)
        sys.exit(0)

    before = {s: signal.signal(s, leave) for s in (signal.SIGINT, signal.SIGTERM)}
    yield came  # type: ignore[misc]
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_interrupted_and_then_flower_ends_the_process(
    number: signal.Signals, flowers: list[int]
) -> None:
    seen: list[type] = []
    with pytest.raises(SystemExit), stoppable():
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            seen.append(type(error))
            raise
    assert seen == [Stopped] and issubclass(Stopped, KeyboardInterrupt) and flowers == [number]


def test_without_a_signal_nothing_changes(flowers: list[int]) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stoppable():
        pass
    with pytest.raises(ValueError, match="mine"), stoppable():
        raise ValueError("mine")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers and flowers == []


def test_the_summary_says_interrupted_and_the_same_run_goes_on(
    tmp_path: Path, flowers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower answers that the run is not running any more, in the second round."""
    pulled = LocalGrid.pull_messages

    def until_stopped(self: Any, *args: Any) -> Any:
        if len(rows(tmp_path / "run")) == 1:
            raise RunNotRunningException
        return pulled(self, *args)

    monkeypatch.setattr(LocalGrid, "pull_messages", until_stopped)
    from fedsim.flower import server

    serve = server.serve
    monkeypatch.setattr(server, "serve", lambda grid, config: serve(StoppableGrid(grid), config))  # type: ignore[arg-type]
    with pytest.raises(SystemExit), stoppable():
        deploy(tmp_path, *SETTINGS)
    summary = (tmp_path / "run/summary.json").read_text()
    assert '"status": "interrupted"' in summary and "flwr stop" in summary
    monkeypatch.undo()
    before = hashes(tmp_path / "run")
    deploy(tmp_path, *SETTINGS)
    assert hashes(tmp_path / "run")[:1] == before and len(hashes(tmp_path / "run")) == 3


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_submitted_twice_writes_nothing_into_the_files_of_the_first(tmp_path: Path) -> None:
    with alone(tmp_path / "run"):  # the first one waits for its nodes
        before = contents(tmp_path / "run")
        with pytest.raises(LockedError, match="another process is writing this run"):
            deploy(tmp_path, *SETTINGS)
        assert contents(tmp_path / "run") == before
    first, _ = deploy(tmp_path, *SETTINGS)
    before = contents(tmp_path / "run")
    again, grid = deploy(tmp_path, *SETTINGS)
    assert contents(tmp_path / "run") == before and grid.log == []
    assert [r["weights_hash"] for r in again.rows] == [r["weights_hash"] for r in first.rows]
    with pytest.raises(CheckpointError, match="run holds another run; give another dir"):
        deploy(tmp_path, *SETTINGS, "client.lr=0.05")
    assert contents(tmp_path / "run") == before


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_flwr_stop(tmp_path: Path) -> None:
    """With real processes: stopped in the middle, the summary says interrupted; submitted again, it goes on."""
    settings = " ".join(
        [*SETTINGS[1:], "rounds=30", "num_clients=2", "tracker=quiet", f"dir={tmp_path / 'run'}"]
    )
    with federation(tmp_path, nodes=2) as fed:
        run = fed.submit(ROOT, settings)
        from localgrid import wait_until

        wait_until(lambda: len(rows(tmp_path / "run")) > 1, LIMIT, "two rounds")
        fed.flwr("stop", run, "local")
        wait_until(lambda: (tmp_path / "run/summary.json").exists(), LIMIT, "the end")
        assert '"status": "interrupted"' in (tmp_path / "run/summary.json").read_text()
        assert fed.status(run)[0] == "finished:stopped"
        done = len(rows(tmp_path / "run"))
        (tmp_path / "run/summary.json").unlink()
        again = fed.submit(ROOT, settings.replace("rounds=30", f"rounds={done + 1}"))
        wait(fed, again, tmp_path / "run")
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == done + 1 and events(tmp_path / "run")
