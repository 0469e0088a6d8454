"""Does a round of FedSTO cost what its gradients cost? Its speed against a bare loop (``bare_fedsto``).

``experiment=fedsto_weather``: 300 pictures at each of three clients, 500 at the server, one pass each, one process, one
thread. Both sides go on from a detector that the bare loop has trained, so that their teachers find boxes, and take
turns round by round within one process. Reported for each phase: the median over rounds of (fedsim's seconds / the bare
loop's), and of CPU seconds. A fedsim round is everything between two calls of a callback.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch

import fedsim
from benchmarks.bare_fedsto import ALPHA, Bare
from fedsim.data.sources import weather_shapes
from fedsim.models.detector import Detector

TRAIN = {"cloudy": 500, "overcast": 300, "rainy": 300, "snowy": 300}
CONTRAST = {"cloudy": 1.0, "overcast": 0.36, "rainy": 0.5, "snowy": 0.4}
SETTINGS = (
    "experiment=fedsto_weather",
    "strategy=fedsto",
    f"strategy.alpha={ALPHA}",
    "strategy.weights={class: 0.3, objectness: 0.7, box: 2.0}",
    "strategy.strong=[strong,cutout]",
    "strategy.warmup_rounds=0",
    "evaluation.every=1000000",
    "evaluation.predictions=false",
    "checkpoint.every=0",
    "tracker=quiet",
)


def bare(warm: int) -> Bare:
    """The loop on the experiment's pictures, its detector trained by ``warm`` passes of the server."""
    data = weather_shapes(
        train=TRAIN, test=0, side=64, shapes=[9, 22], contrast=CONTRAST, domains=None, seed=0
    )
    x, y = data.train.take(torch.arange(len(data.train)))
    parts = [torch.split(t, list(TRAIN.values())) for t in (x, y["boxes"], y["labels"])]
    torch.manual_seed(0)
    model = Detector((3, 64, 64), 3, channels=(16, 32, 32, 64, 64), groups=4)
    loop = Bare(model, tuple(p[0] for p in parts), parts[0][1:])  # type: ignore[arg-type]
    for _ in range(warm):
        loop.serve(penalised=False)
    return loop


class Turns:
    """Calls a round of the bare loop after each of fedsim's, and keeps the seconds of both."""

    def __init__(self, loop: Bare, selective: int, last: int):
        self.loop, self.selective, self.last, self.done = loop, selective, last, 0
        self.found: dict[str, list[tuple[float, float]]] = {"backbone": [], "everything": []}
        self.at = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Seconds by the clock, and of this process's CPU."""
        return time.perf_counter(), time.process_time()

    def round(self, row: Mapping[str, Any], clients: Any) -> None:
        """A round of fedsim is done."""
        middle = self.now()
        phase = self.done < self.selective
        self.loop.round(phase)
        end = self.now()
        ratios = [(b - a) / (c - b) for a, b, c in zip(self.at, middle, end, strict=True)]
        if self.done not in (0, self.selective, self.last):  # each phase warms up; the last one is evaluated
            self.found["backbone" if phase else "everything"].append((ratios[0], ratios[1]))
        self.done, self.at = self.done + 1, self.now()


def main() -> None:
    """Print both phases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="of each phase, beside one to warm up")
    parser.add_argument("--warm", type=int, default=20, help="passes of the server before")
    parser.add_argument("--only", choices=["backbone", "everything"], help="one phase")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loop = bare(args.warm)
    first = 0 if args.only == "everything" else args.rounds + 1
    last = 0 if args.only == "backbone" else args.rounds + 1
    turns = Turns(loop, first, first + last)
    initial = {k: v.clone() for k, v in loop.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as out:
        given = [f"out={out}", f"rounds={first + last + 1}", f"strategy.selective_rounds={first}"]
        fedsim.simulate([*SETTINGS, *given], initial=initial, callbacks=[turns])
    for phase, pairs in turns.found.items():
        if pairs:
            wall, cpu = (sorted(p[i] for p in pairs) for i in (0, 1))
            print(
                f"{phase}: {statistics.median(wall):.2f} times the bare loop ({wall[0]:.2f}-{wall[-1]:.2f}, "
                f"{len(wall)} rounds), CPU {statistics.median(cpu):.2f}"
            )


if __name__ == "__main__":
    main()
