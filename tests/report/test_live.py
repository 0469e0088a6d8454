"""The live view: how runs stand, what is served to whom, and when the report is built again."""

import fcntl
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from runfolder import make

from fedsim.cli.serving import warned_once
from fedsim.errors import ConfigError
from fedsim.report import live
from fedsim.report.live import LiveReport, answer, server
from fedsim.report.progress import Progress


def built(report):
    """A build that only counts, and writes a page."""
    report.builds = 0

    def build():
        report.builds += 1
        report.out.mkdir(exist_ok=True)
        (report.out / "report.html").write_text(f"<main>{live.LIVE}build {report.builds}</main>")

    report._build = build
    return report


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LOOK", 0.0)
    monkeypatch.setattr(live, "SHARE", 1.0)
    make(tmp_path, "fedavg", 0, [0.5, 0.6], folder="fedavg-s0", rounds=2)
    return built(LiveReport([tmp_path], tmp_path / "report", lambda: None))


@contextmanager
def serving(report):
    with server(report, 0) as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield started.server_address[1]
        finally:
            started.shutdown()
            thread.join()


def get(port, path, host=None):
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    line.putrequest("GET", path, skip_host=True)
    line.putheader("Host", host or f"127.0.0.1:{port}")
    line.endheaders()
    found = line.getresponse()
    body = found.read().decode(errors="replace")
    line.close()
    return found.status, body


def test_how_runs_stand(tmp_path):
    make(tmp_path, "a", 0, [0.5, 0.6], folder="ended", rounds=2)
    make(tmp_path, "a", 1, [0.5], folder="broke", rounds=9, status="failed", summary={"error": "Boom: <b>"})
    make(tmp_path, "a", 2, [0.5], folder="killed", rounds=9, status=None)
    running = make(tmp_path, "a", 3, [0.5, 0.5, 0.5], folder="running", rounds=9, status=None)
    (running / "metrics.jsonl").open("a").write('{"round": 4, "acc')
    progress = Progress([tmp_path], tmp_path / "report")
    with (running / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = progress.look()
        assert {one.name: (one.status, one.done, one.wanted) for one in progress.runs} == {
            "ended": ("done", 2, 2),
            "broke": ("failed", 1, 9),
            "killed": ("interrupted", 1, 9),
            "running": ("under way", 3, 9),
        }
        assert progress.look() == first
        text = progress.html()
        assert "1 under way, 1 done, 1 interrupted, 1 failed" in text
        assert "failed (Boom: &lt;b&gt;)" in text and "3 of 9" in text
        assert [text.index(name) for name in ("broke", "killed", "running", "ended")] == sorted(
            text.index(name) for name in ("broke", "killed", "running", "ended")
        )
    assert progress.look() != first  # whoever wrote to the fourth run is gone
    assert {one.name: one.status for one in progress.runs}["running"] == "interrupted"


def test_the_report_is_built_again_only_when_files_changed(report, tmp_path):
    for _ in range(5):
        answer(report, "/state")
    assert (report.builds, report.version) == (1, 1)
    with (tmp_path / "fedavg-s0" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "accuracy": 0.7}\n')
    state = json.loads(answer(report, "/state")[1])
    assert (report.builds, state["version"]) == (2, 2) and "3 of 2" in state["progress"]
    assert "build 2" in answer(report, "/")[1].decode()
    (tmp_path / "report" / "more.csv").write_text("a")  # the report's own files are no news
    answer(report, "/")
    assert report.builds == 2


def test_builds_take_a_tenth_of_the_time_at_most(report, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "SHARE", 0.001)
    report._build = lambda: time.sleep(0.05)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("x")
    answer(report, "/state")
    with (tmp_path / "fedavg-s0" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3}\n')
    assert json.loads(answer(report, "/state")[1])["version"] == 1  # 50 s have to pass


def test_only_the_reports_own_files_are_served(report, tmp_path):
    with serving(report) as port:
        assert get(port, "/")[0] == 200
        (tmp_path / "report" / "table.csv").write_text("method")
        (tmp_path / "report" / "secret.key").write_text("key")
        (tmp_path / "report" / "deep").mkdir()
        (tmp_path / "report" / "deep" / "a.csv").write_text("deep")
        (tmp_path / "outside.csv").write_text("outside")
        (tmp_path / "report" / "link.csv").symlink_to(tmp_path / "outside.csv")
        assert get(port, "/table.csv") == (200, "method")
        assert get(port, "/table.csv?x=1") == (200, "method")
        for path in (
            "/../outside.csv",
            "/%2e%2e/outside.csv",
            "/..%2foutside.csv",
            "/deep/a.csv",
            "/secret.key",
            "/link.csv",
            f"/{tmp_path}/outside.csv",
            f"//{tmp_path}/outside.csv",
            "/report.html/../../outside.csv",
            "/fedavg-s0/config.yaml",
            "/%00",
            "/.",
        ):
            status, body = get(port, path)
            assert status == 404 and body == "no such file in this report\n", path
        assert get(port, "/", host=f"evil.example:{port}")[0] == 403
        assert get(port, "/state", host=f"localhost:{port}")[0] == 200


def test_a_port_in_use_is_said(report):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: .* cannot be had \(Address already in use\)"):
            server(report, port)


def test_nothing_to_show_yet_and_a_build_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LOOK", 0.0)

    def build():
        raise ConfigError("half a file")

    report = LiveReport([tmp_path], tmp_path / "report", build)
    page = answer(report, "/")[1].decode()
    assert "No runs yet" in page and "No run has begun yet." in page
    make(tmp_path, "fedavg", 0, [0.5])
    assert json.loads(answer(report, "/state")[1])["remark"] == "The report could not be built: half a file"


def test_a_build_that_breaks_off_leaves_the_page(report, tmp_path):
    assert "build 1" in answer(report, "/")[1].decode()

    def build():
        raise KeyError("client")  # as of rows that somebody cut

    report._build = build
    make(tmp_path, "fedavg", 1, [0.5])
    assert json.loads(answer(report, "/state")[1])["remark"].endswith("not be built: KeyError('client')")
    assert "build 1" in answer(report, "/")[1].decode()


def test_what_is_wrong_is_said_once_however_often_the_report_is_built(caplog):
    log = logging.getLogger("fedsim.report.runs")
    with warned_once():
        for number in (1, 2, 2, 1):
            log.warning("run %d skipped", number)
    log.warning("run 1 skipped")
    assert caplog.messages == ["run 1 skipped", "run 2 skipped", "run 1 skipped"]


@pytest.mark.slow
def test_the_command_follows_a_folder_and_ends_with_ctrl_c(tmp_path):
    make(tmp_path, "fedavg", 0, [0.5, 0.6], folder="fedavg-s0")
    command = [sys.executable, "-m", "fedsim.cli", "report", str(tmp_path), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            assert said.startswith("report:  http://127.0.0.1:"), said
            port = int(said.split(":")[3].partition("/")[0])
            status, page = get(port, "/")
            assert status == 200 and "fedavg" in page and 'id="progress"' in page
            assert "fetch(" in page and (tmp_path / "report" / "table.csv").is_file()
            again = subprocess.run([*command[:-1], str(port)], capture_output=True, text=True, env=os.environ)
            assert again.returncode == 2 and f"--port {port}" in again.stderr
        finally:
            process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
        assert (process.returncode, out, error) == (0, "", "")
