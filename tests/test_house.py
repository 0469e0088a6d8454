"""The house keeps its order: sizes of files and functions, names used once, what lies at the root of fedsim.

Who may import whom is held by import-linter (``make lint``, contracts in pyproject.toml).
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fedsim", "clients", "strategies")
ALL = (*SHIPPED, "benchmarks", "experiments", "tests")
MAX_LINES, MAX_FUNCTION = 300, 60

# Known exceptions, each to be removed together with its cause; an entry that is no exception any more fails too.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
SHARED_CLASSES: set[str] = set()

SAME_MEANING = {  # file names that several rooms may use
    "__init__",
    "base",  # the interface of the room's parts
    "engine",  # on Ray, on Flower
}

# They say nothing to a reader from the field
PRIVATE_WORDS = {"conspiracy", "wear", "worn", "told", "beside", "torn", "lent", "lap", "laps", "reality"}


def modules(*packages: str) -> Iterator[tuple[Path, ast.Module, str]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), *parsed(path)


@lru_cache(None)
def parsed(path: Path) -> tuple[ast.Module, str]:
    text = path.read_text()
    return ast.parse(text), text


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def test_no_file_is_too_long() -> None:
    found = {str(path) for path, _, text in modules(*ALL) if len(text.splitlines()) > MAX_LINES}
    assert found == LONG_FILES, f"split by subject; at most {MAX_LINES} lines a file"


def test_no_function_is_too_long() -> None:
    found = {
        f"{path}:{node.name}"
        for path, tree, _ in modules(*ALL)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > MAX_FUNCTION
    }
    assert found == LONG_FUNCTIONS, f"at most {MAX_FUNCTION} lines a function, its docstring not counted"


def test_no_class_name_means_two_things() -> None:
    places = defaultdict(list)
    for path, tree, _ in modules(*SHIPPED):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert set(twice) == SHARED_CLASSES, f"one class a name: {twice}"


def test_no_file_name_means_two_things() -> None:
    places = defaultdict(list)
    for path, _, _ in modules("fedsim"):
        places[path.stem].append(str(path))
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SAME_MEANING}
    assert not twice


def test_names_are_no_private_words() -> None:
    found = defaultdict(set)
    for path, tree, _ in modules(*SHIPPED, "benchmarks", "experiments"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                name = node.name
            else:
                continue
            if PRIVATE_WORDS.intersection(w.lower() for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)):
                found[name].add(str(path))
    assert not found


def test_the_root_of_fedsim_holds_the_public_face_and_the_ground_only() -> None:
    files = {path.name for path in (ROOT / "fedsim").iterdir() if path.is_file()}
    assert files == {"__init__.py", "api.py", "errors.py", "rng.py", "py.typed"}


def test_pandas_is_imported_when_it_is_needed() -> None:
    """It takes half a second, which a run does not need: inside functions, or for the type checker."""
    found = []
    for path, tree, _ in modules(*SHIPPED):
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}:{node.lineno}" for name in names if name.split(".")[0] == "pandas"]
    assert not found
