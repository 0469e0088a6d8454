"""Can one tell who was in? A lower bound on epsilon from the canaries of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsim.config.compose import load
from fedsim.errors import ConfigError
from fedsim.replay.bound import LEVEL, epsilon_lower_bound, right_guesses
from fedsim.replay.claims import claim, said
from fedsim.replay.variants import BaseRun
from fedsim.tracking.rows import to_json

SCORES = ("loss", "gap")


def membership(
    folders: Sequence[Path], *, score: str = "loss", claimed: float | None = None, delta: float | None = None
) -> dict[str, Any]:
    """The bound of every run and their median, as ``fedsim audit --json`` prints them.

    ``score``: ``loss`` guesses by minus the loss of the final model, ``gap`` by how much less it is than that of the
    initial one. ``broken``: the median exceeds the ``claimed`` epsilon: what the runs account for (``privacy``), at its
    delta, in the relation that a canary in or out is (see ``claims``), unless another is given; ``None`` where what
    they account for says nothing of that. ``delta`` is of the claim, and the accounted one where that is left out,
    else 0.

    Raises:
        ConfigError: for a run without canaries, or one that stands twice.
    """
    if twice := [f for f in folders if [g.resolve() for g in folders].count(f.resolve()) > 1]:
        raise ConfigError(f"{twice[0]}: stands twice; runs are told apart by their seeds")
    claims = [claim(folder) for folder in folders]
    known = [one for one in claims if one is not None]
    binding = [one.binds for one in known if one.binds is not None]
    if claimed is None and delta is None and len(binding) == len(folders):
        claimed = max(binding)
    if delta is None:
        delta = max((one.delta for one in known), default=0.0)
    runs = [
        _one(folder, score, delta) | ({} if one is None else one.entries())
        for folder, one in zip(folders, claims, strict=True)
    ]
    bounds = [run["epsilon"] for run in runs]
    middle = median(bounds)
    return {
        "runs": runs,
        "score": score,
        "delta": delta,
        "level": LEVEL,
        "epsilon": {"median": middle, "low": min(bounds), "high": max(bounds)},
        "claimed": claimed,
        "broken": None if claimed is None else middle > claimed,
    }


def _one(folder: Path, score: str, delta: float) -> dict[str, Any]:
    from fedsim.run import canaries

    config = load(folder / "config.yaml")
    m = int(config.audit.canaries)
    if not m:
        raise ConfigError(
            f"{folder}: this run has no canaries; run it with audit.canaries=200, or give --clients for its clients"
        )
    base = BaseRun.of(folder)
    scores, there, tried = scores_of(base, score), canaries.present(config), canaries.guesses(config)
    level = LEVEL / len(tried)  # Bonferroni: the best of several
    found = []
    for r in tried:
        v = right_guesses(scores, there, r)
        found.append({"guesses": r, "right": v, "epsilon": epsilon_lower_bound(m, r, v, delta, level)})
    best = max(found, key=lambda one: one["epsilon"])
    return {
        "run": str(folder),
        "seed": int(config.seed),
        "canaries": m,
        "in": int(there.sum()),
        **best,
        "tried": found,
    }


def scores_of(base: BaseRun, score: str) -> np.ndarray:
    """Of each canary (m,): the higher, the likelier it was in."""
    from fedsim.data.local import LocalData
    from fedsim.run import canaries
    from fedsim.run.given import Given
    from fedsim.run.participants import strategy
    from fedsim.run.preparation import learning_task, load_data
    from fedsim.run.pretraining import pretrained
    from fedsim.run.result import load_run

    config, given = base.config, Given()
    data = load_data(config, given, strategy(config, None))
    given, _ = pretrained(config, given, data, lambda text: None)
    task = learning_task(config, given, data)
    trained = load_run(base.dir).model()
    m, own = int(config.audit.canaries), canaries.size(config)

    def losses(module: nn.Module) -> np.ndarray:
        module = module.eval()
        dtype = next(module.parameters()).dtype
        rows = torch.arange(len(data.dataset.train))[-m * own :]
        samples = LocalData(data.dataset.train, rows, dtype, data.dataset.normalize)
        with torch.no_grad():
            each = (samples.read(torch.arange(i * own, (i + 1) * own)) for i in range(m))
            return np.array([float(task.value(module, batch)) for batch in each])

    found = -losses(trained)
    return found + losses(task.model.to(next(trained.parameters()).dtype)) if score == "gap" else found


def leave_word(found: Mapping[str, Any]) -> None:
    """Put each run's bound into its folder, ``audit.json``, from where a report takes it; a full disk is no error."""
    for run in found["runs"]:
        with suppress(OSError):
            text = to_json({**run, "delta": found["delta"], "level": found["level"], "score": found["score"]})
            (Path(run["run"]) / "audit.json").write_text(text + "\n", encoding="utf-8")


def lines(found: Mapping[str, Any]) -> list[str]:
    """What ``fedsim audit`` prints."""
    out = [
        f"seed {run['seed']}: {run['right']} of {run['guesses']} guesses right of {run['canaries']} canaries, "
        f"epsilon at least {run['epsilon']:.2f}" + (f"; {said(run)}" if "accounted" in run else "")
        for run in found["runs"]
    ]
    e = found["epsilon"]
    if len(found["runs"]) > 1:
        out.append(
            f"epsilon at least {e['median']:.2f} in the median, from {e['low']:.2f} to {e['high']:.2f}"
        )
    out.append(f"(bound from below at level {found['level']:g}, delta {found['delta']:g}: 0 means not shown)")
    out += [f"({why})" for why in dict.fromkeys(run["why"] for run in found["runs"] if run.get("why"))]
    if found["broken"]:
        of = (
            ", for one client replaced"
            if any(run.get("why") and run["compared_relation"] for run in found["runs"])
            else ""
        )
        out.append(f"the claimed epsilon {found['claimed']:g} is below it: the claim is broken{of}")
    return out
