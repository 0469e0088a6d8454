"""Whether compiling a small model's whole local step pays: forward, backward and update of M or L in one computation.

    python -m benchmarks.compiled --workload M

Fedsim's own step in turns with ``torch.compile`` of the step over the parameters, updated in place, and, in another
process, with the same exported and compiled ahead (AOTInductor); one thread. Seconds of a step are CPU seconds of
this process, the median over turns. Compiling is measured with an empty cache and, in a second process, with the cache
of the first. A compiled step pays after ``compile / (step - compiled step)`` steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.workloads import WORKLOADS, Workload
from fedsim.task.losses import cross_entropy
from fedsim.task.vectors import FlatModel

Step = Callable[[Tensor, Tensor], Tensor]
MARK = "result: "
WAYS = ("torch.compile", "AOTInductor")
ROUNDS = 20  # after which compiling is to have paid


def own(work: Workload) -> Step:
    """What a client's plain step does today."""
    model = FlatModel(work.model().train())
    return lambda x, y: model.descend(x, y, cross_entropy, work.lr, 0.0)


class Whole(nn.Module):
    """``step(x, y)``: the loss of the batch; the parameters are moved in place."""

    def __init__(self, work: Workload):
        super().__init__()
        self.model, self.lr = work.model().train(), work.lr

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of SGD."""
        held = dict(self.model.named_parameters())

        def value(params: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(self.model, params, (x,)), y)

        grads, loss = grad_and_value(value)({k: p.detach() for k, p in held.items()})
        with torch.no_grad():
            for k, p in held.items():
                p.sub_(grads[k], alpha=self.lr)
        return loss


def compiled(work: Workload) -> Step:
    """By ``torch.compile``, one graph for the batch's shape."""
    step = torch.compile(Whole(work), fullgraph=True, dynamic=False)
    return lambda x, y: step(x, y)


class Ahead(nn.Module):
    """A step without state: parameters in, parameters out, for export."""

    def __init__(self, work: Workload):
        super().__init__()
        self.lr, self._model = work.lr, [work.model().train()]  # in a list: no part of the module
        self.names = [k for k, _ in self._model[0].named_parameters()]

    def forward(self, params: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss, and what the parameters are afterwards."""

        def value(given: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(self._model[0], given, (x,)), y)

        grads, loss = grad_and_value(value)(dict(zip(self.names, params, strict=True)))
        return loss, [p - self.lr * grads[k] for k, p in zip(self.names, params, strict=True)]


def ahead(work: Workload, folder: str) -> Step:
    """By AOTInductor: a shared library, called without Python in between."""
    import torch._inductor as inductor

    x, y = batch(work)
    step, params = Ahead(work), [p.detach().clone() for p in work.model().parameters()]
    traced = make_fx(step)(
        params, x, y
    )  # forward and backward as one list of operations, which export can read
    exported = torch.export.export(traced, (params, x, y))
    package = inductor.aoti_compile_and_package(exported, package_path=str(Path(folder, "step.pt2")))
    run = inductor.aoti_load_package(package)
    held = [params]

    def go(x: Tensor, y: Tensor) -> Tensor:
        loss, held[0] = run(held[0], x, y)
        return loss

    return go


def batch(work: Workload) -> tuple[Tensor, Tensor]:
    """The first of the workload's batches."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(work.batch, *work.shape, generator=rng), torch.randint(
        10, (work.batch,), generator=rng
    )


def turn(step: Step, x: Tensor, y: Tensor, times: int) -> float:
    """CPU seconds of a step."""
    start = time.process_time()
    for _ in range(times):
        step(x, y)
    return (time.process_time() - start) / times


def measure(work: Workload, way: str, turns: int, times: int) -> dict[str, Any]:
    """Compile in one ``way``, let it and fedsim's own step learn the same, and time them in turns."""
    torch.set_num_threads(1)
    x, y = batch(work)
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Step]] = {
            "own": lambda: own(work),
            way: lambda: compiled(work) if way == WAYS[0] else ahead(work, folder),
        }
        steps, seconds, losses, failed = dict[str, Step](), {}, {}, {}
        for name, make in makers.items():
            start = time.perf_counter(), _cpu()
            try:
                steps[name] = make()
                losses[name] = [float(steps[name](x, y)) for _ in range(3)]
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                steps.pop(name, None)
                continue
            seconds[name] = time.perf_counter() - start[0], _cpu() - start[1]
        spent: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(turns):
            for name, step in steps.items():
                spent[name].append(turn(step, x, y, times))
    medians = {name: statistics.median(found) for name, found in spent.items()}
    return {"step": medians, "compile": seconds, "losses": losses, "failed": failed}


def _cpu() -> float:
    """CPU seconds of this process and of the compilers that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default="M", choices=("M", "L"))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--times", type=int, default=200, help="steps in a turn")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = WORKLOADS[args.workload]
    if args.child:
        print(MARK + json.dumps(measure(work, args.child, args.turns, args.times)), flush=True)
        return
    a_round = work.cohort * -(-work.samples // work.batch)
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("empty", "filled"):
                command = [sys.executable, "-m", "benchmarks.compiled", "--child", way]
                command += [
                    "--workload",
                    args.workload,
                    "--turns",
                    str(args.turns),
                    "--times",
                    str(args.times),
                ]
                done = subprocess.run(
                    command,
                    env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
                if not lines:
                    raise SystemExit(done.stderr)
                report(args.workload, kind, json.loads(lines[0].removeprefix(MARK)), a_round)


def report(workload: str, cache: str, found: dict[str, Any], a_round: int) -> None:
    """Print what was measured."""
    mine = found["step"]["own"]
    for name, step in found["step"].items():
        wall, cpu = found["compile"][name]
        line = f"{workload}  {name:<14} {step * 1e6:7.1f} CPU us a step, x{mine / step:.2f}"
        if name != "own":
            gain = mine - step
            pays = f"{cpu / gain / a_round:.0f} rounds" if gain > 0 else "never"
            line += f"; compiled in {wall:.1f} s, {cpu:.1f} CPU s ({cache} cache): pays after {pays}, wanted {ROUNDS}"
        print(f"{line}; losses {' '.join(f'{v:.6f}' for v in found['losses'][name])}", flush=True)
    for name, why in found["failed"].items():
        print(f"{workload}  {name:<14} failed: {why[:200]}", flush=True)


if __name__ == "__main__":
    main()
