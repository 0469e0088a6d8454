"""Each example of the gallery: two rounds that learn, with the same bits serially and on two workers of Ray."""

from __future__ import annotations

import importlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/gallery.md"
NAMES = sorted(f.stem for f in HERE.glob("*.py") if not f.stem.startswith("test_"))
SETTINGS = ["rounds=2", "clients_per_round=2", "tracker=quiet", "tracker.plots=false"]
OFTEN = ("bert_classifier", "detection_with_boxes", "gan_with_two_optimisers", "lstm_on_ragged_sequences")
LINES = 25  # of the user's own code, without imports, blank lines and the docstring


def measured(result: Any) -> dict[str, float]:
    """Numbers of the last row, without times."""
    return {k: v for k, v in result.rows[-1].items() if isinstance(v, float) and "seconds" not in k}


@cache
def alone(name: str) -> Any:
    return importlib.import_module(name).example([*SETTINGS, "engine=serial"])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns(name: str) -> None:
    first, second = alone(name).rows
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.nightly) for n in NAMES]
)
def test_its_bits_do_not_depend_on_the_engine(name: str, ray: str) -> None:
    first, second = alone(name), importlib.import_module(name).example([*SETTINGS, ray, "engine.workers=2"])
    assert [r["weights_hash"] for r in first.rows] == [r["weights_hash"] for r in second.rows]
    assert measured(first) == measured(second)


def test_an_example_needs_no_settings_but_those_that_it_names() -> None:
    (row,) = importlib.import_module("vae_without_labels").example(["rounds=1", "engine=serial"]).rows
    assert len(row["cohort"]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_on_the_page(name: str) -> None:
    text = (HERE / f"{name}.py").read_text()
    body = re.sub(r'^""".*?"""\n', "", text, count=1, flags=re.DOTALL).strip()
    own = [line for line in body.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
    assert len(own) <= LINES
    assert body in PAGE.read_text()
