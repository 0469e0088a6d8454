"""A finished run's model as a file for other programs: a state dict, safetensors, ONNX, or a Hugging Face folder."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedsim.errors import ConfigError, check_choice, headline
from fedsim.models.split import spread
from fedsim.run import modelcard
from fedsim.run.modelcard import Card, is_kind
from fedsim.server.weightsfile import BEST
from fedsim.task import folding
from fedsim.task.standalone import tensors

SUFFIX = {"state_dict": ".pt", "safetensors": ".safetensors", "onnx": ".onnx", "hf": ""}
CARD = ".json"  # behind the file's name: classes, normalisation and the rest of model.json


class Exportable(Protocol):
    """What is needed of a :class:`fedsim.RunResult`."""

    dir: Path
    weights: dict[str, Tensor]
    summary: dict[str, Any]
    card: Card | None

    def model(self, client: int | None = None, *, at: str = "last", best: bool = False) -> nn.Module:
        """The trained model."""

    def best_weights(self) -> dict[str, Tensor]:
        """After the best round on validation data."""


def export(
    result: Exportable,
    to: str = "state_dict",
    *,
    client: int | None = None,
    best: bool = False,
    out: Path | None = None,
    force: bool = False,
    rank: int | None = None,
) -> Path:
    """Write the final global model, that of ``client``, or the ``best`` on validation data; gives the path written.

    ``out``: a file (for ``hf`` a folder), or a folder to put it into; by default ``export/`` in the run folder. Class
    names, normalisation and the input's shape lie beside it, in ``<file>.json`` (``hf``: ``fedsim.json``).

    ``rank``: for ``hf``, adapters of that rank in the place of those that were trained; where the base has changed too,
    ``hf`` without it writes the whole model with everything merged.

    Raises:
        ConfigError: what is wrong, or there already and not to be overwritten (``force``).
    """
    check_choice("--to", to, SUFFIX)
    if rank is not None and to != "hf":
        raise ConfigError(f"--rank {rank}: is of adapters; add --to hf")
    path = _place(result.dir, to, client, best, out)
    about_file = path / "fedsim.json" if to == "hf" else path.with_name(path.name + CARD)
    for there in (path, about_file):
        empty = to == "hf" and there.is_dir() and not any(there.iterdir())
        if there.exists() and not empty and not force:
            raise ConfigError(
                f"{there} exists; give --force (in Python force=True) to overwrite it, or another --out (out=)"
            )
    card = result.card
    write: Callable[[], None]
    more: dict[str, Any] = {}
    if to in ("state_dict", "safetensors"):
        state = _state(result, client, best)
        write = lambda: _save(state, path, to)  # noqa: E731
    else:
        model = result.model(client, best=best)
        if to == "hf":
            model, more = _plain_adapters(model, rank)
        write = (lambda: _onnx(model, card, path)) if to == "onnx" else (lambda: _hf(model, card, path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
        about = {"to": to, "client": client, "at": _at(result, best), **more, **dict(card or {})}
        if path.is_file():
            about["sha256"] = modelcard.sha256(path)
        about_file.write_text(json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}); give another --out"
        ) from error
    return path


def _place(folder: Path, to: str, client: int | None, best: bool, out: Path | None) -> Path:
    name = "model" + ("_best" if best else "") + ("" if client is None else f"_client{client}")
    name += "_hf" if to == "hf" else SUFFIX[to]
    if out is None:
        return folder / "export" / name
    return out / name if out.is_dir() and to != "hf" else out


def _at(result: Exportable, best: bool) -> dict[str, Any]:
    """Of which round the weights are."""
    if not best:
        return {"round": int(result.summary["rounds"])}
    with safe_open(result.dir / BEST, "pt") as file:
        return {"round": int((file.metadata() or {}).get("round", 0)), "best": "validation"}


def _state(result: Exportable, client: int | None, best: bool) -> Mapping[str, Tensor]:
    """All tensors of the model; the module is built only where the run's file does not hold them."""
    apart = result.card is not None and result.card["frozen"] == "apart"
    if client is None and not apart:
        return result.best_weights() if best else result.weights
    return tensors(result.model(client, best=best))


