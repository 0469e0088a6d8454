"""Error feedback: golden rounds, and the toy whose residuals can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import GOLDEN

from fedsim.exchange.codecs import StageDraws, TopK, compensated, remainder

Send = Callable[[int, np.ndarray], np.ndarray]


def largest(x: np.ndarray) -> np.ndarray:
    """The largest entry, as it arrives."""
    codec, draws = TopK(1 / len(x)), StageDraws(lambda stage: torch.Generator())
    return codec.decode(codec.encode(x), draws).numpy()


def test_a_toy_by_hand() -> None:
    """v = (4, 3, 2, 1) each round, k = 1: what is sent, and what is left."""
    v, r, sent, total = torch.tensor([4.0, 3, 2, 1]), None, [], torch.zeros(4, dtype=torch.float64)
    for t in range(100):
        x = compensated(v, r)
        y = torch.from_numpy(largest(x.numpy()))
        r = remainder(x, y)
        total += y
        if t < 6:
            sent.append((int(y.argmax()), float(y.max())))
        if t == 5:
            assert r.tolist() == [0, 3, 4, 6]
    assert sent == [(0, 4), (1, 6), (0, 8), (2, 8), (1, 9), (0, 12)]
    assert (total / 100).tolist() == pytest.approx([4, 2.97, 1.96, 0.95])


def test_golden_rounds() -> None:
    with np.load(GOLDEN / "release/feedback.npz") as file:
        z = dict(file)
    A, b = z["A"], z["b"]
    assert z["k"] == 1

    def rounds(send: Send) -> np.ndarray:
        x, out = np.zeros(A.shape[2]), []
        for active in z["active"]:
            moves = []
            for i in np.flatnonzero(active):
                w = x.copy()
                for _ in range(int(z["E"])):
                    w -= z["lr"] * A[i].T @ (A[i] @ w - b[i])
                moves.append(send(int(i), w - x))
            x = x + np.mean(moves, axis=0) if moves else x
            out.append(x)
        return np.array(out)

    for name, decay in (("x", 1.0), ("x_decay_half", 0.5)):
        kept: dict[int, torch.Tensor] = {}

        def send(
            i: int, v: np.ndarray, decay: float = decay, kept: dict[int, torch.Tensor] = kept
        ) -> np.ndarray:
            x = compensated(torch.from_numpy(v), kept.get(i))
            y = largest(x.numpy())
            kept[i] = remainder(x, torch.from_numpy(y), decay)
            return y

        np.testing.assert_allclose(rounds(send), z[name], atol=1e-10)
        if decay == 1:
            np.testing.assert_allclose([kept[i].numpy() for i in range(4)], z["residual"][-1], atol=1e-10)
    np.testing.assert_allclose(rounds(lambda i, v: largest(v)), z["x_plain"], atol=1e-10)
    np.testing.assert_allclose(
        rounds(lambda i, v: v.astype(np.float32).astype(float)), z["x_dense"], atol=1e-10
    )
