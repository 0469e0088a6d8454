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
    said = ""
except CheckpointError as error:
    said = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
result = classification().run(*settings)
print("RESULT" + json.dumps([said, hashes(result), [row["round"] for row in result.rows]]))
"""


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on_to_the_same_bits(tmp_path: Path) -> None:
    said, found, rounds = script(DISK, tmp_path)
    assert said.startswith(
        "run/metrics.jsonl could not be written (File too large), so round 4 gets no checkpoint"
    )
    assert "round 2 is still there. Make room and type the same command again" in said
    assert rounds == [1, 2, 3, 4, 5]
    assert found == hashes(classification().run("strategy=fedspeed", "rounds=5"))


STORE = """
import json, torch
from problems import classification, classes, hashes, network

wide = [(torch.cat([x, torch.zeros(len(x), 500_000)], 1), y) for x, y in classes()]  # 98 MB
problem = classification(clients=wide, model=network(features=500_004), test=None)
small = ["engine=ray", "engine.workers=2", "engine.store_mb=80", "engine.early=false"]
print("RESULT" + json.dumps([hashes(problem.run("rounds=2", *engine)) for engine in ([], small)]))
"""


@pytest.mark.nightly
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
    from fedsim.engine.ray import actors

    actors.PATIENCE = 3.0  # s: there is no other node whose room would be worth waiting for

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


@pytest.mark.nightly
def test_a_node_lost_in_mid_round_costs_its_worker_and_no_bit(tmp_path: Path) -> None:
    """Several exchanges, client state with single updates, answers one by one; a node is lost in each."""
    found = script(NODES, tmp_path, json.dumps(METHODS))
    for (name, overrides), (lost, *bits) in zip(METHODS, found, strict=True):
        assert lost
        plain = classification().run(f"strategy={name}", *overrides, "engine.chunks=3")
        assert bits == hashes(plain), name


RELOAD = """
import importlib, json, os, sys
from pathlib import Path
from problems import classification, hashes
import mine

def both():
    engines = (["engine=serial"], ["engine=ray", "engine.workers=2", "engine.early=false"])
    found = [hashes(classification().run(*engine, "rounds=2", loss=mine.loss)) for engine in engines]
    pids = {p.name for p in Path("pids").iterdir()} - {str(os.getpid())}
    for p in Path("pids").iterdir():
        p.unlink()
    return *found, pids

Path("pids").mkdir()
first, again = both(), both()
Path("helper.py").write_text("SCALE = 0.125")
importlib.reload(sys.modules["helper"])
importlib.reload(mine)
edited = both()
print("RESULT" + json.dumps({
    "serial": [runs[0] for runs in (first, again, edited)],
    "ray": [runs[1] for runs in (first, again, edited)],
    "used again": len(first[2] | again[2]) <= 2,
    "renewed": len(edited[2]) > 0 and not edited[2] & (first[2] | again[2]),
}))
"""
MINE = """
import os
from pathlib import Path
from torch.nn.functional import cross_entropy
from helper import SCALE

def loss(output, y):
    Path(FOLDER, str(os.getpid())).touch()
    return SCALE * cross_entropy(output, y)
"""


@pytest.mark.slow
def test_idle_workers_do_not_run_the_code_from_before_a_reload(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("SCALE = 1.0")
    (tmp_path / "mine.py").write_text(MINE.replace("FOLDER", repr(str(tmp_path / "pids"))))
    found = script(RELOAD, tmp_path)
    assert found["ray"] == found["serial"]
    first, again, edited = found["serial"]
    assert first == again != edited
    assert found["used again"]
    assert found["renewed"]


ADDRESS = """
import json, os, socket, sys, time
from types import SimpleNamespace
from fedsim.engine.ray import cluster
from fedsim.errors import EngineError

cluster.JOIN = 6.0  # s
silent = socket.socket()  # takes calls and never answers
silent.bind(("127.0.0.1", 0))
silent.listen(100)
free = socket.socket()
free.bind(("127.0.0.1", 0))
gone = "127.0.0.1:%d" % free.getsockname()[1]
free.close()

def refusal(address, warm=False):
    config, start = SimpleNamespace(address=address, store_mb=0), time.monotonic()
    try:
        if warm:
            cluster.warm_up(config)
        cluster.connect(config)
    except EngineError as error:
        return str(error), time.monotonic() - start
    return "joined", 0.0

import ray  # takes seconds
out = [refusal(gone), refusal("nonsense"), refusal("127.0.0.1:%d" % silent.getsockname()[1]), refusal(gone, warm=True)]
cluster.shutdown()
os.environ["RAY_ADDRESS"] = gone
out.append(refusal(None))
print("RESULT" + json.dumps([gone, out]), flush=True)
"""


def test_an_address_without_a_cluster_is_named_and_not_waited_for(tmp_path: Path) -> None:
    """Nothing there, no address at all, something that never answers, tried in the background, from the environment."""
    gone, out = script(ADDRESS, tmp_path)
    texts = [text for text, _ in out]
    for i in (0, 3):
        assert texts[i].startswith(f"engine.address={gone}: no Ray cluster could be joined there (")
        assert "refused" in texts[i]
        assert texts[i].endswith(
            "name one that runs, or set engine.address=null to start a Ray on this machine"
        )
    assert texts[1].startswith("engine.address=nonsense: ")
    assert "(no answer in 6.0 s)" in texts[2]
    assert texts[4].startswith(f"RAY_ADDRESS={gone}: ") and "unset RAY_ADDRESS" in texts[4]
    assert all(seconds < 12 for _, seconds in out)
