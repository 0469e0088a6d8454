"""FedLoGe. Xiao, Chen, Liu, Wang, Feng, Hao, Zhou, Wu, Yang, Liu: FedLoGe: Joint Local and Generic Federated Learning
under Long-tailed Data, ICLR 2024."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clients.base import Client
from clients.etf import sparse_etf
from clients.fedloge import FedLoGeClient, SparseClassifier
from clients.realign import realign_global, realign_local
from fedsim.task.heads import Head
from strategies.base import State, check
from strategies.heads import HeadStrategy

__all__ = ["FedLoGe", "realign_global", "realign_local", "sparse_etf"]


@dataclass(kw_only=True)
class FedLoGe(HeadStrategy):
    """Stage 1 averages the features, trained against the fixed sparse ETF classifier S, and the head psi; private heads
    stay with their clients. Stage 2, at any evaluation, sets the heads' class norms right in closed form.

    Global models: psi realigned (the method's), ``plain`` psi, psi realigned without its bias (``no_bias``), and S
    (``sse``). Personal ones: realigned psi + phi (the method's), ``phi`` alone, ``phi_psi``. ``scale`` is the length of
    the realigned rows. ``train=head`` is FedAvg with the same second stage: S is left out. ``mask``: which classes a
    personal model may name, those of the client's ``train`` or ``test`` samples.
    """

    sse: SparseClassifier
    scale: float
    train: str
    mask: str

    def make_client(self) -> Client:
        """The three losses."""
        check(self.scale > 0, "scale", self.scale, "the realigned rows need a positive length")
        check(self.train in ("etf", "head"), "train", self.train, "choose one of etf, head")
        check(self.mask in ("train", "test"), "mask", self.mask, "choose one of train, test")
        return FedLoGeClient(weighting=self.weighting, sse=self.sse, train=self.train, mask=self.mask)

    def heads(self, state: State) -> Mapping[str, Head]:
        """The global classifiers."""
        psi = self.slots.of_model(state["w"])
        weight = realign_global(psi.weight, scale=self.scale)
        heads = {"": Head(weight, psi.bias), "plain": psi, "no_bias": Head(weight, 0 * psi.bias)}
        return heads | ({"sse": self.sse.head(*self.slots.shape)} if self.train == "etf" else {})
