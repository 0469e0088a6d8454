"""What goes wrong around a run: a full disk, a full object store, a lost node. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from problems import classification, hashes


def script(text: str, folder: Path, *arguments: str, timeout: float = 300) -> Any:
    """Run ``text`` in a new process and return the JSON that it prints last; nothing of it may be left running."""
    command, mark = [sys.executable, "-c", text, *arguments], uuid.uuid4().hex
    marked = {**os.environ, "FEDSIM_TEST": mark}  # whatever it starts inherits this
    done = subprocess.run(
        command, cwd=folder, env=marked, capture_output=True, text=True, timeout=timeout, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    deadline = time.monotonic() + 30
    while (left := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    return json.loads(lines[-1].removeprefix("RESULT"))


def running(mark: str) -> list[str]:
    """Processes that were started with the mark; Ray's own agents, which outlive a dead raylet by a minute, aside."""
    out = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, IndexError):
            if process.environ().get("FEDSIM_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                out.append(" ".join(process.cmdline()[:3]))
    return [name for name in out if "gent" not in name]


DISK = """
import json, resource, sys
from problems import classification, hashes
from fedsim.errors import CheckpointError

class FullAfter:
    def round(self, row, clients):
        if row["round"] == 3:  # from now on no file may grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))

settings = ["strategy=fedspeed", "rounds=5", "checkpoint.every=2", "dir=run"]
try:
    classification().run(*settings, callbacks=[FullAfter()])
    told = ""
except CheckpointError as error:
    told = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
result = classification().run(*settings)
print("RESULT" + json.dumps([told, hashes(result), [row["round"] for row in result.rows]]))
"""


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on_to_the_same_bits(tmp_path: Path) -> None:
    told, found, rounds = script(DISK, tmp_path)
    assert told.startswith("the checkpoint of round 4 could not be written to run/checkpoint")
    assert "round 2 is still there. Make room and type the same command again" in told
    assert rounds == [1, 2, 3, 4, 5]
    assert found == hashes(classification().run("strategy=fedspeed", "rounds=5"))


STORE = """
import json, torch
from problems import classification, classes, hashes, network

wide = [(torch.cat([x, torch.zeros(len(x), 500_000)], 1), y) for x, y in classes()]  # 98 MB
problem = classification(clients=wide, model=network(features=500_004), test=None)
small = ["engine=ray", "engine.workers=2", "engine.store_mb=80"]
print("RESULT" + json.dumps([hashes(problem.run("rounds=2", *engine)) for engine in ([], small)]))
"""


@pytest.mark.slow
def test_data_larger_than_the_object_store_are_no_obstacle(tmp_path: Path) -> None:
    serial, crowded = script(STORE, tmp_path)
    assert crowded == serial


NODES = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster

quick = dict(health_check_period_ms=1000, health_check_failure_threshold=3)  # to notice a dead node in 3 s, not 15
head = dict(num_cpus=0, include_dashboard=False, object_store_memory=100 * 2**20, _system_config=quick)
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
found = []
try:
    from hooks import Die, hooked
    from problems import classification, hashes, of_strategy
    from fedsim.engine.ray import engine as engine

    engine.PATIENCE = 3.0  # s: there is no other node whose room would be worth waiting for

    for name, overrides in json.loads(sys.argv[1]):
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)  # in place of the one lost before
        cluster.wait_for_nodes()
        marker = Path(f"lost-{len(found)}").resolve()
        strategy = hooked(name, Die(3, marker, node=True), *overrides)
        settings = [f"strategy={name}", *(o for o in overrides if not of_strategy(o)), "engine.chunks=3"]
        place = ["engine=ray", f"engine.address={cluster.address}"]
        result = classification().run(*place, *settings, strategy=strategy)
        found.append([marker.exists(), *hashes(result)])
        for node in [n for n in cluster.worker_nodes if not n.any_processes_alive() or n.dead_processes()]:
            cluster.remove_node(node, allow_graceful=False)
    print("RESULT" + json.dumps(found))
finally:
    import ray
    ray.shutdown()
    cluster.shutdown()
"""
METHODS = (
    ("ggeur", ("strategy.target=6",)),
    ("fedspeed", ("aggregator=flag",)),  # client state, single updates
    ("fedbuff", ("system=lognormal", "strategy.buffer=3", "strategy.concurrency=2")),
)


@pytest.mark.slow
def test_a_node_lost_in_mid_round_costs_its_worker_and_no_bit(tmp_path: Path) -> None:
    """Several exchanges, client state with single updates, answers one by one; a node is lost in each."""
    found = script(NODES, tmp_path, json.dumps(METHODS))
    for (name, overrides), (lost, *bits) in zip(METHODS, found, strict=True):
        assert lost
        plain = classification().run(f"strategy={name}", *overrides, "engine.chunks=3")
        assert bits == hashes(plain), name
