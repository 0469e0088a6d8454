"""Which test samples the final model classifies correctly: what a comparison needs to speak of other samples too."""

from __future__ import annotations

import logging

import numpy as np
import torch

from fedsim.data.federated import FederatedData
from fedsim.run.boxes_found import FILE as BOXES
from fedsim.run.boxes_found import metric_of, write_boxes
from fedsim.server.loop import Loop
from fedsim.task.copies import copied
from fedsim.task.problems import logits_of
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

FILE = "predictions.npz"


def write_predictions(loop: Loop, task: Task, data: FederatedData, batch_size: int) -> None:
    """Write ``predictions.npz``: ``right`` (N,), for each sample of the test set whether the global model is right.

    Of boxes ``boxes.npz`` instead, some images with them. Without class labels, or without a test set, a warning says
    that there is none.
    """
    test = data.test_data(loop.server.dtype)
    if test is not None and metric_of(task) is not None:
        whole = FlatModel(copied(task.model), loop.server.dtype)
        whole.load(*loop.models()["global"])
        write_boxes(loop.folder / BOXES, task, data, whole)
        return
    if test is None or data.dataset.class_labels("test") is None:
        logging.getLogger(__name__).warning(
            "evaluation.predictions=true: %s needs a test set with one class label a sample", FILE
        )
        return
    model, weights = FlatModel(copied(task.model), loop.server.dtype), loop.models()["global"]
    w, right = model.load(weights.w, weights.buffers), []
    with model.measuring(w) as again:
        for rows in torch.split(torch.arange(len(test)), batch_size):
            again()
            x, y = test.read(rows)
            right.append((logits_of(task.output(model.module, x)).argmax(1) == y).cpu())
    np.savez_compressed(loop.folder / FILE, right=torch.cat(right).numpy())
