"""The configuration's types. Values live in ``conf/`` only: these classes give no defaults.

Every field says its role, by which runs are told apart and compared: ``problem``, ``method`` or ``neutral``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

Role = Literal["problem", "method", "neutral"]


def problem_key() -> Any:
    """A setting that says what is learned on what, and how that is measured."""
    return _setting("problem")


def method_key() -> Any:
    """A setting that says how it is learned: also how it is computed, where that changes the last bits."""
    return _setting("method")


def neutral_key() -> Any:
    """A setting that changes no weight and no metric: where results go, who is told, how work is spread."""
    return _setting("neutral")


def _setting(role: Role) -> Any:
    return field(default=MISSING, metadata={"role": role})


@dataclass
class AdamConfig:
    """Adam's constants (Kingma, Ba 2015, Algorithm 1)."""

    beta1: float = method_key()  # first moment
    beta2: float = method_key()  # second moment
    eps: float = method_key()  # added to the root of the second moment


@dataclass
class ClientConfig:
    """Local optimiser of every client (group ``client``)."""

    lr: float = method_key()  # local learning rate of round 0
    lr_decay: float = method_key()  # multiplies lr after each round
    epochs: int = method_key()  # passes over the client's samples per round
    min_epochs: int | None = method_key()  # if set: each client draws its epochs from here to `epochs`
    steps: int | None = method_key()  # if set: exactly this many mini-batches, instead of epochs
    batch_size: int = method_key()  # samples; the last batch of an epoch may be short
    accumulate: int = method_key()  # micro-batches of batch_size samples that make one step
    shuffle: bool = method_key()  # new order each epoch; false: the order of the partition
    momentum: float = method_key()  # local heavy ball, starts at zero every round
    nesterov: bool = method_key()  # the gradient once more on top of the momentum
    adam: AdamConfig | None = method_key()  # if set: Adam instead of SGD; moments start at zero every round
    weight_decay: float = method_key()
    decoupled: bool = (
        method_key()
    )  # it shrinks the weights beside momentum and moments (AdamW), is no gradient
    groups: Any = method_key()  # by pattern of parameter names: lr (a multiple), weight_decay, frozen
    schedule: Any = method_key()  # of the rate over a client's steps of a round: a shape, or shape and more
    round_schedule: Any = method_key()  # of the rate over the rounds: likewise
    clip_norm: float | None = method_key()  # bound on the norm of what `clip` names; null: no bound
    clip: str = method_key()  # direction (gradient + corrections) | loss (gradient) | full (with decay)
    clip_pull: str = method_key()  # whole | split: how clip=direction bounds a proximal pull
    autocast: str | None = method_key()  # bfloat16 | float16: mixed precision of forward passes in training
    classes: list[Any] | None = method_key()  # kinds of clients: share of all, and what each does differently
    classes_by: str = method_key()  # random | speed: the slowest devices are the first class


@dataclass
class EmbedConfig:
    """How samples become embeddings, where an encoder is given (group ``encoder``)."""

    batch_size: int = problem_key()  # samples
    normalize: bool = problem_key()  # scale embeddings to unit length


@dataclass
class EngineConfig:
    """Where clients are computed (group ``engine``): what all engines share, and all the serial one has."""

    name: str = neutral_key()  # serial | ray | flower
    workers: int = neutral_key()  # worker processes; 0: one per core (ray)
    threads: int = method_key()  # torch threads per worker; they change the bits
    device: str = method_key()  # auto | cpu | cuda
    chunks: int = method_key()  # parts a cohort is cut into; 0: by model size; they change the bits
    vectorize: str = method_key()  # auto | on | off
    lanes: int = (
        neutral_key()
    )  # clients at a time on one GPU, of which each is computed as if it were alone; 0: auto
    tf32: bool = method_key()  # on a GPU: matrix products and convolutions of inputs rounded to 10 bits


@dataclass
class RayConfig(EngineConfig):
    """The Ray engine's own settings."""

    address: str | None = neutral_key()  # of a running Ray cluster
    store_mb: int = neutral_key()  # object store of an own Ray instance; 0: Ray's default, 30 % of memory
    timeout: float | None = neutral_key()  # seconds that a chunk may take, else the run stops; null: no limit
    early: bool = neutral_key()  # forked workers compute while Ray starts


@dataclass
class FlowerConfig(EngineConfig):
    """A deployment's own settings: clients are computed on Flower's SuperNodes."""

    start: float = neutral_key()  # seconds to wait for the clients' nodes before round 1
    wait_for: int = neutral_key()  # clients that must be there before round 1; 0: all
    deadline: float | None = neutral_key()  # seconds a client has to answer, else it dropped; null: no limit
    poll: float = neutral_key()  # seconds between looks for replies
    lost_state: str = neutral_key()  # restart | stop, when a node has lost what its client keeps
    nodes: Any = (
        neutral_key()
    )  # which clients each registered key may be, by name, or a file that says so; null: any
    most_samples: int = neutral_key()  # that a node may say it has, and weigh


