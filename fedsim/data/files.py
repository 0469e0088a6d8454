"""Reading data files: Parquet tables, encoded images, IDX arrays; errors name file and remedy."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.cache import Arrays, cached, fingerprint
from fedsim.data.decoding import decode
from fedsim.data.hub import within_reach
from fedsim.errors import DataError, NoSamplesError

PathLike = str | os.PathLike[str]

log = logging.getLogger(__name__)


def existing(path: PathLike, expected: str) -> Path:
    """``path`` as a ``Path``; ``DataError`` saying what was ``expected`` there if nothing exists."""
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"{found} does not exist; expected {expected}. Type data.path=<where it is>")
    return found


def parquet_files(folder: Path, pattern: str, expected: str) -> list[Path]:
    """Files of ``folder`` matching ``pattern`` in name order; ``DataError`` if there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(f"{folder} holds no {pattern}; expected {expected}. Type data.path=<that folder>")
    return files


def read_table(file: Path, columns: Sequence[str]) -> Any:
    """These columns of a Parquet file as a ``pyarrow.Table``; ``DataError`` if one is missing."""
    present = columns_of(file)
    missing = [name for name in columns if name not in present]
    if missing:
        raise DataError(f"{file} has no column {missing}; its columns are {present}")
    pa, pq = _pyarrow(file)
    try:
        return pq.read_table(file, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file ({error}); fetch it again") from error


def columns_of(file: Path) -> list[str]:
    """Names of a Parquet file's columns."""
    pa, pq = _pyarrow(file)
    try:
        return [str(name) for name in pq.read_schema(file).names]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file ({error}); fetch it again") from error


def _pyarrow(file: Path) -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {file} needs pyarrow: pip install 'fedsim-lab[data]'") from error
    return pa, pq


def class_names(schema: Any, column: str) -> tuple[str, ...]:
    """Names of a ``ClassLabel`` column, from the metadata ``datasets`` writes; ``()`` without."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return ()
    feature = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
    return tuple(feature.get("names", ())) if isinstance(feature, dict) else ()


def column_array(table: Any, name: str, source: str) -> np.ndarray:
    """A column without gaps as int64 or fixed-width text ``(N,)``; whole floats, as of pandas, are integers."""
    column = table[name]
    if column.null_count:
        raise DataError(
            f"{source}: column '{name}' has {column.null_count} empty cells; fill or drop those rows"
        )
    values = np.asarray(column.to_pylist())
    if values.ndim == 1 and values.dtype.kind == "f":
        if (odd := np.flatnonzero(values != np.round(values))).size:
            raise DataError(
                f"{source}: column '{name}', row {odd[0]} is {values[odd[0]]}; expected integers or text"
            )
        values = values.astype(np.int64)
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise DataError(f"{source}: column '{name}' holds numbers beyond 2**63; number the classes from 0")
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise DataError(f"{source}: column '{name}' is {column.type}; expected integers or text")
    return values if values.dtype.kind == "U" else values.astype(np.int64)


def table_images(table: Any, image: str, *, channels: int, size: int | None, source: str) -> np.ndarray:
    """Decode an image column (binary, or the hub's struct of bytes and path) to uint8 ``(N, C, H, W)``."""
    import pyarrow as pa

    column = table[image].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow < 15 keeps one chunk here
        column = pa.concat_arrays(column.chunks)
    paths = column.field("path").to_pylist() if _has(column, "path") else []
    if _has(column, "bytes"):
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"{source}: column '{image}' is {column.type}; expected encoded images (bytes)")
    where = f"{source}, column '{image}'"
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        path = f", only the path {paths[row]!r}" if paths and paths[row] else ""
        raise DataError(
            f"{where}, row {row}: holds no image{path}; write the images' bytes into the table, or read the folder of "
            "images itself (data=domain_images)"
        )
    return decode(column.to_pylist(), channels=channels, size=size, source=where)


def _has(column: Any, field: str) -> bool:
    """Whether a column is a struct with this field."""
    import pyarrow as pa

    return bool(pa.types.is_struct(column.type) and column.type.get_field_index(field) >= 0)


def image_table(
    table: Any, image: str, columns: Sequence[str], *, channels: int, size: int | None, source: str
) -> Arrays:
    """Arrays ``image`` (N, C, H, W) uint8, each of ``columns`` (N,), and ``<column>.names`` where known."""
    arrays = {name: column_array(table, name, source) for name in columns}
    for name in columns:
        if names := class_names(table.schema, name):
            arrays[f"{name}.names"] = np.asarray(names)
    arrays["image"] = table_images(table, image, channels=channels, size=size, source=source)
    return arrays


def read_images(
    files: Sequence[Path], image: str, columns: Sequence[str], *, channels: int, size: int | None = None
) -> Arrays:
    """As ``image_table`` for Parquet files read one after the other, through the cache of decoded arrays."""

    def build() -> Arrays:
        source = ", ".join(str(file) for file in files)
        table = _joined([read_table(file, [image, *columns]) for file in files], source)
        return image_table(table, image, columns, channels=channels, size=size, source=source)

    key = (*fingerprint(files), image, *columns, str(channels), str(size))
    return cached(files[0].stem, key, build)


def split_files(path: Path, expected: str) -> dict[str, list[Path]]:
    """Parquet files of each split; a test split without rows is none."""
    if path.is_file():
        return {"train": [path]}
    files = {"train": parquet_files(path, "train-*.parquet", expected)}
    test = sorted(path.glob("test-*.parquet"))
    if apart := sorted(f.name for f in path.glob("val*-*.parquet")):
        log.warning("%s: %s is not read; samples to choose by are evaluation.validation=0.1", path, apart[0])
    return files | ({"test": test} if test and rows_in(test) else {})


def rows_in(files: Sequence[Path]) -> int:
    """Rows of Parquet files together, from their footers."""
    total = 0
    for file in files:
        pa, pq = _pyarrow(file)
        try:
            total += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error}); fetch it again") from error
    return total


