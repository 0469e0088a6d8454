"""The weights of the best validation round are kept beside the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import QUIET, classification, hashes
from safetensors import safe_open

import fedsim
from fedsim.server.loop import Loop
from fedsim.server.weightsfile import BEST, is_best


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("val/accuracy", [0.5, 0.7, 0.7, 0.6], 2),
        ("val/loss", [2.0, 1.0, 3.0, 1.0], 2),
        ("val/loss", [float("nan"), 2.0, float("nan"), 3.0], 2),
        ("loss", [3.0, 2.0, 1.0], None),
    ],
)
def test_the_best_is_the_earliest_of_the_best(name: str, values: list[float], best: int | None) -> None:
    rows = [{"round": i, name: v} for i, v in enumerate(values, 1)]
    kept = [i for i in range(1, len(rows) + 1) if is_best(rows[:i])]
    assert (kept[-1] if kept else None) == best


def test_accuracy_decides_where_there_is_one() -> None:
    rows = [{"val/accuracy": 0.9, "val/loss": 2.0}, {"val/accuracy": 0.8, "val/loss": 1.0}]
    assert is_best(rows[:1]) and not is_best(rows)


def test_a_run_keeps_them_also_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, plain = [3.0, 1.0, 2.0, 5.0], Loop._measured
    validated = lambda self, server, state: {  # noqa: E731
        **plain(self, server, state),
        "val/loss": losses[server.round.index],
    }
    monkeypatch.setattr(Loop, "_measured", validated)

    class Stop:
        def round(self, row: Any, clients: Any) -> None:
            if row["round"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classification().run(f"dir={tmp_path}", "checkpoint.every=1", callbacks=[Stop()])
    result = classification().run(f"dir={tmp_path}", "checkpoint.every=1")
    two = classification().run("rounds=2")
    for best in (result.model(best=True), result.model(at="best_val")):
        for name, value in best.state_dict().items():
            assert torch.equal(value, two.weights[name])
    with safe_open(tmp_path / BEST, "pt") as file:
        assert file.metadata() == {"round": "2"}
    assert hashes(result)[:2] == hashes(two)
    monkeypatch.undo()
    classification().run(f"dir={tmp_path}", "resume=never")
    assert not (tmp_path / BEST).exists()


def test_it_is_the_best_round_on_validation_samples(tmp_path: Path) -> None:
    settings = [
        *QUIET,
        "data=digits",
        "data.subset=300",
        "engine=serial",
        "num_clients=4",
        "clients_per_round=2",
    ]
    settings += ["client.lr=0.5", "evaluation.validation=0.2", "evaluation.every=1"]
    result = fedsim.simulate([*settings, f"dir={tmp_path / 'long'}", "rounds=5"])
    found = result.history["val/accuracy"].tolist()
    best = found.index(max(found)) + 1
    assert best < 5  # else the last would do
    short = fedsim.simulate([*settings, f"dir={tmp_path / 'short'}", f"rounds={best}"])
    for name, value in result.model(best=True).state_dict().items():
        assert torch.equal(value, short.weights[name])
