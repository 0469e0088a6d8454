"""Attacks on what a worker trains on: augmented images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import (
    hashes,
)

from fedsim.data.warps import CatMap, LotkaVolterra
from fedsim.errors import DataError


def test_the_cat_map_moves_every_pixel_once() -> None:
    x = torch.arange(2 * 25.0).view(2, 1, 5, 5)
    out = CatMap()(x, torch.Generator().manual_seed(0))
    for i in range(5):
        for j in range(5):
            assert out[1, 0, (2 * i + j) % 5, (i + j) % 5] == x[1, 0, i, j]
    period = 10  # of the map on a 5 x 5 torus
    assert torch.equal(CatMap(iterations=period)(x, torch.Generator()), x)
    assert torch.equal(CatMap(p=0.0)(x, torch.Generator()), x)
    with pytest.raises(DataError, match=r"square images"):
        CatMap()(torch.zeros(1, 1, 4, 5), torch.Generator())


def test_the_predator_prey_flow_follows_its_equation() -> None:
    from scipy.integrate import solve_ivp

    side, time = 28, 0.01
    x = torch.arange(1.0, side * side + 1).view(1, 1, side, side)
    out = LotkaVolterra(times=[time])(x, torch.Generator())[0, 0]

    def flow(t: float, z: np.ndarray) -> list[float]:
        return [2 / 3 * z[0] - 4 / 3 * z[0] * z[1], z[0] * z[1] - z[1]]

    moved = 0
    for i, j in ((0, 0), (3, 5), (14, 14), (20, 9), (27, 1), (9, 26), (2, 25)):
        end = solve_ivp(flow, (0, time), [side / 2 - i, side / 2 - j], rtol=1e-10, atol=1e-10).y[:, -1]
        row, column = int(np.floor(side / 2 - end[0])), int(np.floor(side / 2 - end[1]))
        inside = 0 <= row < side and 0 <= column < side
        assert out[i, j] == (x[0, 0, row, column] if inside else 0)
        moved += (row, column) != (i, j)
    assert moved >= 3
    assert torch.equal(LotkaVolterra(times=[0.0])(x, torch.Generator()), x)


@pytest.mark.parametrize("attack", ["cat_map", "lotka_volterra"])
def test_workers_with_augmented_data_train_on_other_images(attack: str) -> None:
    settings = (
        "engine=serial",
        "tracker=quiet",
        "rounds=1",
        "num_clients=4",
        "clients_per_round=4",
        "client.steps=1",
    )
    import fedsim

    calm = fedsim.simulate([*settings])
    warped = fedsim.simulate([*settings, f"attack={attack}", "attack.fraction=0.25"])
    assert hashes(calm) != hashes(warped)
    both = fedsim.simulate([*settings, f"attack={attack}", "attack.fraction=0.25", "data.augment=true"])
    assert hashes(both) not in (hashes(calm), hashes(warped))
