"""Seconds and memory of a round on a real deployment: a SuperLink and SuperNodes on this machine.

``python -m benchmarks.deployment --hidden 8475 8475`` deploys FedAvg on an MLP of 72 million parameters (290 MB) to
three nodes, with two local steps a round. Memory is the proportional set size (what is shared counts once), looked at
some times a second: the most of one process of each kind, and the most of all at one moment. Copies are that memory,
less what the same takes with a tiny model, in sizes of the model. Seconds are those between rows of metrics.jsonl, the
first round left out; CPU seconds, those that all processes together were computing in them, hang less on what else
the machine does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

from fedsim.flower.deploy import MODULE, PRELOAD, PROJECT, for_nodes
from fedsim.flower.options import deployed
from fedsim.flower.processes import Federation
from fedsim.models import MLP

EVERY = 0.25  # seconds between looks
LIMIT = 900.0  # seconds for a run
TINY = [32]
WORK = ("client.steps=2", "client.batch_size=16")
ROLES = {  # by a word of the command line, the first that fits
    "flwr-serverapp": "server app",
    "flower-superlink": "link",
    "forkserver": "client apps",
    "flwr-clientapp": "client apps",
    "flower-supernode": "nodes",
    "flower-superexec": "starters",
}
MB = 1e6


@dataclass
class Peaks:
    """The most memory of a federation's processes, by kind, in bytes."""

    most: dict[str, float] = field(default_factory=dict)  # of one kind at one moment
    single: dict[str, float] = field(default_factory=dict)  # of one process
    total: float = 0.0  # of all at one moment
    parts: dict[str, float] = field(default_factory=dict)  # of that, by kind
    spent: dict[tuple[int, float], float] = field(
        default_factory=dict
    )  # seconds of processor time by process
    _over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        now, kinds = 0.0, defaultdict[str, float](float)
        for process in psutil.Process().children(recursive=True):
            try:
                words, size = " ".join(process.cmdline()), process.memory_full_info().pss
                times = process.cpu_times()
                self.spent[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
            role = next((kind for word, kind in ROLES.items() if word in words), "others")
            now, kinds[role] = now + size, kinds[role] + size
            self.single[role] = max(self.single.get(role, 0.0), size)
        if now > self.total:
            self.total, self.parts = now, dict(kinds)
        for kind, size in kinds.items():
            self.most[kind] = max(self.most.get(kind, 0.0), size)

    def until_over(self) -> None:
        while not self._over.wait(EVERY):
            self.look()

    def __enter__(self) -> Peaks:
        self._thread = threading.Thread(target=self.until_over, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


@dataclass
class Deployed:
    """One deployment's figures."""

    size: int  # bytes of the model
    seconds: list[float]  # of each round but the first
    cpu: list[float]  # seconds of processor time in these rounds, of all processes
    first: float  # seconds from submitting to the end of the first round
    watch: Peaks


def measured(place: Path, hidden: list[int], nodes: int, rounds: int, more: list[str]) -> Deployed:
    """A deployment in ``place``."""
    folder = place / "run"
    text = f"model.hidden={json.dumps(hidden)}"
    overrides = for_nodes([f"rounds={rounds}", text, "tracker=quiet", f"dir={folder}", *WORK, *more], nodes)
    deployed(overrides)
    app = place / "app"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "deployment.py").write_text(MODULE)
    with Federation(place / "federation", env=PRELOAD) as federation, Peaks() as watch:
        federation.link()
        federation.ready("link")
        ports = [
            federation.node(f"node-{k}", {"partition-id": k, "state-dir": str(place / f"state-{k}")})
            for k in range(nodes)
        ]
        for k, port in enumerate(ports):
            federation.ready(f"node-{k}", port)
        start = time.monotonic()
        federation.submit(app, shlex.join(overrides))
        ends, spent = _rounds(folder, rounds, start, watch)
    size = 4 * sum(p.numel() for p in MLP((8, 8), 10, hidden).parameters())
    seconds, cpu = ([b - a for a, b in pairwise(found)] for found in (ends, spent))
    return Deployed(size, seconds, cpu, ends[0] - start, watch)


def _rounds(folder: Path, rounds: int, start: float, watch: Peaks) -> tuple[list[float], list[float]]:
    """When the row of each round was written, and how much processor time was spent by then."""
    ends, spent, path = list[float](), list[float](), folder / "metrics.jsonl"
    while len(ends) < rounds:
        rows = path.read_text().count("\n") if path.exists() else 0
        ends += [time.monotonic()] * (rows - len(ends))
        spent += [sum(list(watch.spent.values()))] * (rows - len(spent))
        if (folder / "summary.json").exists() and len(ends) < rounds:
            raise RuntimeError((folder / "summary.json").read_text())
        if time.monotonic() - start > LIMIT:
            raise RuntimeError(f"{folder}: {len(ends)} of {rounds} rounds within {LIMIT:g} s")
        time.sleep(0.05)
    return ends, spent


def table(tiny: Deployed, big: Deployed, nodes: int) -> str:
    """Both, side by side."""
    lines = [f"{'':14}{'tiny':>12}{f'{big.size / MB:.0f} MB':>12}{'copies':>9}"]
    for kind in dict.fromkeys(ROLES.values()):
        a, b = tiny.watch.single.get(kind, 0.0), big.watch.single.get(kind, 0.0)
        lines.append(f"{kind:14}{a / MB:9.0f} MB{b / MB:9.0f} MB{(b - a) / big.size:9.1f}")
    for kind, b in big.watch.parts.items():
        a = tiny.watch.parts.get(kind, 0.0)
        lines.append(
            f"{'  ' + kind:14}{a / MB:9.0f} MB{b / MB:9.0f} MB{(b - a) / big.size:9.1f}  of all at once"
        )
    a, b = tiny.watch.total, big.watch.total
    lines.append(f"{'all at once':14}{a / MB:9.0f} MB{b / MB:9.0f} MB{(b - a) / big.size:9.1f}")
    lines.append(f"{'s a round':14}{_typical(tiny.seconds):12}{_typical(big.seconds):12}")
    lines.append(f"{'CPU s a round':14}{_typical(tiny.cpu):12}{_typical(big.cpu):12}")
    lines.append(f"{'s to round 1':14}{tiny.first:12.1f}{big.first:12.1f}")
    return "\n".join(lines) + f"\n{nodes} nodes; a row is the largest process of its kind; s: median (range)"


def _typical(s: list[float]) -> str:
    return f"{statistics.median(s):5.1f} ({min(s):.1f}-{max(s):.1f})".rjust(12) if s else "-".rjust(12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[8475, 8475], help="layers of the large MLP")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tiny-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of both runs")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = measured(Path(folder, "tiny"), TINY, args.nodes, args.rounds, args.overrides)
        small = args.tiny_only
        big = (
            tiny
            if small
            else measured(Path(folder, "big"), args.hidden, args.nodes, args.rounds, args.overrides)
        )
    print(table(tiny, big, args.nodes))


if __name__ == "__main__":
    main()
