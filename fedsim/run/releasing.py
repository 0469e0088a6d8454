"""The release of a run from its configuration: its parts, and the server's half."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fedsim.config.parts import part
from fedsim.config.schema import ClientConfig
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.exchange.account import Account
from fedsim.exchange.central import CentralNoise
from fedsim.exchange.compression import nonzero
from fedsim.exchange.correlated import column
from fedsim.exchange.landing import Landing
from fedsim.exchange.ledger import Ledger
from fedsim.exchange.payload import Payload
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.release import Release
from fedsim.exchange.secagg import default_threshold
from fedsim.exchange.spending import Spending
from fedsim.exchange.terms import Terms
from fedsim.local.kept import LocalPart
from fedsim.run import budgeting
from fedsim.run.budgeting import events, most_turns, rates, record_noise
from fedsim.server.traits import ClientQuestion, JudgesUpdates, StrategyLike, parts_of, statistics_of
from fedsim.task.losses import WholeLoss

if TYPE_CHECKING:
    from fedsim.engine.assignments import Plan
    from fedsim.server.context import Context

log = logging.getLogger(__name__)


def release(
    config: DictConfig, method: StrategyLike, local: ClientConfig, data: FederatedData
) -> Release | None:
    """What is done to updates before they leave; None where all three groups are none, and the method's vectors are not
    ``sparse``."""
    privacy, compression, secure = (_built(config, name) for name in ("privacy", "compression", "secagg"))
    if method.traits.sparse and privacy is None and compression is None and secure is None:
        compression = nonzero()
    if privacy is None and compression is None and secure is None:
        return None
    if privacy is not None and privacy.noise == "auto":
        privacy = replace(privacy, noise="os" if deployed(config) else "keyed")
    if privacy is not None and privacy.level == "record" and privacy.epsilon is not None:
        z = record_noise(
            privacy, most_turns(config), events(local, data.shards.sizes), rates(local, data.shards.sizes)
        )
        privacy = replace(privacy, found=z)
    if secure is not None:
        most = None if privacy is None else privacy.cap
        everybody = coins(config) or method.traits.meets_all_clients
        most = secure.most or most or (config.num_clients if everybody else config.clients_per_round)
        secure = replace(secure, most=most, hides=secure.masks and not alike(method))
        if privacy is not None and privacy.distributed:
            least = privacy.least or default_threshold(config.clients_per_round)
            privacy = replace(privacy, least=least)
            secure = replace(secure, threshold=max(least, secure.threshold or 0), firm=True)
    statistics = statistics_of(method)
    traits = method.traits
    return Release(privacy, compression, secure, statistics, traits.public_values, traits.counted)


def alike(method: StrategyLike) -> bool:
    """Whether all updates are known to weigh the same: then weights say nothing."""
    said = [vars(one)["weighting"] for one in parts_of(method) if "weighting" in vars(one)]
    return bool(said) and set(said) == {"uniform"}


def coins(config: DictConfig) -> bool:
    """Whether cohorts have no fixed size, or the method asks others too."""
    return bool(config.participation == "bernoulli" or config.system)


def deployed(config: DictConfig) -> bool:
    """Whether clients are real."""
    return bool(config.engine.name == "flower")


def _check_records(context: Context) -> None:
    """Refuse what gradients of single samples cannot be taken of."""
    if context.layout.batch_norm:
        raise ConfigError(
            "privacy=record: BatchNorm mixes the samples of a batch, so no noise on single gradients hides one; type a "
            "model without it (model.norm=group)"
        )
    if type(context.task.loss) is WholeLoss or context.task.forward is not None:
        raise ConfigError(
            "privacy=record: forward= or a loss (model, batch) calls the model by itself, so samples' gradients cannot "
            "be told apart; put it into the model's forward pass, and give loss(output, y)"
        )


def landing(
    config: DictConfig,
    work: Plan,
    context: Context,
    method: StrategyLike,
    folder: Path,
    cohorts: bool = False,
) -> Landing | None:
    """The server's half, if there is a release; ``cohorts``: they were handed over."""
    if work.release is None:
        return None
    privacy = work.release.privacy
    stays = LocalPart.of(work.buffers, context.layout, work.client.keeps(context.layout)).spans
    terms = Terms(
        seed=config.seed,
        layout=context.layout,
        dtype=work.dtype,
        cohort=float(config.clients_per_round),
        stays=stays,
        deployed=deployed(config),
        heaviest=_heaviest(work, context, method),
    )
    _say_memory(config, work.release, context)
    _check_buffers(work.release, context)
    if privacy is None:
        return Landing(work.release, terms)
    keyed = privacy.noise == "keyed"
    if keyed and deployed(config):
        log.warning(
            "privacy.noise=keyed: whoever knows the seed can take the noise off again: it protects nobody here; "
            "leave privacy.noise at auto"
        )
    terms, ledger = replace(terms, keyed=keyed), Ledger(folder, keyed)
    if privacy.central:
        if work.release.secure is not None:
            log.info(
                "secagg: the server sees no single update, so it cannot tell one that is longer than privacy.clip"
            )
        terms = replace(terms, **_central(config, privacy, cohorts))
        correlated = _correlated(config, privacy)
        central = CentralNoise(privacy, config.seed, terms.cohort, keyed, **correlated, rounds=config.rounds)
        return Landing(work.release, terms, Account(privacy, terms, ledger), central)
    if privacy.local:
        return _spending(Landing(work.release, terms, spending=Spending(privacy, ledger=ledger)), privacy)
    _check_records(context)
    about = rates(work.local, context.sizes), events(work.local, context.sizes)
    return _spending(Landing(work.release, terms, spending=Spending(privacy, *about, ledger)), privacy)


