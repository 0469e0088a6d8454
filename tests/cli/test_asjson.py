"""``fedsim ... --json``: how every job ended, by ``run.schema.json``."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from standin import stand_in

from fedsim.cli import verify
from fedsim.cli.main import command
from fedsim.errors import DataError


def test_runs_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulator = stand_in(monkeypatch, tmp_path)
    schema = json.loads((Path(verify.__file__).parent / "run.schema.json").read_text())
    simulator.errors[1] = DataError("no data")
    assert command(["--json", "engine=serial", "-m", "seed=0,1", "name=two"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    jsonschema.validate(found, schema)
    assert [(j["job"], j["status"], j["reason"]) for j in found["jobs"]] == [
        (0, "done", None),
        (1, "failed", "no data"),
    ]
    assert found["jobs"][0]["summary"] == {"status": "done", "accuracy": 0.5} and "results:" in err
    assert command(["engine=serial", "name=two", "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)["jobs"]
    assert job["status"] == "skipped" and job["folder"] == found["jobs"][0]["folder"]
    assert command(["engine=serial", "rounds=-1", "--json"]) == 2 and not capsys.readouterr().out
