"""What the pages name exists: files and what they define, modules, and (nightly) settings of every command line."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.utils import get_object

from fedsim.config.check import validate
from fedsim.config.compose import compose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *ROOT.glob("docs/**/*.md"),
]
EXPERIMENTS = sorted(ROOT.glob("conf/experiment/*.yaml"))
TOP = r"(?:fedsim|clients|strategies|conf|tests|experiments|benchmarks|docs)"
OTHER_COMMANDS = (
    "report",
    "verify",
    "deploy",
    "provision",
    "compare",
    "export",
    "tune",
    "ls",
    "rm",
)  # those that take no settings

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pages
def test_files_exist_and_define_what_is_said(page: Path) -> None:
    """``path/to/file.py: name, name`` in backticks, and folders."""
    missing, place = [], rf"{TOP}/[\w/-]*\.\w+|(?!clients){TOP}/[\w/-]*"  # `clients/accuracy` is a metric
    for path, names in re.findall(rf"`({place})(?:: ([\w, ]+))?`", page.read_text()):
        if not (ROOT / path).exists():
            missing.append(path)
            continue
        text = (ROOT / path).read_text() if names else ""
        for name in filter(None, names.split(", ")):
            if not re.search(rf"^\s*(def|class) {name}\b|^\s*{name}\b.* = ", text, re.MULTILINE):
                missing.append(f"{path}: {name}")
    assert not missing


@pages
def test_modules_exist(page: Path) -> None:
    text = page.read_text()
    modules = re.findall(rf"python -m ({TOP}[\w.]+)", text)
    assert not [m for m in modules if find_spec(m) is None]
    for name in re.findall(rf"`({TOP}(?:\.\w+)+)`", text):
        if not name.endswith((".md", ".py", ".yaml", ".jsonl", ".json", ".toml")):
            get_object(name)


def command_lines(text: str) -> list[list[str]]:
    """The arguments of every line ``fedsim ...``; of swept values the first."""
    lines = re.sub(r"\\\n\s*#?", " ", text).splitlines()
    found = []
    for line in lines:
        line = re.sub(r"<[^>]*>", "X", line.removeprefix("#").strip())
        if not line.startswith("fedsim ") or "=" not in line:
            continue
        words = shlex.split(re.split(r"\s{3,}", line)[0], comments=True)[1:]
        if words[0] not in OTHER_COMMANDS:
            settings = [w for w in words if "=" in w and "interval(" not in w]
            settings = [re.sub(r"=range\([^)]*\)$", "=0", w) for w in settings]
            found.append([re.sub(r"=([^,\[{('\"]*),.*", r"=\1", w) for w in settings])
    return found


LINES = {
    f"{file.relative_to(ROOT)}-{i}": overrides
    for file in (*PAGES, *EXPERIMENTS)
    for i, overrides in enumerate(command_lines(file.read_text() if file.exists() else ""))
}


@pytest.mark.nightly
@pytest.mark.parametrize("overrides", LINES.values(), ids=list(LINES))
def test_the_settings_of_every_command_line_exist(overrides: list[str]) -> None:
    config = compose([o for o in overrides if not o.startswith("hydra/")])
    validate(config)
