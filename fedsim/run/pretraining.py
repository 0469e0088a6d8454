"""Weights that a run starts from, trained in one place before it (group ``pretrain``): made once, then found again.

``out/pretrained/<key>/`` holds ``weights.safetensors`` and ``made.json``, which says by what they were made. The key
stands for all settings, code and samples that they depend on, so any run that wants the same finds them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedsim.config.code import digest
from fedsim.config.compose import plain
from fedsim.config.parts import as_dataclass, part
from fedsim.config.schema import ClientConfig, EmbedConfig
from fedsim.data.embedding import embedded
from fedsim.data.federated import FederatedData
from fedsim.data.local import batches_per_epoch
from fedsim.data.shards import Shards
from fedsim.data.views import configured
from fedsim.engine.base import pick_device
from fedsim.errors import ConfigError, returned
from fedsim.exchange.payload import Payload
from fedsim.local.job import Job
from fedsim.local.pretext import Pretext
from fedsim.rng import hash_tensors, key, seed_global
from fedsim.run import initial, samples, tasks
from fedsim.run.given import Given
from fedsim.run.key import version
from fedsim.run.preparation import learning_task
from fedsim.run.weightstore import Stored, alone, read, write
from fedsim.task.gradients import halve
from fedsim.task.task import Task
from fedsim.task.threads import threads
from fedsim.task.vectors import FlatModel, Weights

log = logging.getLogger(__name__)

FORMAT = 1  # raise when the same settings come to other weights
OF_THE_DRIVER = ("data", "seed", "training")  # options that are not those of the way of pretraining


def pretrained(
    config: DictConfig, given: Given, data: FederatedData, say: Callable[[str], None]
) -> tuple[Given, dict[str, Any]]:
    """``given`` with the pretrained weights to start from, and what a run's summary says of them; as it is without.

    ``say`` is told what is done. The same weights whatever engine runs afterwards.

    Raises:
        ConfigError: if the settings, the model or the samples cannot work.
    """
    if config.pretrain is None:
        return given, {}
    if given.initial is not None:
        raise ConfigError(
            "initial: pretrain says as well where the run starts; leave it out, or type pretrain=none"
        )
    shadow = _settings(config)
    source, kind = _source(config, shadow, given, data)
    if not int(source.shards.sizes[0]):
        raise ConfigError(
            "pretrain: there are no samples here to train on; give some by +data@pretrain.data=OPTION"
        )
    task = learning_task(shadow, replace(given, clients=None, data=None, test=None), source)
    what = _what(shadow, given, source)
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.out) / "pretrained" / name
    with alone(folder, say):
        found = read(folder)
        if found is None:
            say(f"pretraining: {folder}")
            found = _make(shadow, task, source)
            found.made.update({"key": name, "made_of": what, "samples_are": kind})
            write(folder, found)
        else:
            say(f"pretrained weights: {folder}")
    start = _beginning(config, given, data, found)
    return replace(given, initial=start), {"pretrained": name}


def _settings(config: DictConfig) -> DictConfig:
    """The run's settings as they count for pretraining: its own seed, and its own samples if it has such."""
    node = config.pretrain
    for name in OF_THE_DRIVER:
        if name not in node:
            raise ConfigError(f"pretrain.{name}: has no value; add it as in conf/pretrain/central.yaml")
    training = node.training
    if training.lr_decay != 1 or training.classes is not None:
        raise ConfigError(
            "pretrain.training: there are no rounds and no clients; leave lr_decay at 1 and classes out"
        )
    if training.get("round_schedule") is not None:
        raise ConfigError(
            "pretrain.training.round_schedule: there are no rounds; type pretrain.training.schedule"
        )
    if node.seed is not None and (not isinstance(node.seed, int) or node.seed < 0):
        raise ConfigError(
            f"pretrain.seed={node.seed}: must be a whole number from 0; null follows the run's seed"
        )
    shadow = copy.deepcopy(config)
    shadow.seed = config.seed if node.seed is None else node.seed
    if node.data is not None:
        shadow.data = node.data
    return shadow


def _source(
    config: DictConfig, shadow: DictConfig, given: Given, data: FederatedData
) -> tuple[FederatedData, str]:
    """All samples as those of one client, and what they are."""
    if config.pretrain.data is None and (own := data.roles.server) is not None:
        mine = data.dataset
        if own.samples is not None:
            mine = replace(mine, train=own.samples, normalize=own.normalize, augment=own.augment)
        return FederatedData(mine, Shards.of([own.rows.numpy()])), "the server's own samples"
    if config.pretrain.data is None:
        if data.num_clients > 1:
            log.warning(
                "pretrain: without pretrain.data the training samples of all clients are put together in one place, "
                "which a federation could not do: a leak, for comparison only; "
                "+data@pretrain.data=OPTION names other samples"
            )
        return data.pooled(), "the clients' own training samples, pooled"
    found = samples.dataset(shadow, given.model, own_loss=tasks.problem(config, given).raw)
    if config.encoder:
        device = pick_device(config.engine.device)
        found = embedded(found, config.encoder, as_dataclass(config.embed, EmbedConfig), device)
    every = torch.arange(len(found.train)).numpy()
    return FederatedData(found, Shards.of([every])), "pretrain.data"


