"""What to type instead of a key that there is not: of the options chosen, of another option, or a likely one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hydra import compose as hydra_compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ConfigDefault
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.config.tree import config_dir, config_loader
from fedsim.errors import hint

ABSENT = {"system": "are no devices", "topology": "is no graph of peers"}  # else: is no attack, is no encoder

AS_ONE = "data.contract"  # null, or a value in braces

MEANT = {  # names that other tools have
    "clients": "num_clients",
    "learning_rate": "client.lr",
    "optimizer": "client=adam",
    "optimiser": "client=adam",
}


def known_keys(overrides: Sequence[str] = ()) -> list[str]:
    """All keys, dotted, of the configuration that the valid group choices among ``overrides`` make."""
    with config_loader() as loader:
        return list(_flatten(_chosen(loader, overrides), ""))


def refusal(bad: str, overrides: Sequence[str]) -> str:
    """One line on the key ``bad``, which the configuration of these overrides has not."""
    if bad.removeprefix("client.") in MEANT:
        return f"unknown key {bad!r}; did you mean {MEANT[bad.removeprefix('client.')]!r}?"
    with config_loader() as loader:
        config = _chosen(loader, overrides)
        group, option, rest = _place(bad, config.hydra.runtime.choices)
        off, outer = _off(bad, config), bad.removesuffix(f".{rest}")
        if group and off is not None:
            inner = off.removeprefix(outer).lstrip(".")
            if there := _options(loader, group, rest) or _options(loader, group, inner):
                return (
                    f"{bad}: there {ABSENT.get(off, f'is no {off}')} yet; add {group}={listed(there, 'or')}"
                )
        if group and (text := _of_some(loader, bad, group, rest, overrides)):
            return text
        keys = [k for k in _flatten(config, "") if not k.endswith("_") and k != bad]
        if off == AS_ONE:
            return f"{bad}: {off} is given as one value; type {_as_one(overrides)}"
        if near := _alike(bad, keys):
            return f"unknown key {bad!r}{near}"
        if group and (there := _options(loader, group, rest, null=True)):
            have = "has" if len(there) == 1 else "have"
            return f"unknown key {bad!r}: {option} has no {rest}; {listed(there, 'and')} {have}"
    return f"unknown key {bad!r}{_likeliest(bad, keys)}"


def _as_one(overrides: Sequence[str]) -> str:
    """``'data.contract={classes: [a, b]}'`` of all that was set below it."""
    below = [
        o.lstrip("+").removeprefix(f"{AS_ONE}.") for o in overrides if o.lstrip("+").startswith(f"{AS_ONE}.")
    ]
    return f"'{AS_ONE}={{{', '.join(o.replace('=', ': ', 1) for o in below)}}}'"


def _of_some(loader: ConfigLoader, bad: str, group: str, name: str, overrides: Sequence[str]) -> str:
    """What to say where a sweep is over options of which only some have ``name``; empty if that is not so."""
    chosen = next((o for o in overrides if o.partition("=")[0] == group), "")
    swept = chosen.partition("=")[2].split(",")
    have = [
        option for option in swept if _gives(loader, group.partition("@")[0], option, name.split("."), True)
    ]
    lack = [option for option in swept if option not in have]
    if not have or not lack:
        return ""
    value = next((o for o in overrides if o.partition("=")[0].lstrip("+") == bad), f"{bad}=VALUE")
    tuned = f" (fedsim tune takes {have[0]}:{value})" if group == "strategy" else ""
    return (
        f"{value}: {listed(lack, 'and')} {'has' if len(lack) == 1 else 'have'} no {name}, and a sweep gives a setting "
        f"to all; type two commands, which share a folder: -m {group}={','.join(have)} {value} and then -m "
        f"{group}={','.join(lack)} without it{tuned}"
    )


def misplaced(overrides: Sequence[str]) -> str | None:
    """One line on the first setting below a value, or below what is off: Hydra cannot set it, and does not say why."""
    with config_loader() as loader:
        config = _chosen(loader, overrides)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if not key.startswith("hydra") and _off(key, config) is not None:
            return refusal(key, overrides)
        for depth in range(1, key.count(".") + 1):
            outer = ".".join(key.split(".")[:depth])
            if not isinstance(OmegaConf.select(config, outer, default={}), DictConfig | dict):
                return f"{key}: {outer} is a value and has no {key[len(outer) + 1 :]}"
    return None


def listed(names: Sequence[str], last: str) -> str:
    """``a, b or c``; of many the first five."""
    names = [*names[:5], "..."] if len(names) > 6 else list(names)
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "OPTION"


def _chosen(loader: ConfigLoader, overrides: Sequence[str]) -> DictConfig:
    """The configuration, Hydra's own part included, of the group choices that are valid."""
    groups = loader.get_group_options("", ObjectType.GROUP)
    named = [o.split(",")[0] for o in overrides]
    choices = [o for o in named if o.partition("=")[0].partition("@")[0].partition("/")[0] in groups]
    searchpath = [o for o in overrides if o.startswith("hydra.searchpath=")]
    if extra := config_dir(overrides):
        searchpath = [f"hydra.searchpath=[file://{extra.absolute()}]"]
    for some in (choices, [o for o in choices if o.partition("=")[0] in groups], []):
        try:
            return hydra_compose("config", overrides=searchpath + some, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):
            continue
    return hydra_compose("config", return_hydra_config=True)


