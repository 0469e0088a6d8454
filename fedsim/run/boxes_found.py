"""Some test images with the boxes that are there and those that the final model finds, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.federated import FederatedData
from fedsim.task.metrics import Counted
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

if TYPE_CHECKING:
    from fedsim.task.detection import MeanAveragePrecision

FILE = "boxes.npz"
EACH = 3  # images of each domain, the first ones of its test samples
MOST = 20  # boxes found that are kept of an image, the surest


def metric_of(task: Task) -> MeanAveragePrecision | None:
    """The metric of boxes, which knows how to read the model's output; ``None`` where none are measured."""
    held = [m.metric for m in (task.metrics or {}).values() if isinstance(m, Counted)]
    if not held:
        return None
    from fedsim.task.detection import MeanAveragePrecision

    return next((m for m in held if isinstance(m, MeanAveragePrecision)), None)


def write_boxes(file: Path, task: Task, data: FederatedData, model: FlatModel) -> None:
    """Write images (n, C, H, W) uint8 with their ``domains`` (n,), the ``true`` boxes and labels, the ``found`` ones
    with scores, padded with label -1, and the names of the ``classes``.

    ``model`` holds the final weights.
    """
    metric, test = metric_of(task), data.test_data(model.w.dtype)
    if metric is None or test is None:
        return
    spans = data.test_domains or {"": slice(0, len(test))}
    rows = torch.cat([torch.arange(s.start, s.stop)[:EACH] for s in spans.values()])
    domains = [name for name, s in spans.items() for _ in range(min(EACH, s.stop - s.start))]
    x, y = test.read(rows)
    with model.measuring(model.w) as again:
        again()
        output = task.output(model.module, x)
    found = output if metric.decode is None else metric.decode(output)
    content: dict[str, Any] = {
        "images": _bytes(test.samples.take(test.index[rows])[0]),
        "domains": np.array(domains),
        "classes": np.array(data.dataset.classes),
        "true_boxes": y["boxes"].cpu().numpy(),
        "true_labels": y["labels"].cpu().numpy(),
    }
    content |= {f"found_{k}": found[k][:, :MOST].cpu().numpy() for k in ("boxes", "labels", "scores")}
    np.savez_compressed(file, **content)


def _bytes(x: Tensor) -> np.ndarray:
    """Images as bytes; floats from their smallest to their largest number."""
    if x.dtype != torch.uint8:
        low, high = x.amin(), x.amax()
        x = (255 * (x - low) / (high - low).clamp(min=1e-9)).round().to(torch.uint8)
    return x.cpu().numpy()