def _what(shadow: DictConfig, given: Given, source: FederatedData) -> dict[str, Any]:
    """All that the weights depend on."""
    values = plain(shadow)
    sections = ("model", "views", "encoder", "embed", "task")
    facts = {k: values[k] for k in sections if values.get(k) is not None}
    if given.model is not None:
        facts["model"] = digest("model", given.model)
    for name in ("loss", "forward"):
        if (own := getattr(given, name)) is not None:
            facts[name] = digest(name, own)
    code = {k: v for k, v in (values.get("code") or {}).items() if k.split(".")[0] in (*sections, "pretrain")}
    augment = source.dataset.augment
    return {
        **facts,
        "pretrain": {k: v for k, v in values["pretrain"].items() if k not in ("data", "seed")},
        "code": code,
        "seed": shadow.seed,
        "dtype": shadow.dtype,
        "threads": shadow.engine.threads,
        "device": pick_device(shadow.engine.device),
        "samples": _content(source, initial.DTYPES[shadow.dtype]),
        "augment": None if augment is None else digest("data.augment", augment),
        "fedsim": version(),
        "format": FORMAT,
    }


def _content(source: FederatedData, dtype: torch.dtype) -> str:
    """Sha256 of the samples as a model gets them."""
    data = source.client(0, dtype)
    blocks = torch.split(torch.arange(len(data)), 4096)
    hashed = (hash_tensors(tree_leaves(tuple(data.read(rows)))) for rows in blocks)
    return hashlib.sha256("".join(hashed).encode()).hexdigest()


def _make(shadow: DictConfig, task: Task, source: FederatedData) -> Stored:
    """Train."""
    began, node = time.time(), shadow.pretrain
    rule: Pretext = part(OmegaConf.create({k: node[k] for k in node if k not in OF_THE_DRIVER}), "pretrain")
    training = as_dataclass(node.training, ClientConfig)
    device, dtype = pick_device(shadow.engine.device), initial.DTYPES[shadow.dtype]
    with threads(shadow.engine.threads):
        seed_global(key(shadow.seed, "pretrain"))
        model = copy.deepcopy(task.model).to(dtype)
        network = rule.network(model, task.example)
        flat = FlatModel(network, dtype, device, loss=task.loss)
        halve(flat, training.autocast)
        job = Job(
            client=0,
            round=0,
            task=replace(task, model=network),
            model=flat,
            local=training,
            seed=shadow.seed,
            message=Payload({"w": flat.w.clone(), "buffers": flat.buffers.clone()}),
            state={},
            source=source.to(device),
            purpose="pretrain",
            views=configured(shadow.views),
        )
        w = rule.fit(job)
    if not isinstance(w, torch.Tensor) or w.shape != flat.w.shape:
        expected = f"the trained vector, a tensor of shape {tuple(flat.w.shape)}"
        raise ConfigError(f"pretrain: {returned(rule, 'fit', w, expected)}")
    if not bool(torch.isfinite(w).all()):
        raise ConfigError(
            f"pretrain: the weights are not finite after {job.steps} steps; give a smaller pretrain.training.lr"
        )
    untrained = {s.name for s in flat.layout.params if _within(s.span, flat.idle)}
    within = next(name for name, m in network.named_modules() if m is model)
    prefix = f"{within}." if within else ""
    state = {k: v.cpu().contiguous() for k, v in flat.state_dict(Weights(w, flat.buffers)).items()}
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and k not in untrained}
    losses = [float(loss) for loss in job.meter.losses]
    each = batches_per_epoch(len(job.data), training.batch_size, 2 if flat.layout.batch_norm else 1)
    epochs = [losses[i : i + each] for i in range(0, len(losses), max(1, each))]
    made = {
        "losses": [sum(epoch) / len(epoch) for epoch in epochs],
        "samples": len(job.data),
        "classes": source.dataset.num_classes,
        "steps": job.steps,
        "untrained": sorted(name.removeprefix(prefix) for name in untrained),
        "seconds": time.time() - began,
    }
    return Stored(own, made)


def _within(span: slice, spans: tuple[slice, ...]) -> bool:
    return any(s.start <= span.start and span.stop <= s.stop for s in spans)


def _beginning(config: DictConfig, given: Given, data: FederatedData, found: Stored) -> Mapping[str, Tensor]:
    """The state that the run starts from: pretrained, as it was drawn for this run where there is nothing of the kind.

    A layer whose rows are classes does not fit a run with another number of classes, and is left as drawn.
    """
    model = initial.model(config, data.dataset, given.model)
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    there, here = int(found.made["classes"]), data.dataset.num_classes
    left = [name for name in own if name not in found.state]
    for name, value in found.state.items():
        if name not in own:
            raise ConfigError(f"pretrain: its samples make a model with '{name}', which the run's has not")
        wanted, shape = tuple(own[name].shape), tuple(value.shape)
        if shape == wanted:
            own[name] = value
        elif shape[:1] == (there,) and wanted[:1] == (here,) and shape[1:] == wanted[1:]:
            left.append(name)
        else:
            raise ConfigError(
                f"pretrain: '{name}' is {shape} for the samples of pretrain.data, and {wanted} for the run's; "
                "give samples of one shape to both"
            )
    if left:
        log.info("pretrain: as drawn, not pretrained: %s", ", ".join(left))
    return own
