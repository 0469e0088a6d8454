"""Whether masks hold only classes that the task knows."""

from __future__ import annotations

from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError


def check_pixels(data: FederatedData, classes: int, ignored: int) -> None:
    """Refuse targets (N, H, W) in memory with a class other than 0 to ``classes`` - 1 and ``ignored``.

    Raises:
        ConfigError: names client, row and class.
    """
    for which, part in (("", data.dataset.train), ("the test set", data.dataset.test)):
        y = None if part is None else part.labels
        for start in () if y is None else range(0, len(y), 256):
            piece = y[start : start + 256].long()  # type: ignore[index]
            odd = (piece != ignored) & ((piece < 0) | (piece >= classes))
            if not odd.any():
                continue
            row = int(odd.reshape(len(odd), -1).any(1).nonzero()[0])
            found = int(piece[row][odd[row]][0])
            whose = f"{which}, row {start + row}" if which else data.shards.whose(start + row)
            raise ConfigError(
                f"task: {whose}, has a pixel of the class {found}, of "
                f"task.num_classes={classes}; type task.ignore_index={found} if such pixels are to be left out"
            )
