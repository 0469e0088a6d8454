"""Clients' models that were asked for once, on disk: by run, and by all that they depend on.

``uploads/`` of a run folder holds ``<client>.safetensors`` (parameters and statistics by name) and ``uploads.json``
with a line per client. ``out/uploads/<key>/`` holds the same for every run that would ask for the same models: the
files of a run are links to these, so that they stay when one of both goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
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
from fedsim.data.shards import Stated
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Outcome
from fedsim.local.kinds import models
from fedsim.run.given import Given
from fedsim.run.key import run_dir, version
from fedsim.run.provenance import data_hash
from fedsim.run.uploadfiles import FOLDER, INDEX, folder_of, link, measures, rest_hash
from fedsim.run.weightstore import alone
from fedsim.server.context import Context
from fedsim.server.depot import MEASURED, Upload, Uploads, plain_outcome
from fedsim.server.traits import StrategyLike
from fedsim.task.vectors import Weights

log = logging.getLogger(__name__)

FORMAT = 1  # raise when the same settings come to other models
BROKEN = (LookupError, TypeError, RecursionError, json.JSONDecodeError)  # of an index that somebody changed
OF_THE_SERVER = (  # settings that clients' models do not depend on; what evaluation sets apart is in the shards
    *("strategy", "aggregator", "rounds", "clients_per_round", "evaluation", "code", "sampling", "topology"),
    *("encoder", "embed", "partition", "pretrain", "num_clients", "exclude", "exclude_samples", "audit"),
)


class UploadStore:
    """The uploads of one run."""

    def __init__(
        self, config: DictConfig, given: Given, method: StrategyLike, data: FederatedData, context: Context
    ):
        """``context``: of the run, which knows the model that each client starts from."""
        self._config, self._given, self._method = config, given, method
        self._data, self._context = data, context
        self._own = run_dir(config) / FOLDER
        asked = method.traits.uploads
        self._named = None if asked in (None, "auto") else folder_of(Path(str(asked)))
        self._read: Uploads | None = None

    @property
    def own_tests(self) -> bool:
        """See ``Depot``."""
        data = self._data
        return data.own_domain or data.holdout is not None or data.local_test is not None

    def facts(self, client: int) -> Mapping[str, Any]:
        """Architecture, hash of the split (of samples that lie with the nodes of a deployment ``None``) and, of labels
        that are classes, how many samples each class has; where clients train several architectures also the client's
        class and a digest of its model's settings."""
        data, shards, context = self._data, self._data.shards, self._context
        name, _ = self._architectures[context.architecture_of(client)]
        if isinstance(shards, Stated):
            said = {"class_counts": shards.held[client].tolist()} if data.all_counts() is not None else {}
            return {"architecture": name, "split": None, **said}
        split = hashlib.sha256(shards.part(client).astype("<i8").tobytes()).hexdigest()
        found: dict[str, Any] = {"architecture": name, "split": split}
        if context.others and context.kinds is not None:
            found |= {"class": int(context.kinds.member[client]), "model": self._settings(client)}
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

    def read(self, cohort: Sequence[int] = (), *, own: bool = False) -> Uploads | None:
        """See ``Depot``."""
        if self._read is None:
            named = self._named is not None and not own
            place = self._own if own else self._named or self._shared
            found = self._found(place, wanted=named)
            if found is not None and found.lost and place is self._shared:
                log.warning("%s: clients failed when these models were made; asked for again", place)
                found = None
            if found is not None and place is self._shared:
                log.info(
                    "clients' models are those of %s, where another run of these settings left them", place
                )
            if found is None or own or named or {o.client for o in found.outcomes} == set(cohort):
                self._read = found
        return self._read

    def write(self, uploads: Uploads, *, share: bool = False, found: bool = False) -> None:
        """See ``Depot``."""
        self._read = uploads
        if share:
            self._write(self._shared, uploads)
        if share or found:
            link(self._named or self._shared, self._own)
        else:
            self._write(self._own, uploads)

    @cached_property
    def _architectures(self) -> list[tuple[str, str]]:
        """Name, and digest of the settings, of each model that clients train, by its number."""
        values, given = plain(self._config), self._given.model
        out = []
        for node in (values["model"], *models(values["client"]["classes"])):
            text = json.dumps(node, sort_keys=True, default=str)
            name = str(node.get("_target_", "")).rpartition(".")[2]
            out.append((name, hashlib.sha256(text.encode()).hexdigest()[:16]))
        if given is not None:
            out[0] = getattr(given, "__name__", type(given).__name__), out[0][1]
        return out

    def _settings(self, client: int) -> str | None:
        """Digest of the settings of the client's model; ``None`` where all clients train one."""
        number = self._context.architecture_of(client)
        return self._architectures[number][1] if self._context.others else None

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
        free = () if 0 in self._context.trained else ("model",)  # which no client trains
        return {
            **{k: v for k, v in values.items() if k not in (*OF_THE_SERVER, *free)},
            "data": source,
            "client_code": digest("client", self._method.client),
            "own_code": {k: v for k, v in (values.get("code") or {}).items() if not k.startswith("strategy")},
            "handed": mark,
            "start": self._starts(),
            "samples": data_hash(data.dataset),
            "augment": None if data.dataset.augment is None else digest("data.augment", data.dataset.augment),
            "normalize": str(data.dataset.normalize),
            "shards": data.shards.hash(),
            "own": [*(None if s is None else s.hash() for s in (data.holdout, held)), *self._tests()],
            "absent": sorted(data.roles.absent),
            "fedsim": version(),
            "format": FORMAT,
        }

    def _tests(self) -> list[str]:
        """Which test samples are clients' own beside those held out, by which their models are measured."""
        data = self._data
        if data.local_test is not None:
            return [data.local_test.hash()]
        return ["domain"] if data.own_domain else []

    def _starts(self) -> str | list[str]:
        """Hash of the model that clients start from, or of each."""
        every = [self._context.architecture(number) for number in self._context.trained]
        hashes = [one.start.hash(one.layout) for one in every]
        return hashes if self._context.others else hashes[0]

    def _found(self, folder: Path, wanted: bool) -> Uploads | None:
        """What lies in the folder; ``None`` if nothing was finished there, or, which is said, if it is damaged.

        Raises:
            ConfigError: if what was asked for by name is not there or does not fit.
        """
        try:
            index = json.loads((folder / INDEX).read_text())
            if wanted:
                self._check_clients(folder, index)
            models = [self._model(folder, line) for line in index["clients"]]
            outcomes = [Outcome(**o) for o in index["outcomes"]]
            lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in index["clients"]]
            found = Uploads(models, outcomes, lines, index.get("key") == self._shared.name)
            rest = rest_hash(index)
            if (found.hash, rest) != (index["uploads_hash"], index.get("rest_hash", rest)) or not models:
                raise ValueError(f"{INDEX} is not what was written, by its hash")
            return found
        except FileNotFoundError as error:
            if wanted:
                raise ConfigError(f"strategy.uploads: a model is missing ({error}); type auto") from error
            if (folder / INDEX).is_file():
                log.warning("%s: models are missing; made again", folder)
        except (OSError, ValueError, SafetensorError, ConfigError, *BROKEN) as error:
            said = f"{INDEX} is not what was written ({error})" if isinstance(error, BROKEN) else str(error)
            if wanted:
                raise ConfigError(f"strategy.uploads: {folder} cannot be used here: {said}") from error
            log.warning("%s: cannot be read (%s); made again", folder, said)
        return None

    def _check_clients(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Refuse models of clients that this run has not; say that they come of another split, or other settings."""
        lines = index["clients"]
        clients = [int(line["client"]) for line in lines]
        if gone := sorted({*clients} - {*self._context.clients}):
            raise ConfigError(f"it holds the model of client {gone[0]}, who is not there in this run")
        others = [
            c for c, line in zip(clients, lines, strict=True) if line["split"] != self.facts(c)["split"]
        ]
        if others:
            log.warning(
                "strategy.uploads: %s: %d of %d models were trained on other samples than this run's split gives these "
                "clients (first: client %d), maybe on those that validate or test here",
                *(folder, len(others), len(clients), others[0]),
            )
        elif index.get("key") != self._shared.name:
            log.warning(
                "strategy.uploads: %s: trained under other settings of clients, samples, seed or code than this run's",
                folder,
            )

    def _model(self, folder: Path, line: Mapping[str, Any]) -> Upload:
        """The model of one line, if it is the one that was written, of the architecture that its client trains."""
        client = int(line["client"])
        path, number = folder / f"{client}.safetensors", self._context.architecture_of(client)
        if line.get("model") != self._settings(client):
            raise ValueError(
                f"the model of client {client} is {line['architecture']} of another class of clients"
            )
        layout, tensors = self._context.architecture(number).layout, load_file(path)
        dtypes = {t.dtype for t in tensors.values()}
        if len(dtypes) != 1:
            raise ValueError(f"{path.name} holds numbers of several types")
        dtype = dtypes.pop()
        weights = Weights(layout.flatten(tensors, dtype), layout.buffers.flatten(tensors, dtype))
        names = {*layout.named(weights.w), *layout.named_buffers(weights.buffers)}
        if weights.hash(layout) != line["sha256"] or names != tensors.keys():
            raise ValueError(f"{path.name} is not what was written, by its hash")
        identity = ("client", "sha256", "samples")
        facts = {k: v for k, v in line.items() if k not in (*identity, *MEASURED)}
        return Upload(client, weights, float(line["samples"]), facts, number, measures(line))

    def _write(self, folder: Path, uploads: Uploads) -> None:
        """The models, then in one piece the index, without which there is nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        for model in uploads.models:
            layout = self._context.architecture(model.architecture).layout
            held = layout.named(model.weights.w) | layout.named_buffers(model.weights.buffers)
            tensors = {k: v.detach().cpu().clone().contiguous() for k, v in held.items()}
            save_file(tensors, folder / f"{model.client}.safetensors")
        written = [{**line, **m.measured} for line, m in zip(uploads.lines, uploads.models, strict=True)]
        lines = ",\n".join(json.dumps(line, sort_keys=True) for line in written)
        answers = [json.dumps(plain_outcome(o), sort_keys=True, default=str) for o in uploads.outcomes]
        outcomes, key = ",\n".join(answers), self._shared.name
        rest = rest_hash({"key": key, "clients": written, "outcomes": [json.loads(a) for a in answers]})
        names = f'"uploads_hash": "{uploads.hash}",\n"key": "{key}",\n"rest_hash": "{rest}"'
        text = f'{{{names},\n"clients": [\n{lines}\n],\n"outcomes": [\n{outcomes}\n]}}\n'
        scratch = folder / f".{INDEX}.part"
        scratch.write_text(text)
        scratch.replace(folder / INDEX)
