"""Runs on simulated devices: the problems of the core, and fleets whose numbers are easy to check by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import compose_quickly

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.api.compose", compose_quickly)


@pytest.fixture
def traces() -> Path:
    if not TRACES.is_dir():
        pytest.skip(f"the device traces are not at {TRACES}")
    return TRACES


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    """Overrides for six devices: 10 samples/s but client 2, 1 kB/s down, 0.5 kB/s up, 100 ms, 2 W and 1 W."""
    rows = [f"{c},{10 if c != 2 else 1},1,0.5,100,2,1" for c in range(6)]
    text = "client,speed,down,up,latency,compute_watts,radio_watts\n" + "\n".join(rows) + "\n"
    (tmp_path / "fleet.csv").write_text(text)
    return f"system.devices.path={tmp_path / 'fleet.csv'}"
