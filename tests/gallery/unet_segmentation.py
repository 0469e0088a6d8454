"""A class for every pixel: U-Net, mean intersection over union of the whole set."""

import torch

import fedsim
from fedsim.models import UNet

g = torch.Generator().manual_seed(0)
x = torch.rand(240, 1, 16, 16, generator=g) * 0.5
y = torch.zeros(240, 16, 16, dtype=torch.int64)
for image, mask, (top, left) in zip(x, y, torch.randint(0, 10, (240, 2), generator=g).tolist(), strict=True):
    mask[top : top + 6, left : left + 6] = 1
    image[0, top : top + 6, left : left + 6] += 0.5


def example(settings: list[str]) -> fedsim.RunResult:
    return fedsim.simulate(
        [
            "task=segmentation",
            "task.num_classes=2",
            "num_clients=4",
            "partition=iid",
            "client.lr=0.1",
            *settings,
        ],
        model=lambda: UNet((1, 16, 16), 2, channels=[8, 16], groups=4),
        data=(x[:200], y[:200]),
        test=(x[200:], y[200:]),
    )