def _check_buffers(release: Release, context: Context) -> None:
    """Refuse running statistics that would leave clients in the clear."""
    if not (context.share_buffers and context.layout.buffer_dim):
        return
    if release.secure is not None:
        raise ConfigError(
            "buffers=average: running statistics of BatchNorm would pass unmasked; with secagg type buffers=local, or "
            "a model without them (model.norm=group)"
        )
    if release.privacy is not None and release.privacy.level != "record":
        raise ConfigError(
            f"buffers=average: running statistics of BatchNorm leave clients without noise; with "
            f"privacy={release.privacy.level} type buffers=local, or a model without them (model.norm=group)"
        )


def _heaviest(work: Plan, context: Context, method: StrategyLike) -> float:
    """The most that a client can weigh in a mean."""
    others = 0 if context.unlabelled is None else context.unlabelled
    samples = max(1.0, float((context.sizes + others).max()))
    if not isinstance(method, JudgesUpdates):
        return samples
    kinds = (work.local,) if work.kinds is None else work.kinds.settings
    asked = [ClientQuestion(0, "fit", Payload(), samples, local, 0) for local in kinds]
    return max(map(method.most_weight, asked))


def _spending(made: Landing, privacy: Privacy) -> Landing:
    """The same, unless not even round 1 fits the budget."""
    if made.spent(1):
        raise ConfigError(
            f"privacy.epsilon_max={privacy.most}: not even round 1 fits with z={privacy.multiplier:g}; type a "
            "larger privacy.z"
        )
    return made


def _correlated(config: DictConfig, privacy: Privacy) -> dict[str, Any]:
    """Of noise that is correlated over rounds, what ``CentralNoise`` takes."""
    apart = budgeting.apart(config, privacy)
    if privacy.mechanism == "banded":
        return {"column": tuple(column(config.rounds, apart)[:apart].tolist())}
    return {"epoch": apart} if privacy.mechanism == "tree" else {}


def _say_memory(config: DictConfig, release: Release, context: Context) -> None:
    """How much error feedback keeps: a vector for each client seen, in memory up to checkpoint.memory_mb."""
    codec = release.compression
    if codec is not None and codec.feedback:
        size = config.num_clients * context.layout.size * context.dtype.itemsize / 2**20
        log.info(
            "compression.feedback: residuals of up to %d clients take %.1f MB a vector",
            config.num_clients,
            size,
        )


def _central(config: DictConfig, privacy: Privacy, cohorts: bool) -> dict[str, Any]:
    """What the server's half must know of noise that is added to sums."""
    mechanism = budgeting.mechanism_of(config, privacy, privacy.multiplier, cohorts)
    apart = budgeting.apart(config, privacy)
    out: dict[str, Any] = {"mechanism": mechanism, "apart": apart, "rounds": config.rounds}
    slow = privacy.accountant == "pld" or mechanism.event == "truncated"
    if privacy.epsilon_max is not None and slow and mechanism.sensitivity is None:
        assert privacy.delta is not None
        out["affords"] = mechanism.affordable(privacy.epsilon_max, config.rounds, privacy.delta, "pld")
    return out


def _built(config: DictConfig, name: str) -> Any:
    return part(config[name], name) if config.get(name) else None
