"""Views: named augmentations of whole batches under a keyed generator, with which boxes and maps move.

``conf/view/NAME.yaml`` names one and holds its options. ``views.weak`` and ``views.strong`` of a configuration are two,
which a local rule asks for (``job.view("strong", batch)``); ``data.augment=NAME`` augments training batches by one.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from fedsim.config.parts import part
from fedsim.data.views.base import Joint, Traced, Unchanged, View, as_view, seen, seen_prepared
from fedsim.data.views.noise import MaskedFeatures, Noise, SwappedFeatures, Tokens
from fedsim.data.views.photometric import Colour, Cutout
from fedsim.data.views.randaugment import RandAugment, Strong
from fedsim.data.views.shifts import Affine, Mosaic, Weak
from fedsim.errors import ConfigError, hint

__all__ = [
    "Affine",
    "Colour",
    "Cutout",
    "Joint",
    "MaskedFeatures",
    "Mosaic",
    "Noise",
    "RandAugment",
    "Strong",
    "SwappedFeatures",
    "Tokens",
    "Traced",
    "Unchanged",
    "View",
    "Weak",
    "as_view",
    "configured",
    "named",
    "seen",
    "seen_prepared",
]


def named(name: str, key: str = "data.augment", **options: Any) -> View:
    """The view of ``conf/view/NAME.yaml``, with ``options`` where it has such.

    Raises:
        ConfigError: naming ``key``, for a name that there is not.
    """
    files_of = {file.name.removesuffix(".yaml"): file for file in (files("conf") / "view").iterdir()}
    names = sorted(files_of)
    if name not in names:
        raise ConfigError(
            f"{key}={name}: there is no such view{hint(name, names)}; there are {', '.join(names)}"
        )
    return _built(OmegaConf.create(files_of[name].read_text()), key, **options)


def configured(node: Any) -> dict[str, View]:
    """The views of a configuration's ``views``, by name: nodes with a ``_target_``, or names of ``conf/view``."""
    found = {}
    for name in node or ():
        key, one = f"views.{name}", node[name]
        if isinstance(one, str):
            found[str(name)] = named(one, key)
        elif one is not None:
            found[str(name)] = _built(one, key)
    return found


def _built(node: Any, key: str, **options: Any) -> View:
    """The view of a node; what its class refuses is said of ``key``."""
    try:
        return as_view(part(node, key, **options), key)
    except ConfigError as error:
        said = str(error)
        raise ConfigError(key + said.removeprefix("view") if said.startswith("view:") else said) from error
