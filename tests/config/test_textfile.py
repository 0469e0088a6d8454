"""Text files of the user's that are not UTF-8 are named, wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.config.compose import compose
from fedsim.config.textfile import OtherEncodingError, read_text
from fedsim.config.yamlfile import read_yaml
from fedsim.data.coco_file import annotated
from fedsim.data.own_tables import _csv
from fedsim.errors import FedsimError
from fedsim.replay.worth import _of_file
from fedsim.system.devices import read_table
from fedsim.topology.graphs import edge_list
from fedsim.topology.timing import Profile

READERS: list[Callable[[Path], object]] = [
    read_yaml,
    _csv,
    read_table,
    lambda path: annotated(path, 32, ""),
    lambda path: _of_file(str(path)),
    lambda path: Profile(str(path)),
    lambda path: edge_list(3, path=str(path), directed=False, connected="check"),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-16", "no UTF-8, but UTF-16"), ("latin-1", "line 2 holds the byte 0xE9")]
)
def test_other_encodings_are_named(
    read: Callable[[Path], object], encoding: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("a,b\né,1\n".encode(encoding))
    with pytest.raises(FedsimError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value) and "iconv -f" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_an_option_of_ones_own_is_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "strategy" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes("# é\n_target_: strategies.fedavg.FedAvg\n".encode(encoding))
    with pytest.raises(FedsimError, match="no UTF-8") as caught:
        compose([f"hydra.searchpath=[file://{tmp_path}]", "strategy=mine"])
    assert str(caught.value).startswith(f"{path}: ")


def test_utf_8_is_read_with_and_without_its_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a").write_bytes("é".encode(encoding))
        assert read_text(tmp_path / "a") == "é"
    (tmp_path / "a").write_bytes("ab".encode("utf-16-le"))
    with pytest.raises(OtherEncodingError, match="UTF-16"):
        read_text(tmp_path / "a")
