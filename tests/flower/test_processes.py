"""The twin of a simulation on real processes: a SuperLink, SuperNodes, and Flower's own command to run the app."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until
from real import LIMIT, ROOT, events, federation, hashes, left_over, rows, start_node, wait

import fedsim
from fedsim.cli.main import command

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
SETTINGS = ("num_clients=2", "clients_per_round=2", "model=linear", "client.epochs=1", "tracker=quiet")
TWO_PHASE = ("strategy._target_=twophase.TwoPhase", "~strategy.server_lr", "~strategy.weighting", "rounds=1")
FEDSPEED = ("strategy=fedspeed", "rounds=3")


def check_twin(folder: Path, *settings: str) -> None:
    """The deployment's weights, bytes and measurements are those of the simulation."""
    alone = fedsim.simulate(["engine=serial", *SETTINGS, *settings])
    assert hashes(folder) == [r["weights_hash"] for r in alone.rows]
    for key in ("accuracy", "loss", "bytes_up", "bytes_down"):
        assert [r.get(key) for r in rows(folder)] == [r.get(key) for r in alone.rows], key


def test_the_twin_survives_a_killed_node_and_a_killed_server(tmp_path: Path) -> None:
    """Two methods side by side: several exchanges a round, and client state. A node and the ServerApp are killed."""
    two, speed = tmp_path / "two", tmp_path / "speed"
    with federation(tmp_path, nodes=2) as fed:
        texts = [" ".join([*SETTINGS, *s, f"dir={d}"]) for s, d in ((FEDSPEED, speed), (TWO_PHASE, two))]
        first, other = (fed.submit(ROOT, text) for text in texts)
        wait_until(lambda: rows(speed), LIMIT, "round 1")
        fed.kill("node-1")
        start_node(fed, tmp_path, 1, "node-1-again")
        wait_until(lambda: len(rows(speed)) > 1, LIMIT, "round 2")
        kill_server(fed.environment["FEDSIM_TESTS"], first)
        again = fed.submit(ROOT, texts[0])
        assert wait(fed, again, speed)["status"] == "done"
        assert wait(fed, other, two)["status"] == "done"
    check_twin(speed, *FEDSPEED)
    check_twin(two, *TWO_PHASE)
    joined = [e["client"] for e in events(speed) if e["event"] == "joined"]
    assert sorted(joined) == [0, 0, 1, 1, 1]  # at the start, after the node's death, after the server's
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")


def kill_server(mark: str, run: str) -> None:
    """SIGKILL to the process that runs the ServerApp of ``run``, and to no other."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any("flwr-serverapp" in w for w in words) and process.environ().get("FEDSIM_TESTS") == mark:
                found.append(process)
        except psutil.Error:
            continue
    oldest = min(found, key=lambda p: p.create_time())  # the run submitted first
    oldest.kill()


def test_a_hostile_node_takes_nobodys_place(tmp_path: Path) -> None:
    """Client 1's own process says that it is client 0 (see ``impatient/sitecustomize.py``)."""
    (tmp_path / "hostile").touch()
    settings = (*SETTINGS, "rounds=2", "failures.policy=skip", f"dir={tmp_path / 'run'}")
    with federation(tmp_path, nodes=2) as fed:
        assert wait(fed, fed.submit(ROOT, " ".join(settings)), tmp_path / "run")["status"] == "done"
    failures = [
        (f["client"], "its reply is of client 0" in f["reason"])
        for r in rows(tmp_path / "run")
        for f in r["failures"]
    ]
    assert failures == [(1, True)] * 2
    assert command(["verify", str(tmp_path / "run")]) == 0
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
