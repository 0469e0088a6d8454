"""Whether what leaves clients is covered by the privacy that the settings promise, before anything starts.

The rule is one for all methods: each array of the fold is a vector, under the budget, or a statistic, refused; each
value of an update is refused unless the method calls it public; what a method sends in other exchanges is told by its
``traits.discloses``. The table of methods is in docs/privacy.md.
"""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from fedsim.config.parts import part
from fedsim.errors import ConfigError
from fedsim.exchange.accounting import gaussian_noise
from fedsim.exchange.central import z_delta
from fedsim.exchange.fold import fold_kinds
from fedsim.exchange.privacy import Privacy
from fedsim.local.interface import SaysHowItLooks
from fedsim.run import agreement, budgeting
from fedsim.run.needs import other_rule
from fedsim.server.traits import StrategyLike, fold_of, parts_of, statistics_of

log = logging.getLogger(__name__)


def check_privacy(method: StrategyLike, config: DictConfig, given_cohorts: bool) -> None:
    """Refuse settings under which more leaves clients than is accounted for.

    Raises:
        ConfigError: naming the setting or what is sent, why, and what to type.
    """
    if not config.get("privacy"):
        return
    privacy: Privacy = part(config.privacy, "privacy")
    _check_sent(method, config, privacy)
    if privacy.level == "record":
        _check_records(method, config, privacy)
        return
    if privacy.local and privacy.epsilon is not None and method.traits.asynchronous:
        raise ConfigError(
            "privacy.epsilon: how often an asynchronous server asks a client is not known before; type privacy.z, and "
            "privacy.epsilon_max for the budget"
        )
    if privacy.central:
        _check_central(method, config, privacy, given_cohorts)
    assert privacy.delta is not None
    if privacy.delta >= 1 / config.num_clients:
        log.warning(
            "privacy.delta=%g: from 1/num_clients = %g on, publishing one client whole would pass; type less",
            privacy.delta,
            1 / config.num_clients,
        )
    if privacy.z == 0:
        log.warning("privacy.z=0: no noise, epsilon is infinite; only the clip is there")


def _check_sent(method: StrategyLike, config: DictConfig, privacy: Privacy) -> None:
    name, how = type(method).__name__, f"privacy={privacy.level}"
    traits = method.traits
    if traits.pooled:
        raise ConfigError(
            f"{how}: {name} has all samples in one place: nothing leaves a client; leave privacy out"
        )
    if traits.discloses and privacy.level != "record":
        raise ConfigError(f"{how}: {traits.discloses}")
    if config.pretrain and not config.pretrain.get("data"):
        raise ConfigError(
            f"{how}: pretrain trains on clients' samples outside the budget; leave it out, or give it other samples: "
            "+data@pretrain.data=OPTION"
        )
    _check_looks(config, privacy)
    _check_clips(method, privacy)
    if privacy.level == "record":
        return
    for one in parts_of(method):
        weighting = vars(one).get("weighting", "uniform")
        if weighting != "uniform":
            raise ConfigError(
                f"strategy.weighting={weighting}: under {how} every update weighs 1, since another weight says how "
                "many samples a client has and changes what one can do to the sum; type strategy.weighting=uniform"
            )
    statistics = statistics_of(method)
    for array, kinds in fold_kinds(fold_of(method)).items():
        if array in statistics:
            raise ConfigError(
                f"{how}: {name} sends '{array}', a statistic of the clients' samples that no noise covers; "
                "type strategy=fedavg or another method of the table in docs/privacy.md"
            )
        if privacy.central and set(kinds) & {"stack", "cat"}:
            raise ConfigError(
                f"{how}: {name} looks at single updates ('{array}'), but only sums are private; type privacy=local, or "
                "a method that averages"
            )
    if traits.public_values and _work_differs(config):
        named = ", ".join(sorted(traits.public_values))
        raise ConfigError(
            f"{how}: {name} sends {named} in plain, which says how many samples a client has unless all do the same "
            "work; add client.steps=10, without client.min_epochs and client.classes"
        )


def _check_clips(method: StrategyLike, privacy: Privacy) -> None:
    """Refuse bounds of vectors that there are none of."""
    sent = [n for n in fold_kinds(fold_of(method)) if n not in statistics_of(method)]
    for name in privacy.clips or ():
        if privacy.level == "record":
            raise ConfigError(
                f"privacy.clips.{name}: under privacy=record gradients of samples are clipped, by privacy.clip; leave "
                "privacy.clips out"
            )
        if sent and name not in sent:
            raise ConfigError(
                f"privacy.clips.{name}: {type(method).__name__} sends no vector '{name}'; it sends {', '.join(sent)}"
            )


def _check_looks(config: DictConfig, privacy: Privacy) -> None:
    """Refuse what else looks at samples before or beside the rounds, without noise."""
    how, rule = f"privacy={privacy.level}", part(config.sampling, "sampling")
    if rule.remembers and not privacy.central:  # which knows few rules anyway: see ``budgeting.mechanism_of``
        raise ConfigError(
            f"sampling={type(rule).__name__}: clients are chosen by losses on their samples, which no noise covers; "
            f"with {how} type sampling=uniform or sampling=round_robin"
        )
    if (agreed := agreement.of(config)) is not None and agreed.pooled:
        raise ConfigError(
            "data.contract.normalize=agreed: clients send sums and squares of their samples, which no noise covers; "
            f"with {how} give constants: data.contract.normalize={{mean: [...], std: [...]}}"
        )


def _work_differs(config: DictConfig) -> bool:
    client = config.client
    return client.steps is None or client.min_epochs is not None or client.classes is not None


