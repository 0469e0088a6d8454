"""A node does not trust who submits: what it refuses before anything is built, and that it writes in its place only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import deploy, node
from real import ROOT

from fedsim.errors import ConfigError, EngineError
from fedsim.flower.options import CACHES, Node, at_node
from fedsim.run import participants
from fedsim.tracking.prometheus import parsed

SPEED = ("strategy=fedspeed", "rounds=2", "clients_per_round=3", "model=linear", "client.epochs=1")
HOSTILE = {  # overrides, and the key that the refusal names
    "model._target_=os.system": "model._target_",
    "model._target_=fedsim.api.os.system": "model._target_",
    "data._target_=builtins.eval": "data._target_",
    "partition._target_=torch.load": "partition._target_",
    "sampling._target_=functools.partial +sampling._args_=[os.system]": "sampling._target_",
    "strategy=ggeur strategy.base._target_=subprocess.Popen": "strategy.base._target_",
    "+task.metrics={x: {_target_: os.system, command: touch}}": "task.metrics.x._target_",
    "task=detection task.loss.path=os.system": "task.loss.path",
    "+model.x.y.z={_target_: os.system}": "model.x.y.z._target_",
    "+model.x=[1,{_target_: os.system}]": "model.x",
    "+model._call_=os.system": "model._call_",
    "encoder={_target_: pickle.loads}": "encoder._target_",
    "model.hidden=${oc.env:HOME}": "model.hidden",
    "strategy=${oc.env:HOME}": "strategy",
    "name=${hydra:runtime.cwd}": "name",
    "hydra.searchpath=[file:///tmp]": "hydra.searchpath",
    "data=hf data.path=x data.cache=/etc/cron.d": "data.cache",
    "+data@data.server=hf data.server.path=x data.server.cache=/etc/cron.d": "data.server.cache",
}


@pytest.mark.parametrize(("text", "key"), HOSTILE.items(), ids=list(HOSTILE))
def test_hostile_settings(text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[Any]()
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.setattr("hydra.utils.instantiate", lambda *a, **k: ran.append(a))
    monkeypatch.setattr("fedsim.config.parts.instantiate", lambda *a, **k: ran.append(a))
    quoted = " ".join(f"'{word}'" for word in text.split(" ")) if "{" not in text else f'"{text}"'
    with pytest.raises(ConfigError) as error:
        at_node({"overrides": quoted}, node(tmp_path, 0))
    assert str(error.value).startswith(key) and os.environ["HOME"] not in str(error.value)
    assert ran == []


def test_the_refusal_names_the_node_in_the_run(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        deploy(tmp_path, *SPEED, "+model.then={_target_: os.system}")
    for number in (100, 101, 102):
        assert f"node {number} is refused: ConfigError: model.then._target_=os.system: not among" in str(
            error.value
        )


def test_a_nodes_owner_names_modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_ALLOW")
    settings = ("rounds=1", "clients_per_round=2", "model=linear", "model._target_=narrow.NarrowBody")
    nodes = {100 + c: node(tmp_path, c, allow="narrow") for c in range(2)}
    assert len(deploy(tmp_path, *settings, clients=2, nodes=nodes)[0].rows) == 1
    del nodes[101]["allow"]
    with pytest.raises(
        EngineError, match=r"node 101 is refused: ConfigError: model\._target_=narrow\.NarrowBody"
    ):
        deploy(tmp_path / "other", *settings, clients=2, nodes=nodes)


def test_samples_do_not_leave_a_node_that_owns_them(tmp_path: Path) -> None:
    own = node(tmp_path, 0, **{"own-data": True})
    said = "own-data: GGEUR would send samples: the mean of a class with one row is that row; type strategy.min_count=2"
    with pytest.raises(ConfigError, match=said):
        at_node({"overrides": "strategy=ggeur"}, own)
    with pytest.raises(ConfigError, match=said):
        at_node({"overrides": "strategy=ggeur strategy.noise=1 strategy.clip=1"}, own)
    for settings in ("strategy=ggeur strategy.min_count=2", "strategy=fedproto", "strategy=fedavg"):
        at_node({"overrides": settings}, own)
    config, _ = at_node({"overrides": "strategy=ggeur"}, node(tmp_path, 0))  # a part of common data
    assert participants.strategy(config, None).traits.exposes


def test_what_a_node_counts(tmp_path: Path) -> None:
    path = tmp_path / "collected/node.prom"
    nodes = {100 + c: node(tmp_path, c, metrics=str(path)) for c in range(2)}
    run, _ = deploy(tmp_path, "rounds=2", "clients_per_round=2", "model=linear", clients=2, nodes=nodes)
    found = parsed(path.read_text())
    for client in ("0", "1"):
        assert found["fedsim_node_messages_total", (("client", client), ("outcome", "ok"))] == 2
        sent = found["fedsim_node_bytes_total", (("client", client), ("direction", "up"))]
        assert 0 < sent <= sum(row["bytes_up"] for row in run.rows)


def test_caches_lie_in_the_state_dir_unless_the_owner_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", "/elsewhere")
    with Node.of(node(tmp_path, 0), 1, 0).at_home():
        assert os.environ["HF_HOME"] == str(tmp_path / "state-0/cache/huggingface")
        assert os.environ["TORCH_HOME"] == "/elsewhere"
    assert "HF_HOME" not in os.environ


NODE = """
import os, sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fedsim.flower import client
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
hello = Message(RecordDict({"hello": ConfigRecord()}), 1, "query")
hello.metadata.__dict__["_message_id"] = "1"
context = Context(1, 1, {"partition-id": 0, "state-dir": sys.argv[1]}, RecordDict(), {"overrides": sys.argv[2]})
about = client.app(hello, context).content["node"]
assert about.get("client") == 0, dict(about)
"""


def test_a_node_writes_nothing_outside_its_state_dir(tmp_path: Path) -> None:
    """Home, working and temporary folder of a node's process stay empty; settings cannot lead it elsewhere."""
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "FEDSIM_", "HF_", "TORCH_"))}
    env |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"MPLCONFIGDIR": str(tmp_path / "matplotlib"), "FLWR_HOME": str(tmp_path / "flwr")}
    words = f"model=linear dir={tmp_path}/submitted out={tmp_path}/out num_clients=2"
    words += f" clients_per_round=2 tracker.prometheus={tmp_path}/x.prom tracker=tensorboard"
    done = subprocess.run(
        [sys.executable, "-c", NODE, str(tmp_path / "state"), words],
        env=env,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written and {path.split("/")[0] for path in written} <= {"state", "flwr", "matplotlib"}, written
