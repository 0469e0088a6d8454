"""Data sets of Hugging Face as they lie on disk: saved folders, and files whose names say which split they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.config.textfile import OtherEncodingError, read_text
from fedsim.data.hub import within_reach
from fedsim.errors import DataError

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}
TABS: dict[str, Any] = {
    "delimiter": "\t",
    "quoting": 3,
}  # of .tsv: quotation marks are text, as GLUE has them
TEXTS = (".csv", ".tsv", ".json", ".jsonl")
SPLITS = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}


def read(datasets: Any, path: str, cache: str | None, wanted: Sequence[str]) -> Mapping[str, Any]:
    """The splits of a data set, by name: of files those that are ``wanted``, or all if one of these is not there, so
    that a test set without targets, whose columns are others, is no hindrance.

    Raises:
        DataError: if there is none, or it cannot be read.
    """
    place = Path(path).expanduser()
    try:
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            found = datasets.load_from_disk(str(place))
            return found if isinstance(found, Mapping) else {"train": found}
        files = _files(place)
        if files is None:
            if place.is_absolute() or path.startswith((".", "~")):
                raise DataError(f"data.path={path}: there is no such file or folder")
            with within_reach():
                return dict(datasets.load_dataset(path, cache_dir=cache))
        suffix, named = files[0].suffix, dict[str, list[str]]()
        for file in files:
            named.setdefault(_split(file.name, wanted), []).append(str(file))
        if set(wanted) - {"test"} <= set(named):
            named = {k: v for k, v in named.items() if k in wanted}
        options = TABS if suffix == ".tsv" else {}
        return dict(datasets.load_dataset(FORMATS[suffix], data_files=named, cache_dir=cache, **options))
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds
        said = _other_encoding(path) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        offline = " (no network: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(f"data.path={path}: cannot be read as a data set{offline}: {said}") from error


def _split(name: str, wanted: Sequence[str]) -> str:
    """The split that a file holds, by the beginning of its name, or as it was called by who wants it."""
    word = re.sub("[^a-z].*", "", name.lower())
    if word in wanted:
        return word
    known = ("train", "test", "validation")
    return SPLITS.get(word) or next((s for s in known if word.startswith(s)), "train")


def _other_encoding(path: str) -> str:
    """What a text file in the folder, or the file itself, is instead of UTF-8; empty if none is."""
    place = Path(path).expanduser()
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if file.suffix in TEXTS and file.is_file():
            try:
                read_text(file)
            except OtherEncodingError as error:
                return f"{file.name}: {error}"
    return ""


def _files(place: Path) -> list[Path] | None:
    if place.is_file():
        found = [place]
    elif place.is_dir():
        inner = place / "data"  # where sets of the hub keep their files, beside descriptions of them
        found = sorted(f for f in inner.iterdir() if f.suffix in FORMATS) if inner.is_dir() else []
        found = found or sorted(f for f in place.iterdir() if f.suffix in FORMATS)
    elif any(c in place.name for c in "*?["):
        found = sorted(place.parent.glob(place.name))
    else:
        return None
    kinds = {f.suffix for f in found}
    if len(kinds) != 1 or not kinds <= set(FORMATS):
        shown = ", ".join(sorted(kinds)) or "nothing"
        raise DataError(
            f"data.path={place}: holds {shown}; expected files of one kind of {', '.join(FORMATS)}"
        )
    return found
