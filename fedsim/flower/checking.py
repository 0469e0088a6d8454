"""Whether an answer fits what was asked of the client that was asked. Nothing else reaches the fold.

What shapes, types and names an update has is known from the question: ``delta`` is a change of the ``w`` that this
client received, ``buffers`` are the model's. Of everything else the server makes sure by itself, the first time that it
needs to know: it answers the question on a few samples of its own (``fedsim.flower.ownanswer``). No client's reply
is the measure of another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import RecordDict

from fedsim.data.longtail import GROUPS  # few samples of the server's own may lack some
from fedsim.errors import ClientError
from fedsim.exchange.landing import RECLIPPED
from fedsim.exchange.payload import WEIGHT, Payload
from fedsim.exchange.release import FITS, Leaving, Release
from fedsim.flower import bounds
from fedsim.flower.answers import UPDATE, NodeAnswer, ReplyTo, address_of, failed, read_answer
from fedsim.flower.masking import LEGS, OTHERS
from fedsim.server.traits import ClientQuestion, JudgesUpdates
from fedsim.task.layout import Layout

Kind = tuple[tuple[int, ...], torch.dtype]

METRICS = frozenset(
    {"train_loss", "steps", "clipped", "retries", "loss", "accuracy"}
)  # that any client may send
HUGE = {torch.float32: 1e16, torch.float64: 1e100}  # no sum or square of numbers below overflows
MOST_FRAME = 64  # bytes of a frame beyond those of the numbers that it stands for
FREE = 64 << 20  # bytes of an array whose length is the client's affair; or four models


@dataclass(frozen=True)
class Question:
    """What one client was asked, and what its answer is judged by."""

    to: ReplyTo
    asked: ClientQuestion
    fold: Mapping[str, tuple[str, ...]]
    state: bool = False  # a state of the client was named
    held: bool = False  # the message relies on what the client holds
    bytes_down: int = 0
    turn: int = 0  # number that keys the client's draws
    rows: int = 1  # samples that it has, however the task counts


@dataclass(frozen=True)
class OwnAnswer:
    """What the server's own answer to a question looked like; ``why`` there is none."""

    arrays: Mapping[str, Kind] = field(default_factory=dict)
    values: Mapping[str, type] = field(default_factory=dict)
    metrics: frozenset[str] = frozenset()
    why: str = ""
    weighs: bool = True  # whether the weight travels
    stateful: bool = True  # whether the client keeps something, as far as is known
    sizes: Mapping[str, float] = field(default_factory=dict)  # the largest number of each array
    events: int = 2  # noisy gradients of one step; no rule that is known takes more than two
    received: float = 0.0  # the largest number of the message that it answered


