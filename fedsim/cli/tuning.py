"""What a job of a sweep that optimises hands to the sweeper: the objective, of validation data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, ListConfig

from fedsim.config.compose import plain
from fedsim.errors import ConfigError, FedsimError
from fedsim.report.objective import Objective, number_of
from fedsim.run.key import has_trait

GRID = "basic_sweeper"  # Hydra's own, which asks for no result


def optimises(info: HydraConf) -> bool:
    """Whether the sweeper waits for a number of each job, by which it chooses the next ones."""
    return GRID not in str((info.sweeper or {}).get("_target_"))


def objective_of(config: DictConfig, personal: bool) -> Objective:
    """The objective that a search goes by: where ``objective.on`` says nothing, on validation data.

    Methods whose result are the clients' ``personal`` models go by the clients' validation data.

    Raises:
        ConfigError: if there are no such data.
    """
    plan = config.evaluation
    default = "clients_val" if personal or (plan.client_validation and not plan.validation) else "val"
    objective = Objective.of(plain(config), default)
    if objective.at != "best_val" and objective.on not in ("val", "clients_val"):
        return objective
    key = "validation" if objective.validation.on == "val" else "client_validation"
    if plan[key]:
        return objective
    if config.objective.on is None and not personal:
        raise ConfigError(
            "tuning on test data: type evaluation.validation=0.1, or objective.on=test to do it knowingly"
        )
    why = "the method's results are the clients' own models" if personal else f"of {objective.column}"
    raise ConfigError(f"tuning without validation data ({why}): type evaluation.{key}=0.1")


def check_search(config: DictConfig, info: HydraConf) -> Objective:
    """The objective of a sweep that optimises, if the sweeper's direction agrees with it."""
    objective = objective_of(config, has_trait(config, "personal"))
    direction: Any = info.sweeper.get("direction")
    wanted = "maximize" if objective.sign > 0 else "minimize"
    if direction is None or isinstance(direction, ListConfig | list):
        return objective
    said = str(getattr(direction, "name", direction)).lower()
    if said != wanted:
        raise ConfigError(
            f"hydra.sweeper.direction={said}: {objective.column} is to be {wanted.removesuffix('e')}ed; type "
            f"hydra.sweeper.direction={wanted}, or objective.direction={'max' if said == 'maximize' else 'min'}"
        )
    return objective


def result_of(config: DictConfig, folder: str, summary: Mapping[str, Any] | None) -> float:
    """The objective of a job that is done; NaN if it failed, or has not measured it."""
    if summary is None or not folder:
        return math.nan
    try:
        return number_of(folder, objective_of(config, bool(summary.get("personal")))).value
    except (FedsimError, OSError):
        return math.nan
