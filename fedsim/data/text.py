"""Text: Shakespeare's plays, next-character prediction, one natural client per role."""

from __future__ import annotations

import numpy as np

from fedsim.data.common import samples
from fedsim.data.dataset import Dataset
from fedsim.data.files import PathLike, column_array, existing, read_table
from fedsim.errors import DataError

_COLUMNS = ("play", "speaker", "text")


def shakespeare(
    path: PathLike | None, *, window: int, stride: int, min_chars: int, test_fraction: float
) -> Dataset:
    """Next-character prediction after McMahan et al. 2017 and LEAF (Caldas et al. 2018).

    x is ``(N, window)`` int64 character codes, y ``(N,)`` the code of the character that follows. Natural ids
    are roles, that is (play, speaker); a role's speeches are joined by newlines in the order of the play. The
    last ``test_fraction`` of a role's text is its test part; no window reaches over that border.

    Args:
        path: folder with ``speeches.parquet`` (columns play, speaker, text), or that file.
        window: characters the model sees (80 in LEAF).
        stride: characters between the starts of two windows (1 in LEAF; ``window`` reads each character
            once).
        min_chars: roles with less text are left out.
        test_fraction: share of each role's characters in the test part, rounded down.
    """
    if window < 1 or stride < 1 or not 0 <= test_fraction < 1:
        raise DataError(
            f"data.window={window} data.stride={stride} data.test_fraction={test_fraction}: window "
            "and stride must be at least 1, and 0 <= test_fraction < 1"
        )
    spoken = speeches(path)
    vocabulary = np.unique(_codepoints("\n".join(spoken.values())))
    kept = {role: text for role, text in spoken.items() if len(text) >= max(min_chars, 1)}

    train: list[np.ndarray] = []
    test: list[np.ndarray] = []
    for text in kept.values():
        codes = np.searchsorted(vocabulary, _codepoints(text)).astype(np.int64)
        border = len(codes) - int(len(codes) * test_fraction)
        train.append(_windows(codes[:border], window, stride))
        test.append(_windows(codes[border:], window, stride))
    if not sum(map(len, train)):
        raise DataError(
            f"{path}: no role has {min_chars} characters and a training window of {window} + 1; "
            "lower data.min_chars or data.window"
        )
    return _dataset(train, test, vocabulary, tuple(f"{play}: {speaker}" for play, speaker in kept))


def speeches(path: PathLike | None) -> dict[tuple[str, str], str]:
    """What each role, (play, speaker), says, in the order of roles; its speeches are joined by newlines in the order
    of the play.

    Raises:
        DataError: naming what is missing.
    """
    need = f"speeches.parquet with columns {', '.join(_COLUMNS)}"
    if path is None:
        raise DataError(f"shakespeare is read from a file only: type data.path=<folder>, holding {need}")
    root = existing(path, need)
    file = existing(root / "speeches.parquet", need) if root.is_dir() else root
    table = read_table(file, _COLUMNS)
    plays, speakers, texts = (column_array(table, name, str(file)).tolist() for name in _COLUMNS)
    roles: dict[tuple[str, str], list[str]] = {}
    for play, speaker, text in zip(plays, speakers, texts, strict=True):
        roles.setdefault((play, speaker), []).append(text)
    return {role: "\n".join(parts) for role, parts in sorted(roles.items())}


def _dataset(
    train: list[np.ndarray], test: list[np.ndarray], vocabulary: np.ndarray, roles: tuple[str, ...]
) -> Dataset:
    ids, test_ids = (
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]) for parts in (train, test)
    )
    rows, test_rows = np.concatenate(train), np.concatenate(test)
    return Dataset(
        train=samples(rows[:, :-1].copy(), rows[:, -1].copy()),
        test=samples(test_rows[:, :-1].copy(), test_rows[:, -1].copy()) if len(test_rows) else None,
        classes=tuple(chr(code) for code in vocabulary),
        ids=ids,
        groups={"train": {"role": ids}, "test": {"role": test_ids}},
        group_names={"role": roles},
    )


def _codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _windows(codes: np.ndarray, window: int, stride: int) -> np.ndarray:
    """``(n, window + 1)``: inputs and, last, the character that follows."""
    if len(codes) <= window:
        return np.empty((0, window + 1), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(codes, window + 1)[::stride]
