"""The way down: the model that clients receive as a frame, and what they start from.

The server encodes its model once for all clients of an exchange, by draws keyed by the round. Clients train from the
decoded model and send differences to it; the server moves its exact model by their mean. Nothing is kept: only codecs
that send every entry can be used. A message that its receivers keep, and all arrays but ``w``, travel as they are.
"""

from __future__ import annotations

import torch

from fedsim.errors import ClientError
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.normals import Draws
from fedsim.exchange.payload import Payload
from fedsim.exchange.release import OWN, Release
from fedsim.rng import torch_rng
from fedsim.task.layout import Layout

MODEL = "w"
FRAME = f"{OWN}down/{MODEL}"  # the array of a message that stands for the model


def packed_down(
    release: Release | None, shared: Payload, task: str, seed: int, round: int, layout: Layout
) -> Payload:
    """What is sent of ``shared``: a frame in the place of the model, where compression is to go down too."""
    codec = None if release is None else release.compression
    w = shared.arrays.get(MODEL)
    if codec is None or codec.downlink is None or w is None or is_measuring(task):
        return shared
    if w.dim() != 1 or not layout.params.holds(w):
        return shared
    frame = codec.encode_down(layout.compact(w).double(), _draws(seed, task, round))
    return Payload({**{k: v for k, v in shared.arrays.items() if k != MODEL}, FRAME: frame}, shared.values)


def opened_down(
    release: Release | None,
    payload: Payload,
    task: str,
    seed: int,
    round: int,
    layout: Layout,
    dtype: torch.dtype,
) -> Payload:
    """The inverse of :func:`packed_down`, as clients do it: the same bits in every place."""
    if FRAME not in payload.arrays:
        return payload
    if release is None or release.compression is None or release.compression.downlink is None:
        raise ClientError("the message holds a compressed model, but compression.down says of no codec")
    frame = payload.arrays[FRAME]
    v = release.compression.decode_down(frame, _draws(seed, task, round), layout.size)
    w = layout.expand(v.to(dtype)).to(frame.device)
    return Payload({**{k: t for k, t in payload.arrays.items() if k != FRAME}, MODEL: w}, payload.values)


def _draws(seed: int, task: str, round: int) -> Draws:
    first = "" if task == "fit" else f"{task}/"
    return lambda stage: torch_rng(seed, f"{first}{OWN}down/{MODEL}/{stage}", round)
