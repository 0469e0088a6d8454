"""Options of FRAug: each changes the run, what cannot work is refused, controls leave their network out."""

from __future__ import annotations

import pytest
from problems import classes, classification, hashes, recorded

from clients.fraug import (
    Generator,
)
from fedsim.errors import ConfigError

OPTIONS = (
    "latent=uniform",
    "latent_dim=7",
    "draws=3",
    "interpolate=false",
    "schedule=1overx",
    "dist_generator=MMD",
    "dist_generator=L2",
    "dist_rtnet=MMD_kernel",
    "rtnet_loss=non_saturating",
    "rtnet_loss=none",
    "rtnet_bn=false",
    "proto_momentum=0.5",
    "proto_init=first",
    "unseen_classes=drop",
    "reset_momentum=true",
    "momentum=0",
    "lam=0.3",
    "lam_generator=3",
    "lam_rtnet=3",
    "lr_generator=0.01",
    "lr_rtnet=0.01",
    "warmup_rounds=1",
    "share_model=silobn",
    "share_generator=no_bn",
    "use_generator=false",
    "use_rtnet=false",
)


@pytest.mark.nightly
def test_every_option_changes_the_run() -> None:
    clients = classes((10, 16, 9))
    clients[0] = (clients[0][0], clients[0][1].clamp(max=1))  # a client without class 2
    problem = classification("bn", clients=clients, settings=("clients_per_round=3", "rounds=3"))
    local = ("client.epochs=2", "client.batch_size=5", "client.momentum=0.5")
    plain = problem.run("strategy=fraug", *local)
    ends = {o: hashes(problem.run("strategy=fraug", *local, f"strategy.{o}"))[-1] for o in OPTIONS}
    assert len({hashes(plain)[-1], *ends.values()}) == len(OPTIONS) + 1


WRONG = {
    "rounds=0": "rounds=0: must be at least 1",
    "schedule=linear": "schedule=linear: choose one of exp, avg, 1overx",
    "gamma=-1": "gamma=-1: must not be negative",
    "lam=0.7": r"lam=0.7: must be in \[0, 0.5\]",
    "latent=cauchy": "latent=cauchy: choose one of normal, uniform",
    "latent_dim=0": "latent_dim=0: must be at least 1",
    "draws=0": "draws=0",
    "lr_rtnet=0": "lr_rtnet=0: must be positive",
    "momentum=1": r"momentum=1: must be in \[0, 1\)",
    "dist_generator=cosine": "dist_generator=cosine: choose one of MMD_kernel, MMD, L1, L2",
    "proto_momentum=0": "proto_momentum=0",
    "share_model=none": "share_model=none: choose one of fedbn, silobn, all",
    "unseen_classes=guess": "unseen_classes=guess: choose one of keep, drop",
}


@pytest.mark.parametrize(("option", "message"), WRONG.items(), ids=WRONG)
def test_impossible_options_are_refused_by_name(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{message}"):
        classification().run("strategy=fraug", f"strategy.{option}")


def test_controls_leave_out_their_network_on_the_wire_and_in_the_state() -> None:
    problem = classification("bn", cohorts=[[0, 1]])
    found = {
        control: recorded("fraug", problem, "rounds=1", *control)
        for control in ((), ("strategy.use_generator=false",), ("strategy.use_rtnet=false",))
    }
    traffic = [r.rows[0]["bytes_up"] for _, r in found.values()]
    d, generator = 5 * (4 + 1) + 2 * 5 + 3 * (5 + 1), Generator(5, 2, 3)
    size = sum(p.numel() for p in generator.parameters()) + 4 * 5  # with its statistics
    assert traffic == [4 * 2 * (d + 10 + size) + 16, 4 * 2 * (d + 10) + 16, traffic[0]]
    states = [s.kept[0][0] for s, _ in found.values()]
    assert ["rtnet" in s for s in states] == [True, True, False]
    assert ["generator/momentum" in s for s in states] == [True, False, True]
    assert ["generator" in s.states[0] for s, _ in found.values()] == [True, False, True]
