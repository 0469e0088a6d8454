"""What a method is, said once on its class, and what the simulator asks of any method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from fedsim.errors import ConfigError
from fedsim.local.kept import POLICIES, SERVER
from fedsim.local.work import num_steps

if TYPE_CHECKING:
    from fedsim.config.schema import ClientConfig
    from fedsim.exchange.fold import Fold
    from fedsim.exchange.payload import Message, Payload
    from fedsim.local.interface import ClientLike
    from fedsim.server.exchanges import Server
    from fedsim.server.round import Round
    from fedsim.task.layout import Layout
    from fedsim.task.task import Task
    from fedsim.task.vectors import Weights

State = dict[str, Any]  # tensors and plain values: all of a method that a checkpoint needs


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What loop, configuration and deployment must know of a method; a class changes what differs from the defaults.

    ``traits = replace(Base.traits, pooled=True)`` in the body of a class. Where options of an object decide, its
    ``__post_init__`` gives the object ``traits`` of its own; the class then says what holds by default.
    """

    asynchronous: bool = False  # starts clients by itself, at times of its own: there are no cohorts
    peers: bool = False  # clients are peers on a graph, without a server
    pooled: bool = False  # all training samples lie in one place, as if of one client
    buffers: str | None = None  # policy for BatchNorm instead of the configured: average, local or all_local
    widths: bool = False  # clients may train sub-models of the model (``width`` of their class)
    architectures: bool = False  # clients may train models other than the run's (``model`` of their class)
    personal: bool = False  # its results are the clients' own models: no global one is meant to be used
    horizon: bool = False  # a schedule depends on the total number of rounds: a longer run is another run
    # cohorts that are not handed over are all clients, whatever clients_per_round says
    everybody: bool = False
    uploads: str | None = None  # asks clients for their models once: auto, or a folder where these are
    sparse: bool = False  # its vectors are mostly zero: what is not travels, with its places
    disjoint: bool = False  # no sample may be in two places, which is checked
    asked_only: bool = False  # what it computes hangs on no other clients than those asked so far
    counts_clients: bool = False  # but for how many there are
    client_by_client: bool = False  # sums are taken client by client, so that whoever replays a round can
    # every client is asked for something at least once, whatever the sampling
    meets_all_clients: bool = False
    # values of updates that say nothing of a client's samples but how many
    public_values: frozenset[str] = frozenset()
    # names of metrics that only some clients send, or only in some rounds
    metrics: frozenset[str] = frozenset()
    # how updates may hold samples as they are, by its settings; and what to type so that none does
    exposes: str = ""
    counted: frozenset[str] = (
        frozenset()
    )  # arrays of whole numbers that it needs the sum of: secure sums take them
    discloses: str = ""  # what clients send that no noise covers, by its settings, and what to type instead

    # of the model
    frozen: tuple[str, ...] = ()  # patterns of names of parameters that it does not train
    # patterns of what is zero in some of its vectors, and travels not then
    silent: tuple[tuple[str, ...], ...] = ()
    changes_base: bool = False  # adds to the bases of low-rank adapters (``fedsim.task.lowrank``)
    features: bool = False  # needs model.features(x) -> (B, d) and model.head, or a head named by model.head=
    logits: bool = False  # computes with the logits (B, C) that the model gives
    linear_head: bool = False  # needs a head that is one linear layer
    body: bool = False  # needs parameters to train outside the head
    batch_norm: bool = False  # differs from others by what it does with BatchNorm layers alone
    # of the data
    labels: bool = False  # needs class labels, one a sample
    vectors: bool = False  # needs samples that are one tensor, embeddings or images
    # who must have labelled samples (``data.labelled``)
    labelled: Literal["client", "server", "any"] = "client"
    unlabelled: bool = False  # needs samples without labels too
    fixed_sizes: bool = False  # computes with the clients' numbers of samples, so nothing may add samples
    # of the settings
    one_step: bool = False  # clients take one local step (client.steps=1)
    no_optimiser: str = ""  # what clients do instead of steps of an optimiser, whose settings are not read
    devices: Literal["needed", "refused"] | None = None  # of the simulated fleet (system)
    over_selection: bool = True  # copes with more clients asked than waited for (system.over_selection)
    # why not, and what to type instead; empty: it can
    no_vectors: str = ""  # be attacked in the vectors that clients send
    mean_only: str = ""  # work with an aggregator other than the mean
    undirected: str = ""  # work on a directed graph of peers
    fixed_graph: str = ""  # work on a graph that changes
    unread: Mapping[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    # option: another one, and the values of that by which the first is not read

    def __post_init__(self) -> None:
        if self.buffers not in (None, *POLICIES, SERVER):
            raise ConfigError(
                f"traits.buffers={self.buffers!r}: choose one of {', '.join(POLICIES)}, or None"
            )
        if self.labelled not in ("client", "server", "any"):
            raise ConfigError(f"traits.labelled={self.labelled!r}: choose one of client, server, any")
        if self.devices not in (None, "needed", "refused"):
            raise ConfigError(f"traits.devices={self.devices!r}: choose one of needed, refused, or None")


class StrategyLike(Protocol):
    """The server half of a method as the simulator sees it; ``strategies.base.Strategy`` has all of it."""

    def init(self, server: Server) -> State:
        """State before round 0."""

    def round(self, server: Server, state: State, round: Round) -> State:
        """One round."""

    def models(self, state: State) -> Mapping[str, Weights]:
        """Models to evaluate by name; ``global`` is the one a run ends with."""

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """Numbers of the common test set for the round's row."""

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """Numbers of all clients' own test samples for the round's row."""

    def setup(self, task: Task, layout: Layout) -> None:
        """Once per run, before the engine starts."""

    @property
    def client(self) -> ClientLike:
        """The local half."""

    @property
    def traits(self) -> Traits:
        """What it is and needs."""


@runtime_checkable
class ChecksCohort(Protocol):
    """A strategy that knows how many updates it needs, as all that derive from ``strategies.base.Strategy`` do."""

    def check_cohort(self, size: int, most: int) -> None:
        """Refuse settings by which ``clients_per_round=size`` of ``most`` clients are never enough."""


@runtime_checkable
class ChecksRun(Protocol):
    """A strategy that needs samples at the server or for validation, or local settings, in some of its forms only."""

    def check_run(self, local: ClientConfig, *, server: bool, validation: bool) -> None:
        """Refuse settings that do not go together; ``server``, ``validation``: whether there are such samples."""


@runtime_checkable
class OffersModels(Protocol):
    """A strategy with several models, among which a client that never takes part chooses."""

    def newcomer_message(self, server: Server, state: State) -> Message:
        """What such a client receives."""


@runtime_checkable
class Folds(Protocol):
    """A strategy that says what it asks of clients in its rounds, as ``strategies.base.Strategy`` does."""

    @property
    def fold(self) -> Fold:
        """How each array of an update is summed up."""


@runtime_checkable
class SendsStatistics(Protocol):
    """A strategy some of whose arrays are no vectors: counts and the like."""

    @property
    def statistics(self) -> frozenset[str]:
        """Their names in the fold."""


@runtime_checkable
class Aggregates(Protocol):
    """A strategy that takes its means from an aggregator, which another rule can take the place of."""

    @property
    def aggregator(self) -> Any:
        """``(updates (n, d), weights (n,)) -> (d,)``."""


@runtime_checkable
class Wraps(Protocol):
    """A strategy around another one."""

    @property
    def base(self) -> StrategyLike | None:
        """The other one."""


def fold_of(method: StrategyLike) -> Fold:
    """What the method asks of clients in its rounds; empty if it does not say."""
    return method.fold if isinstance(method, Folds) else {}


def statistics_of(method: StrategyLike) -> frozenset[str]:
    """Arrays of its fold that are statistics of single clients."""
    return method.statistics if isinstance(method, SendsStatistics) else frozenset()


def aggregator_of(method: StrategyLike) -> Any:
    """Its aggregator; ``None`` if it has none."""
    return method.aggregator if isinstance(method, Aggregates) else None


def parts_of(method: StrategyLike) -> Iterator[StrategyLike]:
    """The method, and what it wraps."""
    part: StrategyLike | None = method
    while part is not None:
        yield part
        part = part.base if isinstance(part, Wraps) else None


@dataclass(frozen=True)
class ClientQuestion:
    """One client's part of an exchange, for whoever judges the update that comes back."""

    client: int
    task: str
    message: Payload  # all that the client received or holds
    samples: float  # that it can have used, at most; of a task that counts tokens, tokens
    local: ClientConfig  # its local training
    domains: int  # of the data: numbers of domains are smaller

    @property
    def steps(self) -> int:
        """Local steps that it can have taken, at most."""
        return max(1, num_steps(self.local, int(min(self.samples, 2**53)), self.local.epochs))


@runtime_checkable
class JudgesUpdates(Protocol):
    """A strategy that knows what an honest client can send; ``strategies.base.Strategy`` does. In a deployment it is
    asked about every update that has the right names, types and shapes, before anything is done with it."""

    def most_weight(self, asked: ClientQuestion) -> float:
        """The most that an honest client can weigh."""

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Why no honest client sends such an ``update``: it would break or mislead what is made of it; else nothing."""


def missing(thing: object, protocol: type) -> list[str]:
    """Members that ``protocol`` states and ``thing`` lacks, in the protocol's order."""
    stated = (*protocol.__annotations__, *vars(protocol))
    return [name for name in stated if not name.startswith("_") and not hasattr(thing, name)]
