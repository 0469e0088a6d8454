"""Models of the library ``transformers``, from a configuration or a folder with weights, with adapters of ``peft``.

Nothing is fetched: the hub is switched off before the libraries are imported. What a model gives is the library's own
output object; its ``logits`` or ``loss`` are for the task to read. A tokenizer in the folder is the data's business.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError, check_choice, hint
from fedsim.models.lora import adapted

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>")  # names of that token, as the data look for them
FOLDER = "a folder with config.json and model.safetensors"


def hf(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    architecture: str | None,
    config: Mapping[str, Any] | None,
    path: str | None,
    lora: Mapping[str, Any] | None,
    freeze: Sequence[str] | None,
    dtype: str | None,
) -> nn.Module:
    """A model of ``transformers`` with weights of its own, drawn, or those of a folder.

    From the data come, unless ``config`` says them: ``num_labels`` of classifiers, ``vocab_size`` of language models,
    ``image_size`` and ``num_channels`` of image models that are drawn. Dropout is as the library has it, 0.1 in most.

    Args:
        input_shape: shape of one sample.
        num_classes: of the targets; 0: none.
        architecture: name of the class, e.g. ``GPT2LMHeadModel``; ``None``: the one that the folder's config names.
        config: fields of its configuration (``n_embd: 96``), over the folder's or the library's defaults.
        path: a folder with ``config.json`` and weights; ``None``: weights are drawn.
        lora: options of ``peft``'s LoRA (see ``fedsim.models.lora``); everything else is frozen.
        freeze: patterns of parameter names (``transformer.h.0.*``) that are not trained.
        dtype: type of the frozen parameters, ``float32``, ``bfloat16`` or ``float16`` (without kernels on most CPUs).

    Raises:
        ConfigError: for a missing library, an unknown class or field, weights that do not fit.
    """
    transformers = library("transformers")
    if path is None and architecture is None:
        raise ConfigError(
            "model=hf: type model.architecture=GPT2LMHeadModel (any class of transformers) for drawn weights, or "
            f"model.path=<{FOLDER}>"
        )
    folder = None if path is None else _folder(path)
    kind, settings = _class(transformers, architecture, folder)
    given = {**_from_data(kind, settings, folder, input_shape, num_classes), **dict(config or {})}
    fields = ({"use_cache": False} if hasattr(settings, "use_cache") else {}) | given
    for key, value in fields.items():
        _check_field(settings, kind, key, value)
    with _quietly(transformers):
        model = _drawn(kind, fields) if folder is None else _loaded(kind, settings, folder, fields)
        if lora is not None:
            model = adapted(library("peft"), model, lora)
    model.train()
    for pattern in freeze or ():
        _freeze(model, pattern)
    if dtype is not None:
        _cast_frozen(model, dtype)
    return model


def library(name: str) -> Any:
    """A library of Hugging Face, imported offline.

    Raises:
        ConfigError: what to install.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        return __import__(name)
    except ImportError as error:
        raise ConfigError(f"model=hf needs {name}: pip install 'fedsim-lab[hf]' ({error})") from error


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={path}: expected {FOLDER}, found {_inside(folder)}; nothing is fetched"
        )
    return folder


