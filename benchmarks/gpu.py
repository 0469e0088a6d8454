"""fedsim on a GPU: the same numbers as on a CPU, the same bits whatever the number of lanes, and clients per second
against a bare CUDA loop (and against Flower's simulation and pfl-research, where they are installed).

    python -m benchmarks.gpu --seconds 420 --out gpu.jsonl

Each finding is a line of JSON, printed and written as it comes; a table is the last of it. What no longer fits into the
seconds is left out, and that is said. Both sides of a comparison use the same arithmetic: float32 proper, and in the
part ``tf32`` rounded products.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bare import FORMS
from benchmarks.gpu_sides import SMALL, WORK, RoundTimer, bare_seconds, simulated
from benchmarks.sides import flower, pfl
from benchmarks.workloads import Workload
from fedsim.task.captured import exact

WARM = 3  # rounds that are not: steps are captured in them
ROUNDS = {"M": 12, "L": 40, "R": 6}  # timed
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "one by one": ("engine.lanes=1", "engine.vectorize=off"),
    "2 lanes": ("engine.lanes=2", "engine.vectorize=off"),
    "4 lanes": ("engine.lanes=4", "engine.vectorize=off"),
    "8 lanes": ("engine.lanes=8", "engine.vectorize=off"),
    "vectorised": ("engine.vectorize=on",),
}


class Report:
    """Findings as lines of JSON, and the time that is left."""

    def __init__(self, seconds: float, out: Path | None):
        self.end, self.found = time.monotonic() + seconds, list[dict[str, Any]]()
        self.file = out.open("a") if out else None

    def say(self, **finding: Any) -> None:
        self.found.append(finding)
        line = json.dumps(finding)
        print(line, flush=True)
        if self.file:
            self.file.write(line + "\n")
            self.file.flush()

    def part(self, name: str, seconds: float, do: Callable[[], Any]) -> None:
        """Do a part that takes about ``seconds``, if they are left; its error is a finding."""
        if time.monotonic() + seconds > self.end:
            return self.say(part=name, left_out="no time")
        start = time.monotonic()
        try:
            found = do()
        except Exception as e:
            traceback.print_exc()
            return self.say(part=name, error=f"{type(e).__name__}: {e}"[:500])
        return self.say(part=name, seconds=round(time.monotonic() - start, 1), **(found or {}))

    def table(self) -> None:
        print("\nworkload  side          clients/s  / bare")
        bare = {f["workload"]: f["rate"] for f in self.found if f.get("side") == "bare"}
        for f in self.found:
            if "rate" in f:
                ratio = f["rate"] / bare[f["workload"]] if f["workload"] in bare else float("nan")
                print(f"{f['workload']:<9} {f['side']:<13} {f['rate']:9.1f}  {ratio:6.2f}", flush=True)


# -- the findings ----------------------------------------------------------------------------------------------------


class Mixed(nn.Sequential):
    """BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(64, 10),
        )


def agreement(name: str) -> dict[str, Any]:
    """How far the GPU's weights are from the CPU's after a round, of the distance moved; in float32 and float64."""
    work, found = SMALL[name], dict[str, Any]()
    start = work.model().state_dict()
    for dtype in ("float32", "float64"):
        w = [
            simulated(work, 1, f"engine.device={device}", f"dtype={dtype}", "engine.chunks=2", *rest).weights
            for device, rest in (("cpu", ()), ("cuda", VARIANTS["4 lanes"]), ("cuda", VARIANTS["vectorised"]))
        ]
        moved, *off = (
            sum(float((w[0][k] - other[k]).square().sum()) for k in start) ** 0.5 for other in (start, *w[1:])
        )
        found[dtype] = {"lanes": off[0] / moved, "vectorised": off[1] / moved}
    return {"workload": name, "off by": found}