@dataclass
class Judge:
    """Reads answers to questions of one run; ``trial(question, whole)`` answers one here, with the
    message as the question has it if it is ``whole``, else as it was sent."""

    method: object
    layout: Layout
    dtype: torch.dtype
    metrics: frozenset[str]  # names that the task and the method know beside ``METRICS``
    trial: Callable[[Question, bool], OwnAnswer]
    lost_is_the_end: bool = False  # engine.lost_state=stop
    release: Release | None = None  # what updates pass before they leave
    seed: int = 0
    counted: frozenset[str] = frozenset()  # arrays that grow with samples, not with steps
    _tried: dict[Any, OwnAnswer] = field(default_factory=dict)

    def read(self, content: RecordDict, question: Question) -> NodeAnswer:
        """The answer, its ``client`` and ``bytes_down`` as the server knows them; one that is not finite is made so.

        Raises:
            ClientError: what is wrong with it.
        """
        answer = read_answer(content, self.layout, lambda *array: self._fits(question, *array))
        self._flags(answer, address_of(content), question)
        outcome = answer.outcome
        bounds.check_counts(outcome, question.asked)
        self._metrics(outcome.metrics, question)
        outcome.bytes_down = question.bytes_down
        if outcome.kind not in UPDATE:
            outcome.weight = 0.0
            return answer
        self._update(answer, question)
        if outcome.kind != "ok":
            return replace(answer, arrays={})
        return self._weighed(self._opened(answer, question), question)

    def foresee(self, question: Question) -> int:
        """Find out what an answer looks like before one comes; bytes of its arrays, as far as that is known."""
        if question.asked.task in LEGS:
            return 0
        kinds = self._sample(question, quietly=True).arrays.values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds)

    def _opened(self, answer: NodeAnswer, question: Question) -> NodeAnswer:
        """The answer with what it is folded as in the place of frames; vectors that are too long are clipped."""
        if self.release is None:
            return answer
        asked = question.asked
        about = Leaving(self.seed, question.turn, asked.client, asked.task, self.layout, asked.message.values)
        names = self.release.summed(question.fold, asked.task)
        wanted = {n: self._wanted(n, question) for n in names}
        like = {n: torch.zeros(shape, dtype=kind) for n, (shape, kind) in wanted.items()}
        arrays, long = self.release.arrive(answer.arrays, like, question.fold, about)
        if long:
            outcome = answer.outcome
            answer = replace(answer, outcome=replace(outcome, values={**outcome.values, RECLIPPED: long}))
        return replace(answer, arrays=arrays)

    def _flags(self, answer: NodeAnswer, found: ReplyTo, question: Question) -> None:
        for name, said, true in zip(ReplyTo._fields, found, question.to, strict=True):
            if said != true:
                word = f" (it says: {answer.outcome.reason})" if answer.outcome.kind == "failed" else ""
                raise ClientError(f"its reply is of {name} {said!r:.80}, but {true!r} was asked{word}")
        kind = answer.outcome.kind
        if answer.lacks and (kind != "failed" or not question.held):
            raise ClientError("it says that it lacks what the message relies on, but nothing is missing")
        if answer.lost and (kind != "failed" or not question.state or not self.lost_is_the_end):
            raise ClientError("it says that its state is lost and the run must end, but nothing says so")
        if answer.lost and not self._sample(question, quietly=True).stateful:
            raise ClientError("it says that its state is lost, but clients of this method keep none")
        if answer.restarted and not question.state:
            raise ClientError("it says that it began again from its initial state, but it had none")
        if answer.stateful and kind != "ok":
            raise ClientError(f"it says that it keeps a new state, but its answer is {kind}")

    def _fits(self, question: Question, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Called for each array before its numbers are read."""
        if name not in question.fold:
            raise ClientError(
                f"the update holds '{name:.80}', expected {', '.join(question.fold) or 'no array'}"
            )
        wanted, like = self._wanted(name, question)
        if torch.Size(wanted).numel() and self._framed(name, like, question):
            most = MOST_FRAME + 16 * torch.Size(wanted).numel()  # rotated vectors are padded
            if dtype != torch.uint8 or len(shape) != 1 or shape[0] > most:
                raise ClientError(
                    f"'{name}' has shape {shape}, {dtype}; expected a frame of at most {most} bytes"
                )
            return
        free = question.fold[name] == ("cat",)
        if dtype != like or (
            shape[1:] != wanted[1:] or len(shape) != len(wanted) if free else shape != wanted
        ):
            here = f"('n', {', '.join(map(str, wanted[1:]))})" if free else f"{wanted}"
            raise ClientError(f"'{name}' has shape {shape}, {dtype}; expected {here}, {like}")
        size = torch.Size(shape).numel() * dtype.itemsize
        if free and size > max(FREE, 4 * self.layout.size * self.dtype.itemsize):
            raise ClientError(f"'{name}' has {size} bytes, more than is taken of an array of any length")

    def _hidden(self, question: Question) -> frozenset[str]:
        """Counts behind masks, of which nothing can be said."""
        release, fold = self.release, set(question.fold)
        return release.counted & fold if release and release.secure and release.secure.masks else frozenset()

    def _framed(self, name: str, dtype: torch.dtype, question: Question) -> bool:
        release = self.release
        if release is None or name not in release.summed(question.fold, question.asked.task):
            return False
        return release.frames(name, dtype)

    def _wanted(self, name: str, question: Question) -> Kind:
        received = question.asked.message.arrays
        if question.asked.task in LEGS:
            return (len(received[OTHERS]), LEGS[question.asked.task][1]), torch.uint8
        if name == "delta" and "w" in received:
            return tuple(received["w"].shape), received["w"].dtype
        if name == "buffers":
            return (self.layout.buffer_dim,), self.dtype
        if name in (WEIGHT, FITS):
            return (1,), self.dtype
        return self._sample(question).arrays[name]

    def _update(self, answer: NodeAnswer, question: Question) -> None:
        """Names, and the types of values."""
        if missing := [name for name in question.fold if name not in answer.arrays]:
            raise ClientError(f"the update lacks '{missing[0]}'")
        values, weight = dict(answer.outcome.values), answer.outcome.weight
        own = values.pop("weight", None)
        leg = question.asked.task in LEGS
        sample = OwnAnswer() if leg else self._sample(question, quietly=not values)
        if own is None and not sample.weighs:
            own = 1.0  # which does not travel
        if type(own) is not float or not (own == weight or (own != own and weight != weight)):
            raise ClientError(f"the update's weight is {own!r:.40}, its outcome's {weight}")
        for name, kind in sample.values.items():
            if name not in values:
                raise ClientError(f"the update lacks the value '{name}'")
            if type(values[name]) is not kind and not {kind, type(values[name])} <= {int, float}:
                raise ClientError(
                    f"value '{name}' is {type(values[name]).__name__}, expected {kind.__name__}"
                )
        if extra := [name for name in values if name not in sample.values]:
            raise ClientError(f"the update holds the value '{extra[0]}', which was not asked for")
        for name, value in values.items():
            if isinstance(value, int | float) and not abs(value) <= HUGE[torch.float64]:
                raise ClientError(f"value '{name}' is {value}, expected a finite number")
        bounds.check_released(answer.outcome, question.asked, question.rows, sample.events)

    def _weighed(self, answer: NodeAnswer, question: Question) -> NodeAnswer:
        """The answer, if weight and numbers are possible."""
        weight, bad, slots = answer.outcome.weight, list[str](), self.layout.params
        sizes, hidden = dict[str, float](), self._hidden(question)
        for name, t in ((n, t) for n, t in answer.arrays.items() if n not in hidden):
            size = sizes[name] = bounds.largest(t)
            most = HUGE.get(t.dtype, float("inf"))
            if not size < float("inf"):
                bad.append(name)
            elif size > most:
                raise ClientError(f"'{name}' holds numbers above {most:g}")
            elif name == "delta" and t.shape[-1:] == (slots.dim,) and not slots.holds(t):
                raise ClientError("'delta' holds numbers where the layout has padding")
            elif name == "buffers" and t.dim() == 1 and (which := bounds.negative_variance(self.layout, t)):
                raise ClientError(f"'buffers' holds a variance below 0, of {which}")
        if bad or not abs(weight) < float("inf"):
            what = ", ".join(bad) or f"the weight ({weight})"
            return failed(answer, f"non-finite values in {what}", "nonfinite")
        if question.asked.task in LEGS:
            return answer
        judge = self.method if isinstance(self.method, JudgesUpdates) else None
        most = judge.most_weight(question.asked) if judge else max(question.asked.samples, 1.0)
        if not 0 <= weight <= most:
            raise ClientError(
                f"its weight is {weight:g}; expected 0 to {most:g}, what it can have by its samples"
            )
        if weight < min(bounds.TINY, most) and any("mean" in kinds for kinds in question.fold.values()):
            raise ClientError(f"its weight is {weight:g}: it has no part in the mean")
        update = Payload({n: answer.arrays[n] for n in sizes}, answer.outcome.values)
        if judge and (why := judge.objection(question.asked, update)):
            raise ClientError(why)
        self._sized(answer, sizes, question)
        return answer

    def _sized(self, answer: NodeAnswer, sizes: Mapping[str, float], question: Question) -> None:
        """Whether numbers are as large as training makes them, and what they lead to can be trained: where they are
        larger than the model's, the server answers the question from there."""
        own, asked, rows = self._sample(question, quietly=True), question.asked, question.rows
        steps = bounds.steps_of(asked, rows)

        def check(found: Mapping[str, float]) -> None:
            bounds.check_sizes(found, own.sizes, own.received, lambda n: rows if n in self.counted else steps)

        check(sizes)
        if own.why or max(sizes.values(), default=0.0) <= max(1.0, own.received):
            return
        if (there := bounds.moved(asked.message, answer.arrays)) is None:
            return
        try:
            check(self.trial(replace(question, asked=replace(asked, message=there)), True).sizes)
        except ClientError as error:
            raise ClientError(
                f"nobody could go on from it: one step of the server's own from there: {error}"
            ) from None

    def _metrics(self, found: Mapping[str, float], question: Question) -> None:
        plain = {name: "/".join(p for p in name.split("/") if p not in GROUPS) for name in found}
        unknown = [name for name, bare in plain.items() if not {name, bare} & (METRICS | self.metrics)]
        if not unknown:
            return
        sample = self._sample(question, quietly=True, each_round=True)
        self.metrics = self.metrics | sample.metrics
        for name in unknown:
            if not sample.why and not {name, plain[name]} & self.metrics:
                raise ClientError(
                    f"metric '{name}' is not known; the strategy's traits.metrics names those that only some send"
                )

    def _sample(self, question: Question, quietly: bool = False, each_round: bool = False) -> OwnAnswer:
        """The server's own answer to such a question, worked out once for all that are alike."""
        message = question.asked.message
        shapes = tuple((k, tuple(t.shape), t.dtype) for k, t in message.arrays.items())
        round = question.to.round if each_round else None
        key = (question.asked.task, tuple(question.fold), shapes, tuple(message.values), round)
        found = self._tried.get(key) or self._tried.get((*key, question.to.client))
        if found is None:
            found = self.trial(question, False)
            self._tried[(*key, question.to.client) if found.why else key] = (
                found  # another client may do better
            )
        if found.why and not quietly:
            raise ClientError(
                f"the server cannot tell what an answer to '{question.asked.task}' looks like: {found.why}"
            )
        return found
