"""What a client keeps between rounds, in files at its node, stamped with run, client and round.

The server says with every message which state is current; the node only ever adds files, whole or not at all. So an
update that was lost, came late or was refused changes nothing, and the same message may be worked on twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsim.flower.wire import Stamp
from fedsim.server.checkpoint import FORMAT
from fedsim.server.older import with_padding
from fedsim.task.layout import Layout

_NAME = re.compile(r"state-(\d+)-(\d+)\.safetensors")


class StateFiles:
    """The states of one client in one run, in ``folder/<run>/client-<id>``."""

    def __init__(self, folder: Path, run: str, client: int, layout: Layout):
        self.folder, self._layout = folder / run / f"client-{client}", layout
        self._about = {"run": run, "client": str(client)}

    def path(self, stamp: Stamp) -> Path:
        """File of the state made in that round and exchange."""
        return self.folder / f"state-{stamp[0]:06d}-{stamp[1]:03d}.safetensors"

    def read(self, stamp: Stamp) -> dict[str, Tensor] | None:
        """That state, or None if it is not there (or not whole, or of another run)."""
        try:
            with safe_open(self.path(stamp), framework="pt") as f:
                about = dict(f.metadata() or {})
                format = about.pop("format", "1")
                if format not in ("1", str(FORMAT)) or about != self._meta(stamp):
                    return None
                state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
                return with_padding(state, self._layout) if format == "1" else state
        except (OSError, SafetensorError):
            return None

    def write(self, stamp: Stamp, state: Mapping[str, Tensor]) -> None:
        """Add a state; the file appears by one rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.path(stamp)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        about = {**self._meta(stamp), "format": str(FORMAT)}
        save_file({k: v.contiguous() for k, v in state.items()}, scratch, metadata=about)
        with scratch.open("rb") as f:
            os.fsync(f.fileno())
        scratch.replace(target)

    def prune(self, round: int, current: Stamp | None) -> None:
        """Delete states of rounds before ``round`` but the one named ``current`` in it.

        States of the same round stay, and so does what the round began with: the server may do the round again.
        """
        if current is not None and current[0] >= round:
            return  # a later exchange of the round: what it began with is no longer named
        for path in self.folder.glob("state-*.safetensors"):
            found = _NAME.fullmatch(path.name)
            if found and int(found[1]) < round and path != (current and self.path(current)):
                path.unlink(missing_ok=True)

    def _meta(self, stamp: Stamp) -> dict[str, str]:
        return {**self._about, "round": str(stamp[0]), "exchange": str(stamp[1])}
