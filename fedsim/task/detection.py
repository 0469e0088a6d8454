"""Mean average precision of boxes, as COCO measures it (Lin et al. 2014), by the library ``faster-coco-eval``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fedsim.errors import ConfigError
from fedsim.models.detector import decode

MOST = 100  # detections an image that count, the best ones


class MeanAveragePrecision(Metric):
    """``map`` (IoU .5 to .95), ``map_50`` and ``map_75`` of detections against boxes, mean over the classes that occur.

    ``update(output, y)`` takes a batch: ``decode`` makes ``{"boxes": (B, K, 4), "labels": (B, K), "scores": (B, K)}``
    of the model's output, padded with label -1; ``y`` is ``{"boxes": (B, M, 4), "labels": (B, M)}``. Without any box to
    find, all are NaN. States are concatenated in order, so shards merge exactly.

    Args:
        decode: model output to padded boxes; ``None``: the output is that already.
    """

    full_state_update = False
    higher_is_better = True

    found_boxes: list[Tensor]
    found_labels: list[Tensor]
    found_scores: list[Tensor]
    found_counts: list[Tensor]
    true_boxes: list[Tensor]
    true_labels: list[Tensor]
    true_counts: list[Tensor]

    def __init__(self, decode: Callable[[Any], Mapping[str, Tensor]] | None = decode, **options: Any) -> None:
        super().__init__(**options)
        self.decode = decode
        needed()
        for name in ("boxes", "labels", "counts"):
            self.add_state(f"found_{name}", [], dist_reduce_fx="cat")
            self.add_state(f"true_{name}", [], dist_reduce_fx="cat")
        self.add_state("found_scores", [], dist_reduce_fx="cat")

    def update(self, output: Any, y: Mapping[str, Tensor]) -> None:
        """Add the images of a batch."""
        found = output if self.decode is None else self.decode(output)
        best = (
            found["scores"]
            .masked_fill(found["labels"] < 0, -torch.inf)
            .argsort(dim=1, descending=True, stable=True)
        )
        best = best[:, :MOST]
        here, there = found["labels"].gather(1, best) >= 0, y["labels"] >= 0
        boxes = found["boxes"].gather(1, best[..., None].expand(-1, -1, 4))
        self.found_boxes.append(boxes[here].detach().double().cpu())
        self.found_labels.append(found["labels"].gather(1, best)[here].cpu())
        self.found_scores.append(found["scores"].gather(1, best)[here].detach().double().cpu())
        self.found_counts.append(here.sum(1).cpu())
        self.true_boxes.append(y["boxes"][there].double().cpu())
        self.true_labels.append(y["labels"][there].cpu())
        self.true_counts.append(there.sum(1).cpu())

    def compute(self) -> dict[str, Tensor]:
        """The three means over all images, float64 ()."""
        names = ("map", "map_50", "map_75")
        if not sum(len(t) for t in _listed(self.true_labels)):
            return {name: torch.tensor(torch.nan, dtype=torch.float64) for name in names}
        values = self._evaluated()
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in zip(names, values, strict=True)}

    def _evaluated(self) -> list[float]:
        from faster_coco_eval import COCO, COCOeval_faster

        true = _rows(self.true_boxes, self.true_labels, self.true_counts)
        found = _rows(self.found_boxes, self.found_labels, self.found_counts)
        for row, score in zip(found, torch.cat(_listed(self.found_scores)).tolist(), strict=True):
            row["score"] = score
        images = [{"id": i} for i in range(len(torch.cat(_listed(self.true_counts))))]
        names = {row["category_id"] for row in (*true, *found)}
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            truth = COCO(
                {"images": images, "annotations": true, "categories": [{"id": k} for k in sorted(names)]}
            )
            measured = COCOeval_faster(
                truth, truth.loadRes(found) if found else COCO(_nothing(images, names)), "bbox"
            )
            measured.params.maxDets = [1, 10, MOST]
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
        return [float(v) for v in measured.stats[:3]]


def mean_average_precision(decode: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Metric]:
    """The metric of ``task=detection``, by name."""
    return {"boxes": MeanAveragePrecision(decode)}


def needed() -> None:
    """Refuse to go on without the library.

    Raises:
        ConfigError: what to install.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "mean average precision needs faster-coco-eval: pip install 'fedsim-lab[detection]'"
        ) from error


def _listed(state: list[Tensor] | Tensor) -> list[Tensor]:
    """A list state, which torchmetrics may have put together."""
    return [state] if isinstance(state, Tensor) else state


def _rows(boxes: list[Tensor], labels: list[Tensor], counts: list[Tensor]) -> list[dict[str, Any]]:
    """Annotations as COCO has them: a box is (x, y, width, height)."""
    joined, per_image = torch.cat(_listed(boxes)), torch.cat(_listed(counts))
    image = torch.repeat_interleave(torch.arange(len(per_image)), per_image)
    corner, size = joined[:, :2], joined[:, 2:] - joined[:, :2]
    columns = (image, torch.cat(_listed(labels)), torch.cat([corner, size], dim=1), size.prod(1))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {"id": i, "image_id": im, "category_id": label, "bbox": box, "area": space, "iscrowd": 0}
        for i, (im, label, box, space) in enumerate(rows, start=1)
    ]


def _nothing(images: list[dict[str, Any]], names: set[int]) -> dict[str, Any]:
    return {"images": images, "annotations": [], "categories": [{"id": k} for k in sorted(names)]}
