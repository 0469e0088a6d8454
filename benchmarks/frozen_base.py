"""A frozen base of 100 million parameters under rank-8 adapters: memory of all processes, and what a step costs.

Memory: the largest proportional set size (PSS: shared pages are divided among those who map them) of the driver and its
workers together over a run of two rounds. Steps: rounds of one client on the serial engine, in turns with as many steps
of a bare loop (peft's model, torch's SGD) on the same batches; median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim

MB = 1e6
LENGTH, BATCH, STEPS, LR = 16, 2, 4, 0.01
WORKERS, CLIENTS = 2, 4
MOST, EXTRA = 1.4, 1e9  # times the base, plus bytes


def adapted(layers: int = 12) -> nn.Module:
    """GPT-2's width with a smaller vocabulary: 100.5 million frozen parameters in float32, adapters of rank 8."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20_000, n_positions=128, n_layer=layers, **off, **ends))
    targets = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def next_token(output: Any, y: Tensor) -> Tensor:
    """Mean cross entropy of each next token."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def texts(clients: int) -> list[tuple[Tensor, Tensor]]:
    """Random tokens."""
    rng = torch.Generator().manual_seed(0)
    return [(x, x) for x in torch.randint(0, 20_000, (clients, BATCH * STEPS, LENGTH), generator=rng)]


def settings(engine: str, rounds: int, cohort: int, out: str) -> list[str]:
    local = [f"client.batch_size={BATCH}", "client.epochs=1", f"client.lr={LR}", "client.lr_decay=1"]
    plain = ["client.clip_norm=null", "client.weight_decay=0", "client.momentum=0", "client.shuffle=false"]
    quiet = ["tracker=quiet", "evaluation.every=1000", "checkpoint.every=0", f"out={out}"]
    return [f"engine={engine}", f"rounds={rounds}", f"clients_per_round={cohort}", *local, *plain, *quiet]


class Memory(threading.Thread):
    """Looks at the PSS of this process and of Ray's workers under it, until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.parts, self.ended = 0, list[int](), threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(0.05):
            parts = [me.memory_full_info().pss]
            for child in me.children(recursive=True):
                try:
                    if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::_Actor"):
                        parts.append(child.memory_full_info().pss)
                except psutil.Error:  # it has ended
                    continue
            if sum(parts) > self.peak:
                self.peak, self.parts = sum(parts), parts


def memory() -> None:
    """One run on two workers, with a look at the memory."""
    model = adapted()
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    watch = Memory()
    watch.start()
    with tempfile.TemporaryDirectory() as out:
        given: dict[str, Any] = {"model": model, "clients": texts(CLIENTS), "loss": next_token}
        fedsim.simulate([*settings("ray", 2, CLIENTS, out), f"engine.workers={WORKERS}"], **given)
    watch.ended.set()
    watch.join()
    allowed = MOST * base + EXTRA
    found = {"base": base, "peak": watch.peak, "parts": watch.parts, "allowed": allowed}
    print(json.dumps(found))


def imports() -> None:
    """What a process holds that has imported the libraries of this run, and nothing else."""
    import peft  # noqa: F401
    import ray  # noqa: F401
    from transformers import GPT2LMHeadModel  # noqa: F401

    print(psutil.Process().memory_full_info().uss)


def steps(rounds: int) -> float:
    """Median ratio of seconds: a client of fedsim over a bare loop."""
    torch.set_num_threads(1)
    bare, (x, y) = adapted().train(), texts(1)[0]
    optimiser = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], LR)
    ratios: list[float] = []
    began = 0.0

    def loop() -> float:
        start = time.perf_counter()
        for i in range(0, len(x), BATCH):
            optimiser.zero_grad()
            torch.autograd.backward(next_token(bare(input_ids=x[i : i + BATCH]), y[i : i + BATCH]))
            optimiser.step()
        return time.perf_counter() - start

    class InTurns:
        def round(self, row: dict[str, Any], clients: object) -> None:
            nonlocal began
            took = time.perf_counter() - began
            plain = loop()
            if row["round"] > 1:  # the first one warms up
                ratios.append(took / plain)
            began = time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        given: dict[str, Any] = {"model": adapted(), "clients": texts(1), "loss": next_token}
        fedsim.simulate(settings("serial", rounds, 1, out), callbacks=[InTurns()], **given)
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"a step of fedsim / of a bare peft loop: {middle:.3f} ({least:.3f}-{most:.3f})")
    return middle


def main() -> None:
    """Print both; each in a process of its own, so that neither has the other's memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["memory", "imports", "steps"], help="one part, in this process")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the comparison of steps")
    options = parser.parse_args()
    if options.only == "steps":
        steps(options.rounds)
        return
    if options.only is not None:
        {"memory": memory, "imports": imports}[options.only]()
        return
    words = [sys.executable, "-m", "benchmarks.frozen_base", "--only"]

    def said(part: str) -> Any:
        done = subprocess.run([*words, part], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    found, alone = said("memory"), said("imports")
    parts = ", ".join(f"{part / MB:.0f}" for part in found["parts"])
    print(
        f"base {found['base'] / MB:.0f} MB; driver and {WORKERS} workers at their peak {found['peak'] / MB:.0f} MB"
    )
    print(f"  ({parts}); at most {MOST} x the base + 1 GB = {found['allowed'] / MB:.0f} MB")
    print(
        f"  of these the imports of torch, transformers, peft and Ray alone take {alone / MB:.0f} MB in each process"
    )
    subprocess.run([*words, "steps", "--rounds", str(options.rounds)], check=True)


if __name__ == "__main__":
    main()
