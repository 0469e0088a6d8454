"""FedKSeed. Qin, Chen, Qian, Ding, Li, Deng: Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes, arXiv 2312.06353, 2023."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clients.codec import CODECS
from clients.fedkseed import LARGEST_POOL, FedKSeedClient, entries, read_entries, rebuilt
from clients.replica import CURRENT, digest
from fedsim.config.schema import ClientConfig
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Message, Outcome, Payload
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State, check
from strategies.replicas import Slopes


def probabilities(history: ArrayLike, uses: ArrayLike) -> NDArray[np.float64]:
    """FedKSeed-Pro: ``softmax(minmax(mean |c|))`` over the pool (K,), of sums ``history`` of ``|c|`` over ``uses``.

    Each direction's history begins with one entry of 0, as in the authors' code, so that a single steep slope counts
    half; equal means give equal probabilities.
    """
    mean = np.asarray(history, np.float64) / (np.asarray(uses, np.float64) + 1)
    spread = mean.max() - mean.min()
    e = np.exp((mean - mean.min()) / spread if spread > 0 else np.zeros_like(mean))
    return np.asarray(e / e.sum())


@dataclass(kw_only=True)
class FedKSeed(Slopes):
    """``G_k += sum_i p_i sum c`` of the clients' steps along direction k of a fixed pool; the model is
    ``theta_0 - lr sum_k G_k z_k``, whatever the number of rounds: clients are sent G, four bytes a direction, and
    nobody has anything to catch up with.

    ``pro``: directions are drawn by ``probabilities`` of their past slopes, each bounded by ``pro_clip``, which are
    sent beside G. The rate is constant and nothing decays: G could not say when a direction was used.
    State: ``G``, ``history`` and ``uses`` as lists.
    """

    traits: ClassVar[Traits] = replace(
        Slopes.traits,
        mean_only="FedKSeed's clients choose their directions: no rule compares their slopes; leave it out, or type "
        "strategy=decomfl, whose clients share directions",
        unread={"pro_clip": ("pro", (False,))},
    )
    local_steps: int
    pool: int
    pro: bool
    pro_clip: float
    hash_every: int

    def make_client(self) -> FedKSeedClient:
        """A client that steps along directions of the pool."""
        check(self.local_steps >= 1, "local_steps", self.local_steps, "must be at least 1")
        check(1 <= self.pool <= LARGEST_POOL, "pool", self.pool, f"directions, 1 to {LARGEST_POOL}")
        check(self.pro_clip > 0, "pro_clip", self.pro_clip, "must be positive")
        check(self.hash_every >= 0, "hash_every", self.hash_every, "rounds, 0: never")
        return FedKSeedClient(
            lr=self.lr,
            eps=self.eps,
            codec=self.codec,
            measure=self.measure,
            local_steps=self.local_steps,
            pool=self.pool,
        )

    def init(self, server: Server) -> State:
        """Nothing was added up yet.

        Raises:
            ConfigError: for a rate that changes over the rounds.
        """
        self.check_run(server.local, server=False, validation=False)
        zero = [0.0] * self.pool
        return super().init(server) | {"G": zero, "history": zero, "uses": [0] * self.pool}

    def check_run(self, local: ClientConfig, *, server: bool, validation: bool) -> None:
        """Refuse a rate that changes over the rounds, by its key."""
        for key, still in (("lr_decay", 1.0), ("round_schedule", None), ("weight_decay", 0.0)):
            if (value := getattr(local, key)) != still:
                raise ConfigError(
                    f"client.{key}={value}: FedKSeed adds up slopes over all rounds, so the rate must stay and nothing "
                    f"may decay; type client.{key}={'null' if still is None else still}"
                )

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Anything but entries of the pool."""
        if asked.task != "fit":
            return ""
        n = entries(self.local_steps, self.pool)
        if why := self.misfit(update, n, 2 * n):
            return why
        data: Any = update.values["slopes"]
        most = int(read_entries(data, n, CODECS[self.codec])[0].max())
        return f"'slopes' names direction {most} of {self.pool}" if most >= self.pool else ""

    def round(self, server: Server, state: State, round: Round) -> State:
        """G goes down, steps along its directions come up."""
        replies = server.exchange(self._question(server, state, round), {})
        heard = [(o.client, *found) for o in replies.ok if (found := self._entries(o)) is not None]
        if lost := sorted(set(replies.clients) - {c for c, *_ in heard}):
            server.log["out_of_sync"] = lost
        self.name_the_blind(server, replies, self.local_steps, round)
        if not heard:
            return state
        G, history, uses = (np.array(state[name], np.float64) for name in ("G", "history", "uses"))
        n = [float(server.sizes[c]) if self.weighting == "samples" else 1.0 for c, *_ in heard]
        for (_, chosen, c), weight in zip(heard, n, strict=True):
            np.add.at(G, chosen, weight / sum(n) * c)
            np.add.at(history, chosen, np.minimum(np.abs(c), self.pro_clip))
            np.add.at(uses, chosen, 1)
        sums = G.astype(np.float32)
        w = rebuilt(server.start.w, sums, server.seed, server.layout, self.lr)
        record = {"G": sums.tolist(), "history": history.tolist(), "uses": uses.astype(int).tolist()}
        return state | record | {"w": w}

    def _question(self, server: Server, state: State, round: Round) -> Message:
        t, buffers = round.index, state["buffers"]
        values: dict[str, Any] = {"G": np.array(state["G"], "<f4").tobytes()}
        if self.pro:
            values["p"] = probabilities(state["history"], state["uses"]).astype("<f4").tobytes()
        if t and self.hash_every and t % self.hash_every == 0:
            values["hash"] = digest(server.layout, state["w"])
        own = self.own_copies(server)
        arrays = {"w": server.start.w if own else state["w"]} | ({"buffers": buffers} if len(buffers) else {})
        return Message(Payload({}, values), standing=Payload(arrays, {} if own else {CURRENT: True}))

    def _entries(self, outcome: Outcome) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Directions and slopes that a client sent; ``None`` of one that says that it has nothing."""
        codec, data = CODECS[self.codec], outcome.values["slopes"]
        assert isinstance(data, bytes)
        chosen, codes = read_entries(data, entries(self.local_steps, self.pool), codec)
        return None if bool(codec.is_absent(codes).all()) else (chosen, codec.decode(codes))
