"""The server at work on samples of its own: a resident model, and jobs like a client's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from fedsim.config.schema import ClientConfig
from fedsim.data.federated import FederatedData
from fedsim.data.shards import Shards
from fedsim.exchange.payload import Payload
from fedsim.local.job import Job
from fedsim.rng import key, seed_global
from fedsim.task.copies import copied
from fedsim.task.gradients import halve
from fedsim.task.threads import threads
from fedsim.task.vectors import FlatModel, Weights

if TYPE_CHECKING:
    from fedsim.engine.assignments import Plan


class Bench:
    """Trains where the strategy runs, on the labelled samples that the server holds; the same bits on any engine."""

    def __init__(self, plan: Plan, whole: FederatedData):
        """``whole`` holds what is not handed to workers."""
        self._plan, self._whole = plan, whole

    @cached_property
    def _model(self) -> FlatModel:
        plan = self._plan
        task = plan.task
        model = FlatModel(copied(task.model), plan.dtype, plan.device, habits=task.habits, loss=task.loss)
        halve(model, plan.local.autocast)
        return model

    @cached_property
    def _source(self) -> FederatedData:
        """The server's samples as those of one client."""
        own, data = self._whole.roles.server, self._whole.dataset
        assert own is not None
        if own.samples is not None:
            data = replace(data, train=own.samples, normalize=own.normalize, augment=own.augment)
        return FederatedData(data, Shards.of([own.rows.numpy()])).to(self._plan.device)

    def train(
        self,
        weights: Weights,
        fit: Callable[[Job], Tensor],
        round: int,
        local: ClientConfig | None = None,
        purpose: str = "train",
    ) -> tuple[Weights, dict[str, float]]:
        """What ``fit(job) -> w`` makes of ``weights``, and what it reports; ``job.data`` are the server's samples.

        Draws are keyed by (seed, ``purpose``, round); ``local`` replaces the settings of group ``client``.
        """
        plan, model = self._plan, self._model
        with threads(plan.threads):
            seed_global(key(plan.seed, f"server/{purpose}/layers", round))
            job = Job(
                client=0,
                round=round,
                task=plan.task,
                model=model,
                local=local or plan.local,
                seed=plan.seed,
                message=Payload({k: v.to(plan.device) for k, v in weights._asdict().items()}),
                state={},
                source=self._source,
                purpose=f"server/{purpose}",
                views=plan.views,
            )
            w = fit(job)
            found = Weights(w.detach().cpu().clone(), model.buffers.cpu().clone())
            report = job.report()
            model.forget()
        return found, report