def _save(state: Mapping[str, Tensor], path: Path, to: str) -> None:
    plain = {k: v.detach().clone().contiguous() for k, v in state.items()}
    if to == "safetensors":
        save_file(plain, path)
    else:
        torch.save(plain, path)


def _onnx(model: nn.Module, card: Card | None, path: Path) -> None:
    """By ``torch.onnx``, with a free batch size; inputs that are a mapping keep their names."""
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ConfigError("--to onnx: needs onnx and onnxscript; type: pip install 'fedsim-lab[export]'")
    if card is None:
        raise ConfigError(
            "--to onnx: this run is of before model.json, so its input is not known; run it again"
        )
    import onnx

    example, tree = modelcard.example(card), card["input"]
    named = example if isinstance(tree, dict) and not is_kind(tree) else {}
    several = isinstance(example, tuple) and (spread(model, example) or spread(model, list(example)))
    args = () if named else example if several else (example,)
    free = tree_map_only(Tensor, lambda _: {0: torch.export.Dim.DYNAMIC}, named or args)
    try:
        with warnings.catch_warnings(), _unsaid("torch.onnx"), _without_cache(model):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                args,
                path,
                kwargs=named,
                dynamo=True,
                dynamic_shapes=free,
                external_data=False,
                verbose=False,
            )
        _name_batch(path)
        onnx.checker.check_model(str(path))
    except OSError:
        raise
    except Exception as error:
        path.unlink(missing_ok=True)
        said = str(error.__cause__ or error)  # the exporter's own words are advice
        raise ConfigError(
            f"--to onnx: torch.onnx cannot express {type(model).__name__}: {headline(said)[:300]}; use "
            "--to safetensors"
        ) from error


def _name_batch(path: Path) -> None:
    """Call the free dimension ``batch``, wherever it is that of an input, an output or a value between."""
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if free and dim.dim_param == free:
                dim.dim_param = "batch"
    onnx.save(model, str(path))


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Models of transformers without the keys and values that they give beside their output, which are no tensors."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None or config is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextmanager
def _unsaid(name: str) -> Iterator[None]:
    """Without the warnings of a library's logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _plain_adapters(model: nn.Module, rank: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model as other programs can take it, and what was done to it."""
    if rank is not None:
        made, error = folding.lowered(model, rank)
        return made, {"adapter_rank": rank, "adapter_error": error}
    whole = folding.base_has_changed(model) or folding.several(model)
    return (folding.merged(model), {"merged": True}) if whole else (model, {})


def _hf(model: nn.Module, card: Card | None, path: Path) -> None:
    """By the library's own ``save_pretrained``: all of a transformers model, the adapters of a peft model."""
    saves = [m for m in (model, *model.children()) if callable(getattr(m, "save_pretrained", None))]
    whole = [m for m in saves if {id(p) for p in m.parameters()} == {id(p) for p in model.parameters()}]
    if not whole:
        raise ConfigError(
            f"--to hf: {type(model).__name__} has no save_pretrained, as models of transformers and peft have; use "
            "--to safetensors"
        )
    config, classes = getattr(whole[0], "config", None), list((card or {}).get("classes", ()))
    if classes and getattr(config, "num_labels", None) == len(classes):
        config.id2label = dict(enumerate(classes))  # type: ignore[union-attr]
        config.label2id = {name: i for i, name in enumerate(classes)}  # type: ignore[union-attr]
    names = list(getattr(whole[0], "active_adapters", ())) if hasattr(whole[0], "peft_config") else []
    whole[0].save_pretrained(path, **({"selected_adapters": names} if names else {}))  # type: ignore[operator]
    if names and (inner := path / names[0]).is_dir():  # where peft puts one that is not called "default"
        for file in inner.iterdir():
            file.replace(path / file.name)
        inner.rmdir()
