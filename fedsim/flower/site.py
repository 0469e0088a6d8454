"""A client at its node: data, model and worker built from the run's own configuration, once per process."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fedsim.config.compose import plain
from fedsim.data.cache import not_cached
from fedsim.engine.worker import Worker
from fedsim.errors import ClientError, ConfigError
from fedsim.exchange.downlink import MODEL, NUMBER, stepped, steps_of
from fedsim.exchange.fold import Folder
from fedsim.exchange.payload import Payload
from fedsim.flower import contract
from fedsim.flower.answers import NodeAnswer, absent
from fedsim.flower.habitsfile import HabitsFile
from fedsim.flower.masking import LEGS, MaskingSite, masks
from fedsim.flower.nodelog import briefly
from fedsim.flower.options import Node
from fedsim.flower.standing import StandingFile, content
from fedsim.flower.statefiles import StateFiles, forget_old
from fedsim.flower.wire import WIRE, Ask
from fedsim.run import participants, samples
from fedsim.run.given import Given
from fedsim.run.preparation import learning_task, load_data, plan
from fedsim.task.copies import copied
from fedsim.task.frozen import base_of
from fedsim.task.layout import Layout
from fedsim.task.vectors import FlatModel

LARGE = 1 << 23  # numbers of a model of which a process holds no copy that it can do without

_built: dict[tuple[str, int | None], Worker] = {}


@dataclass(frozen=True)
class Site:
    """One client's configuration and worker."""

    node: Node
    config: DictConfig
    worker: Worker

    @staticmethod
    def of(config: DictConfig, node: Node, run: int) -> Site:
        """Build it, or take what this process built before for the same settings and data; ``run``: Flower's number,
        which stands for the code."""
        config = node.localise(config)
        owner = node.client if node.own_data else None
        key = (json.dumps(plain(config), sort_keys=True), owner)
        if key not in _built:
            _built.clear()
            with contract.reading(config, node), not_cached():
                _built[key] = _build(config, owner, HabitsFile(node.state_dir, node.client, (*key, run)))
        return Site(node, config, _built[key])

    def describe(self) -> dict[str, Any]:
        """What the server wants to know before it gives this node work."""
        data, base = self.worker.data, base_of(self.worker.plan.task.model)
        return {
            **(base.metadata() if base else {}),
            "wire": WIRE,
            "client": self.node.client,
            "samples": int(data.shards.sizes[self.node.client]),
            "counts": self._counts(),
            "own": self.node.own_data,
            "partition": data.shards.hash(),
            "layout": layout_name(self.worker.model),
            "contract": contract.introduce(
                self.config, self.node, self.worker, layout_name(self.worker.model)
            ),
            "host": socket.gethostname(),
            "instance": _claim(self.node),
        }

    def _counts(self) -> list[int]:
        """Samples per class where the data are the node's own: more than their numbers does not leave it, and under
        privacy not even these, which no noise covers."""
        data = self.worker.data
        counts = self.node.own_data and self.worker.privacy is None
        if not counts or data.dataset.class_labels() is None:
            return []
        return [int(n) for n in data.class_counts(self.node.client)]

    def answer(self, ask: Ask) -> NodeAnswer:
        """Do what is asked with the state that the server names, and put a new state into its file."""
        if ask.client != self.node.client:
            return absent(ask.client, "failed", f"this node is client {self.node.client}")
        place, layout = (self.node.state_dir, ask.run, ask.client), self.worker.model.layout
        forget_old(self.node.state_dir, self.node.keep_days, but=ask.run)
        files, round, restarted = StateFiles(*place, layout), ask.broadcast.round, False
        masking, release = MaskingSite(files.folder, ask), self.worker.plan.release
        if ask.broadcast.task in LEGS:
            if release is None or release.secure is None or not release.secure.masks:
                return absent(
                    ask.client, "failed", "the configuration of this node says nothing of secagg=masks"
                )
            return masking.answer()
        chunk, numbered = masking.alone(), NUMBER in ask.broadcast.payload.values
        keeps = StandingFile(*place, layout, name="model" if numbered else "standing")
        broadcast, came = ask.broadcast, ask.broadcast.standing
        if ask.held:
            found = keeps.read(ask.held) or self._caught_up(keeps, ask) or self._initial(ask.held)
            if found is None:
                return self._lacking(ask)
            broadcast = replace(broadcast, standing=found)
        elif came is not None and not numbered:
            keeps.write(came)
        if ask.state is not None:
            state = files.read(ask.state)
            restarted = state is None
            if state is not None:
                chunk = replace(chunk, states={ask.client: state})
            elif self.config.engine.lost_state == "stop":
                return self._lost(ask, files.path(ask.state))
        torch.set_num_threads(self.worker.plan.threads)
        try:
            update = Single(broadcast.fold)
            result = self.worker.run(broadcast, chunk, update)
            if result.outcomes[0].kind == "ok" and release and masks(release, broadcast.fold, broadcast.task):
                names = release.summed(broadcast.fold, broadcast.task)
                update.arrays = masking.masked(names, update.arrays)
        except ClientError as error:  # it wrote to what is read-only
            return absent(ask.client, "failed", str(error))
        outcome, new = result.outcomes[0], result.states.get(ask.client)
        if outcome.kind == "nonfinite" and self.worker.plan.release is not None:
            outcome.kind = "refused"  # what is not finite has not passed the release and stays here
        if outcome.metrics and (privacy := self.worker.privacy) is not None and privacy.metrics == "drop":
            outcome.metrics = {}  # what the log would like to know is not under the budget
        if outcome.kind == "failed":
            outcome.reason = briefly(outcome.reason, ask.client, round + 1)
        if (broadcast.keep or numbered) and outcome.kind == "ok":
            held = broadcast.opened(self.worker.plan, layout).payload if numbered else broadcast.payload
            keeps.write(Payload({MODEL: held.arrays[MODEL]}) if numbered else held)
        if new is not None:
            files.write((round, ask.exchange), new)
        files.prune(round, ask.state)
        return NodeAnswer(outcome, update.arrays, stateful=new is not None, restarted=restarted)

    def _caught_up(self, keeps: StandingFile, ask: Ask) -> Payload | None:
        """The model that a message moves, by frames that this node missed, if it holds what these move."""
        release, steps = self.worker.plan.release, steps_of(ask.chunk.part(ask.client))
        held = keeps.read() if steps else None
        if held is None or release is None or (codec := release.compression) is None:
            return None
        about = (self.worker.plan.seed, self.worker.model.layout)
        found = Payload({MODEL: stepped(codec, held.arrays[MODEL], steps, *about)})
        return found if content(found, self.worker.model.layout) == ask.held else None

    def _initial(self, wanted: str) -> Payload | None:
        """The model that this node starts from by itself, if a message relies on that: it need not be sent."""
        plan = self.worker.plan
        start = FlatModel(copied(plan.task.model), plan.dtype).weights
        found = Payload({k: v for k, v in start._asdict().items() if len(v)})
        return found if content(found, self.worker.model.layout) == wanted else None

    def _lacking(self, ask: Ask) -> NodeAnswer:
        """Nothing is done; the server sends the message again, with what it relies on."""
        return replace(
            absent(ask.client, "failed", "this node has not what the message relies on"), lacks=True
        )

    def _lost(self, ask: Ask, path: Path) -> NodeAnswer:
        assert ask.state is not None
        text = f"client {ask.client} lost its state of round {ask.state[0] + 1}: no {path}"
        remedy = "engine.lost_state=restart lets such clients begin again from their initial state"
        return replace(absent(ask.client, "failed", f"{text} ({remedy})"), lost=True)


