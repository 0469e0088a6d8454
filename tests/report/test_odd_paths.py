"""``report`` and ``verify`` on paths that are no runs, or broken ones: one line each, and its exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import OmegaConf

from fedsim.cli.main import command
from fedsim.config.compose import load
from fedsim.report import load_runs

ROWS = [{"round": at, "weights_hash": f"h{at}", "accuracy": 0.5, "loss": 1.0} for at in (1, 2)]
NONE = "no run folder: it has no metrics.jsonl"
HERE = "no run folder (with metrics.jsonl) here"
CHECKPOINT = "; it has a checkpoint, from which the run's own command goes on"
TORN = "metrics.jsonl, line 1: not a JSON object"


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    OmegaConf.save(compose_quickly(["method=fedavg"]), folder / "config.yaml", resolve=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "summary.json").write_text('{"status": "done", "method": "fedavg", "rounds": 2}')
    return folder


def only_checkpoint(run: Path) -> None:
    for file in list(run.iterdir()):
        file.unlink()
    (run / "checkpoint").mkdir()


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda run: (run / name).write_text(content)


def gone(name: str) -> Callable[[Path], Any]:
    return lambda run: (run / name).unlink()


def is_folder(name: str) -> Callable[[Path], Any]:
    return lambda run: ((run / name).unlink(), (run / name).mkdir())


BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {  # how, what verify and what report say
    "no metrics": (gone("metrics.jsonl"), NONE, HERE),
    "checkpoint only": (only_checkpoint, NONE + CHECKPOINT, HERE + CHECKPOINT),
    "no config": (
        gone("config.yaml"),
        "not a run's configuration: cannot be read (No such file",
        "config.yaml: cannot be read (No such file",
    ),
    "config a folder": (
        is_folder("config.yaml"),
        "not a run's configuration: cannot be read (Is a dir",
        "config.yaml: cannot be read (Is a dir",
    ),
    "config broken": (
        text("config.yaml", "a: [1\n"),
        "not a run's configuration, line 2: no valid YAML",
        "config.yaml, line 2: no valid YAML",
    ),
    "config empty": (
        text("config.yaml", ""),
        "not a run's configuration: holds no settings",
        "config.yaml: holds no settings",
    ),
    "config a word": (
        text("config.yaml", "hello"),
        "not a run's configuration: holds no settings",
        "config.yaml: holds no settings",
    ),
    "config in part": (text("config.yaml", "seed: 1\n"), "is missing", ""),
    "config of another program": (
        text("config.yaml", "seed: 1\nevaluation: 3\n"),
        "",
        "evaluation is no mapping",
    ),
    "rows torn": (text("metrics.jsonl", '{"rou\n{"round": 1}\n'), TORN, TORN),
    "rows lists": (text("metrics.jsonl", "[1]\n[2]\n"), TORN, TORN),
    "rows nameless": (
        text("metrics.jsonl", "{}\n{}\n"),
        "no finished round to compare",
        "metrics.jsonl: a row whose round is no number",
    ),
    "rows text": (
        text("metrics.jsonl", '{"round": "x", "weights_hash": 1}\n'),
        "round 'x' is no number",
        "a row whose round is no number",
    ),
    "accuracy text": (
        text("metrics.jsonl", '{"round": 1, "accuracy": "high"}\n'),
        "no finished round",
        "a row whose accuracy is no number",
    ),
    "rows cut": (
        text("metrics.jsonl", '{"round": 1, "weights_hash": "a"}\n'),
        "metrics.jsonl is damaged: it ends with round 1, but 2 were finished",
        "metrics.jsonl: damaged: it ends with round 1, but summary.json says 2",
    ),
    "rows of no round": (text("metrics.jsonl", '{"round": "NaN"}\n'), "", "a row whose round is no number"),
    "summary torn": (text("summary.json", '{"status": "do'), "", "summary.json: damaged"),
    "summary a list": (text("summary.json", "[1]"), "", "summary.json: damaged"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No page is written, and nothing computed again."""
    monkeypatch.setattr(
        "fedsim.report.page.write_report", lambda groups, frame, out, commands: out / "report.html"
    )
    yield


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = command(argv)
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") <= 1, err
    return code, err


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, by_verify, by_report = BROKEN[case]
    spoil(make(Path("run")))
    if by_verify:
        code, line = said(capsys, "verify", "run")
        assert code == 2 and line.startswith("fedsim: run") and by_verify in line
    if by_report:
        code, line = said(capsys, "report", "run")
        assert code == 2 and line.startswith("fedsim: run") and by_report in line


