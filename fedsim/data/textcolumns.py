"""Columns in tables of Hugging Face as tensors; text as tokens: ``input_ids`` and ``attention_mask``, of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedsim.data.language import END, Bytes, Pieces, tokenizer
from fedsim.errors import DataError

PADS = ("<pad>", "[PAD]", "<|pad|>", END)  # tokens that fill up, the first that there is
TOKENS = ("input_ids", "attention_mask")


def tokenised(
    name: str, data: Any, x: Sequence[str] | str | None, besides: Sequence[str], kind: str, length: int
) -> Any:
    """``data`` (a ``datasets.Dataset``) with its text replaced by ``TOKENS`` (N, length), and its other columns.

    Args:
        name: of the data, in errors.
        data: the rows.
        x: one column of text, or two that belong together; by default those of text that are not ``besides``.
        besides: columns that are something else: targets, clients, domains.
        kind: ``byte``, or a ``tokenizer.json``, or a folder with one (``fedsim.data.language.tokenizer``).
        length: tokens of a sample: longer ones are cut, shorter ones filled up at the end.

    Raises:
        DataError: naming the column that is not there or no text.
    """
    text = [
        c for c in data.column_names if getattr(data.features[c], "dtype", "") in ("string", "large_string")
    ]
    chosen = [x] if isinstance(x, str) else [c for c in text if c not in besides] if x is None else list(x)
    if length < 2:
        raise DataError(f"data.length={length}: give at least 2 tokens")
    for column in chosen:
        if column not in text:
            raise DataError(
                f"{name}: the column '{column}' is no text, which data.x names beside data.tokenizer; text is in "
                f"{', '.join(text) or 'none'}"
            )
    if not 1 <= len(chosen) <= 2:
        raise DataError(
            f"{name}: {len(chosen)} columns of text ({', '.join(chosen)}); name one, or two that belong together, by "
            "data.x"
        )
    if kind == "bpe":
        raise DataError(
            "data.tokenizer=bpe: is learnt from plays; give byte, or the folder of a pretrained model"
        )
    rows = list(zip(*(data[c] for c in chosen), strict=True))
    ids, masks = _encoded(tokenizer(kind, 0), rows, length)
    kept = data.remove_columns([*text_only(chosen, besides), *(c for c in TOKENS if c in data.column_names)])
    return kept.add_column(TOKENS[0], ids).add_column(TOKENS[1], masks)


def text_only(chosen: Sequence[str], besides: Sequence[str]) -> list[str]:
    """Columns that are nothing but text."""
    return [c for c in chosen if c not in besides]


def _encoded(
    made: Any, rows: Sequence[tuple[str, ...]], length: int
) -> tuple[list[list[int]], list[list[int]]]:
    if isinstance(made, Bytes):
        found = ["\n".join(row).encode()[:length] for row in rows]
        return [[*t, *[0] * (length - len(t))] for t in found], [
            [1] * len(t) + [0] * (length - len(t)) for t in found
        ]
    assert isinstance(made, Pieces)
    pad = next((p for p in PADS if p in made.names), made.names[0])
    made.made.enable_truncation(length)
    made.made.enable_padding(length=length, pad_id=made.names.index(pad), pad_token=pad)
    done = made.made.encode_batch([row if len(row) > 1 else row[0] for row in rows])
    return [e.ids for e in done], [e.attention_mask for e in done]


def stacked(name: str, column: Any) -> Tensor:
    """Rows of a column as one tensor (n, ...).

    Raises:
        DataError: if they are of several shapes, or no numbers.
    """
    if isinstance(column, Tensor):
        return column
    if isinstance(column, list) and column and all(isinstance(v, Tensor) for v in column):
        lengths = {tuple(v.shape) for v in column}
        raise DataError(
            f"data: rows of the column '{name}' have several shapes ({', '.join(map(str, sorted(lengths)[:3]))}); pad "
            "them when you tokenise, or hand over DataLoader(data, collate_fn=...)"
        )
    raise DataError(
        f"data: the column '{name}' holds no numbers; tokenise or encode it first, or leave it out of x"
    )
