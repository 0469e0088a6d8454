"""The Ray engine on a running cluster of several nodes (on this machine), in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from problems import classification, hashes

SCRIPT = """
import json, sys
from ray.cluster_utils import Cluster

head = dict(num_cpus=0, include_dashboard=False, object_store_memory=100 * 2**20)
cluster = Cluster(initialize_head=True, head_node_args=head)
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
try:
    from problems import classification, hashes
    from fedsim.engine.ray import cluster as ours
    from fedsim.errors import EngineError

    place = ["engine=ray", f"engine.address={cluster.address}"]
    found = hashes(classification().run(*place, "strategy=fedspeed"))
    assert not ours.ours()
    try:
        classification().run(*place, "engine.workers=3")
    except EngineError as error:
        found.append(str(error))
    print("RESULT" + json.dumps(found))
finally:
    import ray
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.nightly
def test_a_cluster_gives_the_same_bits_and_is_joined_not_started(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    *found, refusal = json.loads(lines[0].removeprefix("RESULT"))
    assert found == hashes(classification().run("strategy=fedspeed"))
    assert refusal.startswith("engine.workers=3, but the cluster has 2 CPUs")
