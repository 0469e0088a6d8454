"""What a run may be called: its names are folders."""

from __future__ import annotations

from pathlib import PurePath

from omegaconf import DictConfig

from fedsim.errors import ConfigError

LONGEST = 255  # bytes of a file name
SUFFIX = (
    60  # bytes that a run's folder has besides the method's label: -s<seed>-<key>, or a stamp in its place
)


def check_names(config: DictConfig) -> None:
    """Refuse names that can be no folder, or lie where ``fedsim report`` does not look.

    Raises:
        ConfigError: naming the key and what is wrong.
    """
    for key in ("name", "out", "dir", "method"):
        value = config[key]
        if value is None:
            continue
        text = str(value)
        if not text.strip():
            raise ConfigError(f"{key}='': must not be empty")
        if not text.isprintable():
            raise ConfigError(f"{key}={text!r}: holds a character that cannot be printed; leave it out")
        size = max((len(part.encode()) for part in PurePath(text).parts), default=0)
        most = LONGEST - SUFFIX if key == "method" else LONGEST
        if size > most:
            raise ConfigError(f"{key}: too long for a folder ({size} bytes; at most {most})")
    _check_name(str(config.name))
    if config.method is not None and ("/" in config.method or config.method.startswith((".", "~"))):
        raise ConfigError(f"method={config.method}: must be a plain label, without '/', '.' or '~' before it")


def _check_name(name: str) -> None:
    parts = PurePath(name).parts
    if name.startswith("/") or ".." in parts:
        raise ConfigError(f"name={name}: names a folder within `out`; another place is out=PATH or dir=PATH")
    if not parts or any(part.startswith((".", "~")) for part in parts):
        raise ConfigError(
            f"name={name}: must not begin with '.' or '~', which fedsim report and shells pass over"
        )
