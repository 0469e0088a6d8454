"""Roles of settings: every field says one, and what tells runs apart follows from them."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
from composing import compose_quickly

from fedsim.config.compose import plain
from fedsim.config.roles import role_of, roles, telling
from fedsim.config.schema import ENGINES, EngineConfig, RunConfig

ALLOWED = {"problem", "method", "neutral"}


def fields(schema, prefix=""):
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}", field
        kind = types[field.name]
        for section in ENGINES.values() if kind is EngineConfig else (kind, *get_args(kind)):
            if dataclasses.is_dataclass(section):
                yield from fields(section, f"{prefix}{field.name}.")


def test_every_field_of_the_schema_has_a_role():
    found = {key: field.metadata.get("role") for key, field in fields(RunConfig)}
    assert len(found) > 80 and "client.adam.beta1" in found and "engine.lost_state" in found
    assert [key for key, role in found.items() if role not in ALLOWED] == []
    assert dict(roles()) == found


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("seed", "problem"),
        ("data", "problem"),
        ("partition.alpha", "problem"),
        ("evaluation.target", "problem"),
        ("strategy.base.rho", "method"),
        ("client.adam", "method"),
        ("client.adam.beta1", "method"),
        ("engine.threads", "method"),
        ("engine.workers", "neutral"),
        ("engine.deadline", "neutral"),
        ("tracker.wandb.project", "neutral"),
        ("method", "neutral"),
        ("hydra.run.dir", None),
        ("", None),
    ],
)
def test_role_of_a_key(key, role):
    assert role_of(key) == role


def test_neutral_settings_are_left_out_at_any_depth():
    values = plain(compose_quickly(["engine.timeout=3"]))
    kept = telling(values)
    assert set(kept["engine"]) == {"threads", "device", "chunks", "vectorize", "tf32"}
    gone = {"name", "out", "dir", "method", "resume", "tags", "tracker", "checkpoint", "objective"}
    assert set(values) - set(kept) == gone
    assert telling({"engine": {"workers": 3}, "mine": {"name": 1}}) == {"engine": {}, "mine": {"name": 1}}
