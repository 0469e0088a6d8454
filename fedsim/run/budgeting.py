"""What a run's privacy costs, by its settings: the mechanism to be accounted, and the noise that a budget buys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from omegaconf import DictConfig

from fedsim.config.parts import part
from fedsim.config.schema import ClientConfig
from fedsim.errors import ConfigError
from fedsim.exchange.accounting import Mechanism, gaussian_noise, turns
from fedsim.exchange.correlated import column, levels, sensitivity
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.spending import Rates
from fedsim.local.work import num_steps

UNIFORM, IN_TURN = "fedsim.sampling.Uniform", "fedsim.sampling.RoundRobin"
RULES = {"Uniform": UNIFORM, "RoundRobin": IN_TURN}


def fill_in(config: DictConfig) -> None:
    """Put the z that ``privacy.epsilon`` comes to, and the rounds that it is made for, into the settings.

    Raises:
        ConfigError: for settings of the group that cannot be, or a budget that no noise keeps.
    """
    if not config.get("privacy"):
        return
    typed: Privacy = part(config.privacy, "privacy")
    config.privacy.span = config.rounds if typed.span_matters else None
    config.privacy.found = None
    if typed.epsilon is None or typed.level == "record":  # whose noise hangs on the data: see ``plan``
        return
    config.privacy.found = found(config, replace(typed, found=None))


def found(config: DictConfig, privacy: Privacy) -> float:
    """The z of ``privacy.epsilon`` over all rounds."""
    assert privacy.epsilon is not None and privacy.delta is not None
    if privacy.level == "local":
        return 2 * math.sqrt(most_turns(config)) * gaussian_noise(privacy.epsilon, privacy.delta)
    mechanism = mechanism_of(config, privacy, 1.0)
    if mechanism.sensitivity is not None:
        return mechanism.sensitivity * gaussian_noise(privacy.epsilon, privacy.delta)
    return mechanism.noise_for(privacy.epsilon, config.rounds, privacy.delta, privacy.accountant)


def most_turns(config: DictConfig) -> int:
    """Releases of one client over all rounds, at most."""
    if rule_of(config) == IN_TURN and not moves(config):
        return turns(int(config.rounds), seats(config), int(config.clients_per_round))
    return int(config.rounds)


def rates(local: ClientConfig, sizes: np.ndarray) -> Rates:
    """How the batches of each client with samples are drawn: expected samples of one, of how many."""
    return {c: (max(1, min(local.batch_size, int(n))), int(n)) for c, n in enumerate(sizes) if n}


def events(local: ClientConfig, sizes: np.ndarray) -> dict[int, int]:
    """Noisy gradients of each client with samples in a round, at most."""
    most = {int(n): num_steps(local, int(n), local.epochs) for n in np.unique(sizes)}
    return {c: most[int(n)] for c, n in enumerate(sizes) if n}


def record_noise(privacy: Privacy, turns: int, events: Mapping[int, int], rates: Rates) -> float:
    """The z by which no client spends more than ``privacy.epsilon`` in so many ``turns``."""
    assert privacy.epsilon is not None and privacy.delta is not None
    delta, most = privacy.delta, privacy.epsilon
    kinds = {(rates[c], turns * k) for c, k in events.items() if k}
    return max(
        (
            Mechanism(event="poisson", z=1.0, n=n, m=batch).noise_for(most, count, delta)
            for (batch, n), count in sorted(kinds)
        ),
        default=0.0,
    )


def rule_of(config: DictConfig) -> str:
    """The place of the sampling rule, however it was named."""
    name = str(config.sampling.get("_target_"))
    return RULES.get(name.rpartition(".")[2], name) if name.startswith("fedsim.sampling") else name


def moves(config: DictConfig) -> bool:
    """Whether others take the places of clients that are not there, so that who is asked hangs on more than a draw."""
    return bool(config.system) or filled(config)


def filled(config: DictConfig) -> bool:
    """Whether some are never there, excluded, held out or canaries that are out, and others take their places."""
    gone = (
        bool(config.exclude) or config.evaluation.held_out_clients > 0 or seats(config) > config.num_clients
    )
    return config.exclude_fill == "substitute" and gone


def seats(config: DictConfig) -> int:
    """Clients whose turn it may be: canaries that are clients of their own too, whether they are in or out."""
    return int(config.num_clients + (config.audit.canaries if config.audit.level == "client" else 0))


def apart(config: DictConfig, privacy: Privacy) -> int:
    """Rounds from one turn of a client to its next, at least, where noise is correlated; else 0."""
    if privacy.mechanism == "gaussian":
        return 0
    if privacy.band is not None:
        return int(privacy.band)
    if rule_of(config) != IN_TURN:
        raise ConfigError(
            f"privacy.mechanism={privacy.mechanism}: nothing keeps a client from coming back at once; type "
            "sampling=round_robin, or privacy.band=N with cohorts in which nobody comes back within N rounds"
        )
    rounds = max(1, int(config.num_clients) // int(config.clients_per_round))
    if rounds > 1 and filled(config):
        raise ConfigError(
            f"privacy.mechanism={privacy.mechanism}: who takes the place of a client that is never there is back in "
            "the next round, when its own turn comes; type exclude_fill=shrink"
        )
    return rounds


def mechanism_of(config: DictConfig, privacy: Privacy, z: float, given: bool = False) -> Mechanism:
    """What central noise of multiplier ``z`` is accounted as; ``given``: cohorts were handed over.

    Raises:
        ConfigError: naming the sampling rule that no accountant knows.
    """
    n, m, rule = seats(config), config.clients_per_round, rule_of(config)
    if privacy.mechanism != "gaussian":
        band = apart(config, privacy)
        if privacy.mechanism == "banded":
            sens = sensitivity(column(config.rounds, band), band)
        else:
            sens = math.sqrt(math.ceil(config.rounds / band) * levels(band))
        return Mechanism(event="plain", z=z, n=n, m=m, sensitivity=sens)
    if given:
        return Mechanism(event="plain", z=z, n=n, m=m)
    if config.participation == "bernoulli" and rule == UNIFORM:
        kind = "poisson" if privacy.cap is None else "truncated"
        return Mechanism(event=kind, z=z, n=n, m=m, cap=privacy.cap)
    if rule == UNIFORM:
        event = "plain" if moves(config) else "fixed"
        return Mechanism(event=event, z=z, n=n, m=m, assume_poisson=privacy.assume_poisson)
    if rule == IN_TURN:
        return Mechanism(event="plain" if moves(config) else "round_robin", z=z, n=n, m=m)
    raise ConfigError(
        f"sampling={rule.rpartition('.')[2]}: who is asked hangs on clients' data or behaviour, which no accountant "
        "covers; with privacy=client type sampling=uniform participation=bernoulli, or sampling=round_robin"
    )
