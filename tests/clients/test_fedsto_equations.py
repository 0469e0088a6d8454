"""FedSTO's equations: Omega, routing, the teacher, CIoU and the losses of cells against float64 forms of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.fedsto import auto_alpha, ema, route
from clients.orthogonal import omega, orthogonality, starting
from fedsim.models.boxes import ciou
from fedsim.models.detector import part_losses


def spectral(theta: np.ndarray) -> float:
    """Omega by singular values of both Gram matrices."""
    a, b = theta.T @ theta - np.eye(theta.shape[1]), theta @ theta.T - np.eye(theta.shape[0])
    return float(np.linalg.norm(a, 2) + np.linalg.norm(b, 2))


@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (6, 2, 3, 3), (40, 3, 1, 1)])
def test_omega_and_its_gradient(shape: tuple[int, ...], scale: float) -> None:
    theta = scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta.requires_grad_()
    value = omega(theta)
    matrix = theta.detach().flatten(1).numpy()
    assert value.item() == pytest.approx(spectral(matrix), rel=1e-12)
    (found,) = torch.autograd.grad(value, theta)
    u, s, v = np.linalg.svd(matrix)
    i = int(np.abs(s**2 - 1).argmax())
    one = 2 * s[i] * np.sign(s[i] ** 2 - 1) * np.outer(u[:, i], v[i])
    square, large = matrix.shape[0] == matrix.shape[1], abs(s[i] ** 2 - 1) > 1
    np.testing.assert_allclose(found.flatten(1), one * (2 if square or large else 1), atol=1e-12)


def test_least_values_of_omega() -> None:
    assert omega(torch.eye(4, dtype=torch.float64)).item() == 0
    assert omega(torch.eye(4, 7, dtype=torch.float64)).item() == 1


def test_power_iteration_reaches_the_norm_if_it_goes_on_and_not_in_one_step() -> None:
    thetas = {"a": torch.randn(30, 50, dtype=torch.float64), "b": 0.1 * torch.randn(20, 6, 3, 3).double()}
    exact = orthogonality(thetas).item()
    assert exact == pytest.approx(sum(spectral(t.flatten(1).numpy()) for t in thetas.values()))
    vectors = starting(thetas, torch.Generator().manual_seed(0))
    first = orthogonality(thetas, vectors, steps=1).item()
    for _ in range(80):
        last = orthogonality(thetas, vectors).item()
    assert first < 0.95 * exact and last == pytest.approx(exact, rel=1e-5)


def test_what_boxes_count_for() -> None:
    score = torch.tensor([0.05, 0.1, 0.59, 0.6, 0.95, 0.3])
    objectness = torch.tensor([0.5, 0.2, 0.99, 0.7, 1.0, 0.995])
    found = route(score, objectness, 0.1, 0.6)
    assert found.classed.tolist() == [False, False, False, True, True, False]
    assert found.boxed.tolist() == [False, False, False, True, True, True]
    torch.testing.assert_close(found.objectness, torch.tensor([0, 0.2, 0.99, 0.7, 1.0, 0.995]))


def test_the_teacher_follows() -> None:
    teacher, points = torch.tensor([1.0, -2.0]).double(), torch.randn(6, 2).double()
    expected = 0.9**6 * teacher + sum(0.1 * 0.9 ** (5 - i) * p for i, p in enumerate(points))
    for p in points:
        ema(teacher, p, 0.9)
    torch.testing.assert_close(teacher, expected, rtol=0, atol=1e-14)
    assert auto_alpha(156) == pytest.approx(0.999, abs=1e-4) and auto_alpha(7) ** 7 == pytest.approx(0.86)


def ciou_by_hand(a: list[float], b: list[float]) -> float:
    (ax, ay, aX, aY), (bx, by, bX, bY) = a, b
    inner = max(0, min(aX, bX) - max(ax, bx)) * max(0, min(aY, bY) - max(ay, by))
    iou = inner / ((aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inner)
    c2 = (max(aX, bX) - min(ax, bx)) ** 2 + (max(aY, bY) - min(ay, by)) ** 2
    d2 = ((ax + aX - bx - bX) / 2) ** 2 + ((ay + aY - by - bY) / 2) ** 2
    v = 4 / math.pi**2 * (math.atan((bX - bx) / (bY - by)) - math.atan((aX - ax) / (aY - ay))) ** 2
    return iou - d2 / c2 - (v**2 / (1 - iou + v) if v else 0)


def test_ciou_by_hand() -> None:
    pairs = [([0, 0, 4, 2], [1, 1, 3, 6]), ([0, 0, 2, 2], [5, 5, 6, 9]), ([1, 1, 3, 4], [1, 1, 3, 4])]
    found = ciou(*(torch.tensor([p[k] for p in pairs], dtype=torch.float64) for k in (0, 1)))
    np.testing.assert_allclose(found, [ciou_by_hand(a, b) for a, b in pairs], atol=1e-9)


def test_losses_of_a_detectors_cells() -> None:
    """Two boxes in one image, of which the second trains objectness alone; none in the other image."""
    torch.manual_seed(0)
    output = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    boxes = torch.tensor([[[3.0, 5, 13, 15], [20, 18, 30, 28]], [[0.0] * 4] * 2], dtype=torch.float64)
    y = {
        "boxes": boxes,
        "labels": torch.tensor([[2, 0], [-1, -1]]),
        "objectness": torch.tensor([[0.9, 0.4], [0.7, 0.7]], dtype=torch.float64),
        "classed": torch.tensor([[True, False], [True, True]]),
        "boxed": torch.tensor([[True, False], [True, True]]),
    }
    found, z = part_losses(output, y), output.flatten(2).transpose(1, 2)
    wanted, mine = torch.zeros(2, 64, dtype=torch.float64), list[int]()
    for cell in range(64):
        x, down = 4 * (cell % 8) + 2, 4 * (cell // 8) + 2
        if math.hypot(x - 8, down - 10) <= 3.6:
            wanted[0, cell] = 0.9
            mine.append(cell)
        elif math.hypot(x - 25, down - 23) <= 3.6:
            wanted[0, cell] = 0.4
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(found["objectness"], bce(z[..., 0], wanted, reduction="none").mean(1))
    one_hot = torch.tensor([[0.0, 0, 1]] * len(mine), dtype=torch.float64)
    assert len(mine) == 2 and (wanted == 0.4).any()
    torch.testing.assert_close(found["class"][0], bce(z[0, mine, 1:4], one_hot))
    sides = 4 * F.softplus(z[0, mine, 4:]).numpy()
    centres = [(4 * (c % 8) + 2, 4 * (c // 8) + 2) for c in mine]
    off = [
        1 - ciou_by_hand([x - a, d - b, x + c, d + e], [3, 5, 13, 15])
        for (x, d), (a, b, c, e) in zip(centres, sides, strict=True)
    ]
    assert found["box"][0].item() == pytest.approx(np.mean(off), rel=1e-9)
    assert found["class"][1] == found["box"][1] == 0
