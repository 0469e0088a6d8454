"""``fedsim compare``: words in, verdicts and exit codes out."""

import json

import pytest
from runfolder import make

from fedsim.cli.main import command


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(5):
        base = 0.8 + seed / 50
        for method, gain in (("fedavg", 0.0), ("fedspeed", 0.02 + seed / 1e4), ("twin", 0.0)):
            make(
                tmp_path / "runs",
                method,
                seed,
                [base - 0.1] * 3 + [base + gain],
                extra=lambda at: {"cohort": [1]},
            )
    return tmp_path / "runs"


def test_verdicts_and_expectations(runs, capsys):
    assert command(["compare", "runs", "--at", "last"]) == 0
    out = capsys.readouterr().out
    assert "fedspeed" in out and "better" in out and "equivalent within 0.50" in out
    assert (
        command(
            ["compare", "runs", "--at", "last", "--expect", "fedspeed better", "--expect", "twin equivalent"]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        command(["compare", "runs", "--at", "last", "--expect", "fedavg better", "--reference", "fedspeed"])
        == 1
    )
    assert "fedsim: expected fedavg better, but against fedspeed it is worse" in capsys.readouterr().err
    argv = ["compare", "runs", "--at", "last", "--reference", "all", "--rename", "fedspeed=z"]
    assert (
        command([*argv, "--expect", "twin equivalent"]) == 1
    )  # to fedavg, but not to z, whose pair names z first
    assert "expected twin equivalent, but against z it is worse" in capsys.readouterr().err


def test_several_methods_are_renamed_at_once_and_a_name_may_hold_a_comma(runs, capsys):
    assert command(["compare", "runs", "--at", "last", "--rename", "fedspeed=Ours, fast,twin=B"]) == 0
    out = capsys.readouterr().out
    assert "  Ours, fast  " in out and "  B  " in out and "twin" not in out


def test_a_word_of_order_that_is_nobody_is_said(runs, capsys):
    assert command(["report", "runs", "--order", "fedspeeed,twin", "--format", "md"]) == 0
    out, err = capsys.readouterr()
    assert (
        "--order fedspeeed: nothing is called so; nearest is 'fedspeed'" in err and "--order twin" not in err
    )
    assert out.index("| twin") < out.index("| fedavg")
    assert command(["report", "runs", "--order", "twin", "--rename", "twin=Zwei", "--format", "md"]) == 0
    out, err = capsys.readouterr()
    assert out.index("| Zwei") < out.index("| fedavg") and "--order" not in err


def test_trials_of_a_tuning_are_said_to_be_no_results(runs, capsys):
    trials = [{"folders": {str(seed): path.name}} for seed in (0, 1) for path in runs.glob(f"*-s{seed}*")]
    (runs / "tune.json").write_text(json.dumps({"methods": [{"trials": trials}]}))
    line = (
        "runs, seeds 0, 1: trials of fedsim tune, which chose settings by them; results: --where seed=2,3,4"
    )
    assert command(["compare", "runs"]) == 0 and line in capsys.readouterr().out
    assert command(["report", "runs", "--format", "md"]) == 0 and line in capsys.readouterr().out
    assert command(["compare", "runs", "--where", "seed=2,3,4"]) == 0
    assert "trials of fedsim tune" not in capsys.readouterr().out
    (runs / "tune.json").write_text("[]")
    assert command(["compare", "runs"]) == 0 and "trials" not in capsys.readouterr().out


def test_a_method_is_expected_by_its_name_alone_where_more_tells_it_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in range(5):
        for method, weighting, gain in (
            ("fedavg", "samples", 0.0),
            ("fedspeed", "uniform", 0.02 + seed / 1e4),
        ):
            changes = {"strategy": {"weighting": weighting}}
            make(tmp_path / "runs", method, seed, [0.8 + seed / 50 + gain], **changes)
    say = ["compare", "runs", "--at", "last", "--expect"]
    assert command([*say, "fedspeed better"]) == 0
    assert "fedspeed, weighting=uniform" in capsys.readouterr().out
    assert command([*say, "fedspeed worse"]) == 1
    assert "expected fedspeed, weighting=uniform worse" in capsys.readouterr().err
    for seed in range(5):
        make(tmp_path / "runs", "fedspeed", seed, [0.8], strategy={"weighting": "samples"})
    assert command([*say, "fedspeed better"]) == 2
    assert "several arms are of that method; type one of: " in capsys.readouterr().err
    assert command([*say, "moon better"]) == 2
    assert "no comparison has 'moon'; there are " in capsys.readouterr().err


def test_json_is_all_there_is_on_stdout(runs, capsys, monkeypatch):
    argv = ["compare", "runs", "--at", "last", "--against", "fedspeed", "--json"]
    assert command(argv) == 0
    first = capsys.readouterr().out
    content = json.loads(first)
    (block,) = content["blocks"]
    assert [c["verdict"] for c in block["comparisons"]] == ["better"] and block["reference"] == "fedavg"
    assert content["objective"]["k"] == 1 and content["margin"] == 0.005
    monkeypatch.chdir(runs)
    assert command(["compare", ".", *argv[2:]]) == 0
    assert capsys.readouterr().out == first
    assert command(["compare", ".", "--json", "--objective", "acuracy"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "nearest is 'accuracy'" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--where", "strategy=fedavg"], "nothing to compare: no setting has two methods with numbers"),
        (["--where", "strategy=x"], "--where strategy=x: no run is left of 15"),
        (["--where", "strategy=fedvag"], "no run is left of 15; nearest is 'fedavg'"),
        (["--where", "partition.alfa=1"], "no run has this setting; nearest is 'partition.alpha'"),
        (["--reference", "fedspeeed"], "no method 'fedspeeed' among the runs; nearest is 'fedspeed'"),
        (["--rename", "fedav=X"], "--rename fedav: no method of that name; nearest is 'fedavg'"),
        (["--expect", "fedspeed best"], "type a method and one of better, worse, equivalent, undecided"),
        (["--expect", "fedsped better"], "nearest is 'fedspeed'"),
        (["--at", "best_test"], "the best round of the test set is no result"),
        (["--at", "best_val"], "type evaluation.validation=0.1"),
        (
            ["--objective", "clients/accuracy", "--on", "val"],
            "says another place than --on val; leave one out",
        ),
        (
            ["--on", "clients"],
            "no run has measured it; runs with evaluation.holdout=0.2 evaluation.clients_every=10",
        ),
        (["--margin", "-1"], "--margin -1: must be finite and not negative"),
        (["--margin", "inf", "--json"], "--margin inf: must be finite and not negative"),
        (["--until", "0"], "--until 0: rounds are counted from 1"),
        (["--until", "3", "--population", "--at", "last"], "predictions are the final model's"),
        (["--across", "bayes"], "in 5 settings or more; here it is 1"),
        (["--across", "bayes", "--json"], "--across: its line is no part of comparison.json"),
    ],
)
def test_what_is_refused(runs, capsys, argv, said):
    assert command(["compare", "runs", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_report_of_what_nobody_measured(runs, capsys):
    assert command(["report", "runs", "--at", "best_val"]) == 2
    assert "type evaluation.validation=0.1" in capsys.readouterr().err
    assert command(["report", "runs", "--columns", "lss"]) == 2
    assert "--columns lss: no such column; nearest is 'loss'" in capsys.readouterr().err


def test_a_report_in_one_format(runs, capsys):
    for form, begins in (
        ("md", "| method |"),
        ("csv", "method,n,seeds,accuracy"),
        ("tex", "% To see it alone"),
    ):
        assert command(["report", "runs", "--format", form, "--curves", "diff,loss"]) == 0
        assert capsys.readouterr().out.startswith(begins)
    assert command(["report", "runs", "--json", "--pivot", "method", "seed"]) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"]) == 1
    names = {path.name for path in (runs / "report").iterdir()}
    assert {"comparison.json", "curve-diff.png", "curve-loss.png", "table.tex"} <= names
    assert command(["report", "runs", "--format", "md", "--pivot", "method", "seed"]) == 2
    assert "--pivot seed: the runs do not differ in it" in capsys.readouterr().err
    assert command(["report", "runs", "--format", "md", "--pivot", "method", "method"]) == 2
    assert "type two settings, one down and one across" in capsys.readouterr().err


def test_no_common_seed(tmp_path, capsys):
    make(tmp_path, "a", 0, [0.5])
    make(tmp_path, "b", 1, [0.5])
    assert command(["compare", str(tmp_path)]) == 2
    assert "no two methods have a finished run of a common seed" in capsys.readouterr().err


def test_runs_are_chosen_and_renamed(runs, capsys):
    flags = [
        "--at",
        "last",
        "--where",
        "strategy=fedavg,fedspeed",
        "--where",
        "seed<=3",
        "--rename",
        "fedavg=FedAvg",
    ]
    assert command(["compare", "runs", *flags, "--json"]) == 0
    (block,) = json.loads(capsys.readouterr().out)["blocks"]
    assert block["reference"] == "FedAvg" and [m["seeds"] for m in block["methods"]] == [[0, 1, 2, 3]] * 2


def test_a_short_name_of_several_settings_is_the_one_that_all_runs_have(
    tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        make(tmp_path / "runs", "fedavg", seed, [0.5])
        make(
            tmp_path / "runs",
            "fedspeed",
            seed,
            [0.6],
            strategy={"_target_": "strategies.fedspeed.X", "alpha": 1},
        )
    assert command(["compare", "runs", "--where", "alpha=0.1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"][0]["methods"]) == 2
    assert "alpha: taken for partition.alpha, which all runs have; there is strategy.alpha too" in caplog.text
    assert command(["compare", "runs", "--where", "alpha=1"]) == 2


def test_an_earlier_look_is_told(runs, capsys):
    assert command(["compare", "runs", "--at", "last", "--where", "seed<3", "--json"]) == 0
    (runs / "report").mkdir()
    (runs / "report" / "comparison.json").write_text(capsys.readouterr().out)
    assert command(["compare", "runs", "--at", "last"]) == 0
    assert "fedspeed: compared before with n = 3" in capsys.readouterr().out
