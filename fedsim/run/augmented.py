"""An augmentation that was handed over, tried on a few samples before anything starts."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fedsim.data.dataset import Dataset
from fedsim.data.trees import named_leaves
from fedsim.data.views.base import seen
from fedsim.errors import ConfigError, DataError
from fedsim.rng import undisturbed

ROWS = 8  # samples that it is shown


def check_augment(augment: Any, data: Dataset, key: str = "augment") -> None:
    """Refuse an ``augment``, handed over or of the setting ``key``, that cannot show samples of ``data``: every client
    would fail by it.

    Raises:
        ConfigError: one line, with what went wrong and how it is called.
    """
    if isinstance(augment, type) or not callable(augment):
        given = augment.__name__ if isinstance(augment, type) else repr(augment)
        raise ConfigError(
            f"{key}={given}: expected a function (x, generator) -> x of a batch; views by name are settings, "
            "as in data.augment"
        )
    if not len(data.train):
        return
    x, y = data.train.take(torch.arange(min(ROWS, len(data.train))))
    try:
        with undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen(augment, x, y, torch.Generator().manual_seed(0))
    except ConfigError:
        raise
    except DataError as error:  # one of ours
        raise ConfigError(f"{key}: {error}") from error
    except Exception as error:  # any of the user's
        name = getattr(augment, "__qualname__", type(augment).__name__)
        shown = ", ".join(str(tuple(t.shape)) for _, t in named_leaves(x))
        said = (str(error).strip().splitlines() or [""])[-1]
        raise ConfigError(
            f"{key}: {name} cannot show a batch of shape {shown}: {type(error).__name__}: {said}. It is called as "
            "(x, generator) -> x"
        ) from error
