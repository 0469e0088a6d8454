"""What local rules share that give labels to samples which have none: their batches by position, models that only look,
and counts of what was kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.data.dataset import taken
from fedsim.data.local import Batch, LocalData
from fedsim.data.trees import join, size
from fedsim.errors import ClientError
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.local.meter import Meter

ROWS = 512  # that a model looks at at once
UNLABELLED = "unlabelled"  # the purpose that keys the order of samples without labels


class Positions(LocalData):
    """A client's samples of which batches hold positions alone, as ``y``: whoever needs a sample reads it then."""

    def read(self, rows: Tensor, rng: torch.Generator | None = None) -> Batch:
        """The positions themselves."""
        return Batch(rows, rows)

    @staticmethod
    def of(data: LocalData) -> Positions:
        """Those of ``data``."""
        return Positions(data.samples, data.index, data.dtype)


def unlabelled(job: Job) -> LocalData | None:
    """The client's samples without labels, as they are (never augmented); ``None`` if it has none."""
    own = job.unlabelled
    return (
        None if own is None or not len(own) else LocalData(own.samples, own.index, own.dtype, own.normalize)
    )


def true_labels(data: LocalData) -> Tensor | None:
    """True labels (n,) of samples that a ceiling is told (``data.labelled.withhold=false``); ``None``: nobody knows."""
    labels = getattr(data.samples, "y", None)
    return None if labels is None else taken(labels, data.index)


def upcoming(job: Job, data: LocalData, purpose: str = UNLABELLED) -> Tensor:
    """Positions (k,) of all samples that ``job.batches(purpose, data=data)`` is going to give, in order."""
    meter, job.meter = job.meter, Meter()
    try:
        found = [batch.y for batch in job.batches(purpose, data=Positions.of(data))]
    finally:
        job.meter = meter
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def extra_batches(
    job: Job, data: LocalData, size: int, steps: int, purpose: str = UNLABELLED, smallest: int = 1
) -> Iterator[Tensor]:
    """Positions of ``steps`` batches of ``size`` samples, for steps whose batches come from elsewhere."""
    shuffle, order = job.local.shuffle, job.rng(purpose)
    blocks = Positions.of(data).blocks(
        size, epochs=0, steps=steps, shuffle=shuffle, rng=order, smallest=smallest
    )
    return (batch.y for block in blocks for batch in block)


def as_logits(output: Any) -> Tensor:
    """Logits (B, C) of what a model returned.

    Raises:
        ClientError: if it gives no logit for each of at least two classes.
    """
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] < 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ClientError(
            f"pseudo labels need logits (B, C) of at least two classes, but the model gives {shape}; "
            "give it an output for each class"
        )
    return found


def look(job: Job, w: Tensor, batches: Iterable[Any], statistics: Tensor | None = None) -> Tensor:
    """Logits (n, C) of the inputs in ``batches`` at ``w`` (d,), as ``outputs`` gives them."""
    return torch.cat([as_logits(output) for output in outputs(job, w, batches, statistics)]).clone()


def outputs(job: Job, w: Tensor, batches: Iterable[Any], statistics: Tensor | None = None) -> list[Any]:
    """What the model at ``w`` (d,) makes of the inputs in ``batches``, in evaluation mode and without gradient.

    ``statistics`` (b,) take the place of the model's present ones, which stay as they are.
    """
    model, found = job.model, list[Any]()
    present = model.buffers.clone() if statistics is not None and len(model.buffers) else None
    if present is not None:
        model.buffers.copy_(statistics)  # type: ignore[arg-type]
    with model.measuring(w) as again:
        for x in batches:
            again()
            found.append(job.task.output(model.module, x))
            job.meter.forward(size(x))
    if present is not None:
        model.buffers.copy_(present)
    return found


def inputs(data: LocalData, rows: Tensor) -> Iterator[Any]:
    """Inputs of the samples at ``rows`` (k,), in batches."""
    return (data.read(part).x for part in torch.split(rows, ROWS))


def joined(first: Any, second: Any) -> Any:
    """Inputs of two batches as those of one, for a single pass; ``first`` may be ``None``."""
    return second if first is None else join(torch.cat, [first, second])


def refuse_accumulation(job: Job, name: str) -> None:
    """Methods whose steps have two kinds of batches take no micro-batches."""
    if job.local.accumulate > 1:
        raise ClientError(f"{name}: its steps have batches of two kinds; type client.accumulate=1")


def nothing(job: Job) -> Refusal:
    """The answer of a client that has no step to do."""
    few = len(job.data) or (job.unlabelled is not None and len(job.unlabelled))
    return Refusal("one sample, too few for BatchNorm" if few else "no samples")


class Tally:
    """The pseudo labels that one job gives, over all its steps."""

    def __init__(self) -> None:
        self.seen = 0
        self.counts: dict[str, int] = {}
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, seen: int, rows: Tensor, labels: Tensor, **counts: int) -> None:
        """A step looked at ``seen`` samples and kept those at ``rows`` (k,) with ``labels`` (k,); ``counts`` add up."""
        self.seen += seen
        self._rows.append(rows)
        self._labels.append(labels)
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    @property
    def kept(self) -> int:
        """Samples kept, over all steps."""
        return sum(map(len, self._rows))

    @property
    def guesses(self) -> Tensor | None:
        """Positions and labels (2, k), for the evaluator alone."""
        return torch.stack([torch.cat(self._rows), torch.cat(self._labels)]) if self.kept else None

    def update(self, job: Job, w: Tensor, weight: float) -> Update:
        """What a client sends that ended at ``w`` (d,): its move, with these counts and guesses."""
        delta = job.delta(w)
        metrics = {**job.report(), **self.metrics()}
        return Update({"delta": delta}, weight=weight, metrics=metrics, guesses=self.guesses)

    def metrics(self) -> Mapping[str, float]:
        """Counts for the log: ``pseudo/seen``, ``pseudo/kept``, ``pseudo/most_frequent`` (of the class that was given
        most often) and those added."""
        if not self.seen:
            return {}
        most = int(torch.bincount(torch.cat(self._labels)).max()) if self.kept else 0
        counts = {"seen": self.seen, "kept": self.kept, "most_frequent": most, **self.counts}
        return {f"pseudo/{k}": float(v) for k, v in counts.items()}
