"""What is true when the SuperLink dies: its runs end with it; submitted again, they go on from their checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until
from real import LIMIT, ROOT, federation, hashes, left_over, rows

import fedsim

SETTINGS = (
    *("num_clients=2", "clients_per_round=2", "model=linear", "client.epochs=1", "tracker=quiet"),
    *("strategy=fedspeed", "rounds=4"),
)


def status(run: Path) -> str:
    """What the run's summary says, if there is one."""
    path = run / "summary.json"
    return str(json.loads(path.read_text())["status"]) if path.exists() else ""


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_killed_superlink_with_a_database(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = " ".join([*SETTINGS, f"dir={run}"])
    options = ["--insecure", "--database", str(tmp_path / "link.db")]
    with federation(tmp_path, nodes=2, link_options=options) as fed:
        first = fed.submit(ROOT, words)
        wait_until(lambda: rows(run), LIMIT, "round 1")
        fed.kill("link")
        done = len(rows(run))
        assert 1 <= done < 4 and not (run / "summary.json").exists()
        fed.link(fed.port)
        fed.ready("link", limit=LIMIT)
        again = fed.submit(ROOT, words)
        wait_until(
            lambda: status(run) == "done", LIMIT, "the second run's end"
        )  # the first one is interrupted
        wait_until(lambda: fed.status(first)[0].startswith("finished"), LIMIT, "the first run's end")
        assert fed.status(first)[0] == "finished:failed" and fed.status(again)[0].startswith(
            ("running", "finished")
        )
    alone = fedsim.simulate(["engine=serial", *SETTINGS])
    assert hashes(run) == [r["weights_hash"] for r in alone.rows]
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
