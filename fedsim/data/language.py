"""Text as blocks of tokens for language models: Shakespeare's roles as natural clients, tokenizers made on the fly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedsim.data.common import samples
from fedsim.data.dataset import Dataset
from fedsim.data.files import PathLike
from fedsim.data.text import speeches
from fedsim.errors import DataError, check_choice, hint

END = "<|endoftext|>"
STYLES = ("plain", "transcript")


class Tokenizer(Protocol):
    """A tokenizer."""

    names: tuple[str, ...]  # of the tokens

    def encode(self, text: str) -> np.ndarray:
        """Tokens (n,) int64 of a text."""

    def spell(self, tokens: list[int]) -> str:
        """The text of tokens; a character that they end within becomes a replacement mark."""


class Bytes:
    """The 256 bytes of UTF-8."""

    names = tuple(map(str, range(256)))

    def encode(self, text: str) -> np.ndarray:
        """One token a byte."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def spell(self, tokens: list[int]) -> str:
        """The bytes as text."""
        return bytes(tokens).decode(errors="replace")


class Pieces:
    """A tokenizer of the library ``tokenizers``."""

    def __init__(self, made: Any):
        self.made, vocabulary = made, made.get_vocab()
        self.names = tuple(sorted(vocabulary, key=vocabulary.__getitem__))

    def encode(self, text: str) -> np.ndarray:
        """By its own rules, without special tokens."""
        return np.array(self.made.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def spell(self, tokens: list[int]) -> str:
        """By its own decoder."""
        return str(self.made.decode(tokens))


def tokenizer(kind: str, vocabulary: int, texts: Iterable[str] = ()) -> Tokenizer:
    """``byte``; ``bpe``, byte-level pairs (Sennrich et al. 2016) of ``vocabulary`` tokens learnt from ``texts``; or a
    ``tokenizer.json``, or a folder with one.

    Raises:
        DataError: if the library or the file is not there.
    """
    if kind == "byte":
        return Bytes()
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"data.tokenizer={kind}: needs the library tokenizers; type pip install 'fedsim-lab[hf]', or "
            "data.tokenizer=byte"
        ) from error
    if kind != "bpe":
        place = Path(kind).expanduser()
        file = place / "tokenizer.json" if place.is_dir() else place
        if not file.is_file():
            raise DataError(
                f"data.tokenizer={kind}: expected byte, bpe, or the path of a tokenizer.json"
                + hint(kind, ["byte", "bpe"])
            )
        return Pieces(tokenizers.Tokenizer.from_file(str(file)))
    if vocabulary < 257:
        raise DataError(f"data.vocabulary={vocabulary}: 256 bytes and {END} need at least 257")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return Pieces(made)


def shakespeare_tokens(
    path: PathLike | None,
    *,
    tokenizer: str,
    vocabulary: int,
    public: Sequence[str] | None,
    plays: Sequence[str] | None,
    largest: int | None,
    style: str,
    block: int,
    min_chars: int,
    test_fraction: float,
    by_role: bool,
) -> Dataset:
    """Blocks of tokens (N, ``block``), which are their own targets (``task=language_model``); natural ids are roles.

    A role's speeches, joined by newlines in the order of the play, become tokens; the last ``test_fraction`` of them is
    its test part. No block reaches over that border, and what does not fill a block is left out.

    Args:
        path: folder with ``speeches.parquet`` (columns play, speaker, text), or that file.
        tokenizer: ``byte``, ``bpe``, or a ``tokenizer.json`` (or its folder), such as that of a pretrained model.
        vocabulary: tokens of ``bpe``.
        public: plays that ``bpe`` is learnt from; a tokenizer tells what it was learnt from, so they are no clients'.
        plays: whose roles are clients; ``None``: all that are not ``public``.
        largest: that many roles, those with the most text; ``None``: all with ``min_chars`` characters.
        style: ``transcript``: lower case, whatever stands between letters (a to z and ') becomes one space.
        block: tokens of a sample.
        min_chars: roles with less text are left out.
        test_fraction: share of each role's tokens in the test part.
        by_role: roles are domains too, so that each can be measured on its own test part
            (``evaluation.clients_on=domain``).
    """
    check_choice("data.style", style, STYLES)
    if block < 2 or not 0 <= test_fraction < 1 or (largest is not None and largest < 1):
        raise DataError(
            f"data.block={block} data.test_fraction={test_fraction} data.largest={largest}: expected at least 2 "
            "tokens, 0 <= test_fraction < 1, and at least one role, or null"
        )
    roles = speeches(path)
    known = sorted({play for play, _ in roles})
    for name, given in (("public", public), ("plays", plays)):
        for play in given or ():
            if play not in known:
                raise DataError(
                    f"data.{name}: there is no play '{play}'{hint(play, known)}; there are {', '.join(known)}"
                )
    if tokenizer == "bpe" and not public:
        raise DataError(
            "data.tokenizer=bpe: a tokenizer tells what it was learnt from; name plays that are no clients' by "
            f"data.public=[...] (there are {', '.join(known)})"
        )
    if both := sorted({*(public or ())} & {*(plays or ())}):
        raise DataError(
            f"data.public: '{both[0]}' is among data.plays, whose roles are clients; leave it out of one"
        )
    mine = set(plays or known) - set(public or ())
    spoken = {
        role: _styled(text, style)
        for role, text in roles.items()
        if role[0] in mine and len(text) >= min_chars
    }
    order = sorted(spoken, key=lambda role: (-len(roles[role]), role))
    kept = sorted(order[:largest])
    learnt = (_styled(text, style) for (play, _), text in roles.items() if play in (public or ()))
    made = _made(tokenizer, vocabulary, learnt)
    train, test = list[np.ndarray](), list[np.ndarray]()
    for role in kept:
        tokens = made.encode(spoken[role])
        border = int(len(tokens) * (1 - test_fraction))
        train.append(_blocks(tokens[:border], block))
        test.append(_blocks(tokens[border:], block))
    if not sum(map(len, train)):
        raise DataError(f"data: no role fills a block of {block} tokens; lower data.block or data.min_chars")
    return _dataset(train, test, made, tuple(f"{play}: {speaker}" for play, speaker in kept), by_role)


_made = tokenizer  # under a name that the argument does not hide


def _dataset(
    train: list[np.ndarray],
    test: list[np.ndarray],
    made: Tokenizer,
    roles: tuple[str, ...],
    by_role: bool,
) -> Dataset:
    ids, test_ids = (np.repeat(np.arange(len(parts)), [len(p) for p in parts]) for parts in (train, test))
    x, held = np.concatenate(train), np.concatenate(test)
    column = "domain" if by_role else "role"
    return Dataset(
        train=samples(x, x),
        test=samples(held, held) if len(held) else None,
        classes=made.names,
        spell=made.spell,
        ids=ids,
        groups={"train": {column: ids}, "test": {column: test_ids}},
        group_names={column: roles},
    )


def _styled(text: str, style: str) -> str:
    return text if style == "plain" else re.sub("[^a-z']+", " ", text.lower()).strip()


def _blocks(tokens: np.ndarray, block: int) -> np.ndarray:
    """(n, block): what fills whole blocks."""
    return tokens[: len(tokens) // block * block].reshape(-1, block)
