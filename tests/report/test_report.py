import io
import math
import statistics
import subprocess
import sys
import time

import pytest
from rich.console import Console
from runfolder import make

import fedsim
from experiments.long_tail import table
from fedsim.errors import ConfigError
from fedsim.report import (
    clients_plan,
    compare,
    default_plan,
    default_target,
    draw_curves,
    figure_of,
    group_runs,
    load_runs,
    print_table,
)


def test_numbers_by_hand(tmp_path):
    make(tmp_path, "fedavg", 0, [0.2, 0.5, 0.4], every=2)
    make(tmp_path, "fedavg", 1, [0.3, 0.3, 0.6], every=2)
    make(tmp_path, "fedspeed", 0, [0.1, 0.2, 0.3], every=2)
    frame = compare(load_runs([tmp_path]), target=0.5)
    assert list(frame["method"]) == ["fedavg", "fedspeed"]
    assert [c for c in frame.columns if "." in c] == []  # nothing but the method differs
    first, second = frame.to_dict("records")
    assert first["seeds"] == "0,1"
    assert first["accuracy"] == pytest.approx(0.5)
    assert first["accuracy_std"] == pytest.approx(statistics.stdev([0.4, 0.6]))
    assert (first["n"], second["n"], first["resolution"]) == (2, 1, 2)
    assert first["rounds_to_target"] == pytest.approx((4 + 6) / 2)
    assert (first["reached"], second["reached"]) == (2, 0)
    assert first["megabytes"] == pytest.approx(6 * 3)
    assert compare(load_runs([tmp_path]), columns=["seconds"])["seconds"][0] == pytest.approx(3.0)
    assert second["difference"] == pytest.approx(-0.1) and second["verdict"] == "undecided"
    assert math.isnan(second["rounds_to_target"]) and math.isnan(second["accuracy_std"])
    assert "note" not in frame and "sim_seconds" not in frame


def test_settings_get_a_column_only_if_they_tell_groups_apart(tmp_path):
    for rho in (0.05, 0.1):
        strategy = {"_target_": "strategies.fedspeed.FedSpeed", "rho": rho}
        make(tmp_path, "fedspeed", 0, [0.5], strategy=strategy, client={"lr": 0.1}, engine={"workers": 2})
    make(tmp_path, "fedavg", 0, [0.5], client={"lr": 0.2}, engine={"workers": 1})
    groups = group_runs(load_runs([tmp_path]))
    assert [group.label for group in groups] == [
        "fedavg, lr=0.2",
        "fedspeed, rho=0.05, lr=0.1",
        "fedspeed, rho=0.1, lr=0.1",
    ]
    frame = compare(load_runs([tmp_path]))
    assert [c for c in frame.columns if "." in c] == ["strategy.rho", "client.lr"]


def test_what_clients_weigh_is_shown_where_it_differs(tmp_path):
    for name, weighting in (("fedavg", "samples"), ("fedprox", "uniform")):
        make(tmp_path, name, 0, [0.5], strategy={"_target_": f"strategies.{name}.X", "weighting": weighting})
    frame = compare(load_runs([tmp_path]))
    assert frame["strategy.weighting"].tolist() == ["samples", "uniform"]
    (tmp_path / "same").mkdir()
    for name in ("fedavg", "fedprox"):
        strategy = {"_target_": f"strategies.{name}.X", "weighting": "uniform"}
        make(tmp_path / "same", name, 0, [0.5], strategy=strategy)
    assert "strategy.weighting" not in compare(load_runs([tmp_path / "same"])).columns
    base = {
        "_target_": "strategies.ggeur.GGEUR",
        "base": {"_target_": "strategies.fedavg.X", "weighting": "samples"},
    }
    make(tmp_path / "same", "ggeur", 0, [0.5], strategy=base)
    wrapped = compare(load_runs([tmp_path / "same"]))
    assert wrapped[["strategy.weighting", "strategy.base.weighting"]].values.tolist() == [
        ["uniform", None],
        ["uniform", None],
        [None, "samples"],
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # no personal models here
def test_the_long_tail_pages_deviation_is_the_sample_one(tmp_path):
    for seed, value in enumerate((0.5, 0.6, 0.85)):
        folder = make(tmp_path, "ditto", seed, [value], folder=f"ditto-s{seed}-0")
        (folder / "summary.json").write_text("{}")
    (row,) = table(tmp_path).to_dict("records")
    assert row["GM std"] == pytest.approx(100 * ((0.15**2 + 0.05**2 + 0.2**2) / 2) ** 0.5)


def test_a_fixed_inner_seed_is_a_setting_that_all_share(tmp_path):
    for seed in (0, 1, 2):
        make(tmp_path, "fedavg", seed, [0.5], partition={"seed": 0})
    (group,) = group_runs(load_runs([tmp_path]))
    assert [run.seed for run in group.runs] == [0, 1, 2]


def test_same_run_twice_counts_once(tmp_path, caplog):
    make(tmp_path, "fedavg", 0, [0.5], folder="a", tracker={"wandb": "offline"})
    make(tmp_path, "fedavg", 0, [0.5, 0.7], folder="b")
    (group,) = group_runs(load_runs([tmp_path, tmp_path / "b"]))
    assert [run.dir.name for run in group.runs] == ["b"]
    assert "is the same run" in caplog.text


def test_broken_folders_are_named_and_skipped(tmp_path, caplog):
    make(tmp_path, "fedavg", 0, [0.5])
    (make(tmp_path, "fedavg", 1, [0.5], folder="noconfig") / "config.yaml").unlink()
    (make(tmp_path, "fedavg", 2, [0.5], folder="badrow") / "metrics.jsonl").write_text("x\n{}\n")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "metrics.jsonl").write_text("")
    runs = load_runs([tmp_path, tmp_path / "nowhere"])
    assert [run.seed for run in runs] == [0]
    for name in ("noconfig", "badrow", "nowhere"):
        assert name in caplog.text
    assert ".hydra" not in caplog.text


