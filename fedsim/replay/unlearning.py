"""Exact unlearning: the run that there would have been without some clients, or some of their samples.

It is a function of the other clients' data only. It starts from the last checkpoint before those clients were first
asked for anything, if one was kept: until then both runs agree, unless the method counts all clients. Those that
compute with their number agree only where samples are forgotten, not clients.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.errors import ConfigError
from fedsim.replay.again import begin_at, rounds_there, weights_hashes
from fedsim.replay.variants import BaseRun, existing
from fedsim.run.holdings import alone

RECORD = "forget.json"


@dataclass(frozen=True)
class Forgetting:
    """What is to be done: ``config`` of the new run, and from which checkpoint."""

    base: BaseRun
    clients: tuple[int, ...]
    samples: Mapping[int, list[int]]
    config: DictConfig
    first_met: int | None  # round in which they were first asked for something
    why_all: str  # why the run begins anew; empty if it need not

    @property
    def folder(self) -> Path:
        """Of the new run."""
        return Path(self.config.dir)

    def facts(self) -> dict[str, Any]:
        """As ``forget.json`` begins."""
        return {
            "run": str(self.base.dir),
            "without": str(self.folder),
            "clients": list(self.clients),
            "samples": {str(c): list(at) for c, at in self.samples.items()},
            "first_met": self.first_met,
            "from_zero": self.why_all or None,
        }


def plan(
    folder: Path, clients: Collection[int], samples: Mapping[int, Sequence[int]] | None = None
) -> Forgetting:
    """What it takes to forget ``clients``, or ``samples`` by client and position, of the run in ``folder``.

    Raises:
        ConfigError: if the run cannot be computed again, or a client or sample does not exist.
    """
    base, own = BaseRun.of(folder), {int(c): sorted(map(int, at)) for c, at in (samples or {}).items()}
    named = sorted({*clients, *own})
    if not named:
        raise ConfigError("forget: whom? give --client K or --samples K:POSITION,...")
    there = set(base.clients)
    if strange := [c for c in named if c not in there]:
        gone = strange[0] in base.config.exclude
        raise ConfigError(
            f"client {strange[0]} {'is excluded from this run already' if gone else 'does not exist'}: "
            f"{folder} has clients 0 to {int(base.config.num_clients) - 1}"
        )
    if there <= set(clients):
        raise ConfigError(f"forget: of the {len(there)} clients of {folder} nobody would be left to train")
    if bad := [f"{c}:{at}" for c, one in own.items() for at in one if at < 0]:
        raise ConfigError(f"forget: sample {bad[0]}: positions go from 0")
    changes: dict[str, Any] = {}
    if own:
        from fedsim.run.samples_left_out import positions

        before = positions(base.config)
        merged = before | {c: sorted({*before.get(c, []), *at}) for c, at in own.items()}
        changes["exclude_samples"] = {c: at for c, at in merged.items() if c not in set(clients)}
    config = base.without(clients, **changes)
    if own:
        _check_positions(base, own, config)
    why = base.reason(samples_only=not clients)
    return Forgetting(base, tuple(sorted(clients)), own, config, base.first_met(named), why)


def _check_positions(base: BaseRun, samples: Mapping[int, Sequence[int]], config: DictConfig) -> None:
    """Refuse positions beyond a client's last sample; data are read only where the partition on disk leaves doubts.

    Raises:
        ConfigError: naming client and range.
    """
    trained = base.trained  # fewer than what the partition gave, of which some are for tests
    if trained and all(at < trained[c] for c, positions in samples.items() for at in positions):
        return
    from fedsim.run.given import Given
    from fedsim.run.participants import strategy
    from fedsim.run.preparation import load_data

    load_data(config, Given(), strategy(config, None))


def forget(todo: Forgetting, *, purge: bool = False) -> dict[str, Any]:
    """Compute the run without them, unless that is done; write ``forget.json`` into its folder; its content.

    With ``purge`` the old folder, and embeddings of its samples in the cache, are deleted once the new run is done.
    """
    from fedsim.api import run

    began, base, folder = time.perf_counter(), todo.base, todo.folder
    before = weights_hashes(base.dir)
    record = folder / RECORD
    start = 0
    if existing(todo.config) is None:
        begun = (folder / "checkpoint").is_dir() or (folder / "metrics.jsonl").exists()
        if not todo.why_all and not begun:
            begin_at(base.dir, todo.first_met or len(base.rows) + 1, todo.config, folder, mark="")
        start = rounds_there(folder)
        run(todo.config)
    elif record.is_file():
        start = int(json.loads(record.read_text()).get("start", 0))
    after = weights_hashes(folder)
    rounds = int(todo.config.rounds)
    found = todo.facts() | {
        "start": start,
        "replayed": [start + 1, rounds] if start < rounds else None,
        "hashes": {"before": before.get(max(before)), "after": after.get(max(after))},
        "cost": {"rounds": rounds - start, "seconds": round(time.perf_counter() - began, 3)},
        "purged": purge,
    }
    if purge:
        found["purged"] = _purge(base)
    record.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _purge(base: BaseRun) -> list[str]:
    """Delete the old folder and, if an encoder was used, all cached embeddings; what was deleted."""
    gone = [str(base.dir)]
    if base.config.encoder:
        from fedsim.data.cache import cache_dir

        for entry in sorted(cache_dir().glob("embeddings-*")):  # of all clients' samples together
            shutil.rmtree(entry)
            gone.append(str(entry))
    with alone(base.dir):
        shutil.rmtree(base.dir)
    return gone
