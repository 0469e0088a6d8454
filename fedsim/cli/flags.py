"""Flags of the command, Hydra's and --json, wherever they stand; settings written like flags are told their form."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.errors import ConfigError, hint

LONG = ("--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--experimental-rerun")
WITH_VALUE = (*LONG, "-c", "-p", "-cp", "-cn", "-cd")
ALONE = ("--help", "--hydra-help", "--version", "--resolve", "--run", "--multirun", "--shell-completion")
SHORT = ("-h", "-v", "-r", "-m", "-sc")
INFO = ("--info", "-i")  # one of these words may follow
JSON = "--json"  # not Hydra's
FLAGS = (*WITH_VALUE, *ALONE, *SHORT, *INFO, JSON)
SHOWN = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def arranged(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags, with their values, and settings of a command line on which they may be mixed.

    Raises:
        ConfigError: for a flag that there is not, with the setting to type if it is the name of one.
    """
    flags, settings, words = list[str](), list[str](), list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            settings.append(word)
        elif name not in FLAGS:
            raise ConfigError(_no_flag(word, words, argv))
        else:
            flags.append(word)
            if not equals and words and (name in WITH_VALUE or (name in INFO and words[0] in SHOWN)):
                flags.append(words.pop(0))
    return flags, settings


def _no_flag(word: str, after: Sequence[str], argv: Sequence[str]) -> str:
    """``--rounds 5``: type rounds=5."""
    from fedsim.config.keys import known_keys

    name, equals, value = word.partition("=")
    if not equals and after and not after[0].startswith("-") and "=" not in after[0]:
        value = after[0]
    given = word if equals or not value else f"{word} {value}"
    wanted = name.lstrip("-").replace("-", "_")
    keys = [k for k in known_keys([a for a in argv if "=" in a]) if not k.endswith("_")]
    found = [k for k in keys if k == wanted] or [k for k in keys if k.rpartition(".")[2] == wanted]
    if found:
        ways = " or ".join(f"{k}={value or 'VALUE'}" for k in found[:3])
        return f"{given}: settings have no dashes; type {ways}"
    near = hint(name, FLAGS) or hint(wanted, keys)
    return f"{given}: no such flag{near}; settings are written KEY=VALUE (fedsim --help)"
