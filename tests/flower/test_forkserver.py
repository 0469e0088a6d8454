"""Processes for messages: each its own, torch imported once for all of them, and nothing left when the node ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until

from fedsim.flower import forkserver

STARTER = """\
import json, os, subprocess, sys, time
command, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for k in range(count):
    subprocess.Popen([command, "--token", f"t {k}", "--parent-pid", str(os.getpid())])
    while not os.path.exists(os.path.join(out, f"t {k}")):
        time.sleep(0.01)
input()
"""
APP = """\
import json, os, sys, torch
def flwr_clientapp():
    about = {"pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv, "torch": torch.by, "first": torch.first}
    torch.first = False
    path = os.path.join(os.environ["OUT"], sys.argv[2])
    with open(path + ".tmp", "w") as file:
        json.dump(about, file)
    os.rename(path + ".tmp", path)
    sys.exit(0)
"""


def stand_ins(folder: Path) -> Path:
    """A torch that says who imported it, and a command that says what it was started with."""
    place = folder / "modules"
    for package in ("flwr", "flwr/supernode", "flwr/supernode/cli"):
        (place / package).mkdir(parents=True)
        (place / package / "__init__.py").touch()
    (place / "torch.py").write_text("import os\nby, first = os.getpid(), True\n")
    (place / "flwr/supernode/cli/flwr_clientapp.py").write_text(APP)
    for name in ("numpy", "hydra", "omegaconf", "safetensors", "yaml"):
        (place / f"{name}.py").touch()
    return place


def test_messages_have_processes_of_their_own_forked_from_one(tmp_path: Path) -> None:
    out, place = tmp_path / "out", stand_ins(tmp_path)
    out.mkdir()
    (tmp_path / "node").mkdir()
    command = forkserver.install(tmp_path / "node/bin")
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(command), str(out), "3"],
        stdin=subprocess.PIPE,
        env={"PYTHONPATH": str(place), "OUT": str(out), "PATH": "/usr/bin:/bin"},
    )
    try:
        end = time.monotonic() + 60
        while len(found := [json.loads(p.read_text()) for p in sorted(out.glob("t ?"))]) < 3:
            assert starter.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert len({one["pid"] for one in found}) == 3
        (server,) = {one["parent"] for one in found}
        assert all(
            one["torch"] == server and one["first"] for one in found
        )  # nothing is left of earlier ones
        assert [one["argv"] for one in found] == [
            ["flwr-clientapp", "--token", f"t {k}", "--parent-pid", str(starter.pid)] for k in range(3)
        ]
        assert psutil.Process(server).ppid() == starter.pid
        assert starter.stdin is not None
        starter.stdin.close()
        starter.wait(10)
        psutil.wait_procs([p for p in psutil.process_iter() if p.pid == server], timeout=10)
        assert not psutil.pid_exists(server)
    finally:
        starter.kill()
        starter.wait()


def started(place: Path, out: Path, command: Path, count: int) -> subprocess.Popen[bytes]:
    """A process that starts the command as often, like a SuperExec, and waits."""
    environment = {"PYTHONPATH": str(place), "OUT": str(out), "PATH": "/usr/bin:/bin"}
    words = [sys.executable, "-c", STARTER, str(command), str(out), str(count)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, env=environment)


def told(out: Path, count: int) -> list[dict[str, Any]]:
    """What so many messages' processes wrote."""
    wait_until(lambda: len(list(out.glob("t ?"))) >= count, 60, "processes for all messages")
    return [json.loads(p.read_text()) for p in sorted(out.glob("t ?"))]


def test_killed_starters_leave_no_server_and_killed_servers_no_message(tmp_path: Path) -> None:
    out, place = tmp_path / "out", stand_ins(tmp_path)
    out.mkdir()
    command = forkserver.install(tmp_path / "bin")
    starter = started(place, out, command, 2)
    try:
        first = told(out, 1)[0]["parent"]
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(first).kill()  # before or after it took the second message
        servers = {one["parent"] for one in told(out, 2)}
        starter.kill()
        starter.wait()
        wait_until(lambda: not any(map(lives, servers)), 10, "an end of the servers")
    finally:
        starter.kill()
        starter.wait()


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_process_whose_starter_is_gone_becomes_no_server() -> None:
    assert forkserver._starts(7, ["--token", "x", "--parent-pid", "7"])
    assert not forkserver._starts(1, ["--token", "x", "--parent-pid", "7"])
    assert forkserver._starts(7, ["--token", "--parent-pid"])


def test_the_command_stands_for_itself() -> None:
    text = forkserver.as_command()
    assert text.startswith("#!/usr/bin/env -S python3 -P\n")
    assert "import fedsim" not in text and "from fedsim" not in text
    compile(text, "flwr-clientapp", "exec")