def test_a_torn_last_row_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsim.cli.verify import _hashes

    with (make(Path("run")) / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "acc')
    assert _hashes(Path("run")) == {1: "h1", 2: "h2"}
    assert said(capsys, "report", "run") == (0, "")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("run/metrics.jsonl", "run/metrics.jsonl: a file, not a folder; type run"),
        ("dangling", "dangling: no such folder"),
        ("~/no such run", f"{Path.home()}/no such run: no such folder"),
        ("x" * 300, f"{'x' * 300}: cannot be read (File name too long)"),
    ],
)
@pytest.mark.parametrize("name", ["report", "verify"])
def test_a_path_that_is_no_folder(
    name: str, path: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path("run"))
    Path("dangling").symlink_to("gone")
    assert said(capsys, name, path) == (2, f"fedsim: {line}\n")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["report", ""], "fedsim report: argument DIR: a path is empty; see fedsim report --help"),
        (["verify"], "fedsim verify: the following arguments are required: RUN; see fedsim verify --help"),
        (["report", "run", "--target", "90"], "--target 90: must be in [0, 1], as accuracies are"),
        (["report", "run", "--target", "nan"], "--target nan: must be in [0, 1], as accuracies are"),
        (
            ["report", "run", "--target", "x"],
            "fedsim report: argument --target: invalid float value: 'x'; see fedsim report --help",
        ),
        (["report", "run", "--system", "nope"], "system=nope: no such option; nearest is 'none'"),
        (
            ["report", "run", "--system", "none"],
            "--system none: holds no devices; type lognormal, phones, table or a file",
        ),
        (
            ["report", "run", "--system", "b.yaml"],
            "b.yaml, line 2: no valid YAML (expected ',' or ']', but got '<stream end>')",
        ),
        (
            ["report", "run", "--system", "own.yaml"],
            "system: has no _target_, the dotted path of its class (my_module.MyClass)",
        ),
        (["report", "empty"], f"empty: {HERE}"),
        (["verify", "empty"], f"empty: {NONE}"),
    ],
)
def test_odd_arguments(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(Path("run"))
    Path("empty").mkdir()
    Path("b.yaml").write_text("a: [1\n")
    Path("own.yaml").write_text("a: 1\n")
    assert said(capsys, *argv) == (2, f"fedsim: {line}\n")


def test_a_report_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedsim.report.page.write_report", full)
    make(Path("run"))
    line = "fedsim: out: the report cannot be written there (No space left on device); give --out DIR\n"
    assert said(capsys, "report", "run", "--out", "out") == (2, line)


def test_some_of_many_are_broken(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for case, (spoil, _, _) in BROKEN.items():
        spoil(make(Path("all") / case.replace(" ", "-")))
    make(Path("all/good"))
    walk = os.walk

    def denied(top: Path, onerror: Callable[[OSError], None]) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", "all/secret"))
        yield from walk(top)

    monkeypatch.setattr("os.walk", denied)
    assert {run.dir.name for run in load_runs(["all"])} == {"good", "config-in-part"}
    assert "all/secret: cannot be read (Permission denied)" in caplog.messages
    assert len(caplog.messages) == 1 + sum(bool(line) and HERE not in line for _, _, line in BROKEN.values())


def test_a_whole_configuration_is_read_back() -> None:
    assert load(make(Path("run")) / "config.yaml").method == "fedavg"
