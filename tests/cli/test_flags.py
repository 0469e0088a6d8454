"""Flags anywhere on the command line, settings written like flags, and sweeps of which nothing comes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig

from fedsim.cli.flags import arranged
from fedsim.cli.main import command
from fedsim.errors import ConfigError, headline
from fedsim.run.key import run_dir

WRITTEN = "settings are written KEY=VALUE (fedsim --help)"


@pytest.mark.parametrize(
    ("argv", "flags", "settings"),
    [
        ("rounds=5 -m seed=0,1", "-m", "rounds=5 seed=0,1"),
        ("seed=0,1 --multirun", "--multirun", "seed=0,1"),
        ("a=1 --config-dir my b=2 -cn x", "--config-dir my -cn x", "a=1 b=2"),
        ("a=1 --config-dir=my", "--config-dir=my", "a=1"),
        ("--cfg job --package client lr=1", "--cfg job --package client", "lr=1"),
        ("--info plugins a=1", "--info plugins", "a=1"),
        ("--info a=1", "--info", "a=1"),
        ("~model a=1", "", "~model a=1"),
    ],
)
def test_flags_come_first(argv: str, flags: str, settings: str) -> None:
    assert arranged(argv.split()) == (flags.split(), settings.split())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--rounds 5", "--rounds 5: settings have no dashes; type rounds=5"),
        ("--rounds=5", "--rounds=5: settings have no dashes; type rounds=5"),
        ("-rounds 5", "-rounds 5: settings have no dashes; type rounds=5"),
        ("--lr 0.1", "--lr 0.1: settings have no dashes; type client.lr=0.1"),
        ("strategy=fedspeed --rho 0.1", "--rho 0.1: settings have no dashes; type strategy.rho=0.1"),
        ("--strategy fedprox", "--strategy fedprox: settings have no dashes; type strategy=fedprox"),
        ("--local-test", "--local-test: settings have no dashes; type evaluation.local_test=VALUE"),
        ("--multrun", f"--multrun: no such flag; nearest is '--multirun'; {WRITTEN}"),
        ("-x", f"-x: no such flag; {WRITTEN}"),
    ],
)
def test_a_setting_with_dashes_is_told_its_form(argv: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arranged(argv.split())
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            "rounds=2 -m seed=range(0)",
            "fedsim: seed=range(0): holds no value; seed=range(3) gives 0, 1 and 2",
        ),
        (
            "-m strategy=glob(zz*)",
            "fedsim: the sweep has no run: a glob(...) or choice(...) in it fits nothing",
        ),
        ("-m clients_per_round=0,30", "fedsim: 2 of 2 jobs failed"),
        (
            "client.steps=3 client.epochs=2",
            "fedsim: client.epochs=2: without effect, since client.steps=3 says",
        ),
        ("--rounds 5", "fedsim: --rounds 5: settings have no dashes; type rounds=5"),
        ("name=.x", "fedsim: name=.x: must not begin with '.' or '~'"),
        ("report --bogus", "fedsim: fedsim report: the following arguments are required: DIR"),
        ("verify a b", "fedsim: fedsim verify: unrecognized arguments: b; see fedsim verify --help"),
    ],
)
def test_the_command_says_it_and_leaves_no_folder(
    argv: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(argv.split()) == 2
    out, err = capsys.readouterr()
    assert line in err and "Traceback" not in err and "usage:" not in err + out
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("ConfigError: a\nadvice", "ConfigError: a"),
        (
            "ClientError: client 3 failed in round 2: Traceback (most recent call last):\n  File x\n    y\n"
            "ValueError: boom\n"
            "more of it\n(failures.policy=skip goes on)",
            "ClientError: client 3 failed in round 2: ValueError: boom",
        ),
        (
            "Traceback (most recent call last):\n  File x\nKeyError: 1\n\nDuring handling, another:\n\n"
            "Traceback (most recent call last):\n  File y\nOSError: full\nThe last round could not be kept either",
            "OSError: full",
        ),
        ("", "no reason given"),
    ],
)
def test_the_headline_is_the_error_and_not_the_advice(text: str, line: str) -> None:
    assert headline(text) == line


@pytest.mark.parametrize(
    ("argv", "folders"),
    [
        ("name=1e5", ["runs/1e5"]),
        ("name=007", ["runs/007"]),
        ("rounds=2 -m seed=0,1", ["runs/default"]),
        ("seed=0,1 name=3.10 --multirun", ["runs/3.10"]),
        ("-m name=1e5,2e5", ["runs/1e5", "runs/2e5"]),
    ],
)
def test_runs_lie_where_they_were_named(
    argv: str, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def run(config: DictConfig) -> SimpleNamespace:
        made.append(run_dir(config))
        return SimpleNamespace(dir=made[-1], summary={})

    monkeypatch.setattr("fedsim.api.run", run)
    monkeypatch.setattr("fedsim.report.terminal.show", lambda folders, draw: None)
    assert command(["engine=serial", *argv.split()]) == 0
    assert sorted({str(folder.parent) for folder in made}) == folders
    assert len(made) == (2 if "-m" in argv else 1)
