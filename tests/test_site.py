"""The site: what its pages are made of is complete, and (nightly) it builds without network or a dead link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from fedsim.config.compose import compose

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci/site"))
import links  # noqa: E402
import methods  # noqa: E402
import options  # noqa: E402

REMOTE = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\bsrc=["'](?:https?:)?//|<link[^>]*\bhref=["'](?:https?:)?//"""
)


def written(value: str) -> object:
    """What a default stands for."""
    config = OmegaConf.create(f"it: {value}")
    return OmegaConf.to_container(config, resolve=False)["it"]


def leaves(value: object, path: str = "") -> list[str]:
    """Dotted names of the values of a tree, without those that only say what builds a part."""
    if not isinstance(value, dict):
        return [path]
    return [
        k
        for key, part in value.items()
        for k in leaves(part, f"{path}.{key}" if path else key)
        if key[0] != "_"
    ]


def test_every_method_has_a_family_a_row_and_a_page() -> None:
    families = [name for names in methods.families().values() for name in names]
    assert sorted(families) == methods.NAMES == sorted(methods.rows())


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_methods_page_shows_its_options_with_their_defaults(name: str) -> None:
    config = compose([f"strategy={name}"]).strategy
    assert isinstance(config, DictConfig)
    real = OmegaConf.to_container(config, resolve=False)
    found = options.options(methods.FOLDER / f"{name}.yaml")
    assert options.target(methods.FOLDER / f"{name}.yaml") == real.pop("_target_")
    for key, option in found.items():
        assert option.meaning, f"{key} has no remark"
        if option.meaning.startswith(options.INSIDE):
            real.pop(key)
            continue
        value = real
        for part in key.split("."):
            value = value[part]
        assert written(option.default) == value, key
    assert not [k for k in leaves(real) if not any(f"{k}.".startswith(f"{f}.") for f in found)]
    text = methods.page(name)
    assert text.startswith(f"# `{name}`: ") and all(f"| `{key}` |" in text for key in found)
    assert (
        "## Equation" in text
        and "## Results" in text
        and f"::: {options.target(methods.FOLDER / f'{name}.yaml')}" in text
    )
    assert not [link for link in links.LINK.findall(text) if not (ROOT / "docs" / link).exists()]


def test_results_of_a_method_are_rows_of_the_results_pages() -> None:
    page = methods.page("feddyn")
    line = next(
        r for r in (ROOT / "docs/results/optimisers.md").read_text().splitlines() if r.startswith("| FedDyn")
    )
    assert line in page and "| FedAvgM |" not in methods.page("fedavg")


def test_links_lead_from_place_to_place() -> None:
    text = "[a](docs/runs.md#checkpoints) [b](conf/config.yaml) [c](https://x.org/docs/runs.md) [d](#here)"
    there = links.relinked(text, "README.md", "methods/x.md")
    assert (
        there
        == "[a](../runs.md#checkpoints) [b](../source/conf/config.yaml) [c](https://x.org/docs/runs.md) [d](#here)"
    )


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_site_builds_without_network_warnings_or_dead_links(tmp_path: Path) -> None:
    nowhere = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "HTTP", "HTTPS")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*.html")}
    assert {f"methods/{name}.html" for name in methods.NAMES} <= set(pages)
    assert not [name for name, text in pages.items() if REMOTE.search(text)], (
        "something is fetched from elsewhere"
    )
    fedspeed = pages["methods/fedspeed.html"]
    (figure,) = re.findall(
        r"^\| FedSpeed \| 3 \| ([\d.]+)", (ROOT / "docs/results/optimisers.md").read_text(), re.MULTILINE
    )
    assert "FedSpeedClient" in fedspeed and "radius of the ascent step" in fedspeed and figure in fedspeed
    assert "<math" in pages["notebook.html"] and len(list(tmp_path.glob("notebook/*.png"))) == 4
