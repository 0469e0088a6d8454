import sys

import pytest

from fedsim.tracking import RunInfo
from fedsim.tracking.tensorboard import TensorboardTracker


def run(folder, rounds, start_round=0):
    tracker = TensorboardTracker()
    tracker.start(RunInfo(folder, "n", "g", "m", {"seed": 0}, rounds=9, start_round=start_round))
    for at in rounds:
        clients = [{"round": at, "client": c, "metric": "accuracy", "value": c / 4} for c in range(4)]
        tracker.round(
            {"round": at, "accuracy": at / 10 + start_round, "cohort": [1], "weights_hash": "x"}, clients
        )
    tracker.end({"status": "done"})


def test_read_back_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, [1, 2, 3])
    run(tmp_path, [3, 4], start_round=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["accuracy", "cohort_size"]
    found = [(event.step, event.value) for event in events.Scalars("accuracy")]
    assert found == [(at, pytest.approx(value)) for at, value in [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4)]]
    assert events.Histograms("clients/accuracy")[0].histogram_value.num == 4


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(tmp_path, [1])
    (record,) = caplog.records
    assert "pip install 'fedsim-lab[tensorboard]'" in record.getMessage()
    assert not list(tmp_path.iterdir())