def test_killed_runs_are_shown_with_a_note(tmp_path):
    make(tmp_path, "fedavg", 0, [0.5, 0.6])
    with (make(tmp_path, "fedavg", 1, [0.4], status=None) / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "acc')
    frame = compare(load_runs([tmp_path]))
    assert list(frame["seeds"]) == ["0"] and list(frame["accuracy"]) == [0.6]
    assert list(frame["note"]) == ["1 of 2 seeds; seed 1 unfinished after 1 rounds"]


def test_a_diverged_run_is_named(tmp_path):
    make(tmp_path, "fedavg", 0, [0.5, math.nan])
    assert list(compare(load_runs([tmp_path]))["note"]) == ["not finite: 1 of 1 seeds (0)"]


def test_default_target(tmp_path):
    for seed, best in enumerate([0.81, 0.77, 0.10]):
        make(tmp_path, "fedavg", seed, [best, math.nan])
    runs = load_runs([tmp_path])
    assert default_target(runs) == pytest.approx(0.75)
    assert compare(runs).attrs["target"] == pytest.approx(0.75)
    assert default_target([]) is None


def test_configured_target_wins(tmp_path):
    make(tmp_path, "fedavg", 0, [0.2, 0.5], evaluation=0.3)
    frame = compare(load_runs([tmp_path]))
    assert frame.attrs["target"] == 0.3
    assert list(frame["rounds_to_target"]) == [2]


def shown(root, **options):
    console = Console(file=io.StringIO(), width=160)
    print_table(compare(load_runs([root]), **options), console)
    return console.file.getvalue()


def test_the_table_marks_what_is_decided(tmp_path):
    for seed in range(4):
        for at, method in enumerate(("fedavg", "fedspeed")):
            make(tmp_path, method, seed, [0.2, 0.6 + at / 10 + seed / 100], every=5)
    text = shown(tmp_path, target=0.6)
    assert "accuracy %" in text and "rounds to 60%" in text and "<= 10" in text
    assert "71.50 ± 1.29 *" in text and "61.50 ± 1.29 " in text
    assert "+10.00 [+10.00, +10.00]" in text and "better" in text
    assert text.count("*") == 1, "traffic and rounds are equal: nobody leads"
    assert "paired over seeds 0-3; Holm over 1 comparison, intervals unadjusted" in text


def test_few_seeds_and_equal_means_are_not_marked(tmp_path):
    make(tmp_path, "fedavg", 0, [0.2, 0.6])
    make(tmp_path, "fedavg", 1, [0.2, 0.4])
    make(tmp_path, "fedspeed", 0, [0.5, 0.7])
    text = shown(tmp_path, target=0.6)
    assert "50.00 ± 14.14" in text and "70.00" in text and "*" not in text
    assert "2 (1 of 2)" in text
    assert "fedspeed leads, undecided against fedavg" in text


def test_less_traffic_is_marked_by_value(tmp_path):
    make(tmp_path, "fedavg", 0, [0.2, 0.6])
    make(tmp_path, "fedprox", 0, [0.2, 0.5, 0.5])
    make(tmp_path, "fedspeed", 0, [0.9], status="failed")
    lines = shown(tmp_path).splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith(" fedavg")] == [["6.0", "*"]]
    assert "fedspeed: not in the table: seed 0 failed after 1 rounds" in lines


def test_numbers_of_a_search_are_rounded_and_seeds_counted(tmp_path):
    for seed in range(60):
        make(tmp_path, "fedavg", seed, [0.5], client={"lr": 0.012345678901})
    make(tmp_path, "fedavg", 0, [0.5], client={"lr": 0.1}, folder="other")
    text = shown(tmp_path)
    assert "0.01235" in text and " 60 " in text and "0,1,2" not in text


