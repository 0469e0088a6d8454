"""Errors that users meet. Each message names what was wrong, what was given and what to type instead."""

from __future__ import annotations


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose."""


class ConfigError(FedsimError):
    """A setting is unknown, of the wrong type or impossible (exit code 2)."""


class DataError(FedsimError):
    """A data file, source or partition cannot be used (exit code 2)."""


class ClientError(FedsimError):
    """A client's own code raised, or returned something unusable (exit code 1)."""


class CheckpointError(FedsimError):
    """A checkpoint is damaged, incomplete, belongs to another run, or cannot be written (exit code 2)."""


class EngineError(FedsimError):
    """Workers could not be started or were lost for good (exit code 1)."""


class ArgumentError(ConfigError, ValueError):
    """An argument of a pure function is impossible: a ``ValueError`` for who calls it, exit code 2 in a run."""
