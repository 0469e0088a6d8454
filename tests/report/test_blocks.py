"""Runs in blocks: what stands in one comparison, what is noted, who is starred, and the document that is written."""

import json
import math

import jsonschema
import numpy as np
import pytest
from runfolder import make

from fedsim.errors import ConfigError
from fedsim.report.blocks import ALL, ComparisonPlan, blocks_of
from fedsim.report.comparison import document, lines, ranges, schema, to_text
from fedsim.report.objective import Objective
from fedsim.report.runs import load_runs

LAST = ComparisonPlan(Objective(at="last"))


def campaign(root, gains, seeds=range(5), spread=0.02, folder="", **config):
    """A run of 4 rounds a method and seed; ``gains`` by method over a base that follows the seed."""
    for seed in seeds:
        base = 0.8 + spread * math.sin(seed)
        for at, (method, gain) in enumerate(gains.items()):
            noise = 0.0005 * math.cos(7 * seed + at)
            path = make(
                root,
                method,
                seed,
                [0.1, 0.2, 0.3, base + gain + noise],
                folder=f"{folder}{method}-{seed}",
                extra=lambda at: {"cohort": [0, 1]},
                summary={"test_samples": 1000, "partition_hash": f"p{seed}"},
                data={"_target_": "fedsim.data.sources.digits"},
                **config,
            )
            assert path.is_dir()


def verdicts(block):
    return {c.a: c.verdict for c in block.comparisons}


def test_pairs_of_seeds_decide_what_means_cannot(tmp_path):
    campaign(tmp_path, {"fedavg": 0, "prox": 0.0001, "momentum": 0.01})
    (block,) = blocks_of(load_runs([tmp_path]), LAST)
    assert block.reference == "fedavg"
    assert verdicts(block) == {"momentum": "better", "prox": "equivalent"}
    assert block.stars == ["momentum"] and block.undecided == ""
    text = lines([block], LAST)
    assert text[0] == "accuracy on test, last evaluation; 5 seeds; digits"
    assert (
        text[-1]
        == "paired over seeds 0-4, on these 1000 test samples; Holm over 2 comparisons, intervals unadjusted"
    )
    (row,) = [line for line in text if line.startswith("  momentum")]
    assert (
        "81.43 vs 80.46" in row
        and "+0.970 [+0.898, +1.041]" in row
        and "p < .001 (flip .062)" in row
        and "better" in row
    )
    assert any("equivalent within 0.50" in line for line in text)


def test_equivalent_leaders_are_all_starred_and_all_equal_none(tmp_path):
    campaign(tmp_path / "a", {"fedavg": 0, "x": 0.02, "y": 0.0202})
    (block,) = blocks_of(load_runs([tmp_path / "a"]), LAST)
    assert sorted(block.stars) == ["x", "y"]
    campaign(tmp_path / "b", {"fedavg": 0, "x": 0.0001})
    assert blocks_of(load_runs([tmp_path / "b"]), LAST)[0].stars == []
    campaign(tmp_path / "c", {"fedavg": 0, "x": 0.01}, seeds=range(2))
    (block,) = blocks_of(load_runs([tmp_path / "c"]), LAST)
    assert block.stars == [] and block.undecided == "x leads, undecided against fedavg"


def test_problems_are_never_compared_across(tmp_path):
    for alpha in (0.1, 1.0):
        campaign(
            tmp_path, {"fedavg": 0, "x": 0.02 - alpha / 20}, folder=f"a{alpha}", partition={"alpha": alpha}
        )
    blocks = blocks_of(load_runs([tmp_path]), LAST)
    assert [b.setting.differing for b in blocks] == [{"partition.alpha": 0.1}, {"partition.alpha": 1.0}]
    assert [verdicts(b)["x"] for b in blocks] == ["better", "worse"]
    assert [b.stars for b in blocks] == [["x"], ["fedavg"]]
    assert len({b.setting.hash for b in blocks}) == 2


def test_a_whole_number_is_one_setting_however_it_is_typed(tmp_path):
    campaign(tmp_path, {"fedavg": 0}, partition={"alpha": 1})
    campaign(tmp_path, {"prox": 0.01}, partition={"alpha": 1.0})
    (block,) = blocks_of(load_runs([tmp_path]), LAST)
    assert verdicts(block) == {"prox": "better"} and not block.setting.differing