def test_columns_that_are_asked_for(tmp_path):
    make(tmp_path, "fedavg", 0, [0.9, 0.6], extra=lambda at: {"val/loss": at / 8})
    text = shown(tmp_path, columns=["best_test", "val/loss", "seconds"])
    assert "best % (test, optimistic)" in text and "90.00" in text and "0.25" in text
    assert "seconds: not ranked: busy or different machines" in text
    with pytest.raises(ConfigError, match="--columns val/los: no such column; nearest is 'val/loss'"):
        compare(load_runs([tmp_path]), columns=["val/los"])


def test_columns_stand_in_the_order_asked_for_and_what_no_run_has_is_said(tmp_path):
    for seed in range(3):
        for method, last in (("fedavg", 0.6), ("fedspeed", 0.7)):
            make(tmp_path, method, seed, [0.5, last + seed / 50], extra=lambda at: {"val/loss": at / 8})
    asked = ["joules", "verdict", "val/loss", "difference", "megabytes"]
    frame = compare(load_runs([tmp_path]), columns=asked)
    at = [list(frame).index(name) for name in asked[1:]]
    assert at == sorted(at) and "joules: no run has it" in frame.attrs["below"]
    text = shown(tmp_path, columns=["megabytes", "verdict"])
    assert text.index("MB") < text.index("verdict") and "difference" not in text.splitlines()[1]


def test_personal_methods_have_a_table_of_their_own(tmp_path):
    extra = {"clients/accuracy": 0.8, "clients/accuracy_worst_tenth": 0.4}
    for method in ("fedavg", "mine"):
        make(tmp_path, method, 0, [0.5], extra=lambda at: extra, summary={"personal": method == "mine"})
    runs = load_runs([tmp_path])
    assert list(compare(runs)["method"]) == ["fedavg"]
    assert "mine: not in the table: its models are the clients' own" in shown(tmp_path)
    frame = compare(runs, plan=clients_plan(runs, default_plan(runs)))
    assert list(frame["method"]) == ["fedavg", "mine"]
    assert (
        list(frame["clients/accuracy"]) == [0.8] * 2 == [2 * v for v in frame["clients/accuracy_worst_tenth"]]
    )


def test_data_frames_of_a_folder(tmp_path):
    make(tmp_path, "fedavg", 3, [0.5, 0.6], clients=[(1, 0, "evaluate/accuracy", 0.5)], summary={"key": "k"})
    loaded = fedsim.load(tmp_path)
    assert repr(fedsim.load([tmp_path])) == repr(loaded)  # lists of folders too
    assert loaded.runs[["method", "seed", "status", "key", "partition.alpha"]].values.tolist() == [
        ["fedavg", 3, "done", "k", 0.1]
    ]
    assert loaded.rows["accuracy"].tolist() == [0.5, 0.6] and set(loaded.rows["seed"]) == {3}
    assert loaded.clients[["round", "client", "value"]].values.tolist() == [[1, 0, 0.5]]


def test_many_runs_are_reported_quickly(tmp_path):
    for method in range(10):
        for seed in range(6):
            make(tmp_path, f"m{method}", seed, [0.5 + at / 100 + method / 1000 for at in range(20)])
    start = time.perf_counter()
    compare(load_runs([tmp_path]))
    assert time.perf_counter() - start < 5


def test_a_narrow_terminal_loses_no_digit(tmp_path):
    make(tmp_path, "fedavg", 0, [0.2, 0.6])
    console = Console(file=io.StringIO(), width=20)
    print_table(compare(load_runs([tmp_path])), console)
    assert "60.00" in console.file.getvalue() and "…" not in console.file.getvalue()


def test_curves_are_drawn(tmp_path):
    for seed in (0, 1):
        make(tmp_path, "fedavg", seed, [0.2 + seed / 10, 0.5, 0.6])
    make(tmp_path, "fedspeed", 0, [0.3, 0.6, 0.7])
    figure = draw_curves(load_runs([tmp_path]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    accuracy, loss = figure.axes
    assert [line.get_label() for line in accuracy.get_lines()] == ["fedavg (n=2)", "fedspeed"]
    assert list(accuracy.get_lines()[0].get_ydata()) == pytest.approx([0.25, 0.5, 0.6])
    assert len(accuracy.collections) == 1  # the band of the two seeds
    assert len(loss.get_lines()) == 2


def test_figure_of_one_history_without_accuracy():
    figure = figure_of({"mine": [[{"round": 1, "loss": 1000.0}, {"round": 2, "loss": 0.1}]]})
    accuracy, loss = figure.axes
    assert "no accuracy was measured" in accuracy.texts[0].get_text()
    assert loss.get_yscale() == "log"


def test_a_label_that_begins_with_an_underscore_is_in_the_legend():
    rows = [{"round": 1, "accuracy": 0.5}, {"round": 2, "accuracy": 0.6}]
    figure = figure_of({"_mine": [rows], "other": [rows]})
    assert [text.get_text() for text in figure.texts] == ["_mine", "other"]


def test_importing_the_report_is_cheap():
    heavy = "('pandas', 'matplotlib', 'torch', 'wandb')"
    code = f"import sys, fedsim.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