@dataclass
class EvaluationConfig:
    """What is measured, and how often."""

    every: int = problem_key()  # rounds between evaluations of the global model; the last is always evaluated
    batch_size: int = problem_key()
    holdout: float = problem_key()  # share of each client's samples kept as its own test set
    local_test: bool = problem_key()  # true: own test sets come from the common one, with own label mix
    by_class: bool = problem_key()  # also many/medium/few accuracy, F1 and the accuracy of every class
    clients_every: int = problem_key()  # rounds between evaluations on each client's own test set; 0: never
    clients_on: str = problem_key()  # holdout | domain: what clients are measured on
    validation: float = (
        problem_key()
    )  # share of all training samples kept for choosing by; the same for all seeds
    client_validation: float = problem_key()  # share of each client's training samples kept for choosing by
    fairness: bool = problem_key()  # also how unequal clients' own numbers are
    held_out_clients: float = problem_key()  # share of the clients that never take part and are measured
    held_out_steps: int = problem_key()  # local steps that those take on half of their samples before
    local_unseen: str = (
        problem_key()
    )  # all | multi: which unseen classes are locally unseen (LU), by who has them
    predictions: bool = neutral_key()  # write down which test samples the final model classifies correctly
    texts: int = neutral_key()  # samples of text that the final model writes (texts.json); 0: none
    stop_at_target: bool = problem_key()  # end the run at the first evaluation that reaches `target`
    target: float | None = problem_key()  # accuracy whose first crossing is reported as rounds-to-target


@dataclass
class ObjectiveConfig:
    """The number of a run, for whoever chooses by it or compares; a run itself does not read it."""

    metric: str = neutral_key()  # a column of metrics.jsonl
    on: str | None = (
        neutral_key()
    )  # test | val | clients | clients_val; null: val in searches, test in reports
    at: str = neutral_key()  # last | mean:K of the last K evaluations | best_val
    direction: str = neutral_key()  # auto (by name) | max | min
    clients: str = neutral_key()  # mean | weighted | worst_tenth: what clients' accuracies come to


@dataclass
class FailureConfig:
    """What happens when a client's code raises or returns a non-finite update, or when too few updates come."""

    policy: str = problem_key()  # stop | skip, once `retries` are used up
    retries: int = problem_key()
    nonfinite: str = problem_key()  # skip | stop
    thin_round: str = problem_key()  # skip | stop, where too few updates came for the aggregator


@dataclass
class AuditConfig:
    """Canaries, by which ``fedsim audit`` finds out whether one can tell who was trained on."""

    canaries: int = problem_key()  # samples that are in by a fair coin each; 0: none
    kind: str = problem_key()  # random | mislabelled | duplicate
    level: str = problem_key()  # sample | client: what is in or out
    guesses: Any = problem_key()  # an even number, or several


@dataclass
class CheckpointConfig:
    """How often a run can be resumed from."""

    every: int = neutral_key()  # rounds; 0: only at the end
    keep: str = neutral_key()  # last | all | every:N: which checkpoints outlive newer ones
    memory_mb: int = neutral_key()  # client state held in memory before it is spilled to the run folder


@dataclass
class ConsoleConfig:
    """Progress on the terminal."""

    mode: str = neutral_key()  # auto | rich | plain | quiet
    shows: str = neutral_key()  # all | validation: no numbers of test samples, while settings are chosen


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = neutral_key()  # disabled | auto (online if logged in and reachable) | offline | online
    project: str = neutral_key()
    entity: str | None = neutral_key()


@dataclass
class TrackerConfig:
    """Who is told about the run (group ``tracker``); metrics.jsonl is always written."""

    console: ConsoleConfig = neutral_key()
    wandb: WandbConfig = neutral_key()
    tensorboard: bool = neutral_key()
    update_hashes: bool = neutral_key()  # hashes.jsonl: sha256 of every vector that a client got and sent
    prometheus: str | None = neutral_key()  # a text file of numbers for dashboards, or null
    plots: bool = neutral_key()  # draw curves.png and partition.png at the end


@dataclass
class RunConfig:
    """One run."""

    name: str = neutral_key()  # groups runs: folder under `out`, W&B group
    out: str = neutral_key()  # root of all run folders
    dir: str | None = neutral_key()  # exact run folder; null: out/name/<method>-s<seed>-<key>
    method: str | None = neutral_key()  # label of the method; null: the chosen strategy's name
    resume: str = neutral_key()  # auto | never
    tags: list[str] = neutral_key()

    rounds: int = problem_key()
    seed: int = problem_key()
    dtype: str = problem_key()  # float32 | float64
    num_clients: int = problem_key()
    clients_per_round: int = problem_key()
    exclude: list[int] = problem_key()  # ids of clients that are registered but never there
    exclude_samples: Any = problem_key()  # positions, by client, of samples that nobody uses
    exclude_fill: str = problem_key()  # substitute | shrink: whether others take their places in cohorts
    participation: str = problem_key()  # fixed | bernoulli (each with p = clients_per_round/num_clients)
    buffers: str = method_key()  # BatchNorm statistics: average | local | all_local (its weights too)

    code: dict[str, str] | None = method_key()  # digests of the user's own code, filled in
    strategy: Any = method_key()
    aggregator: Any = method_key()
    client: ClientConfig = method_key()
    task: Any = problem_key()
    model: Any = problem_key()
    data: Any = problem_key()
    partition: Any = problem_key()
    encoder: Any = problem_key()
    embed: EmbedConfig = problem_key()
    views: Any = method_key()  # named augmentations that methods ask for; by name, options of group `view`
    pretrain: Any = method_key()  # weights that the run starts from are made so; null: as the model is drawn
    engine: EngineConfig = method_key()
    sampling: Any = problem_key()
    system: Any = problem_key()
    topology: Any = problem_key()
    attack: Any = problem_key()
    privacy: Any = method_key()  # what is done to updates before they leave: see fedsim.exchange.release
    compression: Any = method_key()
    secagg: Any = method_key()
    tracker: TrackerConfig = neutral_key()
    evaluation: EvaluationConfig = problem_key()
    objective: ObjectiveConfig = neutral_key()
    failures: FailureConfig = problem_key()
    audit: AuditConfig = problem_key()
    checkpoint: CheckpointConfig = neutral_key()


ENGINES: dict[str, type[EngineConfig]] = {
    "serial": EngineConfig,
    "ray": RayConfig,
    "flower": FlowerConfig,
}
