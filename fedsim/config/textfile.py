"""Text files of the user's: UTF-8, with or without its mark, or named as something else."""

from __future__ import annotations

import codecs
from pathlib import Path

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class OtherEncodingError(ValueError):
    """A text file is not UTF-8; says what it seems to be, and how to turn it into it."""


def read_text(path: Path) -> str:
    """The text in a file of the user's, without the mark that some programs write before UTF-8.

    Raises:
        OtherEncodingError: if it is not UTF-8; the message says what to do, but not the file's name.
    """
    return text_of(path.read_bytes())


def text_of(content: bytes) -> str:
    """The same of a file's bytes."""
    kind = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    if kind is None and b"\0" in content[:64]:
        kind = "UTF-16"
    if kind is not None:
        raise OtherEncodingError(f"no UTF-8, but {kind}; save it as UTF-8: {_turned(kind)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise OtherEncodingError(
            f"no UTF-8: line {line} holds the byte 0x{content[error.start]:02X}, as in Latin-1 or Windows-1252; save "
            f"it as UTF-8: {_turned('WINDOWS-1252')}"
        ) from None


def _turned(kind: str) -> str:
    return f"iconv -f {kind} -t UTF-8 OLD > NEW"
