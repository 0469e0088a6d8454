"""LoRA adapters of the library ``peft`` on a model of ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedsim.errors import ConfigError, hint

SHORT = {"alpha": "lora_alpha", "dropout": "lora_dropout"}  # names of options that LoRA's paper has too
RANK = 4  # unless said; alpha is twice the rank
ATTENTION = (  # names of the projections that are adapted where peft has no choice of its own for a kind of model
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("qkv",),
    ("Wqkv",),
    ("c_attn",),
)
TASKS = {  # end of a class's name: what peft calls its task
    "LMHeadModel": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def adapted(peft: Any, model: Any, options: Mapping[str, Any]) -> nn.Module:
    """``model`` frozen, with low-rank adapters (Hu et al. 2022) drawn from torch's current generator.

    ``options`` are those of ``peft.LoraConfig`` (``r``, ``alpha``, ``dropout``, ``target_modules``, ``use_dora``,
    ``modules_to_save``, ...); unless said, r is 4, alpha 2 r, and attention's projections are adapted: those that peft
    chooses, or for other models query and value. ``fan_in_fan_out`` follows from the layers and the task from the
    model's class, both unless said; a new image classifier is trained beside the adapters, as ``peft`` does with one of
    text.

    Raises:
        ConfigError: for an unknown option, modules that are not there, or a tied layer to be saved by itself.
    """
    known = [f for f in peft.LoraConfig.__dataclass_fields__ if not f.startswith("_")]
    given = {SHORT.get(key, key): value for key, value in options.items()}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"model.lora.{key}: peft's LoRA has no such option{hint(key, [*known, *SHORT])}"
            )
    from transformers.pytorch_utils import Conv1D

    settings: dict[str, Any] = {
        "task_type": _task(model),
        "fan_in_fan_out": any(isinstance(m, Conv1D) for m in model.modules()),
    }
    if type(model).__name__.endswith("ForImageClassification"):
        settings["modules_to_save"] = ["classifier"]
    settings |= given
    settings.setdefault("r", RANK)
    settings.setdefault("lora_alpha", 2 * settings["r"])
    _refuse_untied(model, settings)
    if "target_modules" not in settings and "target_parameters" not in settings:
        _name_targets(peft, model, settings)
    try:
        out: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**settings))
    except (ValueError, TypeError, KeyError) as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"model.lora: {said}") from error
    return out


def _name_targets(peft: Any, model: Any, settings: dict[str, Any]) -> None:
    """Adapt attention's projections where peft has no choice of its own for this kind of model.

    Raises:
        ConfigError: if there are none.
    """
    mapped = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if getattr(model.config, "model_type", None) in mapped:
        return
    layers = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    found = next((names for names in ATTENTION if set(names) <= set(layers)), None)
    if found is None:
        raise ConfigError(
            f"model.lora: {type(model).__name__} has no attention whose projections are known by name; type "
            f"model.lora.target_modules=[...], some of {', '.join(layers)}"
        )
    settings["target_modules"] = list(found)


def _task(model: Any) -> str | None:
    name = type(model).__name__
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def _refuse_untied(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """A layer that shares its weights with another would be copied, and the two trained apart."""
    if settings.get("ensure_weight_tying"):
        return
    holders: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(name.rpartition(".")[0])
    for module in settings.get("modules_to_save") or ():
        for names in holders.values():
            if len(names) > 1 and any(name == module or name.endswith(f".{module}") for name in names):
                raise ConfigError(
                    f"model.lora.modules_to_save: {' and '.join(names)} share their weights, and would be trained "
                    "apart; add ensure_weight_tying: true to model.lora, or leave them out"
                )