def _place(key: str, choices: Mapping[str, str | None]) -> tuple[str, str, str]:
    """Group and option chosen that a key belongs to, and its name there; all empty if it is of no group."""
    best = ("", "", "")
    for group, option in choices.items():
        name, _, package = str(group).partition("@")
        package = package or name.replace("/", ".")
        if key.startswith(f"{package}.") and len(key) - len(package) - 1 < len(best[2] or key):
            best = (str(group), str(option), key[len(package) + 1 :])
    return best


def _options(loader: ConfigLoader, group: str, name: str, *, null: bool = False) -> list[str]:
    """Options of a group that give ``name`` a value (or ``null``), by themselves or through what they are based on."""
    folder, path = group.partition("@")[0], name.split(".") if name else []
    names = loader.get_group_options(folder, ObjectType.CONFIG)
    return [option for option in names if _gives(loader, folder, option, path, null)]


def _gives(loader: ConfigLoader, folder: str, option: str, path: Sequence[str], null: bool) -> bool:
    loaded = loader.repository.load_config(f"{folder}/{option}")  # type: ignore[attr-defined]
    if loaded is None or loaded.header.get("package") == "_global_":
        return False
    node, known = OmegaConf.to_container(loaded.config), True
    for part in path:
        known = isinstance(node, dict) and part in node
        node = node[part] if isinstance(node, dict) and known else None
    bases = [d.path for d in loaded.defaults_list or () if isinstance(d, ConfigDefault) and not d.is_self()]
    own = known and (null or node is not None)
    return own or any(_gives(loader, folder, str(base), path, null) for base in bases)


def _off(key: str, config: DictConfig) -> str | None:
    """The part of ``key`` that is null in the configuration, so that nothing can lie below it."""
    node, parts = config, key.split(".")
    for depth, part in enumerate(parts, start=1):
        if not isinstance(node, DictConfig) or node._is_missing():
            return None
        node = node._get_node(part, validate_access=False)  # type: ignore[assignment]
        if node is not None and node._is_none():
            return ".".join(parts[:depth])
    return None


def _alike(bad: str, keys: list[str]) -> str:
    """The same name elsewhere, else the likest key beside it; empty if there is none."""
    parent, _, last = bad.rpartition(".")
    if same := [k for k in keys if k.rpartition(".")[2] == last]:
        return f"; did you mean {' or '.join(map(repr, same[:3]))}?"
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    return hint(last, siblings, f"{parent}." if parent else "")


def _likeliest(bad: str, keys: list[str]) -> str:
    """The keys beside it, else the likest of all."""
    parent = bad.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    return f"; {parent} has {', '.join(siblings)}" if parent and siblings else hint(bad, keys)


def _flatten(config: DictConfig, prefix: str) -> Iterator[str]:
    for key in config:
        name = f"{prefix}{key!s}"
        if name == "hydra":
            continue
        yield name
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _flatten(node, f"{name}.")
