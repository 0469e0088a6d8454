"""A disk that is full when clients' states are spilled: said with file, bytes and remedy, and gone on with."""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path
from typing import Any

import pytest
from problems import classification, hashes

from fedsim.errors import CheckpointError

SPILLING = ("strategy=scaffold", "checkpoint.memory_mb=0", "rounds=6")


class Full(io.FileIO):
    """A file on a disk that has room for no more than a header."""

    def write(self, part: Any) -> int:
        if self.tell() + len(part) > 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(part)


def fill(patch: pytest.MonkeyPatch, number: int) -> None:
    """The disk is full from the segment ``number`` on."""
    plain = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        found = re.fullmatch(r"\.states-(\d+)\.safetensors\.tmp", self.name)
        if found and "w" in mode and int(found[1]) >= number:
            return Full(self, "w")
        return plain(self, mode, *args, **options)

    patch.setattr(Path, "open", opened)


@pytest.mark.parametrize("number", [0, 4])
def test_a_run_whose_disk_is_full_says_what_it_wanted_and_goes_on_later(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashes(classification().run(*SPILLING))
    place = (*SPILLING, f"dir={tmp_path}", "checkpoint.every=1")
    with monkeypatch.context() as during:
        fill(during, number)
        with pytest.raises(CheckpointError) as raised:
            classification().run(*place)
    text = str(raised.value)
    assert (
        "No space left on device; it wanted " in text and "Make room and type the same command again" in text
    )
    path = re.search(r"'(\S*/states-\d{6}\.safetensors)'", text)
    assert path is not None and Path(path[1]).parent == tmp_path / "checkpoint"
    assert int(re.search(r"wanted ([\d,]+) bytes", text)[1].replace(",", "")) > 300  # type: ignore[index]
    assert not list(tmp_path.glob("checkpoint/.states*")), "what was begun takes no room"
    assert hashes(classification().run(*place)) == expected
