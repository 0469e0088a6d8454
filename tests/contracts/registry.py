"""The strategies that every contract is tried on. A new method is one line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A strategy under a label: its option in ``conf/strategy`` and further overrides."""

    label: str
    strategy: str
    overrides: tuple[str, ...] = ()
    adds_samples: bool = False  # trains on samples made for each client, of class labels only

    @property
    def arguments(self) -> tuple[str, ...]:
        """Overrides that select it."""
        return (f"strategy={self.strategy}", *self.overrides)


TABLE = (
    Entry("fedavg", "fedavg"),
    Entry("fedavg-uniform", "fedavg", ("strategy.weighting=uniform", "strategy.server_lr=0.5")),
    Entry("fedspeed", "fedspeed"),
    Entry("fedspeed-active", "fedspeed", ("strategy.dual_mean=active", "strategy.alpha=0.5")),
    Entry("fedprox", "fedprox"),
    Entry("scaffold", "scaffold"),
    Entry("scaffold-1", "scaffold", ("strategy.option=1",)),
    Entry("fedcm", "fedcm"),
    Entry("feddyn", "feddyn"),
    Entry("fedadam", "fedadam"),
    Entry("fedyogi", "fedyogi"),
    Entry("fedadagrad", "fedadagrad"),
    Entry("fedavgm", "fedavgm"),
    Entry("fedsam", "fedsam"),
    Entry("mofedsam", "mofedsam"),
    Entry("fednova", "fednova"),
    Entry("moon", "moon"),
    Entry("gossip", "gossip", ("topology=ring", "strategy.init_models=shared")),
    Entry("fedntd", "fedntd"),
    Entry("fedproto", "fedproto", ("strategy.share=model",)),
    Entry("ggeur", "ggeur", ("strategy.target=6",), adds_samples=True),
    Entry(
        "ggeur-scaffold", "ggeur", ("strategy.target=6", "strategy@strategy.base=scaffold"), adds_samples=True
    ),
    Entry("fedspeed-relaxed", "fedspeed", ("strategy.beta=0.2", "strategy.weighting=samples")),
    Entry("fedloge", "fedloge"),
    Entry("fedloge-head", "fedloge", ("strategy.train=head", "strategy.sse.bias=random")),
)
