"""What a finished run would have taken on other devices: priced again from its record, without training."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_object
from omegaconf import DictConfig

from fedsim.config import compose as settings
from fedsim.config.check import check_target
from fedsim.config.yamlfile import read_yaml
from fedsim.errors import ConfigError
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.report.runs import Run
from fedsim.run import initial, participants, preparation, samples
from fedsim.run.given import Given
from fedsim.server.traits import Traits
from fedsim.system.availability import Always
from fedsim.system.clock import Clock
from fedsim.system.cost import Cost, count_flops
from fedsim.system.start import start_clock
from fedsim.tracking.rows import read_rows

Counts = dict[int, dict[str, float]]  # of one exchange: client to bytes and passes
COUNTED = ("bytes_down", "bytes_up", "gradients", "forwards")


def compose_system(option: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The ``system`` settings of an option's name or of a YAML file written like one, with ``overrides``."""
    named = option
    with tempfile.TemporaryDirectory(prefix="fedsim-system-") as folder:
        search = list[str]()
        if option.endswith((".yaml", ".yml")):
            if not Path(option).is_file():
                raise ConfigError(f"--system {option}: no such file")
            read_yaml(Path(option))
            (Path(folder) / "system").mkdir()
            shutil.copy(option, Path(folder) / "system" / "given_file.yaml")
            named, search = "given_file", [f"hydra.searchpath=[file://{folder}]"]
        config = settings.compose([f"system={named}", *overrides, *search])
    if not config.system:
        raise ConfigError(f"--system {option}: holds no devices; type lognormal, phones, table or a file")
    check_target("system", config.system)
    return config


def reprice(run: Run, system: DictConfig) -> Run:
    """The run with the virtual times and energies of another fleet (``system`` as by ``compose_system``).

    Raises:
        ConfigError: if on that fleet other clients would have taken part or other updates have been made, or if the
            record does not tell.
    """
    config = settings.load(run.dir / "config.yaml")
    method: Traits = _declared(config.strategy, "strategy").traits
    _check_recorded(run, config, method)
    config.system = system.system
    clock = _clock(run, config, 1 if method.pooled else config.num_clients)
    by_round = dict(_exchanges(run))
    rows = []
    for row in run.rows:
        parts = [
            _price(clock, counts, int(row["round"]) - 1, n)
            for n, counts in enumerate(by_round.get(row["round"], []))
        ]
        seconds, joules = (math.fsum(p[i] for p in parts) for i in (0, 1))
        if not parts:
            seconds = clock.system.idle
        kept = {k: v for k, v in row.items() if k not in ("sim_seconds", "joules")}
        rows.append({**kept, "sim_seconds": seconds} | ({} if math.isnan(joules) else {"joules": joules}))
    return replace(run, rows=rows, config={**run.config, "system": settings.plain(config)["system"]})


def check_never_asked(run: Run, clients: Sequence[int]) -> None:
    """Refuse to price a run without clients that were asked for something: without them it is another run.

    Raises:
        ConfigError: with the command that computes that one.
    """
    for row in run.rows:
        for client in clients:
            if client in (row.get("cohort") or ()):
                raise ConfigError(
                    f"{run.dir}: client {client} was in the cohort of round {row['round']}, so the run without it is "
                    f"another one; type fedsim forget {run.dir} --client {client}, and report that"
                )


def _check_recorded(run: Run, config: DictConfig, method: Traits) -> None:
    """Refuse runs whose updates depended on how long clients took."""
    own, where = config.system, f"{run.dir}: cannot be priced on other devices: "
    if method.asynchronous:
        raise ConfigError(
            f"{where}updates of an asynchronous method come in the order of their virtual times"
        )
    if own:
        changes = own.deadline is not None or own.over_selection > 1
        changes |= any(own.dropout.get(k, 0) > 0 for k in ("before", "during", "after"))
        changes |= any("battery" in row for row in run.rows)
        if changes or not str(own.availability.get("_target_")).endswith(".Always"):
            raise ConfigError(
                f"{where}who took part depended on its own devices (deadline, dropout, availability or battery)"
            )
    if _declared(config.sampling, "sampling").by_time:
        raise ConfigError(f"{where}its sampling rule looked at how long clients took or would stay")
    if config.client.get("classes") and config.client.classes_by == "speed":
        raise ConfigError(f"{where}its classes of clients went by the speed of its own devices")


