"""Models that classes of clients train (``client.classes``), written out: from an option or some settings to a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim.config.words import CONF
from fedsim.config.yamlfile import read_yaml
from fedsim.errors import ConfigError, hint

OF_ANY_MODEL = "head"  # a setting that any model may have


def write_out(config: DictConfig) -> None:
    """Put the whole node in the place of each class's ``model``; of one that is the run's own, nothing (in place).

    ``model: lenet`` is an option of ``conf/model``, ``model: {option: mlp, hidden: [32]}`` one with other settings,
    ``model: {hidden: [32]}`` the run's own with other settings, and a node with ``_target_`` is written out already.

    Raises:
        ConfigError: for an option or a setting that there is not.
    """
    rows = OmegaConf.to_container(config, resolve=True)["client"]["classes"]  # type: ignore[call-overload,index]
    if not any(isinstance(row, dict) and row.get("model") is not None for row in rows or ()):
        return
    own = OmegaConf.to_container(config.model, resolve=True)
    for i, row in enumerate(rows):
        if isinstance(row, dict) and "model" in row:
            node = _node(row["model"], own, f"client.classes[{i}].model")
            row["model"] = node
            if node is None or node == own:
                del row["model"]
    config.client.classes = rows


def _node(value: Any, own: Any, where: str) -> Any:
    """The node that a class's ``model`` stands for; what cannot be one as it is, for who deals out the classes."""
    if isinstance(value, str):
        value = {"option": value}
    if not isinstance(value, Mapping) or "_target_" in value:
        return value
    changes = {k: v for k, v in value.items() if k != "option"}
    if "option" in value:
        return _changed(_option(str(value["option"]), where), changes, where)
    if "_target_" not in own:
        raise ConfigError(
            f"{where}: the run's model was handed over, so its settings are not known; name an option, such as "
            "model: {option: mlp, hidden: [32]}, or a _target_"
        )
    return _changed(own, changes, where)


def _option(name: str, where: str) -> Any:
    known = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    if name not in known:
        near = hint(name, known) or f"; choose one of {', '.join(known)}"
        raise ConfigError(
            f"{where}={name}: there is no such option of model{near}, or give {{_target_: ...}}"
        )
    return read_yaml(CONF / "model" / f"{name}.yaml")


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``base`` with other values; a mapping within it, entry by entry."""
    out = dict(base)
    for name, value in changes.items():
        if name not in base and name != OF_ANY_MODEL:
            known = [k for k in base if not k.startswith("_")]
            near = hint(name, known, f"{where}.") or f"; it has {', '.join(known) or 'no settings'}"
            raise ConfigError(f"unknown key '{where}.{name}'{near}")
        inner = base.get(name)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        out[name] = _changed(inner, value, f"{where}.{name}") if both else value  # type: ignore[arg-type]
    return out
