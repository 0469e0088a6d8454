"""The model that a run starts from, measured: what nobody's training is worth."""

from __future__ import annotations

import tempfile
from typing import Any

from omegaconf import DictConfig

from fedsim.config.parts import as_dataclass
from fedsim.config.schema import EvaluationConfig
from fedsim.engine.base import SerialEngine
from fedsim.replay.again import as_simulation
from fedsim.rng import undisturbed
from fedsim.run import participants
from fedsim.run.assembly import assemble
from fedsim.run.given import Given
from fedsim.run.preparation import learning_task, load_data, settle
from fedsim.run.pretraining import pretrained
from fedsim.server.measuring import measured
from fedsim.server.round import Round
from fedsim.tracking import build


def untrained(config: DictConfig) -> dict[str, Any]:
    """The row that a round would have had after which the model is still the initial one."""
    with tempfile.TemporaryDirectory(prefix="fedsim-untrained-") as place, undisturbed():
        config, given, engine = as_simulation(config, place), Given(), SerialEngine()
        settle(config, given)
        method = participants.strategy(config, None)
        topology = participants.agreed(config, method)
        data = load_data(config, given, method)
        given, _ = pretrained(config, given, data, lambda text: None)
        task = learning_task(config, given, data, method)
        try:
            trackers = build(config.tracker)
            loop = assemble(config, given, method, task, data, engine, trackers, "untrained", topology)
            loop.rounds = 0
            loop.run()  # the strategy's first state
            run = loop.server
            server = run.begin(Round(0, (), run.num_clients, run.seed, run.local, None))
            plan = as_dataclass(config.evaluation, EvaluationConfig)
            found = measured(server, method, loop.state, plan, True, lambda: loop.models()["global"])
        finally:
            engine.close()
        return {"round": 0, **found}
