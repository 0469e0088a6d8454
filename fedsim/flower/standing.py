"""What a node keeps for later messages: it is sent once, and afterwards named by its content.

A message with ``keep`` makes its receivers store its shared part; later ones that stand on it carry the hash alone. A
node that has it no longer, or never had it, says so and is sent it with the message.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedsim.exchange.packing import pack
from fedsim.exchange.payload import Payload
from fedsim.flower.statefiles import run_folder
from fedsim.rng import hash_tensors
from fedsim.task.layout import Layout


def content(payload: Payload, layout: Layout) -> str:
    """Sha256 over names, types, shapes, bytes and values of what travels; the same on both sides of the wire."""
    arrays, packed = pack(payload.arrays, layout)
    head = [[name, str(t.dtype), list(t.shape)] for name, t in arrays.items()]
    text = json.dumps([head, packed] if packed else head) + hash_tensors(arrays.values()) + _text(payload)
    return hashlib.sha256(text.encode()).hexdigest()


class StandingFile:
    """The payload that one client holds in one run, in ``folder/<run>/client-<id>``: the one kept last."""

    def __init__(self, folder: Path, run: str, client: int, layout: Layout, name: str = "standing"):
        self.path, self._layout = run_folder(folder, run, client) / f"{name}.safetensors", layout
        self._about = {"run": run, "client": str(client)}

    def read(self, wanted: str = "") -> Payload | None:
        """The payload of that content, whatever it is if that is left out; or None if it is not there (or not whole,
        or of another run)."""
        try:
            with safe_open(self.path, framework="pt") as f:
                about = f.metadata() or {}
                wanted = wanted or about.get("content", "")
                if about != about | self._about | {"content": wanted}:
                    return None
                arrays = {name: f.get_tensor(name) for name in json.loads(about["names"])}
            found = Payload(arrays, _values(about["values"]))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None
        return found if content(found, self._layout) == wanted else None

    def write(self, payload: Payload) -> None:
        """Keep it in place of what was kept before; the file appears by one rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {"content": content(payload, self._layout), "names": json.dumps(list(payload.arrays))}
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        arrays = {name: t.cpu().contiguous() for name, t in payload.arrays.items()}
        save_file(arrays, scratch, metadata={**self._about, **about, "values": _text(payload)})
        with scratch.open("rb") as f:
            os.fsync(f.fileno())
        scratch.replace(self.path)


def _text(payload: Payload) -> str:
    """The values as text: pairs of name and value, bytes as ``{"hex": ...}``."""
    return json.dumps(list(payload.values.items()), default=lambda value: {"hex": value.hex()})


def _values(text: str) -> dict[str, Any]:
    return dict(json.loads(text, object_hook=lambda found: bytes.fromhex(found["hex"])))
