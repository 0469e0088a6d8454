"""Whether a method can go with ``compression`` and ``secagg``, before anything starts."""

from __future__ import annotations

from omegaconf import DictConfig

from fedsim.config.parts import part
from fedsim.errors import ConfigError
from fedsim.exchange.compression import Compression
from fedsim.exchange.fold import fold_kinds
from fedsim.exchange.summing import SecureSums
from fedsim.run.needs import other_rule
from fedsim.server.traits import StrategyLike, fold_of, statistics_of


def check_sent(method: StrategyLike, config: DictConfig) -> None:
    """Refuse combinations that make no sense.

    Raises:
        ConfigError: naming the setting, why, and what to type.
    """
    traits, name = method.traits, type(method).__name__
    for group in ("compression", "secagg"):
        if config.get(group) and traits.pooled:
            raise ConfigError(
                f"{group}: {name} has all samples in one place: nothing is sent; leave {group} out"
            )
        if config.get(group) and traits.no_vectors:
            raise ConfigError(
                f"{group}: clients of {name} send slopes, a few bytes that are no vector of the model; leave {group} "
                "out"
            )
    if config.get("compression") and traits.peers:
        raise ConfigError(
            f"compression: peers of {name} send each other whole models over links of their own, which no codec "
            "shortens; leave compression out"
        )
    if config.get("compression"):
        _check_compression(method, config, part(config.compression, "compression"))
    if config.get("secagg"):
        _check_secure(method, config, part(config.secagg, "secagg"))


def _check_compression(method: StrategyLike, config: DictConfig, compression: Compression) -> None:
    privacy, fold = config.get("privacy"), fold_of(method)
    if compression.zstd and (privacy or config.get("secagg")):
        raise ConfigError(
            "compression.zstd=true: how short a compressed frame is tells about the samples, so it goes with neither "
            "privacy nor secagg; type compression.zstd=false"
        )
    if privacy and privacy.level == "local" and not compression.unbiased:
        raise ConfigError(
            "compression: under privacy=local noise comes first, and a codec that is biased would not average it out; "
            "type compression=qsgd, or random_k or rotate with their unbiased forms"
        )
    if compression.standing and method.traits.asynchronous:
        raise ConfigError(
            f"compression: {type(method).__name__} sends its model to one client at a time, so hardly two hold "
            "the same and differences would be as large as the model; type compression.down={codec: qsgd, levels: 127}"
        )
    if compression.feedback and len(method.traits.silent) > 1:
        raise ConfigError(
            f"compression: parts of the model take turns under {type(method).__name__}, so what was left out in one "
            "round belongs to another part in the next; type compression.feedback=false"
        )
    if "w" in fold and compression.takes("w") and compression.codec.shrinks:
        raise ConfigError(
            f"compression: {type(method).__name__} sends weights ('w'), not differences, and this codec would set most "
            "of them to zero; type compression=qsgd or rotate"
        )
    names = [n for n in fold if n not in statistics_of(method)]
    if fold and not names:
        raise ConfigError(
            f"compression: clients of {type(method).__name__} send statistics ({', '.join(fold)}), which would be none "
            "if some of them were left out; leave compression out"
        )
    for wanted in compression.only or ():
        if fold and wanted not in names:
            raise ConfigError(
                f"compression.only: {type(method).__name__} sends no vector '{wanted}'; it sends {', '.join(names)}"
            )


def _check_secure(method: StrategyLike, config: DictConfig, secure: SecureSums) -> None:
    name, traits, fold = type(method).__name__, method.traits, fold_of(method)
    _check_coded(config)
    if traits.asynchronous or traits.peers:
        raise ConfigError(
            f"secagg: {name} uses updates one by one, and a secure sum shows none; type strategy=fedavg, or secagg=none"
        )
    if traits.discloses and (fold or traits.meets_all_clients) and not traits.counted:
        raise ConfigError(f"secagg: {traits.discloses}")
    if rule := other_rule(method):
        raise ConfigError(
            f"aggregator: {rule} looks at single updates, and a secure sum shows none; "
            "leave aggregator out, or type secagg=none"
        )
    for array, kinds in fold_kinds(fold).items():
        if set(kinds) & {"stack", "cat"}:
            raise ConfigError(
                f"secagg: {name} looks at single updates ('{array}'), and a secure sum shows none; type "
                "strategy=fedavg or another method that averages"
            )
        if {"mean", "sum"} <= set(kinds) and vars(method).get("weighting") != "uniform":
            raise ConfigError(
                f"secagg: {name} needs '{array}' summed with weights and without, but only one sum is made; type "
                "strategy.weighting=uniform"
            )
        if array in statistics_of(method):
            raise ConfigError(
                f"secagg: {name} sends '{array}', a statistic of each client that would pass unmasked; type "
                "strategy=fedavg or another method that sends differences"
            )
    if secure.masks and traits.public_values and vars(method).get("weighting") != "uniform":
        raise ConfigError(
            f"secagg=masks: {name} reads what single clients weigh, which masks hide; type strategy.weighting=uniform, "
            "or secagg=ring, which hides nothing"
        )
    attack = config.get("attack")
    if attack and part(attack, "attack").omniscient:
        raise ConfigError(
            "attack: this one sees all honest updates, which nobody does under secagg; choose another attack"
        )
    privacy = config.get("privacy")
    if privacy and privacy.level == "local":
        raise ConfigError(
            "secagg: noise of privacy=local has no largest entry, so it would not fit the ring; type privacy=client"
        )
    if secure.reach is None and not (privacy and privacy.level == "client"):
        raise ConfigError(
            "secagg.reach is missing: the most that an entry of an update may be, where updates are not clipped. "
            "Larger entries saturate and are counted (saturated); add secagg.reach=1"
        )
    secure.check(config.clients_per_round)


def _check_coded(config: DictConfig) -> None:
    """Refuse codecs whose frames cannot be summed below masks."""
    if config.get("compression") and not part(config.compression, "compression").linear:
        raise ConfigError(
            "secagg: sums of residues are no sums of frames; a compressed update cannot be masked. Leave compression "
            "or secagg out, or type compression=random_k compression.shared=true (the same places for all clients), or "
            "compression=rotate compression.shared=true (one rotation, no codes)"
        )
    central = config.get("privacy") and config.privacy.level == "client"
    if config.get("compression") and not central and part(config.compression, "compression").flat_size(1):
        raise ConfigError(
            "compression=rotate: below secure sums it needs a bound of lengths, which says how large rotated entries "
            "are; type privacy=client, or leave compression out"
        )