def _joined(tables: Sequence[Any], source: str) -> Any:
    """The shards of one table; columns whose types differ take the wider one."""
    import pyarrow as pa

    filled = [table for table in tables if table.num_rows]
    if not filled:
        raise NoSamplesError(f"{source}: no rows in it")

    def together(names: Sequence[str]) -> Any:
        return pa.concat_tables([table.select(names) for table in filled], promote_options="permissive")

    names = filled[0].schema.names
    try:
        return together(names)
    except pa.ArrowException as error:
        for name in names:
            try:
                together([name])
            except pa.ArrowException:
                kinds = dict.fromkeys(str(table.schema.field(name).type) for table in filled)
                raise DataError(
                    f"{source}: column '{name}' is {' in one file, '.join(kinds)} in another; write all with one type"
                ) from error
        raise DataError(f"{source}: cannot be put together ({error})") from error


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes with so many ``dimensions`` (3 images, 1 labels), as uint8."""
    try:
        raw = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a readable gzip file ({error}); fetch it again") from error
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if raw[:4] != magic or len(raw) < header:
        raise DataError(
            f"{file} is not an IDX file of {dimensions} dimensions (starts {raw[:4]!r}, not {magic!r})"
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=dimensions, offset=4))
    if len(raw) - header != int(np.prod(shape)):
        raise DataError(
            f"{file}: header says shape {shape}, file has {len(raw) - header} values; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def hub_tables(
    name: str, splits: Mapping[str, str], expected: str, config: str | None = None
) -> dict[str, tuple[Any, str]]:
    """``{"train": (pyarrow.Table, fingerprint), ...}`` of a hub data set (one ``config`` of it) through ``datasets``.

    Raises:
        DataError: ``datasets`` is not installed or the hub cannot be reached; says what ``data.path`` may be
            instead.
    """
    remedy = f"or pass data.path=<folder>, holding {expected}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{name} comes from the hub: pip install 'fedsim-lab[hub]', {remedy}") from error
    try:
        which = () if config is None else (config,)
        with within_reach():
            parts = {key: load_dataset(name, *which, split=split) for key, split in splits.items()}
    except (
        Exception
    ) as error:  # the library raises many unrelated types: connection, HTTP, file, value errors
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot load {name} from the hub ({said}); check the network, {remedy}") from error
    return {key: (part.with_format("arrow")[:], str(part._fingerprint)) for key, part in parts.items()}
