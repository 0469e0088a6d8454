"""What is written down of releases whose noise is clients' own, and what stays below masks."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from problems import classification, method

from fedsim.errors import CheckpointError, StrategyError
from fedsim.exchange.landing import Landing
from fedsim.exchange.ledger import Ledger
from fedsim.exchange.payload import Message, Outcome, Payload
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.release import EVENTS, FITS
from fedsim.exchange.spending import Spending, cost
from fedsim.server.exchanges import Server

SETTINGS = ("strategy.weighting=uniform", "privacy.z=2", "privacy.delta=1e-2")


@pytest.mark.parametrize("level", ["local", "record"])
def test_who_is_asked_is_on_disk_before(level: str, tmp_path: Path) -> None:
    run = classification().run(*SETTINGS, f"privacy={level}", "client.steps=2", f"dir={tmp_path / 'r'}")
    lines = [json.loads(line) for line in (run.dir / "privacy.jsonl").read_text().splitlines()]
    assert [(line["round"], line["clients"]) for line in lines] == [
        (r["round"], r["cohort"]) for r in run.rows
    ]


def test_a_sum_is_not_seen_before_its_line_is_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk takes its time; then it is full."""
    seen: list[str] = []

    def synced(number: int) -> None:
        if len(seen) == 4:
            raise OSError(28, "No space left on device")
        time.sleep(0.1)
        seen.append("disk")

    land = Landing.land

    def landed(self: Landing, *given: Any) -> Any:
        folded = land(self, *given)
        seen.append("sum")
        return folded

    monkeypatch.setattr("fedsim.exchange.ledger.os", SimpleNamespace(fsync=synced))
    monkeypatch.setattr(Landing, "land", landed)
    with pytest.raises(CheckpointError, match="No space left"):
        classification().run(*SETTINGS, "privacy=client", f"dir={tmp_path / 'r'}")
    assert seen == ["disk", "sum"] * 2
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("keyed", "again"), [(True, 0), (False, 1)])
def test_a_round_that_is_run_again_counts_twice_unless_its_noise_is_the_same(
    keyed: bool, again: int, tmp_path: Path
) -> None:
    """A kill came after round 2 had begun, and the checkpoint is of round 1."""

    def spending() -> Spending:
        privacy = Privacy(level="record", z=2.0, delta=1e-2)
        return Spending(
            privacy, dict.fromkeys(range(3), (4, 12)), dict.fromkeys(range(3), 5), Ledger(tmp_path, keyed)
        )

    first = spending()
    first.begin(1, [0, 1], ["delta"])
    first.add([Outcome(c, "ok", values={EVENTS: 5}) for c in (0, 1)])
    saved = first.save()
    first.begin(2, [0, 2], ["delta"])
    then = spending()
    then.restore(saved)
    spent = [then.epsilon(c) for c in range(3)]
    assert spent == [cost("record", 2.0, 5 * n, (4, 12), 1e-2) for n in (1 + again, 1, again)]
    (tmp_path / "privacy.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"privacy\.jsonl knows of 0 releases, the checkpoint of 1"):
        spending().restore(saved)


def test_a_line_that_a_crash_cut_is_none_and_a_file_that_goes_is_begun_anew(tmp_path: Path) -> None:
    """The rest of a cut line is not what the next one goes on from."""
    path = tmp_path / "privacy.jsonl"

    def rounds() -> list[int]:
        return [json.loads(line)["round"] for line in path.read_text().splitlines()]

    Ledger(tmp_path, False).write(1, 0)
    with path.open("a") as file:
        file.write('{"round": 2, "exch')
    later = Ledger(tmp_path, False)
    later.write(2, 0)
    assert rounds() == [1, 2] and len(Ledger(tmp_path, False)) == len(later) == 2
    path.rename(tmp_path / "moved")
    later.write(3, 0)
    assert rounds() == [3]
    path.write_text('{"round": 1, "exchange": 0}\n[]\n')
    with pytest.raises(CheckpointError, match=r"privacy\.jsonl: line 2 is no release \('\[\]'\)"):
        Ledger(tmp_path, False)


def test_a_disk_that_is_full_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written later on, when the file is closed."""
    (tmp_path / "privacy.jsonl").symlink_to("/dev/full")
    ledger = Ledger(tmp_path, False)
    with pytest.raises(OSError, match="No space left"):
        ledger.write(1, 0)
    del ledger
    gc.collect()
    assert capsys.readouterr().err == ""
    (tmp_path / "privacy.jsonl").unlink()
    (tmp_path / "privacy.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be written \(Is a directory\)"):
        Ledger(tmp_path, False).write(1, 0)


def test_of_a_deployment_lost_updates_count() -> None:
    """They may have left their clients."""
    spending = Spending(Privacy(level="local", z=2.0, delta=1e-2))
    spending.add([Outcome(0, "ok"), Outcome(1, "dropped"), Outcome(2, "refused")], deployed=True)
    assert [spending.epsilon(c) > 0 for c in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "clip", [("privacy.clip=0.3",), ("privacy.clip=adaptive", "privacy.adaptive.noise=2")]
)
def test_which_updates_fit_is_seen_as_a_sum_alone(
    clip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Outcome] = []
    exchange = Server.exchange

    def noting(self: Server, *args: Any, **named: Any) -> Any:
        replies = exchange(self, *args, **named)
        seen.extend(replies.outcomes)
        return replies

    monkeypatch.setattr(Server, "exchange", noting)
    given = (*SETTINGS, "privacy=client", *clip)
    plain = classification().run(*given, "secagg=ring")
    assert {FITS in o.values for o in seen} == {True}
    seen.clear()
    masked = classification().run(*given, "secagg=masks")
    assert {FITS in o.values for o in seen} == {False}
    said = ("clipped", "C", "weights_hash")
    assert [[r[k] for k in said] for r in masked.rows] == [[r[k] for k in said] for r in plain.rows]


@pytest.mark.parametrize("given", [("privacy=local",), ("secagg=masks", "secagg.reach=1")])
def test_what_only_measures_is_not_folded(given: tuple[str, ...]) -> None:
    strategy = method("fedavg", "strategy.weighting=uniform")

    def round(server: Server, state: Any, info: Any) -> Any:
        server.exchange(Message(Payload({"w": state["w"]})), {"delta": "mean"}, task="evaluate")
        return state

    strategy.round = round
    more = SETTINGS[1:] if given[0] == "privacy=local" else ()
    with pytest.raises(StrategyError, match=r"'evaluate' only measures, so 'delta' would leave"):
        classification().run(*given, *more, "strategy.weighting=uniform", strategy=strategy)
