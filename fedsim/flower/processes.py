"""A SuperLink and SuperNodes of this machine as child processes, which end with their parent whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.errors import EngineError
from fedsim.flower import forkserver

CONNECTION = "local"  # name of the link in Flower's configuration
PORTS = (20_000, 32_000)  # below those that Linux and macOS give to connections
# Of link, nodes and server app, through which whole models pass: what they free goes back at once. Where messages are
# worked on, activations come and go, and memory is kept (``fedsim.flower.forkserver`` takes the settings away)
SPARING = {**dict.fromkeys(forkserver.SPARING, str(1 << 20)), "MALLOC_ARENA_MAX": "2"}
STOP = 10.0  # seconds from SIGTERM to SIGKILL
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass
class Federation:
    """Processes in groups of their own, their logs in ``folder``. A context manager: leaving it ends all of them."""

    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)  # on top of this process's
    link_options: Sequence[str] = ("--insecure",)
    node_options: Sequence[str] = ("--insecure",)
    connection: Mapping[str, Any] = field(default_factory=lambda: {"insecure": True})
    port: int = 0
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Federation:
        self.folder.mkdir(parents=True, exist_ok=True)
        forkserver.install(self.folder / "bin")
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(*list(self.running)[::-1])

    @property
    def address(self) -> str:
        """Of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What Flower's programs need: their own folder, no telemetry, no installations, the right programs first."""
        here = str(Path(sys.executable).parent)
        code = [str(Path(__file__).resolve().parents[2]), *sys.path[1:]]
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(self.folder / "bin"), here, os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in code if p and "site-packages" not in p)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": "local",  # Flower's own simulation would join any Ray that it finds on this machine
            **SPARING,
            **self.env,
        }

    def link(self, port: int = 0) -> None:
        """Start the SuperLink and name it in Flower's configuration."""
        self.port = port or free_port()
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        about = {"address": self.address, **self.connection}
        lines = [f"{k} = {json.dumps(v)}" for k, v in about.items()]
        head = f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
        (home / "config.toml").write_text(head + "\n".join(lines) + "\n")
        self._start(
            "link", ["flower-superlink", *self.link_options, "--host", "127.0.0.1", "--port", str(self.port)]
        )

    def node(self, name: str, config: Mapping[str, bool | int | str], options: Sequence[str] = ()) -> int:
        """Start a SuperNode; the port of its own API, for ``ready``."""
        text = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
        port = free_port()
        command = ["flower-supernode", *self.node_options, "--superlink", self.address, "--port", str(port)]
        self._start(name, [*command, "--node-config", text, *options])
        return port

    def ready(self, name: str, port: int = 0, limit: float = 120.0, scheme: str = "http") -> None:
        """Wait until a process answers; EngineError shows its log if it ends before."""
        end, url = time.monotonic() + limit, f"{scheme}://127.0.0.1:{port or self.port}/health"
        while time.monotonic() < end:
            if self.running[name].poll() is not None:
                raise EngineError(f"{name} ended with {self.running[name].returncode}:\n{self.log(name)}")
            with contextlib.suppress(OSError, http.client.HTTPException):  # URLError is an OSError
                insecure = _unchecked() if scheme == "https" else None
                with urllib.request.urlopen(url, timeout=2, context=insecure):
                    return
            time.sleep(0.1)
        raise EngineError(f"{name} does not answer within {limit:g} s:\n{self.log(name)}")

    def flwr(self, *arguments: str, limit: float = 120.0) -> dict[str, Any]:
        """A command of Flower's, and its JSON; EngineError if it failed."""
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        with contextlib.suppress(ValueError):
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
            if done.returncode == 0 and answer.get("success", True):
                return answer
        raise EngineError(
            f"flwr {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )

    def submit(self, app: Path, overrides: str, *options: str) -> str:
        """Start a run of the project in ``app``; its id."""
        settings = self.folder / "run-config.toml"
        settings.write_text(f"overrides = {json.dumps(overrides, ensure_ascii=False)}\n")
        answer = self.flwr("run", str(app), CONNECTION, "--run-config", str(settings), *options)
        return str(answer["run-id"])

    def status(self, run: str) -> tuple[str, str]:
        """Flower's word on a run, such as ``finished:completed``, and its details."""
        row = self.flwr("list", CONNECTION, "--run-id", run)["runs"][0]
        return str(row["status"]), str(row.get("status-details") or "")

    def log(self, name: str, lines: int = 40) -> str:
        """The end of a process's log."""
        path = self.folder / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def stop(self, *names: str) -> None:
        """End processes and all that they started."""
        going = [self.running.pop(n) for n in names if n in self.running]
        for process in going:
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + STOP
        for process in going:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        while any(_group_lives(p.pid) for p in going) and time.monotonic() < end:
            time.sleep(0.1)
        for process in going:
            _signal(process, signal.SIGKILL)
            process.wait()

    def kill(self, name: str) -> None:
        """As a crash would: no time to say goodbye."""
        process = self.running.pop(name)
        _signal(process, signal.SIGKILL)
        process.wait()

    def _start(self, name: str, command: list[str]) -> None:
        if shutil.which(command[0], path=self.environment["PATH"]) is None:
            raise EngineError(f"{command[0]} is not installed; type: pip install 'fedsim-lab[flower]'")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )


def free_port() -> int:
    """A port that nobody listens on, of those that no system hands out by itself: it stays free until it is taken."""
    draw = random.SystemRandom()
    for port in (*(draw.randrange(*PORTS) for _ in range(100)), 0):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return int(s.getsockname()[1])
    raise EngineError("no free port on 127.0.0.1")


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent dies, even by SIGKILL. Its own children watch it in turn.

    SIGINT, with which Flower's processes end themselves, is ignored in what a shell starts in the background.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _unchecked() -> Any:
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
