"""The number of a run: which rows it is made of, whether it is finite, and how it is said."""

import math

import pytest
from composing import compose_quickly
from runfolder import make

from fedsim.config.check import validate
from fedsim.config.compose import plain
from fedsim.errors import ConfigError
from fedsim.report import default_plan, load_runs
from fedsim.report.objective import Objective, check_column, number_of
from fedsim.run.key import run_key
from fedsim.tracking.rows import to_json


def rows(**columns):
    """Rows of as many rounds as the columns have values; ``None`` is not measured."""
    names = {name.replace("__", "/"): values for name, values in columns.items()}
    return [
        {"round": at, **dict(zip(names, row, strict=True))}
        for at, row in enumerate(zip(*names.values(), strict=True), 1)
    ]


@pytest.mark.parametrize(
    ("evaluations", "at", "used"),
    [
        (40, "mean:10", 10),
        (39, "mean:10", 9),
        (3, "mean:10", 1),
        (5, "mean:1", 1),
        (100, "mean:20", 20),
        (9, "last", 1),
    ],
)
def test_how_many_of_the_last_evaluations_count(evaluations, at, used):
    values = [i * i / 1e4 for i in range(evaluations)]
    spaced = rows(accuracy=[v for value in values for v in (None, value)])  # evaluated every second round
    number = Objective(at=at).number(spaced)
    assert number.value == pytest.approx(math.fsum(values[-used:]) / used)
    assert number.rounds == tuple(range(2 * (evaluations - used) + 2, 2 * evaluations + 1, 2))


def test_the_best_round_of_validation_is_the_earliest_and_ignores_the_test_set():
    val = [0.1, 0.7, math.nan, 0.7, 0.3]
    for test in ([0.5, 0.4, 0.9, 0.8, 0.99], [0.0, 0.2, 0.1, 0.0, 0.0]):
        number = Objective(at="best_val").number(rows(accuracy=test, val__accuracy=val))
        assert (number.rounds, number.value) == ((2,), test[1])
    losses = rows(loss=[3.0, 1.0, 2.0], val__loss=[2.0, 2.0, 0.5], clients__loss=[9.0, 8.0, 7.0])
    assert Objective("loss", at="best_val").number(losses).value == 2.0
    assert (
        "evaluation.client_validation=0.1" in Objective("loss", "clients", "best_val").number(losses).missing
    )
    assert "type evaluation.validation=0.1" in Objective(at="best_val").number(rows(accuracy=[0.5])).missing


def test_what_is_not_finite_is_no_number_and_what_is_missing_says_so():
    diverged = rows(accuracy=[0.5] * 8, loss=[1.0] * 7 + [math.inf])
    assert Objective(at="mean:2").number(diverged).finite
    assert not (number := Objective("loss", at="mean:2").number(diverged)).finite and not number.missing
    assert Objective("loss", at="mean:2").number(diverged[:-1]).value == 1.0
    assert Objective.parse("val/loss").number(diverged).missing == "val/loss was not measured"


@pytest.mark.parametrize(
    ("words", "column", "sign"),
    [
        ("accuracy", "accuracy", 1),
        ("clients/accuracy", "clients/accuracy", 1),
        ("clients/accuracy_worst_tenth", "clients/accuracy_worst_tenth", 1),
        ("clients_val/loss", "clients_val/loss", -1),
        ("val/accuracy", "val/accuracy", 1),
        ("held_out/loss", "held_out/loss", -1),
        ("sim_seconds", "sim_seconds", -1),
        ("bytes_up", "bytes_up", -1),
        ("perplexity", "perplexity", -1),
        ("clients/mae", "clients/mae", -1),
        ("MeanSquaredError", "MeanSquaredError", -1),
        ("clients/accuracy_gini", "clients/accuracy_gini", -1),
        ("participation_gap", "participation_gap", -1),
        ("participation_gap/loss", "participation_gap/loss", 1),
        ("participation_gap/f1", "participation_gap/f1", -1),
        ("clients/loss_worst", "clients/loss_worst", -1),
        ("clients/loss_gini", "clients/loss_gini", -1),
        ("clients/global/f1_std", "clients/global/f1_std", -1),
        ("clients/accuracy_worst", "clients/accuracy_worst", 1),
        ("explained_variance", "explained_variance", 1),
    ],
)
def test_words_name_a_column(words, column, sign):
    objective = Objective.parse(words)
    assert (objective.column, objective.sign) == (column, sign)
    assert Objective.parse(words, direction="max").sign == 1


def test_a_gap_of_another_metric_than_accuracy_has_no_known_direction():
    history = [[{"round": 1, "participation_gap": -0.2, "participation_gap/loss": -0.2, "clients/loss": 1.0}]]
    with pytest.raises(ConfigError, match="type participation_gap/loss or --direction"):
        check_column(Objective("participation_gap"), history)
    check_column(Objective("participation_gap", direction="max"), history)
    check_column(Objective("participation_gap"), [[history[0][0] | {"clients/accuracy": 0.5}]])


def test_it_says_what_it_is():
    assert str(Objective()) == "accuracy on test, mean of the last 10 evaluations"
    over = Objective("accuracy", "clients", "last", clients="worst_tenth")
    assert str(over) == "accuracy on clients' own test samples, worst tenth over them, last evaluation"
    assert (
        over.column == "clients/accuracy_worst_tenth"
        and over.validation.column == "clients_val/accuracy_worst_tenth"
    )
    assert Objective(clients="weighted", at="best_val", on="clients").number([]).missing


def test_what_is_refused():
    for at in ("best_test", "mean:0", "mean", "mean:x"):
        with pytest.raises(ConfigError, match=rf"objective.at={at}: choose last, mean:K"):
            Objective(at=at)
        with pytest.raises(ConfigError, match=rf"objective.at={at}: must be last, mean:K"):
            validate(compose_quickly([f"objective.at='{at}'"]))
    with pytest.raises(ConfigError, match="nearest is 'val'"):
        Objective(on="vall")
    with pytest.raises(ConfigError, match="objective acuracy: no run has measured it; nearest is 'accuracy'"):
        check_column(Objective("acuracy"), [rows(accuracy=[0.1], loss=[1.0])])


def test_it_is_read_from_a_folder_and_from_settings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_json(row) + "\n" for row in rows(accuracy=[0.1, math.nan])))
    assert not number_of(tmp_path, Objective(at="last")).finite
    assert number_of(tmp_path / "none", Objective()).missing == "no metrics.jsonl"
    config = compose_quickly(["objective.metric=loss", "objective.at=last"])
    assert Objective.of(plain(config), "val") == Objective("loss", "val", "last")
    assert Objective.of({}, "test") == Objective()


def test_it_is_in_no_key():
    assert run_key(compose_quickly([])) == run_key(
        compose_quickly(["objective.metric=loss", "objective.on=test"])
    )


@pytest.mark.parametrize("value", [1e308, -1e200, "Infinity", 10**400])
def test_numbers_beyond_all_sums_are_not_finite(value):
    number = Objective("loss").number(rows(loss=[1.0] * 36 + [value] * 10))
    assert math.isnan(number.value) and len(number.rounds) == 10


def test_an_objective_that_no_run_has_is_said(tmp_path, caplog):
    make(tmp_path, "fedavg", 0, [0.5], objective={"metric": "acuracy"})
    with caplog.at_level("WARNING", logger="fedsim.report"):
        assert default_plan(load_runs([tmp_path])).objective.metric == "loss"
    assert (
        "objective.metric=acuracy: no run has that; its loss is shown; nearest is 'accuracy'" in caplog.text
    )
