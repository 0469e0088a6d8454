"""The claims of ``experiments.claims``: what is asked, of which runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.byzantine import COMMON, GRADIENTS
from experiments.fleet import METHODS as FLEET

Words = Sequence[str]


@dataclass(frozen=True)
class Question:
    """What a paper claims, and the column in which it is looked for."""

    words: str
    objective: str = "accuracy"  # a column of metrics.jsonl
    reference: str = "fedavg"  # the arm compared with
    against: tuple[str, ...] = ()  # the arms compared with it; none named: every one
    at: str = "mean:10"
    total: str = ""  # a column summed over the run instead, of which less is better


@dataclass(frozen=True)
class Claim:
    """Runs that answer questions."""

    page: str  # of docs/results
    common: Words  # settings of all runs
    arms: Mapping[str, Words]  # by name, what selects it
    questions: Sequence[Question]
    grid: Mapping[str, Words] = field(
        default_factory=dict
    )  # settings to choose of each arm; under "" of the others
    problems: Sequence[Words] = ((),)  # settings in which all arms are run; settings are chosen in the first

    def with_arms(self, names: Words) -> Claim:
        """Only these arms and what can be asked of them; all where none is named."""
        arms = {k: v for k, v in self.arms.items() if not names or k in names}
        asked = [
            q
            for q in self.questions
            if q.reference in arms and set(q.against or arms) & (set(arms) - {q.reference})
        ]
        return replace(self, arms=arms, questions=asked)


VALIDATION = "evaluation.validation=0.1"
LONG_TAIL = Claim(
    "long_tail",
    ("experiment=digits_lt", VALIDATION, "evaluation.clients_every=0"),
    {
        "fedavg": ("strategy=fedavg",),
        "realigned": ("strategy=fedloge", "strategy.train=head"),
        "logit_all": ("strategy=logit_adjust", "strategy.prior=all"),
        "fedloge": ("strategy=fedloge", "strategy.sse.norm=3"),
    },
    (
        Question("FedLoGe lifts the few classes over FedAvg", "few/accuracy"),
        Question("FedLoGe's global model is better than FedAvg's"),
        Question(
            "The gain is the fixed classifier's, beyond what realigning FedAvg's head gives",
            "few/accuracy",
            "realigned",
            ("fedloge",),
        ),
    ),
    {"": ("client.lr=0.03,0.1,0.3",)},
)
OPTIMISERS = Claim(
    "optimisers",
    ("experiment=cifar10_small", "rounds=40", "evaluation.every=5", VALIDATION),
    {
        "fedavg": ("strategy=fedavg", "strategy.weighting=uniform"),
        "fedspeed": ("strategy=fedspeed",),
        "feddyn": ("strategy=feddyn",),
        "fedsam": ("strategy=fedsam",),
        "scaffold": ("strategy=scaffold",),
        "fedcm": ("strategy=fedcm",),
        "mofedsam": ("strategy=mofedsam",),
        "moon": ("strategy=moon", "strategy.weighting=uniform"),
    },
    (
        Question("FedSpeed and the others are ahead of FedAvg after 40 rounds"),
        Question(
            "FedSpeed's extra ascent is worth something over FedDyn",
            reference="feddyn",
            against=("fedspeed",),
        ),
    ),
    {
        "": ("client.lr=0.05,0.1,0.2",),
        "fedspeed": ("strategy.rho=0.01,0.03,0.1",),
        "feddyn": ("strategy.alpha=0.03,0.1,0.3",),
        "fedsam": ("strategy.rho=0.01,0.03,0.1",),
        "fedcm": ("client.lr=0.1,0.3,1",),
        "mofedsam": ("strategy.rho=0.01,0.03,0.1",),
        "moon": ("strategy.mu=0.1,0.3,1",),
    },
)
FRAUG = Claim(
    "fraug",
    ("experiment=fraug_small", "rounds=100", "client.steps=20", "evaluation.clients_every=5"),
    {
        "fedbn": ("strategy=fedbn",),
        "fedbn_kept": ("strategy=fraug", "strategy.lam=0"),
        "fraug": ("strategy=fraug",),
        "fraug_digits": ("strategy=fraug_digits",),
        "noise": ("strategy=fraug", "strategy.use_generator=false"),
        "no_rtnet": ("strategy=fraug", "strategy.use_rtnet=false"),
    },
    (
        Question("FRAug is better than FedBN", "clients/domains/accuracy", "fedbn", at="mean:5"),
        Question(
            "The generator is worth something beyond momentum that is kept over rounds",
            "clients/domains/accuracy",
            "fedbn_kept",
            ("fraug", "fraug_digits", "noise", "no_rtnet"),
            at="mean:5",
        ),
    ),
)
TIME = Claim(
    "fleet",
    ("experiment=fleet", "evaluation.stop_at_target=true"),
    FLEET,
    (
        Question(
            "Other ways to wait reach 95 % in less time than FedAvg, which waits for all", total="sim_seconds"
        ),
        Question("They need no more energy to get there", total="joules"),
    ),
)
ROBUST = Claim(
    "byzantine",
    (
        *(o for o in COMMON if not o.startswith(("engine", "tracker", "checkpoint", "evaluation"))),
        *(o for o in GRADIENTS if "{lr}" not in o),
        "data=digits",
        "num_clients=15",
        "clients_per_round=15",
        "evaluation.every=5",
        VALIDATION,
    ),
    {
        "mean": ("aggregator=mean",),
        "median": ("aggregator=coordinate_median",),
        "trimmed_mean": ("aggregator=trimmed_mean", "aggregator.f=3"),
        "multi_krum": ("aggregator=multi_krum", "aggregator.f=3"),
        "geometric_median": ("aggregator=geometric_median",),
        "nnm_trimmed": ("aggregator=trimmed_mean", "aggregator.f=3", "aggregator.before=[nnm]"),
        "flag_raw": ("aggregator=flag", "aggregator.scale=raw"),
        "flag": ("aggregator=flag",),
    },
    (
        Question(
            "The flag aggregator holds where the mean breaks, and costs nothing without attack",
            reference="mean",
        ),
    ),
    {"": ("strategy.server_lr=0.05,0.1,0.2",)},
    (
        ("attack=none",),
        *(
            (f"attack={name}", *more)
            for name, *more in (
                ("random_uniform",),
                ("reverse",),
                ("alie", "attack.z=1.5"),
                ("ipm", "attack.epsilon=2.0"),
            )
        ),
    ),
)
CLAIMS: Mapping[str, Claim] = {
    "robust": ROBUST,
    "long_tail": LONG_TAIL,
    "fleet": TIME,
    "optimisers": OPTIMISERS,
    "fraug": FRAUG,
}
