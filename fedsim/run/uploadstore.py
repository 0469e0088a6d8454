"""Clients' models that were asked for once, on disk: by run, and by all that they depend on.

``uploads/`` of a run folder holds ``<client>.safetensors`` (parameters and statistics by name) and ``uploads.json``
with a line per client. ``out/uploads/<key>/`` holds the same for every run that would ask for the same models: the
files of a run are links to these, so that they stay when one of both goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedsim.config.code import digest
from fedsim.config.compose import plain
from fedsim.config.roles import telling
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Outcome
from fedsim.run.given import Given
from fedsim.run.key import run_dir, version
from fedsim.run.provenance import data_hash
from fedsim.run.weightstore import alone
from fedsim.server.depot import Upload, Uploads, told
from fedsim.server.traits import StrategyLike
from fedsim.task.layout import Layout
from fedsim.task.vectors import Weights

log = logging.getLogger(__name__)

FORMAT = 1  # raise when the same settings come to other models
INDEX, FOLDER = "uploads.json", "uploads"
OF_THE_SERVER = (  # settings that clients' models do not depend on; what evaluation sets apart is in the shards
    *("strategy", "aggregator", "rounds", "clients_per_round", "evaluation", "code", "sampling", "topology"),
    *("encoder", "embed", "partition", "pretrain", "num_clients", "exclude", "exclude_samples", "audit"),
)


class UploadStore:
    """The uploads of one run."""

    def __init__(
        self, config: DictConfig, given: Given, method: StrategyLike, data: FederatedData, start: str
    ):
        """``start``: hash of the model that clients start from."""
        self._config, self._given, self._method = config, given, method
        self._data, self._start = data, start
        self._own = run_dir(config) / FOLDER
        asked = method.traits.uploads
        self._named = None if asked in (None, "auto") else _folder(Path(str(asked)))
        self._read: Uploads | None = None

    def facts(self, client: int) -> Mapping[str, Any]:
        """Architecture, hash of the split and, of labels that are classes, how many samples each class has."""
        data, rows = self._data, self._data.shards.part(client)
        split = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        found: dict[str, Any] = {"architecture": self._architecture, "split": split}
        if data.dataset.class_labels() is not None:
            found["class_counts"] = data.class_counts(client).tolist()
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See ``Depot``."""
        if self._named is not None:
            yield
            return
        with alone(self._shared, log.info):
            yield

    def read(self, layout: Layout, *, own: bool = False) -> Uploads | None:
        """See ``Depot``."""
        if self._read is None:
            places = (self._own,) if own else (self._named or self._shared,)
            found = (_read(place, layout, wanted=self._named is not None and not own) for place in places)
            self._read = next((f for f in found if f is not None), None)
        return self._read

    def write(self, uploads: Uploads, layout: Layout, *, share: bool = False, found: bool = False) -> None:
        """See ``Depot``."""
        self._read = uploads
        if share:
            _write(self._shared, uploads, layout)
        if share or found:
            _link(self._named or self._shared, self._own)
        else:
            _write(self._own, uploads, layout)

    @cached_property
    def _architecture(self) -> str:
        given, node = self._given.model, self._config.model
        if given is not None:
            return getattr(given, "__name__", type(given).__name__)
        return str(node.get("_target_", "")).rpartition(".")[2]

    @cached_property
    def _shared(self) -> Path:
        text = json.dumps(self._key(), sort_keys=True, default=str)
        return Path(self._config.out) / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]

    def _key(self) -> dict[str, Any]:
        """All that the models depend on."""
        values, data = telling(plain(self._config)), self._data
        mark = replace(self._given, strategy=None, cohorts=None, callbacks=()).fingerprint(alone=True)
        held = data.roles.client_validation
        source = {k: v for k, v in (values.get("data") or {}).items() if k != "server"}
        return {
            **{k: v for k, v in values.items() if k not in OF_THE_SERVER},
            "data": source,
            "client_code": digest("client", self._method.client),
            "own_code": {k: v for k, v in (values.get("code") or {}).items() if not k.startswith("strategy")},
            "handed": mark,
            "start": self._start,
            "samples": data_hash(data.dataset),
            "augment": None if data.dataset.augment is None else digest("data.augment", data.dataset.augment),
            "normalize": str(data.dataset.normalize),
            "shards": data.shards.hash(),
            "own": [None if s is None else s.hash() for s in (data.holdout, held)],
            "absent": sorted(data.roles.absent),
            "fedsim": version(),
            "format": FORMAT,
        }


def _folder(path: Path) -> Path:
    """The folder of uploads that ``path``, a run's or its own, stands for."""
    for place in (path, path / FOLDER):
        if (place / INDEX).is_file():
            return place
    raise ConfigError(
        f"strategy.uploads={path}: there is no {FOLDER}/{INDEX}; give the folder of a run of a one-shot method, or "
        "strategy.uploads=auto"
    )


def _read(folder: Path, layout: Layout, wanted: bool) -> Uploads | None:
    """What lies in the folder; ``None`` if nothing was finished there, or, which is said, if it is damaged.

    Raises:
        ConfigError: if what was asked for by name is not there or does not fit.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        models = [_model(folder, line, layout) for line in index["clients"]]
        found = Uploads(models, [Outcome(**o) for o in index["outcomes"]], index["clients"])
    except FileNotFoundError:
        if wanted or (folder / INDEX).is_file():
            log.warning("%s: models are missing; made again", folder)
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigError) as error:
        if wanted:
            raise ConfigError(f"strategy.uploads: {folder} cannot be used here: {error}") from error
        log.warning("%s: cannot be read (%s); made again", folder, error)
        return None
    return found


def _model(folder: Path, line: Mapping[str, Any], layout: Layout) -> Upload:
    """The model of one line, if it is the one that was written."""
    client = int(line["client"])
    path = folder / f"{client}.safetensors"
    tensors = load_file(path)
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1:
        raise ValueError(f"{path.name} holds numbers of several types")
    dtype = dtypes.pop()
    weights = Weights(layout.flatten(tensors, dtype), layout.buffers.flatten(tensors, dtype))
    if weights.hash(layout) != line["sha256"]:
        raise ValueError(f"{path.name} is not what was written, by its hash")
    told_apart = ("client", "sha256", "samples")
    return Upload(
        client, weights, float(line["samples"]), {k: v for k, v in line.items() if k not in told_apart}
    )


def _write(folder: Path, uploads: Uploads, layout: Layout) -> None:
    """The models, then in one piece the index, without which there is nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for model in uploads.models:
        held = layout.named(model.weights.w) | layout.named_buffers(model.weights.buffers)
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in held.items()}
        save_file(tensors, folder / f"{model.client}.safetensors")
    lines = ",\n".join(json.dumps(line, sort_keys=True) for line in uploads.lines)
    outcomes = ",\n".join(json.dumps(told(o), sort_keys=True, default=str) for o in uploads.outcomes)
    text = f'{{"uploads_hash": "{uploads.hash}",\n"clients": [\n{lines}\n],\n"outcomes": [\n{outcomes}\n]}}\n'
    scratch = folder / f".{INDEX}.part"
    scratch.write_text(text)
    scratch.replace(folder / INDEX)


def _link(source: Path, target: Path) -> None:
    """The files of ``source`` in ``target`` too: links, or copies where there can be none."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("*.safetensors"), target / INDEX):
        old.unlink(missing_ok=True)
    for path in (*sorted(source.glob("*.safetensors")), source / INDEX):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)
