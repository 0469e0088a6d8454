"""Randomness as an argument: every draw comes from a key, never from a global generator; and what tells bits apart.

A key is (seed, purpose, integers such as round and client). It is hashed to 64 bits, so streams of different purposes
are independent and no generator has to be saved in a checkpoint.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b, sha256
from threading import RLock

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)
_turn = RLock()  # of the run that computes

LARGE = 64 << 20  # bytes of a model that is hashed beside other work


def key(seed: int, purpose: str, *numbers: int) -> int:
    """64-bit key of (seed, purpose, numbers); the same on every machine and Python version."""
    text = ("%d/%s" + "/%d" * len(numbers)) % (seed, purpose, *numbers)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def numpy_rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """NumPy generator (Philox) of a key: server-side draws, partitions, cohorts."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


def torch_rng(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """CPU torch generator of a key: batch order, augmentation, noise."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers) >> 1)


def seed_global(seed: int) -> None:
    """Seed what user code draws from without a generator of its own: torch, NumPy and Python; 64-bit ``seed``."""
    torch.default_generator.manual_seed(seed >> 1)  # torch.manual_seed formats a stack trace on each call
    if _on_gpu():
        torch.cuda.manual_seed(seed >> 1)
    seed_others(seed)


def seed_others(seed: int) -> None:
    """Seed the global generators of NumPy and Python, beside torch's."""
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the global generators of torch, NumPy and Python as they were before the block."""
    devices = range(torch.cuda.device_count()) if _on_gpu() else ()
    numbers, plain = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numbers)
            random.setstate(plain)


@contextmanager
def taking_turns() -> Iterator[None]:
    """One run of this process at a time: a run in another thread waits, since its draws, and torch's number of threads,
    would be those of this one. A run within a run, in the same thread, does not."""
    if not _turn.acquire(blocking=False):
        log.warning(
            "a run in another thread of this process is under way: this one waits for its end, since threads share the "
            "generators that models draw from; processes (fedsim -m) run beside each other"
        )
        _turn.acquire()
    try:
        yield
    finally:
        _turn.release()


def _on_gpu() -> bool:
    """Whether this process has begun to use a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def uniforms(seed: int, purpose: str, ids: np.ndarray, *numbers: int) -> np.ndarray:
    """A number in [0, 1) for each of ``ids`` (n,), keyed by (seed, purpose, numbers, id): many draws at once.

    SplitMix64 (Steele, Lea, Flood 2014) of the id, started at the key: what one id gets does not depend on the others.
    """
    x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key(seed, purpose, *numbers))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, purpose: str, ids: np.ndarray, *numbers: int) -> np.ndarray:
    """A standard normal number for each of ``ids`` (n,), keyed as in ``uniforms`` (Box and Muller)."""
    first, second = (uniforms(seed, f"{purpose}/{half}", ids, *numbers) for half in "ab")
    return np.asarray(np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second))


def layer_state(device: torch.device) -> list[Tensor]:
    """State of the generators that layers on ``device`` draw from (dropout masks)."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def set_layer_state(state: list[Tensor], device: torch.device) -> None:
    """Draw again what was drawn after ``layer_state``."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """Sha256 over the raw bytes of ``tensors``, in order."""
    digest = sha256()
    for t in tensors:
        flat = t.detach().cpu().contiguous().reshape(-1)
        if len(flat):
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hashing(tensors: Iterable[Tensor]) -> Callable[[], str]:
    """``hash_tensors``, of large models in a thread beside what comes next: the call that waits for the digest."""
    every = list(tensors)
    if sum(t.nbytes for t in every) < LARGE or not all(t.is_cpu for t in every):
        digest = hash_tensors(every)
        return lambda: digest
    pool = ThreadPoolExecutor(1)
    found = pool.submit(hash_tensors, every)
    pool.shutdown(wait=False)
    return found.result
