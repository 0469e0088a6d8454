"""``fedsim audit``: what clients did, and whether one can tell who was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import classification

import fedsim
from fedsim.cli.main import command
from fedsim.config.compose import load
from fedsim.config.parts import part
from fedsim.errors import ConfigError
from fedsim.exchange.accounting import epsilon
from fedsim.replay.claims import difference
from fedsim.replay.membership import lines, membership
from fedsim.run import canaries
from fedsim.run.given import Given
from fedsim.run.participants import strategy
from fedsim.run.preparation import load_data
from fedsim.tracking.rows import read_rows

SETTINGS = (
    "engine=serial", "tracker=quiet", "client.epochs=1", "model.hidden=[8]", "rounds=3", "evaluation.validation=0.1",
    "num_clients=4", "clients_per_round=4",
)  # fmt: skip
CANARIES = ("audit.canaries=60", "audit.guesses=40")


def base(folder: Path, *more: str) -> Path:
    return fedsim.simulate([*SETTINGS, f"dir={folder}", *more]).dir


def test_who_sends_nothing_of_its_own_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = base(tmp_path / "run", "attack=drop", "attack.fraction=0.25", "attack.loss=1", "attack.packet=1")
    assert command(["audit", str(run), "--clients", "--no-loo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    attackers = json.loads((run / "attackers.json").read_text())
    flagged = [row["client"] for row in found["clients"] if "free rider" in row["flags"]]
    assert flagged == attackers and found["confusion"]["attackers_flagged"] == 1
    assert found["confusion"]["others_passed"] == 3 and all(row["rounds"] == 3 for row in found["clients"])
    honest = [row for row in found["clients"] if row["client"] not in attackers]
    assert all(-1 <= row["cosine"] <= 1 and row["norm_ratio"] > 0 for row in honest)
    assert all(row["cosine"] is None for row in found["clients"] if row["client"] in attackers)


def test_the_table_has_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = base(tmp_path / "run", "rounds=1", "num_clients=2", "clients_per_round=2")
    words = ["audit", str(run), "--clients", "--objective", "val/accuracy"]
    assert command([*words, "--dry-run"]) == 0
    assert "3 coalitions, 3 runs: 1 there, 2 to compute" in capsys.readouterr().out
    assert command(words) == 0
    head = capsys.readouterr().out.splitlines()
    assert any(line.split()[:5] == ["client", "rounds", "cosine", "norm", "value"] for line in head)


def test_coins_are_fair_keyed_and_the_same_for_more_canaries(tmp_path: Path) -> None:
    from fedsim.config.compose import compose

    few, many = (canaries.present(compose([f"audit.canaries={m}"])) for m in (1000, 4000))
    assert np.array_equal(few, many[:1000]) and abs(many.mean() - 0.5) < 0.03
    assert not np.array_equal(few, canaries.present(compose(["audit.canaries=1000", "seed=1"])))


@pytest.mark.parametrize("kind", ["random", "mislabelled", "duplicate"])
def test_canaries_that_are_out_reach_no_client(kind: str) -> None:
    from fedsim.config.compose import compose

    plain = compose([*SETTINGS])
    config = compose([*SETTINGS, *CANARIES, f"audit.kind={kind}"])
    bare, data = (load_data(c, Given(), strategy(c, None)) for c in (plain, config))
    total, there = len(bare.dataset.train), canaries.present(config)
    held = np.sort(data.shards.index[data.shards.index >= total]) - total
    assert np.array_equal(held, np.flatnonzero(there))
    for client in range(4):
        own = data.shards.part(client)
        assert np.array_equal(own[own < total], bare.shards.part(client))
        assert all((row - total) % 4 == client for row in own[own >= total])
    x, y = data.dataset.train.take(torch.arange(total, total + 60))
    if kind == "duplicate":
        original = bare.dataset.train.x.reshape(total, -1)
        assert all((original == one.reshape(1, -1)).all(1).any() for one in x)
    assert len(y.unique()) > 5


def test_canaries_are_clients_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("audit.level=client", "client.batch_size=8", "clients_per_round=30", "evaluation.holdout=0.1")
    run = base(
        tmp_path / "run", *CANARIES, *settings, "num_clients=40", "evaluation.clients_every=1", "rounds=6"
    )
    there = canaries.present(load(run / "config.yaml"))
    asked = {c for row in read_rows(run / "metrics.jsonl") for c in row["cohort"]}
    assert asked <= {*range(40), *(40 + np.flatnonzero(there)).tolist()} and max(asked) >= 40
    assert all(len(row["cohort"]) == 30 for row in read_rows(run / "metrics.jsonl"))
    counts = [
        r["value"] for r in read_rows(run / "clients.jsonl") if r["metric"] == "samples" and r["client"] >= 40
    ]
    assert counts and set(counts) == {8}
    assert command(["audit", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["in"] == there.sum()


def test_clients_that_are_canaries_toss_coins_too() -> None:
    """What is accounted is what is done: coins of chance clients_per_round / (num_clients + canaries)."""
    from fedsim.config.compose import compose
    from fedsim.run.budgeting import mechanism_of

    private = ("privacy=client", "privacy.z=1", "privacy.delta=1e-3", "participation=bernoulli")
    for level, n in (("client", 64), ("sample", 4)):
        config = compose([*SETTINGS, *CANARIES, *private, f"audit.level={level}"])
        privacy = part(config.privacy, "privacy")
        found = mechanism_of(config, privacy, 1.0)
        assert (found.event, found.n, found.m) == ("poisson", n, 4)


def test_canaries_that_are_clients_have_turns() -> None:
    """Each of 64 once in 16 rounds of four; but where others take the places of those that are out."""
    from fedsim.config.compose import compose
    from fedsim.run.budgeting import mechanism_of

    private = ("privacy=client", "privacy.z=1", "privacy.delta=1e-3", "audit.level=client")
    for given, event in (
        (("sampling=round_robin", "exclude_fill=shrink"), "round_robin"),
        (("sampling=round_robin",), "plain"),
        (("exclude_fill=shrink",), "fixed"),
        ((), "plain"),
    ):
        config = compose([*SETTINGS, *CANARIES, *private, *given])
        found = mechanism_of(config, part(config.privacy, "privacy"), 1.0)
        assert (found.event, found.n, found.m) == (event, 64, 4)


def test_memorised_canaries_are_told_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = base(tmp_path / "short", *CANARIES, "rounds=1", "client.lr=1e-4")
    long = base(
        tmp_path / "long", *CANARIES, "rounds=12", "client.epochs=15", "model.hidden=[128]", "client.lr=0.3"
    )
    assert command(["audit", str(short), str(long), "--json", "--score", "gap"]) == 0
    found = json.loads(capsys.readouterr().out)
    weak, strong = found["runs"]
    assert weak["epsilon"] < 0.5 < strong["epsilon"] and strong["right"] > 30
    assert found["epsilon"]["median"] == pytest.approx((weak["epsilon"] + strong["epsilon"]) / 2)
    assert command(["audit", str(long), "--claimed", "0.1"]) == 1
    assert "the claim is broken" in capsys.readouterr().out
    assert command(["audit", str(long), "--claimed", "50"]) == 0
    assert membership([long])["runs"][0]["guesses"] == 40
    say_spent(long, 0.1)
    assert command(["audit", str(long), "--score", "gap"]) == 1
    said = capsys.readouterr().out
    assert "; accounted 0.10" in said and "the claimed epsilon 0.1 is below it: the claim is broken" in said
    assert json.loads((long / "audit.json").read_text())["epsilon"] == pytest.approx(
        strong["epsilon"], abs=0.2
    )
    say_spent(long, 50.0)
    assert command(["audit", str(long), "--score", "gap"]) == 0
    shown = [
        membership([long], claimed=0.1, delta=delta)["runs"][0]["epsilon"] for delta in (0.0, None, 1e-5)
    ]
    assert shown[0] >= shown[1] == shown[2]  # a claim is held against its own delta
    assert membership([long], delta=0.0)["claimed"] is None
    with pytest.raises(ConfigError, match="stands twice"):
        membership([long, long])
    say_spent(long, float("inf"))
    capsys.readouterr()
    assert command(["audit", str(long), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["claimed"] == "Infinity"


def say_spent(run: Path, epsilon: float) -> None:
    """Let the run claim that it kept ``epsilon`` for each sample."""
    summary = json.loads((run / "summary.json").read_text())
    said = {"level": "record", "epsilon": epsilon, "delta": 1e-5, "epsilon_valid": True}
    (run / "summary.json").write_text(json.dumps({**summary, "privacy": said}))


PRIVATE = ("privacy=client", "privacy.z=0.5", "privacy.delta=1e-3", "strategy.weighting=uniform")


@pytest.mark.parametrize(
    ("given", "canary", "says"),
    [
        (("privacy=record",), "add_remove", ""),
        (("privacy=record", "audit.level=client"), "", "not whole clients"),
        (("privacy=local",), "replace_one", "all that its client sends"),
        (("privacy=local", "audit.level=client"), "", "not whether there is a client"),
        (("privacy=client",), "replace_one", "all that its client sends"),
        (("privacy=client", "audit.level=client"), "replace_one", "another takes its place"),
        (("privacy=client", "audit.level=client", "exclude_fill=shrink"), "zero_out", ""),
        (("privacy=client", "audit.level=client", "participation=bernoulli"), "zero_out", ""),
    ],
)
def test_what_a_canary_in_or_out_is(given: tuple[str, ...], canary: str, says: str) -> None:
    from fedsim.config.compose import compose

    config = compose([*SETTINGS, *CANARIES, *given, "privacy.z=1", "privacy.delta=1e-3"])
    found, why = difference(config, given[0].removeprefix("privacy="))
    assert found == canary and says in why and bool(says) == bool(why)


def test_a_sample_is_held_against_its_client_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a client left out, and of what an older version wrote, nothing is broken."""
    run = base(tmp_path / "run", *CANARIES, *PRIVATE, "participation=bernoulli", "clients_per_round=2")
    spent = json.loads((run / "summary.json").read_text())["privacy"]
    assert (spent["relation"], spent["releases"]) == ("add_remove", 3)
    found = membership([run])
    one, exact = found["runs"][0], epsilon(0.5, 0.5, 3, 1e-3, "pld", "replace_one")
    assert one["accounted"] == spent["epsilon"] < found["claimed"] == one["compared"] == exact
    assert command(["audit", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"; accounted {spent['epsilon']:.2f} (add_remove), {exact:.2f} under replace_one" in said
    assert "(the bound speaks of one client replaced" in said
    assert lines({**found, "broken": True})[-1].endswith("the claim is broken, for one client replaced")
    older = {k: v for k, v in spent.items() if k not in ("mechanism", "releases")} | {"epsilon": 0.0}
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "privacy": older}))
    found = membership([run])
    assert found["claimed"] is None and found["broken"] is None and found["runs"][0]["compared"] is None
    assert command(["audit", str(run)]) == 0 and "accounted 0.00, not compared" in capsys.readouterr().out


def test_what_nothing_can_be_concluded_from_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for guesses in ("41", "62", "[20,41]", "null"):
        with pytest.raises(ConfigError, match=r"audit.guesses=.*must be even and at most audit.canaries=60"):
            base(tmp_path / "no", "audit.canaries=60", f"audit.guesses={guesses}")
    with pytest.raises(ConfigError, match="needs samples in memory"):
        classification(model=torch.nn.Linear(4, 1), clients=[(torch.zeros(3, 4), torch.zeros(3, 1))] * 3).run(
            "audit.canaries=10",
            "audit.guesses=10",
            "num_clients=3",
            loss=torch.nn.functional.mse_loss,
            test=None,
        )
    run = base(tmp_path / "run", "rounds=1")
    assert load(run / "config.yaml").audit.canaries == 0
    assert command(["audit", str(run)]) == 2
    assert "audit.canaries=200" in capsys.readouterr().err