def _clock(run: Run, config: DictConfig, num_clients: int) -> Clock:
    """The clock of the other fleet, unless that would choose other clients."""
    where = f"{run.dir}: cannot be priced on these devices: "

    def measure() -> Cost:
        handed = [k for k in ("model", "data") if "given" in (config.get(k) or {})]
        if handed:
            raise ConfigError(
                f"{where}system.work=flops needs the {handed[0]}, which was handed over in Python; use work=samples"
            )
        data = samples.split(config, samples.dataset(config))
        dtype = initial.DTYPES[config.dtype]
        return count_flops(
            preparation.learning_task(config, Given(), data), dtype, samples.example(data, dtype)
        )

    system = participants.system(config)
    clock = start_clock(system, num_clients, config.seed, 0.0, measure)
    if system.deadline is not None or system.over_selection > 1 or system.dropout:
        raise ConfigError(f"{where}deadlines, over-selection and dropout would change who takes part")
    if clock.batteries is not None:
        raise ConfigError(f"{where}batteries would change who takes part; use system.devices.battery=null")
    if not isinstance(clock.presence, Always):
        raise ConfigError(
            f"{where}who comes and goes would take part at other times; use system/availability=always"
        )
    return clock


def _declared(node: DictConfig, key: str) -> Any:
    """The class of a part, which says what the part is."""
    try:
        return get_object(str(node.get("_target_")))
    except Exception as error:
        raise ConfigError(f"{key}: {node.get('_target_')} cannot be imported ({error})") from error


def _exchanges(run: Run) -> Iterator[tuple[int, list[Counts]]]:
    """Per round what each client sent, received and computed, exchange by exchange."""
    path = run.dir / "clients.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run.dir}: has no clients.jsonl, which tells what each client sent and computed")
    found: dict[int, list[Counts]] = {}
    last: tuple[int, str] | None = None
    for row in read_rows(path):
        prefix, _, metric = str(row["metric"]).rpartition("/")
        if metric not in COUNTED or is_measuring(prefix):
            continue
        parts, client = found.setdefault(int(row["round"]), []), int(row["client"])
        if (row["round"], prefix) != last or metric in parts[-1].get(client, {}):
            parts.append({})
        last = row["round"], prefix
        parts[-1].setdefault(client, {})[metric] = float(row["value"])
    if found and not any("gradients" in c for parts in found.values() for p in parts for c in p.values()):
        raise ConfigError(f"{path}: recorded before passes were counted; run it again")
    yield from found.items()


def _price(clock: Clock, counts: Counts, round: int, number: int) -> tuple[float, float]:
    """Virtual seconds and joules of one exchange that waits for everybody."""
    ids = np.array(sorted(counts), dtype=np.int64)
    get: Callable[[str], np.ndarray] = lambda k: np.array([counts[int(c)].get(k, 0.0) for c in ids])  # noqa: E731
    units = clock.cost.gradient * get("gradients") + clock.cost.forward * get("forwards")
    delay, compute = clock.fleet.latency[ids] / 1e3, units / clock.fleet.speed[ids]
    down = delay + get("bytes_down") / clock.rate("down", ids, round, number)
    up = delay + get("bytes_up") / clock.rate("up", ids, round, number)
    joules = clock.fleet.compute_watts[ids] * compute + clock.fleet.radio_watts[ids] * (down + up)
    return float((down + compute + up).max()), math.fsum(joules)
