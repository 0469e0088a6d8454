"""An attack, and the client around which it is wrapped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.errors import check_setting
from fedsim.exchange.packing import pack, unpack
from fedsim.exchange.payload import Payload, Update
from fedsim.local.job import Job

check = partial(check_setting, "attack")  # refuses an impossible option of an attack

OWN = (
    "setup",
    "init_state",
    "begin",
    "step",
    "finish",
    "evaluate",
    "test",
    "own_weights",
    "own_model",
    "keeps",
    "prepare",
    "losses",
    "utility",
)  # never attacked: no exchange, or measuring


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks: ``prepare`` spoils what an attacker trains on, ``corrupt`` what it sends.

    ``fraction`` of all clients attack, whoever the seed draws; the run folder's ``attackers.json`` says who.
    """

    fraction: float
    omniscient: ClassVar[bool] = False  # whether ``collude`` computes it from what the honest clients sent

    @property
    def changes_vectors(self) -> bool:
        """Whether it changes the vectors that are sent."""
        return self.omniscient or type(self).corrupt is not Attack.corrupt

    def fitted(self, data: Dataset) -> Attack:
        """The attack on ``data``, with all values filled in that follow from it; asked before anything starts.

        Raises:
            ConfigError: the data have not what the attack needs.
        """
        return self

    def wrap(self, client: Any, attackers: frozenset[int]) -> Any:
        """``client`` with this attack around it; honest for all ids but ``attackers``."""
        return Attacked(client, self, attackers)

    def prepare(self, job: Job) -> None:
        """Before the client's own work; may replace ``job.data``."""

    def corrupt(self, job: Job, name: str, array: Tensor) -> Tensor:
        """What is sent instead of ``array``, one of the update's arrays of real numbers; vectors without padding."""
        return array

    def after(self, job: Job, update: Update) -> Update:
        """What is sent instead of ``update``."""
        arrays, packed = pack(Payload.of(update.arrays).arrays, job.layout)
        spoilt = {k: self.corrupt(job, k, v) if v.is_floating_point() else v for k, v in arrays.items()}
        return replace(update, arrays=unpack(spoilt, packed, job.layout))


@dataclass(frozen=True)
class Attacked:
    """Any client under an attack: whatever exchange it takes part in, ids among ``attackers`` do it the hostile way."""

    inner: Any
    attack: Attack
    attackers: frozenset[int]
    vectorisable = False  # attackers differ from the others

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if name in OWN or name.startswith("_") or not callable(found):
            return found
        return partial(self._run, found)

    def _run(self, task: Any, job: Job) -> Update:
        if job.client not in self.attackers:
            return task(job)  # type: ignore[no-any-return]
        self.attack.prepare(job)
        return self.attack.after(job, task(job))
