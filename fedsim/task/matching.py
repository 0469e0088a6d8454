"""Ids of clusters against classes: one-to-one matching, and what is measured where classes have no names (open world).

Matching is fitted on the very samples that are measured: it is a way of measuring, and never goes back into training.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def matched(gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (n,) of ``gain`` (R, K), n = min(R, K), that are matched one to one for the largest sum."""
    from scipy.optimize import linear_sum_assignment

    row, column = linear_sum_assignment(gain, maximize=True)
    return row, column


def matched_accuracy(confusion: np.ndarray) -> float:
    """Share of samples that are right under the best one-to-one matching of ids to classes.

    ``confusion`` (C, K) counts samples of each class by the id they were given; NaN without samples.
    """
    total = confusion.sum()
    if not total:
        return float("nan")
    return float(confusion[matched(confusion)].sum() / total)


def mutual_information(confusion: np.ndarray) -> float:
    """Normalised mutual information of classes and ids from counts (C, K), by the mean of both entropies.

    1 where both have a single group; NaN without samples.
    """
    total = confusion.sum()
    if not total:
        return float("nan")
    joint = confusion / total
    first, second = joint.sum(1), joint.sum(0)
    there = joint > 0
    shared = float((joint[there] * np.log(joint[there] / np.outer(first, second)[there])).sum())
    mean = (_entropy(first) + _entropy(second)) / 2
    return max(shared, 0.0) / mean if mean > 0 else 1.0


def kinds_of_classes(
    labelled: np.ndarray, holders: np.ndarray, clients: int, local: str
) -> Mapping[str, np.ndarray]:
    """Which classes (C,) bool are ``seen``, and locally (``LU``) and globally unseen (``GU``); unseen are ``AU``.

    ``labelled`` (C,) counts samples with a label, ``holders`` (C,) the clients that have any sample of the class, of
    ``clients`` that have samples at all. ``local`` = ``all``: locally unseen are the unseen classes that every client
    has (Definition 1 of FedoSSL); ``multi``: those that several have.
    """
    unseen = labelled == 0
    everywhere = holders >= (clients if local == "all" else 2)
    return {"seen": labelled > 0, "AU": unseen, "LU": unseen & everywhere, "GU": unseen & ~everywhere}


def open_world(confusion: np.ndarray, kinds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``all``, ``seen``, ``AU``, ``LU``, ``GU`` and ``NMI`` of counts (C, K) of test samples, classes by ids.

    Seen classes: plain accuracy, ids are labels. The others and ``all``: matched on those samples alone, so ``AU`` is
    no mean of ``LU`` and ``GU``, and ``all`` may lie below what ``seen`` and ``AU`` suggest. ``NMI`` of unseen classes.
    A number is left out where there are no samples of the kind.
    """
    out = {"all": matched_accuracy(confusion)}
    held = confusion[kinds["seen"]].sum()
    out["seen"] = float(np.diag(confusion)[kinds["seen"]].sum() / held) if held else float("nan")
    for kind in ("AU", "LU", "GU"):
        out[kind] = matched_accuracy(confusion[kinds[kind]])
    out["NMI"] = mutual_information(confusion[kinds["AU"]])
    return {name: value for name, value in out.items() if value == value}


def _entropy(shares: np.ndarray) -> float:
    there = shares[shares > 0]
    return float(-(there * np.log(there)).sum())
