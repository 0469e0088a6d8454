"""The way down by differences: the model that clients hold, the frames that moved it, and who holds which.

Codecs that leave most entries out cannot send a model, only what it is away from the one that clients hold already:
the server encodes ``w - held``, both sides move ``held`` by what is decoded, and clients start from there. What a frame
leaves out is in the next difference, so nothing is lost (error feedback, as of the updates). Frames are numbered and
keyed by their number. A client that missed some is sent these beside the new one, or the whole model that the new one
moves, whichever is shorter; so is one that was never asked. It counts as holding a model once its update is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.exchange.downlink import (
    MODEL,
    NUMBER,
    STEP,
    WHOLE,
    goes_down,
    in_place,
    step_frame,
    stepped,
)
from fedsim.exchange.packing import sent_bytes
from fedsim.exchange.payload import Outcome, Payload
from fedsim.exchange.stages import Codec
from fedsim.task.layout import Layout


@dataclass(frozen=True)
class Descent:
    """What is sent down in one exchange, and what its receivers will hold."""

    number: int  # of its frame; 0: the model goes as it is, as in the first exchange
    w: Tensor
    shared: Payload
    standing: Payload | None = None  # the model that the frame moves
    parts: Mapping[int, Payload] = field(
        default_factory=dict
    )  # by client: what it missed, or that it is sent all
    frame: Tensor | None = None


class HeldModel:
    """Server state: the model that up-to-date clients hold (padded, in the run's dtype), and how others catch up."""

    def __init__(self, codec: Codec, seed: int, layout: Layout):
        self._codec, self._seed, self._layout = codec, seed, layout
        self._standing: Payload | None = None
        self._number = 0  # of the last frame
        self._frames: list[Tensor] = []  # the last ones, together shorter than the model
        self._held: dict[int, int] = {}  # by client: the frame after which it was last asked

    def descend(self, shared: Payload, task: str, clients: Sequence[int]) -> Descent | None:
        """The message to ``clients`` with a frame in the place of its model; None if it is to go as it is. Nothing
        changes before :meth:`sent`."""
        if not goes_down(shared, task, self._layout):
            return None
        w, standing = shared.arrays[MODEL], self._standing
        if standing is None:
            return Descent(0, w, Payload(shared.arrays, {**shared.values, NUMBER: 0}))
        number, about = self._number + 1, (self._seed, self._layout)
        frame = step_frame(self._codec, w, standing.arrays[MODEL], number, *about)
        after = stepped(self._codec, standing.arrays[MODEL], {number: frame}, *about)
        sent = in_place(Payload(shared.arrays, {**shared.values, NUMBER: number}), f"{STEP}{number}", frame)
        found = {c: self._part(c) for c in clients}
        parts = {c: part for c, part in found.items() if part is not None}
        return Descent(number, after, sent, standing, parts, frame)

    def _part(self, client: int) -> Payload | None:
        """What ``client`` must be sent to hold what the others do; None: nothing."""
        missed = self._number - self._held.get(client, -1)
        if client not in self._held or missed > len(self._frames):
            return Payload({}, {WHOLE: True})
        frames = self._frames[len(self._frames) - missed :]
        first = self._number - missed + 1
        return Payload({f"{STEP}{first + i}": f for i, f in enumerate(frames)}) if frames else None

    def sent(self, descent: Descent, outcomes: Iterable[Outcome]) -> None:
        """An exchange is over: those whose updates were taken hold its model."""
        self._number, self._standing = descent.number, Payload({MODEL: descent.w})
        self._held |= {o.client: descent.number for o in outcomes if o.kind == "ok"}
        if descent.frame is not None:
            self._frames.append(descent.frame)
        most = sent_bytes(self._standing, self._layout)
        while sum(map(len, self._frames)) >= most:
            del self._frames[0]

    def save(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors, for a checkpoint."""
        plain = {"number": self._number, "held": {str(c): n for c, n in self._held.items()}}
        tensors = {f"_down/{i}": frame for i, frame in enumerate(self._frames)}
        if self._standing is not None:
            tensors["_down/w"] = self._standing.arrays[MODEL]
        return plain | {"frames": len(self._frames)}, tensors

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave."""
        self._number, self._held = plain["number"], {int(c): n for c, n in plain["held"].items()}
        self._frames = [tensors[f"_down/{i}"] for i in range(plain["frames"])]
        self._standing = Payload({MODEL: w}) if (w := tensors.get("_down/w")) is not None else None


def held_model(codec: Codec | None, seed: int, layout: Layout) -> HeldModel | None:
    """None where models do not go down by differences."""
    return HeldModel(codec, seed, layout) if codec is not None and codec.standing else None