def _check_central(method: StrategyLike, config: DictConfig, privacy: Privacy, given_cohorts: bool) -> None:
    name, traits = type(method).__name__, method.traits
    if rule := other_rule(method):
        raise ConfigError(
            f"aggregator: privacy=client needs the mean; what one client can do to {rule} is not known. Leave "
            "aggregator out, or type privacy=local"
        )
    if traits.asynchronous:
        raise ConfigError(f"privacy=client: {name} uses updates one by one as they come; type privacy=local")
    if traits.peers:
        raise ConfigError(
            f"privacy=client: peers of {name} see each other's updates, there is no trusted server; type privacy=local"
        )
    if traits.meets_all_clients:
        raise ConfigError(
            f"privacy=client: {name} asks every client once, whatever the sampling: nothing is hidden by chance. "
            "Choose a method of the table in docs/privacy.md"
        )
    if config.system and config.system.get("over_selection", 1) != 1:
        raise ConfigError(
            f"system.over_selection={config.system.over_selection}: who is slow would be left out for who is fast, "
            "which depends on what clients do; with privacy=client leave it at 1"
        )
    if given_cohorts and config.participation == "bernoulli":
        raise ConfigError(
            "cohorts: given ones are no coins; with privacy=client leave participation at fixed"
        )
    if privacy.cap is not None and config.participation != "bernoulli":
        raise ConfigError(f"privacy.cap={privacy.cap}: caps a bernoulli cohort; add participation=bernoulli")
    if privacy.distributed:
        _check_shares(config, privacy)
    _check_budget(config, privacy, given_cohorts)


def _check_shares(config: DictConfig, privacy: Privacy) -> None:
    """Refuse shares of the noise that somebody could see, or that would be too few."""
    key, m = "privacy.where=distributed", int(config.clients_per_round)
    if not config.get("secagg"):
        raise ConfigError(
            f"{key}: a share of the noise hides no single update; type secagg=masks, by which only the sum is seen"
        )
    if config.secagg.get("neighbours") is not None:
        raise ConfigError(
            f"{key}: with secagg.neighbours sums of fewer clients than privacy.least could be unmasked; leave "
            "secagg.neighbours out"
        )
    if config.participation == "bernoulli":
        raise ConfigError(
            f"{key}: in a small cohort of coins the shares would be too few; type participation=fixed, or "
            "privacy.where=server"
        )
    if privacy.least is not None and not m / 2 < privacy.least <= m:
        raise ConfigError(
            f"privacy.least={privacy.least}: must be more than half of the clients of a round, and at most all {m}"
        )
    log.warning(
        "%s: no accountant here knows the sum of rounded Gaussians, so epsilon is that of one Gaussian and rows say "
        "epsilon_valid: false",
        key,
    )


def _check_budget(config: DictConfig, privacy: Privacy, given_cohorts: bool) -> None:
    """Refuse a budget that not even one round fits, or an accountant that does not know the cohort."""
    assert privacy.delta is not None
    z = privacy.multiplier
    mechanism = budgeting.mechanism_of(config, privacy, z, given_cohorts)
    if mechanism.event == "fixed" and not privacy.assume_poisson:
        log.warning(
            "privacy=client: cohorts of fixed size are not accounted as coins are. participation=bernoulli costs "
            "nothing and gives the smaller epsilon"
        )
    if privacy.adapts:
        given = privacy.adaptive.noise
        z_delta(z, config.clients_per_round / 20 if given is None else given)
    if (
        privacy.epsilon_max is None
        or mechanism.epsilon(1, privacy.delta, privacy.accountant)[0] <= privacy.epsilon_max
    ):
        return
    enough = replaced_noise(config, privacy, given_cohorts)
    raise ConfigError(
        f"privacy.epsilon_max={privacy.epsilon_max}: not even round 1 fits with z={z:g}; rounds={config.rounds} would "
        f"need privacy.z={enough:.4f}"
    )


def replaced_noise(config: DictConfig, privacy: Privacy, given_cohorts: bool = False) -> float:
    """z by which all rounds fit into ``privacy.epsilon_max``."""
    assert privacy.epsilon_max is not None and privacy.delta is not None
    mechanism = budgeting.mechanism_of(config, privacy, 1.0, given_cohorts)
    if mechanism.sensitivity is not None:
        return mechanism.sensitivity * gaussian_noise(privacy.epsilon_max, privacy.delta)
    return mechanism.noise_for(privacy.epsilon_max, config.rounds, privacy.delta, privacy.accountant)


def _check_records(method: StrategyLike, config: DictConfig, privacy: Privacy) -> None:
    """Refuse local rules that look at samples in another way than by a gradient of each."""
    if not (isinstance(method.client, SaysHowItLooks) and method.client.grad_only):
        name = type(method).__name__
        raise ConfigError(
            f"privacy=record: clients of {name} look at their samples by more than the gradient of each one's loss, "
            "which no noise covers, or do not say that they don't; type strategy=fedavg, fedprox, scaffold or another "
            f"of the table in docs/privacy.md. A class of your own ({type(method.client).__name__}) that takes samples "
            "by job.grad and job.descend alone says so by grad_only = True"
        )
    if privacy.epsilon is not None and config.engine.name == "flower":
        raise ConfigError(
            "privacy.epsilon: with privacy=record the noise hangs on how many samples clients have, which the server "
            "of a deployment does not set; type privacy.z"
        )
    if config.client.accumulate > 1:
        raise ConfigError(
            f"client.accumulate={config.client.accumulate}: gradients are computed in micro-batches already; with "
            "privacy=record leave it at 1 and type privacy.micro"
        )
