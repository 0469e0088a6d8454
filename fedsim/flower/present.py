"""Who is there before round 1, and whom a run goes on without: by ``failures.policy=skip`` those who do not fit."""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from fedsim.config.schema import FlowerConfig
from fedsim.errors import EngineError
from fedsim.flower.nodes import Nodes

log = logging.getLogger(__name__)


def gather(nodes: Nodes, config: DictConfig, engine: FlowerConfig) -> list[int]:
    """Wait for the nodes; the clients that the run goes on without, by ``failures.policy=skip``.

    Raises:
        EngineError: with what is wrong with every node that was refused.
    """
    try:
        nodes.wait(engine.wait_for or config.num_clients, engine.start, engine.poll)
    except EngineError:
        missing = [c for c in range(config.num_clients) if c not in nodes.of]
        if config.failures.policy != "skip" or not nodes.of or len(missing) > nodes.turned_away:
            raise
        for node, why in nodes.refused.items():
            log.warning("failures.policy=skip: the run goes on without node %d: %s", node, why)
        nodes.event("without", clients=missing, reasons=list(nodes.refused.values()))
        return missing
    return []


def examine(nodes: Nodes, config: DictConfig) -> list[int]:
    """Let ``nodes.check`` look at all nodes that joined before it was there; the clients that the run goes on without.

    Raises:
        EngineError: a line for each node that cannot take part.
    """
    assert nodes.check is not None
    bad = {node.id: why for _, node in sorted(nodes.of.items()) if (why := nodes.check(node))}
    faults = {c: bad[node.id] for c, node in sorted(nodes.of.items()) if node.id in bad}
    lines = [f"client {c}, {nodes.of[c].name}: {why}" for c, why in faults.items()]
    if faults and (config.failures.policy != "skip" or len(faults) == len(nodes.of)):
        raise EngineError("\n".join(lines))
    for client, line in zip(faults, lines, strict=True):
        log.warning("failures.policy=skip: the run goes on without %s", line)
        nodes.lose(client, faults[client])
        nodes.missing[client] = faults[client]
    if faults:
        nodes.event("without", clients=list(faults), reasons=lines)
    return list(faults)


def outvoted(nodes: Nodes, config: DictConfig) -> list[int]:
    """Clients whose nodes say of ``own-data`` what less than half of all do: by ``failures.policy=skip`` the run goes
    on without them."""
    own = [c for c, node in sorted(nodes.of.items()) if node.own]
    others = [c for c in sorted(nodes.of) if c not in own]
    few = min(own, others, key=len)
    if not few or len(own) == len(others) or config.failures.policy != "skip":
        return []
    why = f"own-data={str(few is own).lower()}, which most nodes say otherwise"
    for client in few:
        log.warning("failures.policy=skip: the run goes on without client %d: %s", client, why)
        nodes.lose(client, why)
    nodes.event("without", clients=few, reasons=[f"client {c}: {why}" for c in few])
    return few


def leave_out(nodes: Nodes, config: DictConfig, gone: list[int], resumes: bool) -> None:
    """A run that begins excludes who is ``gone``, for good. One that goes on does not become another run by that: such
    a client fails in each round in which it is asked, with the reason, until its node is back as it was."""
    if not resumes:
        nodes.without = sorted(gone)
        config.exclude = sorted({*config.exclude, *gone})
        return
    for client in gone:
        nodes.missing.setdefault(
            client, "its node was refused when the run was resumed, and is not back since"
        )
