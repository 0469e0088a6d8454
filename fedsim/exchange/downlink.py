"""The way down: the model that clients receive as a frame, and what they start from.

The server encodes its model once for all clients of an exchange, by draws keyed by the round. Clients train from the
decoded model and send differences to it; the server moves its exact model by their mean. Nothing is kept: only codecs
that send every entry can be used. Codecs that leave entries out send the difference to the model that clients hold,
and number their frames: see ``fedsim.exchange.descent``. A message that its receivers keep, and all arrays but ``w``,
travel as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.normals import Draws
from fedsim.exchange.packing import sent_bytes
from fedsim.exchange.payload import Payload
from fedsim.exchange.release import OWN, Release
from fedsim.exchange.stages import Codec
from fedsim.rng import torch_rng
from fedsim.task.layout import Layout

MODEL = "w"
FRAME = f"{OWN}down/{MODEL}"  # the array of a message that stands for the model
STEP = f"{FRAME}/"  # and the number of a frame: what the model that clients hold moves by
NUMBER = f"{OWN}down/number"  # value of a message: of the frame after which its model is held
WHOLE = f"{OWN}down/whole"  # value of one client's part: it is sent the model that the message stands on


def packed_down(
    release: Release | None, shared: Payload, task: str, seed: int, round: int, layout: Layout
) -> Payload:
    """What is sent of ``shared``: a frame in the place of the model, where compression is to go down too."""
    codec = None if release is None else release.compression
    if codec is None or codec.downlink is None or codec.standing or not goes_down(shared, task, layout):
        return shared
    frame = codec.encode_down(layout.compact(shared.arrays[MODEL]).double(), _draws(seed, task, round))
    return in_place(shared, FRAME, frame)


def opened_down(
    release: Release | None,
    payload: Payload,
    task: str,
    seed: int,
    round: int,
    layout: Layout,
    dtype: torch.dtype,
    standing: Payload | None = None,
) -> Payload:
    """The inverse of :func:`packed_down`, as clients do it: the same bits in every place. ``standing`` holds the model
    that numbered frames move."""
    steps, rest = steps_of(payload), bare_down(payload)
    if FRAME not in payload.arrays and not steps:
        return rest
    if release is None or release.compression is None or release.compression.downlink is None:
        raise ClientError("the message holds a compressed model, but compression.down says of no codec")
    codec = release.compression
    if not steps:
        frame = payload.arrays[FRAME]
        v = codec.decode_down(frame, _draws(seed, task, round), layout.size)
        return rest.joined(Payload({MODEL: layout.expand(v.to(dtype)).to(frame.device)}))
    if standing is None or MODEL not in standing.arrays:
        raise ClientError("the message holds what a model moved by, but no model that it moves")
    return rest.joined(Payload({MODEL: stepped(codec, standing.arrays[MODEL], steps, seed, layout)}))


def bare_down(payload: Payload) -> Payload:
    """A message, or one client's part of it, without what is of the way down."""
    arrays = {k: t for k, t in payload.arrays.items() if k != FRAME and not k.startswith(STEP)}
    values = {k: v for k, v in payload.values.items() if k not in (NUMBER, WHOLE)}
    unchanged = len(arrays) == len(payload.arrays) and len(values) == len(payload.values)
    return payload if unchanged else Payload(arrays, values)


def steps_of(payload: Payload | None) -> dict[int, Tensor]:
    """Numbered frames of a message, by number."""
    arrays = {} if payload is None else payload.arrays
    return {int(k[len(STEP) :]): t for k, t in arrays.items() if k.startswith(STEP)}


def step_frame(codec: Codec, w: Tensor, held: Tensor, number: int, seed: int, layout: Layout) -> Tensor:
    """The frame, of that number, of what ``w`` is away from the model that clients hold."""
    ahead = layout.compact(w).double() - layout.compact(held).double()
    return codec.encode_down(ahead.cpu(), _numbered(seed, number), layout)


def stepped(codec: Codec, held: Tensor, steps: Mapping[int, Tensor], seed: int, layout: Layout) -> Tensor:
    """The model that clients hold after the frames ``steps``, by number."""
    w = layout.compact(held).cpu()
    for number, frame in sorted(steps.items()):
        step = codec.decode_down(frame, _numbered(seed, number), layout.size, layout)
        w = (w.double() + step).to(held.dtype)
    return layout.expand(w).to(held.device)


def sends_all(part: Payload | None) -> bool:
    """Whether a client's part of a message says that it is sent the model that the message stands on."""
    return part is not None and bool(part.values.get(WHOLE))


def part_bytes(part: Payload | None, standing: Payload | None, layout: Layout) -> int:
    """Bytes of one client's part of a message, and of the model that it stands on if that is sent too."""
    if part is None:
        return 0
    return sent_bytes(part, layout) + (sent_bytes(standing, layout) if standing and sends_all(part) else 0)


def goes_down(shared: Payload, task: str, layout: Layout) -> bool:
    """Whether a message holds the model of the run, in an exchange that does not only measure."""
    w = shared.arrays.get(MODEL)
    return w is not None and not is_measuring(task) and w.dim() == 1 and layout.params.holds(w)


def in_place(shared: Payload, name: str, frame: Tensor) -> Payload:
    """The message with a frame under ``name`` in the place of the model."""
    return Payload({**{k: v for k, v in shared.arrays.items() if k != MODEL}, name: frame}, shared.values)


def _draws(seed: int, task: str, round: int) -> Draws:
    first = "" if task == "fit" else f"{task}/"
    return lambda stage: torch_rng(seed, f"{first}{OWN}down/{MODEL}/{stage}", round)


def _numbered(seed: int, number: int) -> Draws:
    return lambda stage: torch_rng(seed, f"{STEP}{stage}", number)