def test_other_samples_under_the_same_settings_are_another_block(tmp_path):
    campaign(tmp_path, {"fedavg": 0})
    make(
        tmp_path,
        "x",
        0,
        [0.5],
        summary={"partition_hash": "other"},
        data={"_target_": "fedsim.data.sources.digits"},
    )
    assert [len(b.setting.arms) for b in blocks_of(load_runs([tmp_path]), LAST)] == [1, 1]


def test_what_else_differs_is_noted(tmp_path):
    for seed in range(3):
        for method, steps in (("fedavg", 5), ("x", 10)):
            differ = seed > 0 and method == "x"
            make(
                tmp_path,
                method,
                seed,
                [0.5, 0.6 + seed / 100],
                client={"steps": steps},
                extra=lambda at, differ=differ: {"cohort": [0, 9 if differ and at == 2 else 1]},
            )
    (block,) = blocks_of(load_runs([tmp_path]), LAST)
    notes = block.comparisons[0].notes
    assert "cohorts differ from round 2 (seeds 1, 2)" in notes and "client.steps 10 against 5" in notes


def test_unfinished_seeds_are_left_out_with_their_number(tmp_path):
    campaign(tmp_path, {"fedavg": 0, "x": 0.02})
    (tmp_path / "x-3" / "summary.json").write_text('{"method": "x", "status": "interrupted"}')
    (block,) = blocks_of(load_runs([tmp_path]), LAST)
    assert block.comparisons[0].seeds == (0, 1, 2, 4)
    assert "x: 4 of 5 seeds; seed 3 interrupted after 4 rounds" in lines([block], LAST)


def test_personal_methods_are_compared_by_clients_numbers_only(tmp_path):
    campaign(tmp_path, {"fedavg": 0, "x": 0.01, "mine": 0.3})
    for path in tmp_path.glob("mine-*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"personal": True}))
    (block,) = blocks_of(load_runs([tmp_path]), LAST)
    assert [arm.name for arm in block.ranked] == ["fedavg", "x"] and block.stars == ["x"]
    told = "mine: not compared: its models are the clients' own; compare it by clients/accuracy"
    assert told in lines([block], LAST)
    with pytest.raises(ConfigError, match="objective clients/accuracy: no run has measured it"):
        blocks_of(load_runs([tmp_path]), ComparisonPlan(Objective(on="clients")))


def test_a_number_that_is_not_finite_decides_only_if_all_are(tmp_path):
    campaign(tmp_path, {"fedavg": 0})
    for seed in range(5):
        make(tmp_path, "x", seed, [0.5, math.nan], data={"_target_": "fedsim.data.sources.digits"})
    (block,) = blocks_of(load_runs([tmp_path]), LAST)
    assert (block.comparisons[0].verdict, block.comparisons[0].reason) == (
        "worse",
        "not finite: 5 of 5 seeds",
    )


def test_reference_all_pairs_and_unknown_names(tmp_path):
    campaign(tmp_path, {"a": 0, "b": 0.01, "c": 0.02})
    runs = load_runs([tmp_path])
    (block,) = blocks_of(runs, ComparisonPlan(Objective(at="last"), ALL))
    assert [(c.a, c.b) for c in block.comparisons] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert [p.p_holm >= p.p for p in block.comparisons] == [True] * 3
    (block,) = blocks_of(runs, ComparisonPlan(Objective(at="last"), "c", ("a",)))
    assert [(c.a, c.b, c.verdict) for c in block.comparisons] == [("a", "c", "worse")]
    with pytest.raises(ConfigError, match="no method 'cc' among the runs"):
        blocks_of(runs, ComparisonPlan(Objective(at="last"), "cc"))


def test_the_document_fits_its_schema_and_is_the_same_from_anywhere(tmp_path, monkeypatch):
    campaign(tmp_path, {"fedavg": 0, "x": 0.01})
    make(tmp_path, "broken", 0, [math.nan], data={"_target_": "fedsim.data.sources.digits"})
    texts = []
    for place in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(place)
        runs = load_runs([tmp_path.relative_to(place)])
        content = document(blocks_of(runs, LAST), LAST, ["fedsim"], [tmp_path.relative_to(place)], "1")
        jsonschema.Draft202012Validator.check_schema(schema())
        jsonschema.validate(content, schema())
        texts.append(to_text(content))
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
    methods = {m["name"]: m for m in json.loads(texts[0])["blocks"][0]["methods"]}
    assert methods["broken"]["values"] == {"0": None} and methods["x"]["runs"][0] == f"{tmp_path.name}/x-0"
    assert methods["x"]["sd"] == pytest.approx(np.std(list(methods["x"]["values"].values()), ddof=1))


def test_ranges():
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9, 10"