def same_bits(name: str) -> dict[str, Any]:
    """Hashes of the weights after two rounds, over lanes, and with Ray over workers that share the GPU."""
    model, extra, work = None, (), SMALL["M" if name == "mixed" else name]
    if name == "mixed":
        torch.manual_seed(0)
        model, extra = Mixed(), ("client=adam", "client.epochs=2", "client.clip_norm=1")
    hashes = {}
    ways = {f"{n} lanes": [f"engine.lanes={n}"] for n in (1, 2, 4)}
    if importlib.util.find_spec("ray") is not None and name == "mixed":
        ways |= {f"ray, {n} workers": ["engine=ray", f"engine.workers={n}"] for n in (1, 2)}
    for way, how in ways.items():
        run = simulated(work, 2, "engine.vectorize=off", *extra, *how, model=model)
        hashes[way] = run.rows[-1]["weights_hash"][:12]
    return {"workload": name, "same": len(set(hashes.values())) == 1, "hashes": hashes}


def rate(report: Report, side: str, work: Workload, seconds: Sequence[float], **more: Any) -> None:
    a = sorted(seconds)
    report.say(
        workload=work.name,
        side=side,
        rate=round(work.cohort / statistics.median(a), 2),
        round_ms=[round(1000 * v, 3) for v in (a[0], statistics.median(a), a[-1])],
        rounds=len(a),
        **more,
    )


def speed(report: Report, name: str, variants: Sequence[str], rounds: int, *more: str) -> None:
    """Clients per second of the bare loop, of fedsim, and of the bare loop again."""
    work, forms = WORK[name], list(FORMS[1:] if more else FORMS)
    mark = " tf32" if more else ""
    for turn in ("bare", "bare again"):
        if turn == "bare again":
            for variant in variants:
                timed = RoundTimer(work, rounds)
                run = lambda v=variant, c=timed: simulated(  # noqa: E731
                    work, WARM + rounds, *VARIANTS[v], *more, callbacks=[c]
                )
                report.part(f"{name} {variant}{mark}", 8, lambda r=run: {"loss": r().rows[-1]["train_loss"]})
                if len(timed.seconds) > WARM + 1:
                    rate(report, f"{variant}{mark}", work, timed.seconds[WARM + 1 :])
        with exact(bool(more)):
            found = bare_seconds(work, max(2, rounds // 4), forms)
        form = min(found, key=lambda f: statistics.median(found[f]))
        forms = [form]
        rate(report, f"{turn}{mark}", work, found[form], form=form)


def peer_speed(report: Report, name: str, peer: str, rounds: int, share: float) -> None:
    """Clients per second of another framework; of Flower with ``1 / share`` clients at a time on the GPU."""
    work = WORK[name]
    timed = RoundTimer(work, rounds)
    run = {"flwr": lambda: flower(timed, gpus=share), "pfl": lambda: pfl(timed)}[peer]  # type: ignore[arg-type]
    report.part(f"{name} {peer}", 35, lambda: run() and {})
    if len(timed.seconds) > 1:
        side = f"flower x{round(1 / share)}" if peer == "flwr" else peer
        rate(report, side, work, timed.seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workloads", default="L,R,M")
    parser.add_argument("--variants", default="default,one by one,2 lanes,4 lanes,8 lanes,vectorised")
    parser.add_argument("--parts", default="speed,tf32,bits,agreement,peers")
    parser.add_argument(
        "--flower-share", type=float, default=0.1, help="of the GPU for each client application"
    )
    parser.add_argument("--rounds", type=float, default=1.0, help="factor of the timed rounds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: torch {torch.__version__} sees no GPU here: nothing to measure\n")
    report, parts = Report(args.seconds, args.out), args.parts.split(",")
    report.say(torch=torch.__version__, card=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    names, variants = args.workloads.split(","), args.variants.split(",")
    for name in names:
        rounds = max(3, int(ROUNDS[name] * args.rounds))
        if "speed" in parts:
            speed(report, name, variants, rounds)
        if "tf32" in parts and name == "R":
            speed(report, name, ["default"], rounds, "engine.tf32=true")
    for name in (*names, "mixed"):
        if "bits" in parts:
            report.part(f"{name} bits", 15, lambda n=name: same_bits(n))
    for name in names:
        if "agreement" in parts:
            report.part(f"{name} agreement", 10, lambda n=name: agreement(n))
        for peer in ("flwr", "pfl"):
            if "peers" in parts and importlib.util.find_spec(peer) is not None:
                peer_speed(report, name, peer, 5, args.flower_share)
    report.table()


if __name__ == "__main__":
    main()
