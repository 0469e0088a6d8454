"""Classes that nobody has labelled (``data.labelled.classes``): which they are, and how many clients have them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from omegaconf import DictConfig

from fedsim.data.federated import FederatedData
from fedsim.data.sample_roles import class_labels
from fedsim.task.matching import kinds_of_classes


def kinds(config: DictConfig, data: FederatedData) -> Mapping[str, np.ndarray] | None:
    """Seen, locally and globally unseen classes (C,) bool; ``None`` where every class has labels, or targets are none.

    ``data`` is whole: it has the labels that clients have not. Where these are told all the same
    (``data.labelled.withhold=false``), kinds are what they would be: a ceiling is measured as what it bounds.
    """
    truth, classes, unknown = data.all_labels(), data.dataset.num_classes, data.roles.unlabelled
    if truth is None or unknown is None or class_labels(data.dataset) is None:
        return None
    labels, owners = truth.cpu().numpy(), np.arange(data.num_clients)
    known = [labels[data.shards.index]]
    if (own := data.roles.server) is not None:
        found = labels if own.samples is None else own.samples.labels
        known.append(np.asarray(found)[own.rows.numpy()])
    labelled = np.bincount(np.concatenate(known), minlength=classes)
    if labelled.all():
        return None
    held = [np.repeat(owners, s.sizes) * classes + labels[s.index] for s in (data.shards, unknown)]
    pairs = np.unique(np.concatenate(held))
    holders = np.bincount(pairs % classes, minlength=classes)
    return kinds_of_classes(
        labelled, holders, len(np.unique(pairs // classes)), config.evaluation.local_unseen
    )