def _inside(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty one"


def _class(transformers: Any, architecture: str | None, folder: Path | None) -> tuple[Any, Any]:
    """The model's class and its configuration: the folder's, or the library's defaults."""
    loaded = None
    if folder is not None:
        try:
            loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model.path={folder}: {_first(error)}") from error
    name = architecture or next(iter(getattr(loaded, "architectures", None) or ()), None)
    if name is None:
        raise ConfigError(f"model.path={folder}: its config names no class; type model.architecture=NAME")
    kind: Any = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    config_class: Any = getattr(kind, "config_class", None)
    if not known or config_class is None:
        near = hint(name, [k for k in dir(transformers) if not k.startswith("_")], "model.architecture=")
        raise ConfigError(
            f"model.architecture={name}: transformers {transformers.__version__} has no such model{near}"
        )
    if loaded is not None and not isinstance(loaded, config_class):
        raise ConfigError(
            f"model.architecture={name}: the weights of {folder} are of type {loaded.model_type}; choose one of its "
            "classes"
        )
    return kind, config_class() if loaded is None else loaded


def _from_data(
    kind: Any, settings: Any, folder: Path | None, shape: Sequence[int], num_classes: int
) -> dict[str, Any]:
    """Fields that follow from the data."""
    name, found = kind.__name__, dict[str, Any]()
    if num_classes and name.endswith("Classification") and settings.num_labels != num_classes:
        found["num_labels"] = num_classes
    unfilled = hasattr(settings, "pad_token_id") and settings.pad_token_id is None
    if folder is not None and unfilled and name.endswith("ForSequenceClassification"):
        found["pad_token_id"] = _pad(folder)  # where a text ends
    if folder is None:
        if num_classes and name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")):
            found["vocab_size"] = num_classes
        if len(shape) == 3:
            found |= {
                "num_channels": shape[0],
                "image_size": shape[1] if shape[1] == shape[2] else list(shape[1:]),
            }
    return {k: v for k, v in found.items() if k == "num_labels" or hasattr(settings, k)}


def _pad(folder: Path) -> int | None:
    """The token that fills texts up, by the tokenizer beside the weights."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    names = {t["content"]: int(t["id"]) for t in json.loads(file.read_text()).get("added_tokens", ())}
    return next((names[p] for p in PADS if p in names), None)


def _check_field(settings: Any, kind: Any, key: str, value: Any) -> None:
    """Refuse a field that nothing would read, and one that would fetch code."""
    known = {*settings.to_dict(), *settings.attribute_map, "num_labels", "attn_implementation"}
    if key not in known:
        raise ConfigError(
            f"model.config.{key}: {kind.config_class.__name__} has no such field{hint(key, known)}"
        )
    named = value is None or (isinstance(value, str) and re.fullmatch(r"[\w|]+", value))
    if key == "attn_implementation" and not named:  # the name of a repository is that of code to be fetched
        raise ConfigError(
            f"model.config.attn_implementation={value}: must be a name of the library's own, such as eager or sdpa"
        )


def _drawn(kind: Any, fields: Mapping[str, Any]) -> nn.Module:
    """A new model; fields that others follow from (one kind for each layer) are worked out by the library."""
    try:
        model: nn.Module = kind(kind.config_class(**fields))
    except Exception as error:  # classes check their fields in ways of their own
        raise ConfigError(f"model.config: {kind.__name__} cannot be built: {_first(error)}") from error
    return model


def _loaded(kind: Any, settings: Any, folder: Path, fields: Mapping[str, Any]) -> nn.Module:
    """The folder's model in float32, without a name of this machine in its configuration."""
    for key, value in fields.items():
        setattr(settings, "_attn_implementation" if key == "attn_implementation" else key, value)
    try:
        found = kind.from_pretrained(
            folder,
            config=settings,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConfigError(
            f"model.path={folder}: {kind.__name__} cannot be loaded: {_first(error)}"
        ) from error
    model: nn.Module = found[0]
    for name, stored, wanted in sorted(found[1]["mismatched_keys"]):
        raise ConfigError(
            f"model.path={folder}: '{name}' has shape {tuple(stored)} there, {tuple(wanted)} by the settings; leave "
            "out what model.config changes, or choose data with as many classes"
        )
    missing = sorted(found[1]["missing_keys"])
    if missing:
        if len(missing) >= len(model.state_dict()):
            raise ConfigError(f"model.path={folder}: none of its weights is one of {kind.__name__}")
        log.warning("model.path=%s: not in the folder, so drawn: %s", folder, ", ".join(missing))
    model.config._name_or_path = model.name_or_path = folder.name  # type: ignore[union-attr, assignment]
    return model


def _freeze(model: nn.Module, pattern: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    fit = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
    if not fit:
        raise ConfigError(f"model.freeze: no parameter fits {pattern!r}{hint(pattern, names)}")
    for p in fit:
        p.requires_grad_(False)


def _cast_frozen(model: nn.Module, dtype: str) -> None:
    """Frozen parameters in ``dtype``; where other layers are trained than adapters, each layer casts its inputs."""
    check_choice("model.dtype", dtype, DTYPES)
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if not frozen:
        raise ConfigError(
            f"model.dtype={dtype}: is of frozen parameters; add model.lora={{r: 4}} or model.freeze=[...]"
        )
    for p in frozen:
        p.data = p.data.to(DTYPES[dtype])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if trained and dtype != "float32":
        for layer in model.modules():
            if any(p.is_floating_point() for p in layer.parameters(recurse=False)):
                layer.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = next(p.dtype for p in layer.parameters(recurse=False) if p.is_floating_point())
    return tuple(a.to(kind) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Without progress bars, reports and warnings of the libraries; what matters is said by ourselves."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
