"""The configuration's types. Values live in ``conf/`` only: these classes give no defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class AdamConfig:
    """Adam's constants (Kingma, Ba 2015, Algorithm 1)."""

    beta1: float = MISSING  # first moment
    beta2: float = MISSING  # second moment
    eps: float = MISSING  # added to the root of the second moment


@dataclass
class ClientConfig:
    """Local optimiser of every client (group ``client``)."""

    lr: float = MISSING  # local learning rate of round 0
    lr_decay: float = MISSING  # multiplies lr after each round
    epochs: int = MISSING  # passes over the client's samples per round
    min_epochs: int | None = (
        MISSING  # if set: each client draws its epochs of a round from min_epochs .. epochs
    )
    steps: int | None = MISSING  # if set: exactly this many mini-batches, instead of epochs
    batch_size: int = MISSING  # samples; the last batch of an epoch may be short
    shuffle: bool = MISSING  # new order each epoch; false: the order of the partition
    momentum: float = MISSING  # local heavy ball, starts at zero every round
    adam: AdamConfig | None = MISSING  # if set: Adam instead of SGD, its moments starting at zero every round
    weight_decay: float = MISSING
    clip_norm: float | None = MISSING  # bound on the norm of what `clip` names; null: no bound
    clip: str = MISSING  # direction (gradient + corrections) | loss (gradient) | full (with decay terms)
    autocast: str | None = (
        MISSING  # bfloat16: mixed precision of the forward passes while training; null: off
    )
    classes: list[Any] | None = MISSING  # kinds of clients: share of all, and what each kind does differently
    classes_by: str = MISSING  # random | speed: the slowest devices are the first class


@dataclass
class EmbedConfig:
    """How samples become embeddings, where an encoder is given (group ``encoder``)."""

    batch_size: int = MISSING  # samples
    normalize: bool = MISSING  # scale embeddings to unit length


@dataclass
class EngineConfig:
    """Where clients are computed (group ``engine``): what all engines share, and all the serial one has."""

    name: str = MISSING  # serial | ray | flower
    workers: int = MISSING  # worker processes; 0: one per core (ray)
    threads: int = MISSING  # torch threads per worker; they change the bits, so they are part of the result
    device: str = MISSING  # auto | cpu | cuda
    chunks: int = MISSING  # parts a cohort is cut into; 0: by model size. Part of the result, unlike workers
    vectorize: str = MISSING  # auto | on | off


@dataclass
class RayConfig(EngineConfig):
    """The Ray engine's own settings."""

    address: str | None = MISSING  # of a running Ray cluster
    store_mb: int = MISSING  # object store of an own Ray instance; 0: Ray's default, 30 % of memory
    timeout: float | None = MISSING  # seconds a chunk may take before the run is stopped; null: no limit


@dataclass
class FlowerConfig(EngineConfig):
    """A deployment's own settings: clients are computed on Flower's SuperNodes."""

    start: float = MISSING  # seconds to wait for the clients' nodes before round 1
    wait_for: int = MISSING  # clients that must be there before round 1; 0: all
    deadline: float | None = (
        MISSING  # seconds a client has to answer, then it counts as dropped; null: no limit
    )
    poll: float = MISSING  # seconds between looks for replies
    lost_state: str = MISSING  # restart | stop, when a node has lost what its client keeps between rounds


@dataclass
class EvaluationConfig:
    """What is measured, and how often."""

    every: int = MISSING  # rounds between evaluations of the global model; the last round is always evaluated
    batch_size: int = MISSING
    holdout: float = MISSING  # share of each client's samples kept as its own test set
    local_test: bool = (
        MISSING  # true: each client's own test set is drawn from the common one, with its label mix
    )
    by_class: bool = MISSING  # also many/medium/few accuracy, F1 and the accuracy of every class
    clients_every: int = MISSING  # rounds between evaluations on each client's own test set; 0: never
    clients_on: str = MISSING  # holdout | domain: what clients are measured on
    stop_at_target: bool = MISSING  # end the run at the first evaluation that reaches `target`
    target: float | None = MISSING  # accuracy whose first crossing is reported as rounds-to-target


@dataclass
class FailureConfig:
    """What happens when a client's code raises or returns a non-finite update."""

    policy: str = MISSING  # stop | skip, once `retries` are used up
    retries: int = MISSING
    nonfinite: str = MISSING  # skip | stop


@dataclass
class CheckpointConfig:
    """How often a run can be resumed from."""

    every: int = MISSING  # rounds; 0: only at the end
    memory_mb: int = MISSING  # client state held in memory before it is spilled to the run folder


@dataclass
class ConsoleConfig:
    """Progress on the terminal."""

    mode: str = MISSING  # auto | rich | plain | quiet


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = (
        MISSING  # disabled | auto (online if logged in and reachable, else offline) | offline | online
    )
    project: str = MISSING
    entity: str | None = MISSING


@dataclass
class TrackerConfig:
    """Who is told about the run (group ``tracker``); metrics.jsonl is always written."""

    console: ConsoleConfig = MISSING
    wandb: WandbConfig = MISSING
    tensorboard: bool = MISSING
    plots: bool = MISSING  # draw curves.png and partition.png at the end


@dataclass
class RunConfig:
    """One run."""

    name: str = MISSING  # groups runs: folder under `out`, W&B group
    out: str = MISSING  # root of all run folders
    dir: str | None = MISSING  # exact run folder; null: out/name/<method>-s<seed>-<key>
    method: str | None = MISSING  # label of the method; null: the chosen strategy's name
    resume: str = MISSING  # auto | never
    tags: list[str] = MISSING

    rounds: int = MISSING
    seed: int = MISSING
    dtype: str = MISSING  # float32 | float64
    num_clients: int = MISSING
    clients_per_round: int = MISSING
    participation: str = MISSING  # fixed | bernoulli (each client with p = clients_per_round/num_clients)
    buffers: str = MISSING  # average | local | all_local: BatchNorm statistics (and, all_local, its weights)

    strategy: Any = MISSING
    aggregator: Any = MISSING
    client: ClientConfig = MISSING
    model: Any = MISSING
    data: Any = MISSING
    partition: Any = MISSING
    encoder: Any = MISSING
    embed: EmbedConfig = MISSING
    engine: EngineConfig = MISSING
    sampling: Any = MISSING
    system: Any = MISSING
    topology: Any = MISSING
    attack: Any = MISSING
    tracker: TrackerConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    failures: FailureConfig = MISSING
    checkpoint: CheckpointConfig = MISSING


ENGINES: dict[str, type[EngineConfig]] = {
    "serial": EngineConfig,
    "ray": RayConfig,
    "flower": FlowerConfig,
}
