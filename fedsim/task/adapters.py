"""Adapters of the peft library: what of them is refused, and their files as Hugging Face's libraries load them.

A model counts as adapted if it, or a module in it, is a ``peft.PeftModel``. peft itself is imported for writing only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.task.copies import copied
from fedsim.task.fixed import averaged
from fedsim.task.frozen import base_of, frozen_part, full_state, published

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The outermost ``PeftModel`` in ``model``, with its name there ("" for the model itself)."""
    found = (
        (name, m)
        for name, m in model.named_modules()
        if hasattr(m, "peft_config") and callable(getattr(m, "get_base_model", None))
    )
    return next(found, None)


def refuse_untied(model: nn.Module) -> None:
    """Refuse adapters that part an output layer from the embedding that it shares its weights with.

    Raises:
        ConfigError: naming what to type.
    """
    if (found := adapted(model)) is None:
        return
    base: Any = found[1].get_base_model()  # type: ignore[operator]
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return
    ends = [getattr(base, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    first, last = (_trained_weight(end) for end in ends)
    if first is None or last is None or first is last or not (first.requires_grad or last.requires_grad):
        return
    raise ConfigError(
        "model: the adapters' modules_to_save part the output layer from the embedding whose weights it shares "
        "(config.tie_word_embeddings): one would be trained and not the other, or two copies; name the output layer "
        "alone, with ensure_weight_tying=True, or build the base with tie_word_embeddings=False if that is meant"
    )


def _trained_weight(layer: Any) -> Tensor | None:
    """The weight that a layer, or the copy of it that is trained instead, computes with."""
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and len(copies):
        layer = copies[next(iter(copies))]
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def save(
    model: nn.Module, weights: Mapping[str, Tensor], folder: Path, *, adapter: str | None = None
) -> list[Path]:
    """Write the adapter of ``model``, with the ``weights`` of a run, so that peft's ``PeftModel.from_pretrained(base,
    folder)`` gives the trained model. The files name the base and its sha256, but no folder of this machine.

    Args:
        model: as it was handed to the run; it is not changed.
        weights: ``RunResult.weights``, or what lies in ``weights.safetensors``.
        folder: made if it is not there.
        adapter: which one, if there are several; by default the active one.

    Raises:
        ConfigError: if there is no adapter, or it is not all that was trained.
    """
    if (found := adapted(model)) is None:
        raise ConfigError(
            f"adapters: {type(model).__name__} holds no peft.PeftModel; export its state dict instead"
        )
    full_state(model, weights)  # says what is missing or unknown
    trained, fixed = copied(model), frozen_part(model)
    trained.load_state_dict({k: v for k, v in weights.items() if k not in fixed}, strict=False)
    inner: Any = trained.get_submodule(found[0])
    name = adapter or _active(inner)
    if name not in inner.peft_config:
        raise ConfigError(f"adapters: there is no adapter '{name}'; there are {', '.join(inner.peft_config)}")
    tensors = _tensors(trained, inner, name)
    base = base_of(model)
    about = {"format": "pt", **(base.metadata() if base else {})}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_settings(inner, name), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text)
    save_file(tensors, folder / WEIGHTS, metadata=about)
    return [folder / CONFIG, folder / WEIGHTS]


def _active(inner: Any) -> str:
    names = inner.active_adapters
    if len(names) != 1:
        raise ConfigError(f"adapters: {', '.join(names)} are active; give adapter=... to write one of them")
    return str(names[0])


def _tensors(model: nn.Module, inner: Any, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names of its file, if they are all that ``model`` has trained."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)
    held = {t.data_ptr() for t in found.values()}
    prompt = inner.peft_config[name].is_prompt_learning  # whose embeddings are computed, not taken
    own = set(map(id, inner.prompt_encoder[name].parameters())) if prompt else set()
    others = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in own and p.data_ptr() not in held
    ]
    others += [n for n, _ in averaged(model)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"adapters: '{others[0]}'{more} changed in the run too, but is not part of the adapter '{name}', whose "
            "file alone would give another model; export the state dict, or name its layer in modules_to_save"
        )
    return {n: t.detach().contiguous().clone() for n, t in sorted(found.items())}


def _settings(inner: Any, name: str) -> dict[str, Any]:
    """What ``adapter_config.json`` says, without folders of this machine."""
    settings: dict[str, Any] = _plain(inner.peft_config[name].to_dict())
    settings["inference_mode"] = True
    if settings.get("task_type") is None:  # where peft finds the base's class, which no task names
        kind = type(inner.get_base_model())
        settings["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    if base := settings.get("base_model_name_or_path"):
        settings["base_model_name_or_path"] = published(base)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str) and Path(value).is_absolute():
        return published(value)
    return value
