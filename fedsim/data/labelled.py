"""Which samples have labels, and who holds those (``data.labelled``): semi-supervised data from any labelled source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.data.dataset import Dataset
from fedsim.data.sample_roles import class_labels, stratified
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError, check_choice, hint
from fedsim.rng import numpy_rng

KEY = "data.labelled"
NAMES = ("at", "share", "count", "per_class", "classes", "withhold")


@dataclass(frozen=True)
class Labelled:
    """``at`` client: a share, or number, of each client's samples has labels. ``at`` server: of the training set,
    before it is dealt out, and clients have none.

    ``per_class``: of a share every class has its part, of a number every class as many (those with fewer give all).
    ``classes``: those, by number or name, that have labels at all; ``None``: every class. Where neither ``share`` nor
    ``count`` is given, the server's labelled samples come from elsewhere. Not to ``withhold`` the other labels is the
    ceiling of any method: it then trains on true ones where it would guess.
    """

    at: str
    share: float | None = None
    count: int | None = None
    per_class: bool = True
    classes: tuple[int | str, ...] | None = None
    withhold: bool = True

    @staticmethod
    def of(node: Any) -> Labelled | None:
        """What the configuration says; ``None`` where all samples have labels.

        Raises:
            ConfigError: naming the key, and what to type.
        """
        if node is not None and not isinstance(node, Mapping):
            raise ConfigError(
                f"{KEY}={node}: expected {KEY}={{at: client, share: 0.1}}, or {KEY}.at=client and so on"
            )
        values = {str(k): v for k, v in (node or {}).items()}
        for name in values:
            if name not in NAMES:
                raise ConfigError(f"unknown key '{KEY}.{name}'{hint(name, NAMES, f'{KEY}.')}")
        at, share, count = (values.get(k) for k in ("at", "share", "count"))
        if at is None:
            for name in ("share", "count", "classes"):
                if values.get(name) is not None:
                    raise ConfigError(f"{KEY}.{name}: without effect; add {KEY}.at=client or server")
            return None
        check_choice(f"{KEY}.at", at, ("client", "server"))
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if share is not None and not (number and 0 < share < 1):
            raise ConfigError(f"{KEY}.share={share}: must be between 0 and 1")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"{KEY}.count={count}: must be a whole number, at least 1")
        if share is not None and count is not None:
            raise ConfigError(f"{KEY}.count={count}: not together with {KEY}.share; choose one")
        per_class = values.get("per_class", True)
        if not isinstance(per_class, bool):
            raise ConfigError(f"{KEY}.per_class={per_class}: must be true or false")
        classes = values.get("classes")
        if classes is not None and (
            isinstance(classes, str) or not isinstance(classes, Sequence) or not len(classes)
        ):
            raise ConfigError(f"{KEY}.classes={classes}: must be a list of classes, e.g. [0, 1, 2]")
        if not isinstance(withhold := values.get("withhold", True), bool):
            raise ConfigError(f"{KEY}.withhold={withhold}: must be true or false")
        return Labelled(at, share, count, per_class, None if classes is None else tuple(classes), withhold)

    @property
    def draws(self) -> bool:
        """Whether labelled samples are drawn from the training samples."""
        return self.share is not None or self.count is not None

    def of_server(self, data: Dataset, rows: np.ndarray, seed: int) -> np.ndarray:
        """The server's labelled samples, ascending, of the training samples ``rows`` (n,).

        Raises:
            ConfigError: if that is no sample, or none is left for clients.
        """
        able = self._able(data, rows)
        found = self._chosen(class_labels(data), able, numpy_rng(seed, "labelled"))
        if not len(found) or len(found) == len(rows) or (self.count or 0) > len(able):
            given = f"share={self.share}" if self.count is None else f"count={self.count}"
            left = "leaves clients none" if len(found) == len(rows) else "has none"
            few = (self.count or 0) > len(able)
            raise ConfigError(
                f"{KEY}.{given}: {len(able)} samples can have labels"
                if few
                else f"{KEY}.{given}: the server {left}"
            )
        return found

    def of_clients(self, data: Dataset, shards: Shards, seed: int) -> tuple[Shards, Shards]:
        """Each client's samples with labels and without; at least one has a label where any can have.

        Raises:
            ConfigError: if nobody has a labelled sample.
        """
        labels, able = class_labels(data), self._able(data, np.arange(len(data.train)))
        mask = np.zeros(len(data.train), dtype=bool)
        mask[able] = True
        known, unknown = [], []
        for client in range(len(shards)):
            part = shards.part(client)
            distinct = np.unique(part)
            rows = distinct[mask[distinct]]
            found = self._chosen(labels, rows, numpy_rng(seed, "labelled", 0, client))
            has = np.isin(part, found)
            known.append(part[has])
            unknown.append(part[~has])
        if not sum(map(len, known)):
            raise ConfigError(f"{KEY}: no client has a sample of the classes {list(self.classes or ())}")
        return Shards.of(known), Shards.of(unknown)

    def _chosen(self, labels: np.ndarray | None, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The labelled ones of ``rows`` (n,), ascending."""
        n = len(rows)
        strata = labels[rows] if labels is not None and self.per_class else None
        if not n:
            return rows
        count = int((self.share or 0.0) * n + 0.5) if self.count is None else self.count
        count = min(max(count, 1), n)
        draw = stratified if self.count is None or strata is None else _evenly
        return np.asarray(rows[draw(strata, n, count, rng)])

    def _able(self, data: Dataset, rows: np.ndarray) -> np.ndarray:
        """Those of ``rows`` whose class may have labels."""
        if self.classes is None:
            return rows
        labels = class_labels(data)
        if labels is None:
            raise ConfigError(f"{KEY}.classes: this data set has no class labels; leave it out")
        ids = []
        for wanted in self.classes:
            if str(wanted) in data.classes:
                ids.append(data.classes.index(str(wanted)))
            elif isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < data.num_classes:
                ids.append(wanted)
            else:
                raise ConfigError(
                    f"{KEY}.classes: there is no class {wanted!r}{hint(str(wanted), data.classes)}; there are "
                    f"{data.num_classes}, {data.classes[0]} to {data.classes[-1]}"
                )
        return rows[np.isin(labels[rows], ids)]


def _evenly(strata: np.ndarray | None, n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of ``n`` samples, ascending positions: of every stratum as many, of a small one all; ties at random."""
    assert strata is not None
    order = rng.permutation(n)
    place = np.empty(len(order), dtype=np.int64)  # of each sample within its stratum, in random order
    turn = np.empty(len(order), dtype=np.int64)  # of its stratum
    names = np.unique(strata)
    for position, name in zip(rng.permutation(len(names)), names, strict=True):
        members = order[strata[order] == name]
        place[members], turn[members] = np.arange(len(members)), position
    return np.sort(np.lexsort((turn, place))[:count])
