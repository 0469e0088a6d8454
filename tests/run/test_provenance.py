"""``provenance.json``: an entry a process, without names of host or user; what explains other bits."""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import classification

from fedsim.cli.verify import why_other_bits
from fedsim.config.compose import load
from fedsim.data.dataset import Dataset, Samples
from fedsim.run import provenance
from fedsim.run.machine import code, difference, machine, versions
from fedsim.run.provenance import Record, data_hash, entries, entry_of, scrubbed
from fedsim.server.loop import Loop


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException]) -> None:
    plain = Loop._round

    def round(self: Any) -> None:
        if self.done == after:
            raise error
        plain(self)

    monkeypatch.setattr(Loop, "_round", round)


def test_a_finished_run_says_where_and_on_what_it_was_computed(tmp_path: Path) -> None:
    result = classification().run(f"dir={tmp_path}", "rounds=2")
    (entry,) = entries(tmp_path)
    assert entry["rounds"] == {"from": 1, "to": 2} and entry["status"] == "done"
    assert entry["start"] <= entry["end"] and entry["end"].endswith("Z")
    installed = torch.__version__.partition("+")[0]  # pip may leave the build out
    assert entry["versions"]["torch"].partition("+")[0] == installed
    assert entry["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert entry["engine"] == {"name": "serial", "workers": 1} and entry["threads"] == 1
    assert entry["key"] == result.summary["key"]
    assert entry["partition_hash"] == result.summary["partition_hash"]
    assert len(entry["data_hash"]) == 64 and entry["gpu"] is None and entry["peak_rss_mib"] > 10
    assert len(entry["fedsim"]["commit"] or "0" * 40) == 40


def test_a_run_that_was_interrupted_and_one_that_was_killed_have_an_entry_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after, name in ((2, "interrupted"), (3, "killed")):
        with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
            interrupted(during, after, KeyboardInterrupt)
            if name == "killed":  # as the file stands while the process is at work
                during.setattr(Record, "finish", lambda self, summary: None)
            classification().run(f"dir={tmp_path}")
    classification().run(f"dir={tmp_path}")
    found = entries(tmp_path)
    assert [(e["status"], e["rounds"]["from"], e["rounds"]["to"]) for e in found] == [
        ("interrupted", 1, 2),
        ("killed", 3, None),
        ("done", 4, 4),
    ]
    assert [entry_of(tmp_path, n)["rounds"]["from"] for n in (1, 2, 3, 4)] == [1, 1, 3, 4]  # type: ignore[index]
    assert len({e["data_hash"] for e in found}) == 1
    classification().run(f"dir={tmp_path}")  # done: no process works on it
    assert entries(tmp_path) == found
    classification().run(f"dir={tmp_path}", "resume=never")
    assert [e["rounds"] for e in entries(tmp_path)] == [{"from": 1, "to": 4}]


def test_no_entry_names_user_or_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["/home/alice/bin/fedsim", f"dir={tmp_path / 'run'}", "x=/home/alice/d", "y=/scratch/alice/node17/z"],
    )
    classification().run(f"dir={tmp_path / 'run'}", "rounds=1")
    text = (tmp_path / "run" / "provenance.json").read_text()
    assert "alice" not in text and "node17" not in text and str(tmp_path) not in text
    command = json.loads(text)[0]["command"]
    assert command[:3] == ["fedsim", "dir=run", "x=~/d"]
    assert command[3].endswith("scratch/USER/HOST/z") and command[3].startswith("y=..")
    assert scrubbed(["a=b/c", "lr=1/2"]) == ["a=b/c", "lr=1/2"]  # no absolute paths


def test_the_hash_of_the_data_is_over_kind_shape_and_bytes_in_order() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2])
    expected = hashlib.sha256()
    for t in (x, y, y):
        expected.update(f"{t.dtype}{tuple(t.shape)}".encode() + t.numpy().tobytes())
    data = Dataset(train=Samples(x, y), test=Samples(y))
    assert data_hash(data) == expected.hexdigest()
    others = [Samples(x.view(2, 3), y), Samples(x.double(), y), Samples(x + 1, y), Samples(x, y.flip(0))]
    found = {data_hash(replace(data, train=part)) for part in others}
    assert len(found) == 4 and data_hash(data) not in found


def test_large_data_are_hashed_beside_the_run_to_the_same_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classification().run(f"dir={tmp_path / 'small'}", "rounds=1")
    monkeypatch.setattr(provenance, "AT_ONCE", 0)
    classification().run(f"dir={tmp_path / 'large'}", "rounds=1")
    one, other = (entries(tmp_path / n)[0]["data_hash"] for n in ("small", "large"))
    assert one is not None and one == other


def test_the_first_field_that_explains_other_bits_is_named() -> None:
    now = machine(1, "cpu")
    assert difference(now, machine(4, "cpu")) is None  # threads are a setting, and settings say so
    place = f"{now['cpu']['capability']} with torch {now['versions']['torch']}"
    old = now | {"versions": now["versions"] | {"torch": "1.0", "numpy": "1.0"}}
    torch_now = f"here torch {now['versions']['torch']}: other bits are expected"
    assert difference(old, now) == f"recorded on {now['cpu']['capability']} with torch 1.0, {torch_now}"
    wide = old | {"cpu": now["cpu"] | {"capability": "AVX9000"}}
    assert difference(wide, now) == (
        f"recorded on AVX9000 with torch 1.0, here {now['cpu']['capability']}: other bits are expected"
    )
    numpy = now | {"versions": now["versions"] | {"numpy": "1.0"}}
    expected = (
        f"recorded on {place}, numpy 1.0, here numpy {now['versions']['numpy']}: other bits are expected"
    )
    assert difference(numpy, now) == expected


def test_verify_says_that_noise_of_the_operating_system_does_not_repeat(tmp_path: Path) -> None:
    noise = (
        "privacy=local",
        "privacy.z=1",
        "privacy.delta=1e-2",
        "privacy.noise=os",
        "strategy.weighting=uniform",
    )
    classification().run(f"dir={tmp_path}", "rounds=1", *noise)
    why = why_other_bits(tmp_path, 1, load(tmp_path / "config.yaml"))
    assert why.startswith("its noise was drawn by the operating system")


def test_verify_says_why_bits_may_differ(tmp_path: Path) -> None:
    classification().run(f"dir={tmp_path}", "rounds=1")
    config, path = load(tmp_path / "config.yaml"), tmp_path / "provenance.json"
    assert (
        why_other_bits(tmp_path, 1, config)
        == "recorded on a machine like this one, with the same versions and code"
    )
    found = json.loads(path.read_text())
    found[0]["cpu"]["capability"] = "AVX9000"
    path.write_text(json.dumps(found))
    assert why_other_bits(tmp_path, 1, config).startswith("recorded on AVX9000 with torch ")
    path.unlink()
    assert (
        why_other_bits(tmp_path, 1, config) == "where it was recorded is not known: it has no provenance.json"
    )


def test_versions_and_commit_are_asked_once() -> None:
    assert versions() is versions() and code() is code()


def test_a_record_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as during:
        during.setattr(provenance.Path, "write_text", full)
        record = Record.__new__(Record)
        record._path, record._before, record._entry = tmp_path / "p.json", [], {}
        record._lock = provenance.threading.Lock()
        record._write({"status": "done"})
    assert "could not be written" in caplog.text and not (tmp_path / "p.json").exists()
