"""A client at its node: data, model and worker built from the run's own configuration, once per process."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from fedsim import build, session
from fedsim.engine.worker import Broadcast, Chunk, Worker
from fedsim.errors import ClientError, ConfigError
from fedsim.flower.settings import Node
from fedsim.flower.statefiles import StateFiles
from fedsim.flower.wire import Answer, Ask, absent
from fedsim.given import Given
from fedsim.settings import plain
from fedsim.task import Task, cross_entropy
from fedsim.vectors import FlatModel

_built: dict[tuple[str, int | None], Worker] = {}


@dataclass(frozen=True)
class Site:
    """One client's configuration and worker."""

    node: Node
    config: DictConfig
    worker: Worker

    @staticmethod
    def of(config: DictConfig, node: Node) -> Site:
        """Build it, or take what this process built before for the same settings and data."""
        config = node.localise(config)
        owner = node.client if node.own_data else None
        key = (json.dumps(plain(config), sort_keys=True), owner)
        if key not in _built:
            _built.clear()
            _built[key] = _build(config, owner)
        return Site(node, config, _built[key])

    def describe(self) -> dict[str, Any]:
        """What the server wants to know before it gives this node work."""
        data = self.worker.data
        return {
            "client": self.node.client,
            "samples": int(data.shards.sizes[self.node.client]),
            "own": self.node.own_data,
            "partition": data.shards.hash(),
            "layout": layout_name(self.worker.model),
            "host": socket.gethostname(),
            "instance": _claim(self.node),
        }

    def answer(self, ask: Ask) -> Answer:
        """Do what is asked with the state that the server names, and put a new state into its file."""
        if ask.client != self.node.client:
            return absent(ask.client, "failed", f"this node is client {self.node.client}")
        files, state = StateFiles(self.node.state_dir, ask.run, ask.client), {}
        if ask.state is not None:
            found = files.read(ask.state)
            if found is None and self.config.engine.lost_state == "stop":
                lost = f"client {ask.client} lost its state of round {ask.state[0] + 1}: no {files.path(ask.state)}"
                return Answer(absent(ask.client, "failed", lost).outcome, {}, fatal=_lost_remedy(lost))
            state = found or {}
        restarted = ask.state is not None and not state
        states = {ask.client: state} if state else {}
        each = {} if ask.each is None else {ask.client: ask.each}
        broadcast = Broadcast(ask.round, ask.task, ask.shared, dict.fromkeys(ask.fold, ("stack",)))
        torch.set_num_threads(self.worker.plan.threads)
        try:
            result = self.worker.run(broadcast, Chunk([ask.client], each, states))
        except ClientError as error:  # it wrote to what it was lent: no policy excuses that
            return Answer(absent(ask.client, "failed", str(error)).outcome, {}, fatal=str(error))
        (outcome,) = result.outcomes
        arrays = {name: rows[0] for (name, _), rows in result.folder.blocks.items()}
        new = result.states.get(ask.client)
        if new is not None:
            files.write((ask.round, ask.exchange), new)
        files.prune(ask.round, ask.state)
        return Answer(outcome, arrays, stateful=new is not None, restarted=restarted)


def layout_name(model: FlatModel) -> str:
    """Names and shapes of the model's vectors: what both sides must agree on."""
    layout = model.layout
    return json.dumps([[s.name, list(s.shape)] for s in (*layout.params, *layout.buffers)])


def _build(config: DictConfig, owner: int | None) -> Worker:
    """The worker of a simulation, on all data, or on those of the one client who owns what lies here."""
    method = build.strategy(config, None)
    if owner is None:
        data = session.load_data(config, Given(), method)
    else:
        data = build.owned(config, build.dataset(config), owner)
    task = Task(build.model(config, data.dataset, None), cross_entropy)
    return Worker(session.plan(config, method, task, data))


def _claim(node: Node) -> str:
    """An id that lives as long as the node's state folder; refused while another node's processes hold the client.

    The file names the process that starts this node's client processes. Two nodes of one machine that are told to be
    the same client are found here, two machines at the server.
    """
    folder = node.state_dir / "nodes"
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / f"client-{node.client}.json", {"host": socket.gethostname(), "pid": os.getppid()}
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    if before.get("host") == me["host"] and before.get("pid") != me["pid"] and _serves(before["pid"]):
        raise ConfigError(
            f"client {node.client} is served by another node of this machine already (its process {before['pid']}); "
            "give this one another partition-id, or another state-dir if it is meant to take over"
        )
    mine = {"instance": before.get("instance") or uuid.uuid4().hex, **me}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(mine))
    scratch.replace(path)
    return str(mine["instance"])


def _serves(pid: int) -> bool:
    """Whether that process lives and is one of Flower's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"flower" in words or b"flwr" in words


def _lost_remedy(lost: str) -> str:
    return f"{lost} (engine.lost_state=restart lets such clients begin again from their initial state)"
