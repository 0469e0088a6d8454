"""``fedsim ls`` and ``fedsim rm``: what lies on disk, and that nothing else than what was named goes away."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli.main import command
from fedsim.run.holdings import Holding, holdings, size


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of four runs that ended in all ways, weights to start from, and an entry of the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    for seed, status in enumerate(("done", "failed", "interrupted", None)):
        make(tmp_path / "runs" / "cmp" / f"fedavg-s{seed}-0123abcd", seed, status)
    store = tmp_path / "runs" / "pretrained" / "0f1e2d3c"
    store.mkdir(parents=True)
    (store / "made.json").write_text("{}")
    entry = tmp_path / "cache" / "digits-0123456789"
    entry.mkdir(parents=True)
    (entry / "x.npy").write_bytes(b"0" * 9000)
    return tmp_path


def make(folder: Path, seed: int, status: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: cmp\nmethod: fedavg\nrounds: 5\nseed: {seed}\nclient:\n  seed: 9\n"
    )
    (folder / "metrics.jsonl").write_text(
        '{"round": 1, "loss": 2.0}\n{"round": 2, "loss": 1.0}\n{"round": 3, "lo'
    )
    (folder / ".lock").touch()
    if status:
        facts = {"status": status, "rounds": 5 if status == "done" else 2, "method": "fedavg"}
        (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert command([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_with_status_rounds_and_size(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "ls")
    runs = [h for h in found["holdings"] if h["kind"] == "run"]
    assert [h["status"] for h in runs] == ["done", "failed", "interrupted", "killed"]
    assert [(h["rounds"], h["planned"], h["seed"]) for h in runs] == [
        (5, 5, 0),
        (2, 5, 1),
        (2, 5, 2),
        (2, 5, 3),
    ]
    assert {h["method"] for h in runs} == {"fedavg"}
    assert [h["kind"] for h in found["holdings"][4:]] == ["weights", "cache"]
    assert found["bytes"] == sum(h["bytes"] for h in found["holdings"]) >= 9000
    assert [h["kind"] for h in listed(capsys, "ls", "runs/cmp")["holdings"]] == ["run"] * 4
    assert command(["ls"]) == 0
    out = capsys.readouterr().out
    assert "fedavg-s3-0123abcd" in out and "killed" in out and "2/5" in out
    assert "4 runs, " in out and "1 weights to start from, " in out and "1 cached samples, " in out


def test_a_place_without_runs_is_empty_and_one_that_is_not_there_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "none"))
    assert listed(capsys, "ls") == {"schema": 1, "holdings": [], "bytes": 0}
    assert command(["ls", "nowhere"]) == 2 and "no such folder" in capsys.readouterr().err


def test_a_run_under_way_is_said_to_be_and_never_removed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = root / "runs" / "cmp" / "fedavg-s3-0123abcd"
    with (busy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [h["status"] for h in listed(capsys, "ls", "runs/cmp")["holdings"]][3] == "under way"
        assert command(["rm", "runs/cmp", "--yes"]) == 1
        assert (
            f"not removed: runs/cmp/{busy.name}: another process is at work in it" in capsys.readouterr().err
        )
        assert [p.name for p in (root / "runs" / "cmp").iterdir()] == [busy.name]
        assert (busy / "metrics.jsonl").exists()
    assert command(["rm", str(busy), "--yes"]) == 0
    assert not (root / "runs" / "cmp").exists()  # nothing is left of the sweep


def test_a_sweep_goes_with_its_report_and_leaves_what_is_not_its(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = root / "runs" / "cmp"
    (sweep / "multirun.yaml").touch()
    (sweep / "report").mkdir()
    (sweep / "notes.txt").write_text("mine")
    assert command(["rm", str(sweep), "--yes"]) == 0
    shown = capsys.readouterr()
    assert "removed: 4, " in shown.out and "left in" in shown.err and "notes.txt" in shown.err
    assert [p.name for p in sweep.iterdir()] == ["notes.txt"]
    assert (root / "runs" / "pretrained" / "0f1e2d3c" / "made.json").exists()


def test_only_what_ended_in_a_way_is_removed_and_stores_are_when_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = listed(capsys, "rm", "runs", "--status", "failed,killed", "--yes")
    assert [h["seed"] for h in found["removed"]] == [1, 3] and found["kept"] == []
    assert len(list((root / "runs" / "cmp").iterdir())) == 2
    assert command(["rm", "cache/digits-0123456789", "runs/pretrained", "--yes"]) == 0
    assert not (root / "cache" / "digits-0123456789").exists() and not (root / "runs" / "pretrained").exists()
    assert command(["rm", "runs", "--status", "bad"]) == 2


def test_nothing_is_removed_without_an_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def there() -> int:
        return len(list((root / "runs" / "cmp").iterdir()))

    assert command(["rm", "runs/cmp"]) == 2 and "add --yes" in capsys.readouterr().err
    assert command(["rm", "runs/cmp", "--json"]) == 2 and capsys.readouterr().out == ""
    assert len(listed(capsys, "rm", "runs/cmp", "--dry-run")["would_remove"]) == there() == 4
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in (("", 4), ("n", 4), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert command(["rm", "runs/cmp"]) == 0
        assert (there() if left else (root / "runs" / "cmp").exists()) == left


def test_what_is_not_fedsims_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter.tex").write_text("x")
    assert command(["rm", "thesis", "--yes"]) == 2
    assert "no store of fedsim; nothing is removed" in capsys.readouterr().err
    assert (root / "thesis" / "chapter.tex").exists()


def test_what_others_named_alike_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = root / "mine"
    make(mine / "fedavg-s0-0123abcd", 0, "done")
    (mine / "report").mkdir()
    (mine / "report" / "thesis.tex").write_text("x")
    other = mine / "other"  # of another program
    other.mkdir()
    (other / "config.yaml").write_text("lr: 0.1\nseed: 1\n")
    (other / "metrics.jsonl").write_text("{}")
    assert command(["rm", str(mine), "--yes"]) == 0
    assert "other, report" in capsys.readouterr().err
    assert sorted(p.name for p in mine.rglob("*.*")) == ["config.yaml", "metrics.jsonl", "thesis.tex"]
    make(mine / "fedavg-s0-0123abcd", 0, "done")
    (mine / "report" / "report.html").touch()
    (mine / "report" / "notes.md").touch()
    assert command(["rm", str(mine), "--yes"]) == 0
    assert [p.name for p in (mine / "report").iterdir()] == ["notes.md"]  # what a report does not write


def test_the_size_counts_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 100_000)
    before = size(tmp_path)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert before >= 100_000 and size(tmp_path) == before
    assert list(holdings(tmp_path, cache=False)) == [] and Holding("run", tmp_path, "done", 0).rounds is None


def test_places_that_hold_others_runs_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    below = root / "here"
    below.mkdir(exist_ok=True)
    monkeypatch.chdir(below)
    monkeypatch.setenv("HOME", str(root))
    for place in ("/", str(root), ".."):
        assert command(["rm", place, "--dry-run"]) == 2
        assert "holds more than one project's runs, so nothing is removed" in capsys.readouterr().err
