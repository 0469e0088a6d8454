"""The report folder: page, tables and figures, from tiny run folders."""

import base64
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from runfolder import make

from fedsim.data.shards import Shards
from fedsim.report import compare, group_runs, load_runs
from fedsim.report.clientpoints import last
from fedsim.report.latex import to_latex
from fedsim.report.page import write_report
from fedsim.report.tables import layout, to_csv

VOID = {"meta", "img", "br", "line", "link"}
PNG = b"\x89PNG\r\n"


class Page(HTMLParser):
    """Tags are closed in the order they were opened; texts, attributes and table rows are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.rows, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def report(root, out=None, target=None, commands=()):
    runs = load_runs([root])
    page = write_report(group_runs(runs), compare(runs, target), out or root / "report", commands)
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture
def two_methods(tmp_path):
    evaluated = [(2, c, "evaluate/accuracy", v) for c, v in enumerate([0.25, 0.5, 0.75, 1.0])]
    early = [(1, 0, "evaluate/accuracy", 0.0), (2, 0, "train_loss", 9.0)]
    make(tmp_path, "fedavg", 0, [0.2, 0.6], clients=[*early, *evaluated], name="mine", num_clients=4)
    make(tmp_path, "fedavg", 1, [0.2, 0.4], name="mine", num_clients=4)
    make(tmp_path, "fedspeed", 0, [0.5, 0.7], name="mine", num_clients=4, strategy={"rho": 0.1})
    return tmp_path


def test_the_folder_holds_all_parts(two_methods):
    report(two_methods, target=0.6)
    files = {path.name: path.read_bytes() for path in (two_methods / "report").iterdir()}
    pictures = {f"curves-{name}.png" for name in ("rounds", "traffic", "seconds")} | {
        "clients-evaluate-accuracy.png"
    }
    assert set(files) == pictures | {"report.html", "table.csv", "table.tex"}
    assert all(files[name].startswith(PNG) for name in pictures)


def test_the_page_is_whole_and_loads_nothing(two_methods):
    page = report(two_methods, commands=["fedsim report mine"])
    assert page.text.startswith(
        "mine Skip to the results mine 2 methods (fedavg, fedspeed); 1 to 2 seeds each: 3 runs in all."
    )
    assert page.ids == ["results", "curves", "clients", "partition", "configuration", "failures", "reproduce"]
    for name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#")) or value == "data:,", value
    text = (two_methods / "report" / "report.html").read_text()
    assert not re.search(
        r"https?://|url\(|@import|<script .*src|fetch\(", re.sub(r"base64,[\w+/=]*", "", text)
    )
    assert "fedsim report mine" in page.text
    images = [value for name, value in page.attributes if name == "src"]
    assert len(images) == 7  # accuracy and loss against rounds, traffic and time; the clients
    vector = base64.b64decode(images[0].partition("base64,")[2])
    assert b"<svg" in vector and vector.count(b"<image") == 0


def test_the_page_is_the_same_each_time(two_methods):
    report(two_methods)
    first = (two_methods / "report" / "report.html").read_bytes()
    report(two_methods)
    assert (two_methods / "report" / "report.html").read_bytes() == first


def test_tables_of_the_page_by_hand(two_methods):
    rows = report(two_methods, target=0.6).rows
    assert ["fedavg", "2", "50.00 ± 14.14", "-", "-", "2 (1 of 2)", "6.0"] in rows
    assert ["fedspeed", "1", "70.00", "+10.00", "undecided", "2", "6.0"] in rows
    # 4 clients: mean 62.5, std over (25, 50, 75, 100), worst tenth is the worst one
    assert ["fedavg", "4", "62.50", "32.27", "25.00", "25.00"] in rows
    assert ["setting", "fedavg", "fedspeed"] in rows
    assert ["strategy.rho", "–", "0.1"] in rows
    assert ["num_clients", "4"] in rows and ["partition.alpha", "0.1"] in rows
    assert not any(row[0] in ("dir", "seed", "partition.seed") for row in rows)


def test_csv_is_exact(two_methods):
    assert to_csv(compare(load_runs([two_methods]), target=0.6)) == (
        "method,n,seeds,accuracy,accuracy_std,difference,low,high,p_holm,verdict,needed,target,rounds_to_target,"
        "reached,resolution,megabytes\n"
        'fedavg,2,"0,1",0.5,0.14142135623730948,,,,,,,0.6,2.0,1,1.0,6.0\n'
        "fedspeed,1,0,0.7,,0.09999999999999998,,,,undecided,,0.6,2.0,1,1.0,6.0\n"
    )


def test_latex_is_exact(tmp_path):
    for seed in range(3):
        for method, gain in (("fed_avg", 0.0), ("b", 0.125)):
            make(tmp_path, method, seed, [0.25, 0.5 + seed / 64 + gain])
    make(tmp_path, "fed_avg", 3, [0.25], status="failed")
    lines = to_latex(layout(compare(load_runs([tmp_path]), target=0.7))).splitlines()
    assert lines[5:] == [
        r"\begin{threeparttable}",
        r"\begin{tabular}{l S[table-format=1] S[table-format=2.2(3)] r l r S[table-format=1.1]}",
        r"\toprule",
        r"method & {n} & {accuracy \%} & difference & verdict & rounds to 70\% & {MB} \\",
        r"\midrule",
        r"b & 3 & \bfseries 64.06 \pm 1.56 & - & - & - & 6.0 \\",
        r"fed\_avg\tnote{1} & 3 & 51.56 \pm 1.56 & -12.50 [-12.50, -12.50] & worse & - & 6.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\begin{tablenotes}\footnotesize",
        r"\item[1] 3 of 4 seeds; seed 3 failed after 1 rounds",
        r"\item accuracy on test, mean of the last 1 evaluation (runs have fewer than 40): "
        r"mean $\pm$ sample standard deviation over n seeds",
        r"\item paired over seeds 0-2; Holm over 1 comparison, intervals unadjusted",
        r"\end{tablenotes}",
        r"\end{threeparttable}",
    ]


def test_names_from_outside_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"$title"
    failed = {
        "failures": [{"client": 1, "kind": "failed", "reason": f"Traceback\n  x\n{evil}", "task": "fit"}]
    }
    make(tmp_path, evil[:8], 0, [0.5], folder="evil", name=evil, extra=lambda at: failed)
    make(tmp_path, "b", 0, [0.5], name=evil, client={"note": evil})
    page = report(tmp_path, commands=[evil])
    assert "script" not in [tag.lower() for tag in page.open]
    assert page.text.startswith(evil)
    assert any(evil in row for row in page.rows)
    assert (tmp_path / "report" / "report.html").read_text().count("<script") == 1  # the page's own


def test_settings_that_share_a_short_name_keep_their_key(tmp_path):
    for alpha in (0.1, 1.0):
        for weight in (0.5, 0.9):
            make(tmp_path, "fedspeed", 0, [0.5], strategy={"alpha": weight}, partition={"alpha": alpha})
    groups = group_runs(load_runs([tmp_path]))
    assert groups[0].label == "fedspeed, strategy.alpha=0.5, partition.alpha=0.1"
    header = report(tmp_path).rows[0]
    assert header[:3] == ["method", "strategy.alpha", "partition.alpha"]


def test_what_is_missing_is_said(tmp_path):
    make(tmp_path, "fedavg", 0, [], status=None)
    page = report(tmp_path)
    assert "No round was evaluated yet." in page.text
    assert "No accuracy of single clients was recorded." in page.text
    assert "1 run without a recorded partition." in page.text
    assert "fedavg, seed 0: unfinished after 0 rounds" in page.text
    assert "One configuration; nothing to compare." in page.text


def test_torn_lines_of_clients_are_left_out(tmp_path):
    folder = make(tmp_path, "fedavg", 0, [0.5], clients=[(1, 0, "evaluate/accuracy", 0.5)])
    with (folder / "clients.jsonl").open("a") as file:
        file.write('{"round": 2, "client": 0, "metric": "evaluate/accuracy", "va')
    (run,) = load_runs([tmp_path])
    assert last(run, "accuracy") == {"evaluate/accuracy": {0: 0.5}}


def test_last_values_of_clients_in_both_forms_of_the_file(tmp_path):
    """A line a metric, as up to 0.1.0, then a line a client."""
    folder = make(
        tmp_path, "fedavg", 0, [0.5], clients=[(1, 0, "evaluate/accuracy", 0.5), (1, 1, "accuracy", 0.1)]
    )
    (run,) = load_runs([tmp_path])
    assert last(run, "accuracy") == {"evaluate/accuracy": {0: 0.5}, "accuracy": {1: 0.1}}
    with (folder / "clients.jsonl").open("a") as file:
        for at, client, value in ((2, 0, 0.6), (2, 3, "NaN"), (3, 0, 0.7)):
            values = {"train_loss": 1, "evaluate/accuracy": value, "accuracy": 0.25, "evaluate/seconds": 1e-3}
            file.write(json.dumps({"round": at, "client": client, "values": values}) + "\n")
        file.write('{"round": 3, "client": 1, "values": {"evaluate/accuracy": 0.')
    assert last(run, "accuracy") == {"accuracy": {0: 0.25}, "evaluate/accuracy": {0: 0.7}}
    assert str(last(replace(run, until=2), "e/accuracy")) == "{'evaluate/accuracy': {0: 0.6, 3: nan}}"


def test_a_partition_is_shown_once(tmp_path):
    shards = Shards.of([np.arange(3), np.arange(3, 10)])
    for method in ("fedavg", "fedspeed"):
        folder = make(tmp_path, method, 0, [0.5], summary={"partition_hash": shards.hash()})
    shards.save(folder / "partition.npz")
    other = make(tmp_path, "fedavg", 1, [0.5], status=None)
    Shards.of([np.arange(10)]).save(other / "partition.npz")
    (other / "partition.png").write_bytes(PNG + b"drawn by the run")
    broken = make(tmp_path, "fedavg", 2, [0.5], summary={"partition_hash": "f" * 64})
    (broken / "partition.npz").write_bytes(b"no archive")
    page = report(tmp_path)
    assert f"Partition {shards.hash()[:8]}: seed 0 of all 2 groups. Without classes" in page.text
    assert "seed 1 of fedavg." in page.text
    assert "Partition ffffffff: seed 2 of fedavg. Not drawn:" in page.text
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "report").glob("partition-*.png")}
    assert len(drawn) == 2 and PNG + b"drawn by the run" in drawn.values()


def test_failures_are_counted_by_kind(tmp_path):
    def extra(at):
        dropped = {"client": at, "kind": "dropped", "reason": "battery", "task": "fit"}
        refused = {"client": 7, "kind": "refused", "reason": "no samples", "task": "fit"}
        return {"failures": [dropped, refused] if at > 1 else [dropped]}

    make(tmp_path, "fedavg", 0, [0.1, 0.2, 0.3], extra=extra)
    rows = report(tmp_path).rows
    assert ["fedavg", "fit", "dropped", "3", "3", "1 to 3", "battery"] in rows
    assert ["fedavg", "fit", "refused", "2", "1", "2 to 3", "no samples"] in rows


def test_curves_against_traffic_and_time(tmp_path):
    from fedsim.report.curves import ENERGY, SECONDS, SIMULATED, TRAFFIC, draw

    for seed in (0, 1):  # 3 MB a round; 0.5 s; simulated 100 s and 200 s
        make(tmp_path, "fedavg", seed, [0.2, 0.4], extra=lambda at, s=seed: {"sim_seconds": 100.0 * (s + 1)})
    histories = {"fedavg": [run.rows for run in load_runs([tmp_path])]}

    def drawn(axis):
        axes = draw(histories, axis).axes[0]
        return axes.get_xlabel(), list(axes.get_lines()[0].get_xdata())

    assert drawn(TRAFFIC) == ("sent and received by all clients, MB", [3.0, 6.0])
    assert drawn(SECONDS) == ("computing time, s", [0.5, 1.0])
    assert drawn(SIMULATED) == ("simulated time, min", [2.5, 5.0])
    text = report(tmp_path).text
    assert "Against simulated time" in text and "Against energy" not in text
    frame = compare(load_runs([tmp_path]), 0.4)
    assert math.isclose(frame["sim_seconds"][0], 300.0)
    assert math.isclose(frame["time_to_target"][0], 300.0)
    assert math.isclose(compare(load_runs([tmp_path]), 0.1)["time_to_target"][0], 150.0)
    assert "joules" not in frame
    make(tmp_path, "fedbuff", 0, [0.1, 0.3], extra=lambda at: {"sim_seconds": 10.0, "joules": 4000.0 * at})
    powered = {"fedbuff": [run.rows for run in load_runs([tmp_path]) if run.method == "fedbuff"]}
    axes = draw(powered, ENERGY).axes[0]
    assert (axes.get_xlabel(), list(axes.get_lines()[0].get_xdata())) == (
        "energy of all clients, kJ",
        [4.0, 12.0],
    )
    assert "Against energy" in report(tmp_path).text  # where one of the methods has it
    assert (tmp_path / "report" / "curves-energy.png").is_file()


def test_importing_the_page_is_cheap():
    heavy = "('pandas', 'matplotlib', 'torch', 'numpy')"
    code = f"import sys, fedsim.report.page; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pseudo_labels_are_drawn_where_there_are_any(two_methods, tmp_path):
    assert "Pseudo labels" not in report(two_methods).text
    shares = {"pseudo/kept_share": 0.4, "pseudo/accuracy": 0.9}
    make(tmp_path / "semi", "fixmatch", 0, [0.2, 0.6], extra=lambda at: shares if at > 1 else {})
    text = report(tmp_path / "semi").text
    assert "Pseudo labels" in text and "Of those kept, right" in text and "By the global model" not in text