class Single(Folder):
    """One client's update as it is, to be folded elsewhere; it travels, and counts, even if it is not finite.

    Its arrays may be the worker's own memory: they are to be sent before the worker does anything else.
    """

    def __init__(self, fold: Mapping[str, tuple[str, ...]]):
        super().__init__(fold)
        self.arrays: dict[str, Tensor] = {}

    def check(self, arrays: Mapping[str, Tensor]) -> None:
        """Keep what is not refused."""
        super().check(arrays)
        self.arrays = {k: t.cpu() for k, t in arrays.items()}

    def frames(self, frames: Mapping[str, Tensor]) -> None:
        """Frames travel in the place of what is folded."""
        self.arrays |= {k: t.cpu() for k, t in frames.items()}

    def add(self, arrays: Mapping[str, Tensor], weight: float) -> None:
        """Nothing to do."""


def forget(layout: Layout | None) -> None:
    """Let go of what this process built, if that is large: it works on one message, and needs room for its reply."""
    if layout is not None and layout.size > LARGE:
        _built.clear()


def layout_name(model: FlatModel) -> str:
    """Names and shapes of the model's vectors: what both sides must agree on."""
    layout = model.layout
    return json.dumps([[s.name, list(s.shape)] for s in (*layout.params, *layout.buffers)])


def _build(config: DictConfig, owner: int | None, habits: HabitsFile) -> Worker:
    """The worker of a simulation, on all data, or on those of the one client who owns what lies here."""
    method = participants.strategy(config, None)
    if owner is None:
        data = load_data(config, Given(), method)
    else:
        data = samples.owned(config, contract.of_ones_own(config), owner)
    task = learning_task(config, Given(), data, method, habits.found)
    size = Layout(task.model).size
    work = plan(config, method, task, data, participants.clock(config, task, data, size))
    return Worker(replace(work, sole=size > LARGE))


def _claim(node: Node) -> str:
    """An id that lives as long as the node's state folder; refused while another node's processes hold the client.

    The file names the process that starts this node's client processes. Two nodes of one machine that are told to be
    the same client are found here, two machines at the server.
    """
    folder = node.state_dir / "nodes"
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / f"client-{node.client}.json", {"host": socket.gethostname(), "pid": os.getppid()}
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged
        before = {}
    if before.get("host") == me["host"] and before.get("pid") != me["pid"] and _serves(before.get("pid")):
        raise ConfigError(
            f"client {node.client} is served by another node of this machine already (its process {before['pid']}); "
            "give this one another partition-id, or another state-dir if it is meant to take over"
        )
    mine = {"instance": before.get("instance") or uuid.uuid4().hex, **me}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(mine))
    scratch.replace(path)
    return str(mine["instance"])


def _serves(pid: Any) -> bool:
    """Whether that process lives and is one of Flower's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"flower" in words or b"flwr" in words
