import logging

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from fedsim.config.schema import ConsoleConfig, TrackerConfig, WandbConfig
from fedsim.errors import ConfigError
from fedsim.tracking import RunInfo, Tracker, Trackers, build, read_rows
from fedsim.tracking.jsonl import JsonlTracker


def config(console="quiet", wandb="disabled", tensorboard=False):
    return TrackerConfig(
        ConsoleConfig(console, "all"), WandbConfig(wandb, "fedsim", None), tensorboard, prometheus=None
    )


def info(folder):
    return RunInfo(folder, "run", "sweep", "fedavg", {}, rounds=3)


class Seen(Tracker):
    def __init__(self):
        self.calls = []

    def start(self, run):
        self.calls.append("start")

    def phase(self, text):
        self.calls.append(text)

    def round(self, row, clients):
        self.calls.append(row["round"])

    def end(self, summary):
        self.calls.append(summary["status"])


class Breaks(Seen):
    def round(self, row, clients):
        super().round(row, clients)
        raise KeyError("loss")


class OnlyRounds:
    """A third party's callback: no base class, one hook."""

    def __init__(self):
        self.rounds = []

    def round(self, row, clients):
        self.rounds.append(row["round"])


def drive(trackers, folder):
    trackers.start(info(folder))
    trackers.phase("loading")
    for at in (1, 2, 3):
        trackers.round({"round": at}, [])
    trackers.end({"status": "done"})
    trackers.end({"status": "failed"})  # a second end is ignored


def test_a_failing_tracker_is_reported_once_and_the_others_go_on(tmp_path, caplog):
    breaks, seen, plain = Breaks(), Seen(), OnlyRounds()
    drive(Trackers([JsonlTracker(), breaks, seen, plain]), tmp_path)
    assert breaks.calls == ["start", "loading", 1]
    assert seen.calls == ["start", "loading", 1, 2, 3, "done"]
    assert plain.rounds == [1, 2, 3]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Breaks.round: KeyError: 'loss'" in record.getMessage()


def test_only_a_config_error_at_start_stops_the_run(tmp_path):
    class Refuses(Tracker):
        def start(self, run):
            raise ConfigError("no key")

    first, last = Seen(), Seen()
    trackers = Trackers([first, Refuses(), last])
    with pytest.raises(ConfigError, match="no key"):
        trackers.start(info(tmp_path))
    assert first.calls == ["start", "failed"]
    assert last.calls == []


def test_a_run_that_fails_while_it_is_set_up_closes_the_display(tmp_path):
    seen = Seen()
    trackers = build(config(), extra=[seen])
    trackers.phase("loading")
    trackers.end({"status": "failed"})
    assert seen.calls == ["loading", "failed"]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_not_swallowed(tmp_path):
    class Interrupted(Tracker):
        def round(self, row, clients):
            raise KeyboardInterrupt

    trackers = Trackers([Interrupted()])
    trackers.start(info(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        trackers.round({"round": 1}, [])


@pytest.mark.parametrize(
    ("bad", "hint"),
    [({"console": "plane"}, "nearest is 'plain'"), ({"wandb": "offlin"}, "nearest is 'offline'")],
)
def test_unknown_modes_name_the_nearest(bad, hint):
    with pytest.raises(ConfigError, match=hint):
        build(config(**bad))


@pytest.mark.parametrize(
    ("name", "console", "wandb", "tensorboard"),
    [
        ("default", "auto", "disabled", False),
        ("wandb", "auto", "auto", False),
        ("tensorboard", "auto", "disabled", True),
        ("quiet", "quiet", "disabled", False),
    ],
)
def test_shipped_configurations(name, console, wandb, tensorboard):
    with initialize_config_module(version_base="1.3", config_module="conf"):
        node = compose(f"tracker/{name}").tracker
    typed = OmegaConf.merge(OmegaConf.structured(TrackerConfig), node)
    assert OmegaConf.missing_keys(typed) == set()
    assert (typed.console.mode, typed.wandb.mode, typed.tensorboard) == (console, wandb, tensorboard)
    assert (typed.wandb.project, typed.wandb.entity) == ("fedsim", None)
    build(typed)
