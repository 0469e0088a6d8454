"""How far from identical the clients' data are: distances of their label distributions to the common one, and sizes."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.data.shards import Shards, Stated, put
from fedsim.errors import DataError

FILE = "skew.npz"  # in a run folder
MEASURES = ("js", "emd", "hellinger")


@dataclass(frozen=True, eq=False)
class LabelSkew:
    """Each of m clients against all samples together; q is the label distribution of the latter, p that of a client.

    Attributes:
        sizes: samples ``(m,)``.
        js: Jensen-Shannon divergence ``(m,)`` to base 2, in 0..1: ``KL(p || (p+q)/2) / 2 + KL(q || (p+q)/2) / 2``
            (Lin 1991; the square of what is called the Jensen-Shannon distance).
        emd: ``(m,)``, ``sum_k |p_k - q_k|`` over classes, in 0..2: the earth mover's distance as Zhao et al. 2018
            (Federated learning with non-IID data, section 3) take it, twice the total variation.
        hellinger: ``(m,)``, ``sqrt(sum_k (sqrt(p_k) - sqrt(q_k))^2 / 2)``, in 0..1.

    A client without samples has NaN in all three.
    """

    sizes: np.ndarray
    js: np.ndarray
    emd: np.ndarray
    hellinger: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Means over the clients that have samples, and how unequal all clients' sizes are.

        ``size_cv`` is the coefficient of variation of the sizes (standard deviation over mean, 0 where all are equal),
        ``empty`` the number of clients without samples.
        """
        held = self.sizes > 0
        means = {name: float(getattr(self, name)[held].mean()) for name in MEASURES} if held.any() else {}
        mean = float(self.sizes.mean()) if len(self.sizes) else 0.0
        return {
            **means,
            "size_cv": float(self.sizes.std()) / mean if mean else 0.0,
            "smallest": int(self.sizes.min()) if len(self.sizes) else 0,
            "largest": int(self.sizes.max(initial=0)),
            "empty": int((~held).sum()),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to an ``.npz`` file, whole or not at all."""
        put(path, sizes=self.sizes, **{name: getattr(self, name) for name in MEASURES})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LabelSkew:
        """Read what ``save`` wrote; ``DataError`` when that is not what the file holds."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(stored["sizes"], *(stored[name] for name in MEASURES))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: expected arrays sizes, {', '.join(MEASURES)}, one value a client ({error})"
            ) from error


def skew_of_counts(counts: np.ndarray) -> LabelSkew:
    """Of samples per client and class ``(m, C)``; the common distribution is that of the columns' sums."""
    client, label = np.nonzero(counts)
    return _skew(len(counts), counts.shape[1], client, label, counts[client, label])


def skew_of_shards(shards: Shards, labels: np.ndarray, num_classes: int) -> LabelSkew:
    """Of the clients of ``shards``, whose rows have the classes ``labels`` (N,); the cost goes with the rows alone."""
    if isinstance(shards, Stated):
        return skew_of_counts(shards.held)
    owner = np.repeat(np.arange(len(shards), dtype=np.int64), shards.sizes)
    cells, held = np.unique(owner * num_classes + labels[shards.index], return_counts=True)
    return _skew(len(shards), num_classes, cells // max(num_classes, 1), cells % max(num_classes, 1), held)


def _skew(clients: int, classes: int, client: np.ndarray, label: np.ndarray, held: np.ndarray) -> LabelSkew:
    """From the cells (client, label) that hold any samples. Where p is 0, q adds q/2 to JS (in bits) and q to EMD."""
    sizes = np.bincount(client, weights=held, minlength=clients).astype(np.int64)
    totals = np.bincount(label, weights=held, minlength=classes)
    p, q = held / sizes[client], totals[label] / max(totals.sum(), 1)

    def over_classes(values: np.ndarray) -> np.ndarray:
        return np.where(sizes > 0, np.bincount(client, weights=values, minlength=clients), np.nan)

    elsewhere = 1 - over_classes(q)
    js = (over_classes(p * np.log2(2 * p / (p + q)) + q * np.log2(2 * q / (p + q))) + elsewhere) / 2
    emd = over_classes(np.abs(p - q)) + elsewhere
    hellinger = np.sqrt((over_classes((np.sqrt(p) - np.sqrt(q)) ** 2) + elsewhere) / 2)
    return LabelSkew(sizes, *(np.maximum(values, 0) for values in (js, emd, hellinger)))
