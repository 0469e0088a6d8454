"""FedLabel. Cho, Joshi, Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated Learning with
Limited Labels, ICCV 2023 (section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clients.base import Client
from clients.fedlabel import CONFIDENCES, DENOMINATORS, KL, KL_INPUTS, TEACHERS, WEIGHTINGS, FedLabelClient
from fedsim.local.work import step_size
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import check
from strategies.semisupervised import SemiSupervised


@dataclass(kw_only=True)
class FedLabel(SemiSupervised):
    """FedAvg of clients that label their other samples by the surer of two models: the received and their own.

    ``weighting``: ``used`` weighs clients by r, the labelled samples used and the unlabelled ones kept, over all steps.
    """

    traits: ClassVar[Traits] = replace(SemiSupervised.traits, labelled="client")
    weightings: ClassVar[tuple[str, ...]] = WEIGHTINGS
    beta: float
    lam0: float
    confidence: str = "variance"
    kl: str = "teacher_student"
    kl_input: str = "strong"
    denominator: str = "kept"
    view: str = "strong"
    unlabelled_steps: int | None = None
    teachers: str = "both"

    def most_weight(self, asked: ClientQuestion) -> float:
        """Of ``used``: all samples of both branches in all their steps."""
        if asked.task != "fit" or self.weighting != "used":
            return super().most_weight(asked)
        first = asked.local.steps
        branches = (first, first if self.unlabelled_steps is None else self.unlabelled_steps)
        batch, pass_over = step_size(asked.local), asked.local.epochs * asked.samples
        return max(1.0, sum(pass_over if steps is None else steps * batch for steps in branches))

    def make_client(self) -> Client:
        """The two branches."""
        check(0 <= self.beta <= 1, "beta", self.beta, "probabilities lie in [0, 1]")
        check(self.lam0 >= 0, "lam0", self.lam0, "the weight of the divergence must not be negative")
        for name, known in (
            ("confidence", tuple(CONFIDENCES)),
            ("kl", KL),
            ("kl_input", KL_INPUTS),
            ("denominator", DENOMINATORS),
            ("teachers", TEACHERS),
        ):
            check(
                getattr(self, name) in known, name, getattr(self, name), f"choose one of {', '.join(known)}"
            )
        steps = self.unlabelled_steps
        check(steps is None or steps >= 1, "unlabelled_steps", steps, "must be at least 1, or null")
        return FedLabelClient(
            weighting=self.weighting,
            beta=self.beta,
            lam0=self.lam0,
            confidence=self.confidence,
            kl=self.kl,
            kl_input=self.kl_input,
            denominator=self.denominator,
            view=self.view,
            unlabelled_steps=steps,
            teachers=self.teachers,
        )
