"""Memory of Just One Byte: bytes of all tensors alive at once, beside those of a loop that only measures the loss.

A GPT-2 of two layers and width 768 (29.6 million parameters), all of it trained (``full``) or frozen under adapters of
rank 8 (``adapters``); batches of 4 x 64 tokens, one process, one thread. Counted is what torch's allocator was asked
for and not yet given back, as its profiler saw it, and the base that lies in mapped memory, once: not the process's
RSS, of which most is libraries, and which shows what the C library keeps. The peak is taken after the first round, so
that what a run does once, at its start, is left out; ``--start`` takes it in. ``at rest`` is what is alive between two
rounds: a run in one process is server and client, and holds the server's model beside the one that is measured (the
initial one lies on disk, of models this large). FedAvg, which backpropagates, is there for comparison. Wanted:
inference and four vectors of the trained numbers, with adapters 1.2 times inference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.frozen_base import adapted, next_token

LAYERS, LENGTH, BATCH, CLIENTS, ROUNDS = 2, 64, 4, 2, 3
MARK = "forward_memory: a round has ended"
VECTORS, TIMES = 4, 1.2  # wanted: so many vectors beyond inference, or so many times it
SIDES = {
    "inference": (),
    "one_byte": ("strategy=one_byte", "strategy.lr=1e-6", "strategy.samples=4"),
    "decomfl": ("strategy=decomfl", "strategy.lr=1e-6", "strategy.directions=4"),
    "fedavg": ("strategy=fedavg", "client.epochs=1"),
}


def build(kind: str) -> nn.Module:
    """The model; of ``full`` with no adapters, all of it trained."""
    model = adapted(LAYERS)
    if kind == "full":
        model = model.unload()  # type: ignore[operator]
        model.requires_grad_(True)
    return model.eval()


def texts() -> list[tuple[Tensor, Tensor]]:
    """Random tokens, one batch a client."""
    rng = torch.Generator().manual_seed(0)
    return [(x, x) for x in torch.randint(0, 20_000, (CLIENTS, BATCH, LENGTH), generator=rng)]


def infer(kind: str) -> None:
    """The loss of each client's batch, as often as there are rounds."""
    model, data = build(kind), texts()
    for _ in range(ROUNDS):
        for x, y in data:
            with torch.no_grad():
                float(next_token(model(x), y))
        mark()


def simulated(kind: str, side: str) -> None:
    """The same model and batches in a run of the method."""
    import fedsim

    class Rounds:
        def round(self, info: Any) -> None:
            mark()

    with tempfile.TemporaryDirectory() as out:
        words = [
            f"rounds={ROUNDS}",
            f"clients_per_round={CLIENTS}",
            f"client.batch_size={BATCH}",
            *SIDES[side],
        ]
        quiet = [
            "engine=serial",
            "tracker=quiet",
            "evaluation.every=1000",
            "checkpoint.every=0",
            f"out={out}",
        ]
        given: dict[str, Any] = {"clients": texts(), "loss": next_token, "callbacks": [Rounds()]}
        fedsim.simulate([*quiet, *words], model=lambda: build(kind), **given)


def mark() -> None:
    """A place in the profiler's record."""
    with record_function(MARK):
        pass


def mapped() -> int:
    """Bytes of anonymous files that this process maps, each file once: a base that workers share."""
    sizes: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, inode, name = line.split(maxsplit=5) if line.count("/memfd:") else [""] * 6
        if name:
            low, high = (int(end, 16) for end in place.split("-"))
            sizes[inode] = max(sizes.get(inode, 0), high - low)
    return sum(sizes.values())


def measure(kind: str, side: str) -> dict[str, int]:
    """Peaks of one side in this process, in bytes."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        if side == "inference":
            infer(kind)
        else:
            simulated(kind, side)
        shared = mapped()
    found: Any = seen.profiler
    events = sorted(found.kineto_results.events(), key=lambda e: e.start_ns())
    alive, peaks, rest = 0, [0], 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            peaks[-1] = max(peaks[-1], alive)
        elif event.name() == MARK:
            peaks.append(alive)
            rest = alive
    model = build(kind)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "rounds": max(peaks[1:-1]) + shared,
        "start": max(peaks) + shared,
        "rest": rest + shared,
        "trained": trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default="full,adapters")
    parser.add_argument("--sides", default=",".join(SIDES), help="default: %(default)s")
    parser.add_argument("--start", action="store_true", help="also what a run does before its second round")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(*args.only)))
        return
    for kind in args.kinds.split(","):
        bare, passes = 0, 0
        for side in args.sides.split(","):
            words = [sys.executable, "-m", "benchmarks.forward_memory", "--only", kind, side]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peak = found["start" if args.start else "rounds"]
            bare, passes = bare or peak, passes or peak - found["rest"]  # a forward pass of the first side
            vectors, times = (peak - bare) / found["trained"], peak / bare
            inside = (peak - found["rest"] - passes) / found["trained"]
            print(
                f"{kind} {side}: {peak / 1e6:.1f} MB, x{times:.2f} of inference, {vectors:.2f} vectors of "
                f"{found['trained'] / 1e6:.1f} MB beyond it; at rest {found['rest'] / 1e6:.1f} MB, in a round "
                f"{inside:.2f} vectors beside a forward pass (wanted for slopes: {VECTORS} vectors, or x{TIMES} with "
                "adapters)",
                flush=True,
            )


if __name__ == "__main__":
    main()
