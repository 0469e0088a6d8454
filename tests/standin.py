"""A stand-in for the simulator, for tests of the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig, OmegaConf

from fedsim.cli import launch  # noqa: F401 - before the stand-ins take the place of what it imports
from fedsim.report import terminal
from fedsim.run.key import run_dir, run_key


class Simulator:
    """Stand-in for ``fedsim.api``: writes a run folder at once, or fails as it was told."""

    def __init__(self) -> None:
        self.errors: dict[int, BaseException] = {}  # by seed
        self.ran: list[DictConfig] = []
        self.salt = ""

    def run(self, config: DictConfig, **_: object) -> SimpleNamespace:
        self.ran.append(config)
        if config.seed in self.errors:
            raise self.errors[config.seed]
        folder = run_dir(config)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        hashes = [run_key(config)[:8] + (self.salt if r == 2 else "") for r in range(1, 4)]
        rows = [
            {"round": r, "weights_hash": h, "accuracy": 0.9, "val/accuracy": r / 10}
            for r, h in enumerate(hashes, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "curves.png").touch()
        summary = {"status": "done", "accuracy": 0.5}
        (folder / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(dir=folder, summary=summary)


class Named(str):
    """A run that is known by its folder."""

    @property
    def dir(self) -> Path:
        return Path(self)


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulator:
    """The stand-in and one for ``fedsim.report``, in an empty working directory."""
    simulator = Simulator()
    report = SimpleNamespace(
        compare=lambda runs, target=None: (len(runs), target),
        default_plan=lambda runs: None,
        clients_plan=lambda runs, plan: None,
        print_table=lambda table: print("table", *table),
        heterogeneity=SimpleNamespace(lines=lambda groups: ()),
        draw_curves=lambda runs, path: path.write_text(" ".join(runs)),
    )
    report.load_runs = lambda dirs: [Named(str(d)) for d in dirs]
    runs = SimpleNamespace(load_runs=report.load_runs)
    cluster = SimpleNamespace(warm_up=lambda config: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "fedsim.api", simulator)
    monkeypatch.setitem(sys.modules, "fedsim.report", report)
    monkeypatch.setitem(sys.modules, "fedsim.report.runs", runs)
    monkeypatch.setitem(sys.modules, "fedsim.report.terminal", terminal)
    monkeypatch.setitem(sys.modules, "fedsim.engine.ray.cluster", cluster)
    monkeypatch.chdir(tmp_path)
    return simulator
