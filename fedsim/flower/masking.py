"""A client's half of secure aggregation at its node: three legs beside the method's task, and secrets between them.

Secrets lie in one file of the client's folder, for one exchange: leg 1 begins it anew, leg 4 deletes it. A node never
sends an update that the configuration wants masked without masks, whatever the server asks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.assignments import Chunk
from fedsim.errors import ClientError
from fedsim.exchange.codecs import FrameHeader
from fedsim.exchange.compression import as_bytes, as_tensor
from fedsim.exchange.payload import Outcome, Payload
from fedsim.exchange.release import Release
from fedsim.exchange.secagg import MaskingClient, read_ring_frame, ring_frame
from fedsim.exchange.secagg.protocol import KEYS, SEALED, check_threshold
from fedsim.exchange.secagg.shares import SHARE
from fedsim.flower.answers import NodeAnswer
from fedsim.flower.wire import Ask

OWN = "secagg/"  # begins the names of legs, and of what they bring
LEGS = {  # task, and what its answer holds: rows of so many bytes
    f"{OWN}keys": ("keys", KEYS),
    f"{OWN}shares": ("shares", SEALED),
    f"{OWN}unmask": ("revealed", SHARE),
}
OTHERS, PUBLIC, SHARES, SURVIVORS, LEAST = (
    f"{OWN}{n}" for n in ("others", "public", "sealed", "survivors", "t")
)


def masks(release: Release | None, fold: Mapping[str, tuple[str, ...]], task: str) -> bool:
    """Whether what an exchange asks for is masked."""
    secure = None if release is None else release.secure
    return release is not None and secure is not None and secure.masks and bool(release.vectors(fold, task))


def bare(part: Payload | None) -> Payload | None:
    """What a client receives, without what is of the legs."""
    if part is None:
        return None
    return Payload({k: v for k, v in part.arrays.items() if not k.startswith(OWN)}, part.values)


def rows(parts: Sequence[bytes], width: int) -> Tensor:
    """Byte strings of one length as an array (n, width)."""
    return torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).reshape(-1, width).copy())


def by_client(clients: Tensor, found: Tensor) -> dict[int, bytes]:
    """The rows of an array by client."""
    return {int(c): row.numpy().tobytes() for c, row in zip(clients, found, strict=True)}


class MaskingSite:
    """The legs of one client; ``folder`` is where its files of the run lie."""

    def __init__(self, folder: Path, ask: Ask):
        self._path, self._ask = folder / "masks.json", ask
        part = ask.chunk.part(ask.client)
        self._said = Payload() if part is None else part

    def answer(self) -> NodeAnswer:
        """What a leg's answer is.

        Raises:
            ClientError: for a question that the protocol does not know at this point.
        """
        name, width = LEGS[self._ask.broadcast.task]
        own = {"keys": self._keys, "shares": self._shares, "revealed": self._revealed}[name]
        outcome = Outcome(self._ask.client, "ok", 1.0, {"weight": 1.0})
        return NodeAnswer(outcome, {name: rows(own(), width)})

    def masked(self, names: Sequence[str], arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leg 3: the frames of ``names``, end to end, behind masks."""
        client, out, residues = self._kept(), dict(arrays), list[np.ndarray]()
        said = self._said.arrays
        if SHARES not in said or OTHERS not in said or not client.public:
            raise ClientError("the server asks for an update without masks, which this client does not send")
        frames = [as_bytes(arrays[name]) for name in names]
        heads = [FrameHeader.read(frame) for frame in frames]
        for frame, head in zip(frames, heads, strict=True):
            residues.append(read_ring_frame(frame, head.d, head.bits))
        B = heads[0].bits
        y = client.masked(np.concatenate(residues), by_client(said[OTHERS], said[SHARES]), B)
        self._keep(client)
        start = 0
        for name, head in zip(names, heads, strict=True):
            out[name] = as_tensor(ring_frame(y[start : start + head.d], B))
            start += head.d
        return out

    def alone(self) -> Chunk:
        """The chunk as the method's client sees it."""
        chunk = self._ask.chunk
        return replace(chunk, each={c: p for c, part in chunk.each.items() if (p := bare(part)) is not None})

    def _keys(self) -> list[bytes]:
        client = MaskingClient.fresh(self._ask.client, self._ask.broadcast.round, self._ask.run, 0)
        self._keep(client)
        return [client.keys()]

    def _shares(self) -> list[bytes]:
        client, said = self._kept(), self._said
        if client.public:
            raise ClientError("the server asks a second time for shares of one exchange")
        client.t = int(said.values[LEAST])  # type: ignore[arg-type]
        public = by_client(said.arrays[OTHERS], said.arrays[PUBLIC])
        check_threshold(client.t, len(public) + 1)
        found = client.shares(public)
        self._keep(client)
        return [found[int(c)] for c in said.arrays[OTHERS]]

    def _revealed(self) -> list[bytes]:
        client, said = self._kept(), self._said.arrays
        found = client.unmask(int(c) for c in said[SURVIVORS])
        self._path.unlink()
        return [found.get(int(c), bytes(SHARE)) for c in said[OTHERS]]

    def _keep(self, client: MaskingClient) -> None:
        """Write what must be remembered; the file is this user's alone."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        text = json.dumps({"exchange": self._ask.exchange, **{k: _plain(v) for k, v in vars(client).items()}})
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        scratch.replace(self._path)

    def _kept(self) -> MaskingClient:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            raise ClientError(
                "this node has no secrets of this exchange: it was not asked for keys"
            ) from None
        here = (self._ask.exchange, self._ask.broadcast.round, self._ask.run, self._ask.client)
        if (found.pop("exchange"), found["round"], found["run"], found["client"]) != here:
            raise ClientError("this node's secrets are of another exchange")
        mask, share, seed = (bytes.fromhex(found[k]) for k in ("mask_key", "share_key", "seed"))
        client = MaskingClient(found["client"], found["round"], found["run"], found["t"], mask, share, seed)
        client.public, client.sealed = (
            {int(c): bytes.fromhex(b) for c, b in found[k].items()} for k in ("public", "sealed")
        )
        client.own = bytes.fromhex(found["own"][0]), bytes.fromhex(found["own"][1])
        client.answered = found["answered"]
        return client


def _plain(value: object) -> object:
    """Bytes as text, at any depth."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
