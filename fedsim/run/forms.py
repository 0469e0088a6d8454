"""What some forms of a method ask of the run, told before data are read."""

from __future__ import annotations

from omegaconf import DictConfig

from fedsim.config.parts import as_dataclass
from fedsim.config.schema import ClientConfig
from fedsim.local.optimiser import check_gradient_steps
from fedsim.local.rates import prepared
from fedsim.run.given import Given
from fedsim.server.traits import ChecksRun, StrategyLike


def check_forms(method: StrategyLike, config: DictConfig, given: Given) -> None:
    """Refuse local steps that the client cannot read gradients from, and what the strategy says itself.

    Raises:
        ConfigError: naming the setting, and what to type.
    """
    local = as_dataclass(config.client, ClientConfig)
    check_gradient_steps(method.client, prepared(local, config.rounds))
    if isinstance(method, ChecksRun):
        at_server = config.data.get("labelled") is not None and config.data.labelled.get("at") == "server"
        server = given.server is not None or bool(config.data.get("server")) or at_server
        validation = given.validation is not None or bool(config.evaluation.validation)
        method.check_run(local, server=server, validation=validation)
