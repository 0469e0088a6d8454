"""Settings that runs of before did not have: each new field of the schema, so that the keys of old runs stay known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Settings that runs of before did not have, dotted, and the value by which nothing changes
ADDED: Mapping[str, Any] = {
    "audit": {"canaries": 0, "kind": "random", "level": "sample", "guesses": 100},
    "audit.canaries": 0,
    "audit.kind": "random",
    "audit.level": "sample",
    "audit.guesses": 100,
    "client.accumulate": 1,
    "client.clip_pull": "whole",
    "client.decoupled": False,
    "client.groups": None,
    "client.nesterov": False,
    "client.round_schedule": None,
    "client.schedule": None,
    "checkpoint.keep": "last",
    "code": None,
    "compression": None,
    "data.contract": None,
    "data.labelled": dict.fromkeys(("at", "share", "count", "classes"))
    | {"per_class": True, "withhold": True},
    "data.labelled.withhold": True,
    "data.server": None,
    "engine.early": True,
    "engine.nodes": None,
    "engine.most_samples": 10_000_000,
    "engine.lanes": 0,
    "engine.tf32": False,
    "evaluation.client_validation": 0.0,
    "evaluation.fairness": False,
    "evaluation.held_out_clients": 0.0,
    "evaluation.held_out_steps": 0,
    "evaluation.local_unseen": "all",
    "evaluation.predictions": False,
    "evaluation.texts": 0,
    "evaluation.validation": 0.0,
    "exclude": [],
    "exclude_fill": "substitute",
    "exclude_samples": None,
    "failures.thin_round": "skip",
    "objective": {"metric": "accuracy", "on": None, "at": "mean:10", "direction": "auto", "clients": "mean"},
    "objective.metric": "accuracy",
    "objective.on": None,
    "objective.at": "mean:10",
    "objective.direction": "auto",
    "objective.clients": "mean",
    "task": {"_target_": "fedsim.task.problems.classification", "label_smoothing": 0.0, "metrics": None},
    "pretrain": None,
    "privacy": None,
    "secagg": None,
    "tracker.console.shows": "all",
    "tracker.update_hashes": False,
    "tracker.prometheus": None,
    "views": {
        "weak": {"_target_": "fedsim.data.views.Weak", "flip": 0.5, "padding": None, "visible": 0.25},
        "strong": {
            "_target_": "fedsim.data.views.Strong",
            "n": 2,
            "m": 10,
            "cutout": 0.5,
            "bilinear": False,
            "high": None,
            "visible": 0.25,
        },
    },
}
OF_ENGINES = {  # of these, settings of one engine only
    "engine.early": "ray",
    "engine.most_samples": "flower",
    "engine.nodes": "flower",
}
# Methods whose clients are pulled towards a point; under ``clip=direction`` 0.1.0 split every such pull
_PULLED = frozenset({
    "strategies.fedasync.FedAsync",
    "strategies.feddyn.FedDyn",
    "strategies.fedprox.FedProx",
    "strategies.fedspeed.FedSpeed",
})  # fmt: skip
# Methods whose weights are others since 0.1.0 (CHANGELOG.md), by the setting of clients that this hangs on
_OTHERWISE = {
    "strategies.ditto.Ditto": "clip_norm",
    "strategies.fedcm.FedCM": "momentum",
    "strategies.mofedsam.MoFedSAM": "momentum",
    "strategies.moon.Moon": "lr",  # always: what hangs on its model is not looked at
    "strategies.scaffold.Scaffold": "momentum",
}
# Options that runs of before did not have, by the class that takes them, and the value by which nothing changes
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fedsim.exchange.compression.random_k": {"shared": False},
    "fedsim.exchange.compression.rotate": {"shared": False},
    "fedsim.exchange.privacy.Privacy": {"where": "server", "least": None},
    "fedsim.data.huggingface.load": {"tokenizer": None, "length": 64},
    "strategies.cfl.CFL": {"confirm": True},
    "strategies.feddf.FedDF": {"students": "one", "early_stop": None},
    "strategies.fedmatch.FedMatch": {"sparse": None, "plateau": None},
    "strategies.fedproto.FedProto": {"pull": "samples"},
    "strategies.heterofl.HeteroFL": {"output_rows": "width"},
    "strategies.moon.Moon": {"contrast": "turn"},
    "strategies.parts.FedParts": {"new_client": "zero", "head": "average"},
}
# The same for options that are so common that keys of runs leave them out where they change nothing
SILENT: Mapping[str, Mapping[str, Any]] = {
    f"strategies.aggregators.{rule}": {"before": []}
    for rule in (
        "bulyan",
        "coordinate_median",
        "flag",
        "krum",
        "meamed",
        "mean",
        "multi_krum",
        "norm_clip",
        "phocas",
        "trimmed_mean",
    )
} | {"strategies.aggregators.geometric_median": {"before": [], "start": "mean"}}


def split_before(client: Mapping[str, Any], methods: Iterable[str]) -> bool:
    """Whether a run of before, with these settings of clients and classes of methods, meant ``clip_pull=split``."""
    clips = client.get("clip_norm") is not None and client.get("clip") == "direction"
    return clips and not _PULLED.isdisjoint(methods)


def computed_otherwise(client: Mapping[str, Any], methods: Iterable[str]) -> bool:
    """Whether 0.1.0 gave such a run other weights, so that its folder is no result of the run of today."""
    return any(client.get(_OTHERWISE[method]) for method in methods if method in _OTHERWISE)
