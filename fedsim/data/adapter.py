"""Other libraries' partitioners as a partition function."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim.errors import DataError


def from_partitioner(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    *,
    partitioner: Any,
    index: str = "index",
    ids: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Let another library's partitioner split the data, such as those of ``flwr_datasets.partitioner``.

    Args:
        labels: class labels ``(N,)``.
        num_clients: must equal ``partitioner.num_partitions``.
        rng: not used: such a partitioner has a seed of its own.
        partitioner: has ``num_partitions`` and ``load_partition(i)``, whose rows carry a column ``index``
            with positions in the data set. If ``is_dataset_assigned()`` says no, its ``dataset`` is set to a
            ``datasets.Dataset`` with columns ``label`` (where there is one target per sample), ``index`` and, when
            ``ids`` are given, ``id``.
        index: name of that column.
        ids: natural ids ``(N,)`` for partitioners that group by them.

    Raises:
        DataError: the number of partitions differs, or rows are out of range or in two partitions.
    """
    assigned = getattr(partitioner, "is_dataset_assigned", None)
    if assigned is not None and not assigned():
        try:
            from datasets import Dataset as Table
        except ImportError as error:
            raise DataError(
                "this partitioner needs the datasets library: pip install 'fedsim-lab[hub]'"
            ) from error
        columns = {"label": labels} if labels.ndim == 1 else {}
        columns |= {index: np.arange(len(labels))} | ({} if ids is None else {"id": ids})
        partitioner.dataset = Table.from_dict(columns)
    name = type(partitioner).__name__
    if partitioner.num_partitions != num_clients:
        raise DataError(f"{name} makes {partitioner.num_partitions} partitions; type num_clients=<that>")
    parts = []
    for client in range(num_clients):
        rows = partitioner.load_partition(client)
        try:
            part = np.asarray(rows[index][:]).astype(np.int64, casting="same_kind")
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{name}: partition {client} has no integer column '{index}' ({error})"
            ) from error
        parts.append(np.sort(part))
    used = np.concatenate(parts)
    if len(used) and (used.min() < 0 or used.max() >= len(labels) or len(np.unique(used)) < len(used)):
        raise DataError(
            f"{name}: column '{index}' must hold positions 0 to {len(labels) - 1}, each in one partition"
        )
    return parts
