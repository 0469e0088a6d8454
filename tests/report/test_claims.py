"""The driver of the papers' claims: equal budgets, blocks that come out again, and the theory that it measures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from composing import compose_quickly

from experiments import claims, theory
from experiments.claims_listed import CLAIMS, Claim, Question
from fedsim.config.check import validate

PAGES = {name: claim.page for name, claim in CLAIMS.items()} | {"theory": "theory"}


@pytest.mark.parametrize("name", PAGES)
def test_every_claim_has_its_place_in_a_page_with_its_command(name: str) -> None:
    text = (claims.PAGES / f"{PAGES[name]}.md").read_text()
    assert text.count(f"<!-- made by experiments.claims {name} -->") == 1
    assert f"python -m experiments.claims {name}" in text


@pytest.mark.parametrize("name", CLAIMS)
def test_all_arms_of_a_claim_have_as_many_trials(name: str) -> None:
    claim = CLAIMS[name]
    grids = [claim.grid.get(arm, claim.grid.get("", ())) for arm in claim.arms]
    assert len({math.prod(axis.count(",") + 1 for axis in grid) for grid in grids}) == 1
    assert not set(claim.grid) - {"", *claim.arms}
    asked = {q.reference for q in claim.questions} | {a for q in claim.questions for a in q.against}
    assert asked <= set(claim.arms)


def test_of_some_arms_only_what_they_can_answer_is_asked() -> None:
    claim = CLAIMS["optimisers"]
    assert len(claim.with_arms(["fedavg", "feddyn", "fedspeed"]).questions) == len(claim.questions) == 2
    assert claim.with_arms(["fedavg", "fedspeed"]).questions == [claim.questions[0]]
    assert claim.with_arms(["feddyn"]).questions == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", CLAIMS)
def test_all_runs_of_a_claim_are_possible(name: str) -> None:
    claim = CLAIMS[name]
    for arm, settings in claim.arms.items():
        grid = [axis.partition(",")[0] for axis in claim.grid.get(arm, claim.grid.get("", ()))]
        for problem in claim.problems:
            traces = ["system.traces=traces"] if name == "fleet" else []
            validate(compose_quickly((*claim.common, *settings, *grid, *problem, *traces)))


def test_the_block_of_a_claim_comes_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = Claim(
        "page",
        ("data=digits", "model=linear", "rounds=2", "client.epochs=1", "evaluation.validation=0.2"),
        {"fedavg": ("strategy=fedavg", "client.lr=0.1"), "prox": ("strategy=fedprox",)},
        (Question("It is better"), Question("It sends less", total="bytes_up")),
        {"fedavg": (), "prox": ("client.lr=0.001,0.1",)},
    )
    monkeypatch.setitem(claims.CLAIMS, "small", claim)  # type: ignore[arg-type]
    monkeypatch.setattr(claims, "PAGES", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made by experiments.claims small -->\n-\n<!-- end of small -->\nafter\n")
    arguments = ["small", "--out", str(tmp_path / "runs"), "--seeds", "1,2,3", "num_clients=5"]
    assert claims.main([*arguments, "--write"]) == 0
    assert "page.md: written" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "3 seeds" in text and "undecided" in text and "bytes_up in all" in text
    assert claims.main(arguments) == 0
    assert "page.md: the same" in capsys.readouterr().out
    settings = list((tmp_path / "runs/small/runs").glob("prox-s*/config.yaml"))  # the better rate was chosen
    assert len(settings) == 3 and all("lr: 0.1\n" in file.read_text() for file in settings)


def test_a_method_without_drift_reaches_the_optimum_and_fedavg_does_not(tmp_path: Path) -> None:
    ends = {
        name: theory.descend(name, 0.1, 150, 0, tmp_path).rows[-1]["distance"]
        for name in ("fedavg", "scaffold")
    }
    assert ends["scaffold"] < 1e-4 < 0.05 < ends["fedavg"]


def test_rules_break_down_where_they_must() -> None:
    table = {
        row.split(" | ")[0][2:]: row.strip(" |").split(" | ")[1:] for row in theory.breakdown([0], 20)[2:]
    }
    assert float(table["mean"][1]) > 5 > 1 > float(table["geometric median"][1])
    assert set(table) == set(theory.RULES) and all(
        len(cells) == len(theory.WRONG) for cells in table.values()
    )


def test_the_variance_under_gossip_is_the_predicted_one() -> None:
    _, _, *rows = theory.variance([0])
    predicted, plain, corrected = (np.array(row.strip(" |").split(" | ")[1:], dtype=float) for row in rows)
    np.testing.assert_allclose(plain, predicted, rtol=0.1, atol=2e-3)
    np.testing.assert_allclose(corrected, 1, atol=0.02)
    assert predicted[0] == 1 and predicted[-1] == pytest.approx(1 / theory.PEERS, rel=0.05)
