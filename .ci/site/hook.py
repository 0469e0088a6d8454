"""What mkdocs asks while it builds the site: pages made from other files, and links that lead to them.

Nothing is written twice: the front page is README.md, a method's page comes from its YAML, docs/fidelity.md and
docstrings (``methods.py``), the settings from the YAML files (``options.py``), the notebook from what it stored.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

sys.path.insert(0, str(Path(__file__).parent))
import methods
from links import PAGES, ROOT, linked, place, relinked
from options import settings

ROOMS = sorted(f.name for f in (ROOT / "fedsim").iterdir() if (f / "__init__.py").exists())
REFERENCE = {
    "simulate": [
        "fedsim.api",
        "fedsim.run.result",
        "fedsim.tracking.callbacks",
        "fedsim.errors",
        "fedsim.rng",
    ],
    "clients": ["clients"],
    "strategies": ["strategies"],
    **{f"fedsim.{room}": [f"fedsim.{room}"] for room in ROOMS},
}
NAMING = ("index.md", "methods.md", "results/README.md")  # pages whose tables lead to the pages of methods


def on_config(config: Any) -> Any:
    """Put the pages that are made, or come with others' work, into the navigation."""
    results = sorted(
        f"results/{f.name}" for f in (ROOT / "docs/results").glob("*.md") if f.name != "README.md"
    )
    made: dict[str, list[Any]] = {
        "Methods": [
            {family: [{n: f"methods/{n}.md"} for n in names]} for family, names in methods.families().items()
        ],
        "Results": list(results),
        "Reference": [{name: f"reference/{name}.md"} for name in REFERENCE],
    }
    for entry in config.nav:
        for title, pages in entry.items() if isinstance(entry, dict) else ():
            pages.extend(made.get(title, ()))
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are made, and the files that pages link to."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    for source, page in PAGES.items():
        if source.endswith(".ipynb"):
            text, pictures = notebook(ROOT / source)
            for name, content in pictures.items():
                add(name, content)
        else:
            text = relinked((ROOT / source).read_text(), source, page)
        add(page, methods.linked(text) if page in NAMING else text)
    for name in methods.NAMES:
        add(f"methods/{name}.md", relinked(methods.page(name), "docs/methods.md", f"methods/{name}.md"))
    for name, modules in REFERENCE.items():
        add(f"reference/{name}.md", reference(name, modules))
    add("settings.md", settings())
    texts = [(ROOT / source, source) for source in PAGES if source.endswith(".md")]
    texts += [(file, file.relative_to(ROOT).as_posix()) for file in (ROOT / "docs").rglob("*.md")]
    wanted = {path for file, source in texts for path in linked(file.read_text(), source)}
    for path in sorted(path for path in wanted if place(path).startswith("source/")):
        add(place(path), (ROOT / path).read_bytes())
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of the pages in docs/ as the site needs them."""
    if page.file.generated_by is not None:
        return markdown
    path = page.file.src_uri
    text = relinked(markdown, f"docs/{path}", path)
    if path in NAMING:
        up = "../" * path.count("/")
        text = methods.linked(text).replace("](methods/", f"]({up}methods/")
    return text


def reference(name: str, modules: list[str]) -> str:
    """A page of docstrings: the modules with all that is in them."""
    lines = "    options:\n      show_submodules: true\n"
    return f"# {name}\n\n" + "\n\n".join(f"::: {module}\n{lines}" for module in modules) + "\n"


def notebook(file: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs as a page, and its pictures by name; formulas become MathML."""
    text, resources = MarkdownExporter().from_notebook_node(nbformat.read(file, as_version=4))
    pictures = {f"notebook/{name}": content for name, content in resources.get("outputs", {}).items()}
    text = re.sub(r"(?<=\]\()(?=output_\w+\.png\))", "notebook/", text)
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), text, flags=re.DOTALL)
    outside = re.split(r"(^```.*?^```|^    .*?$)", text, flags=re.DOTALL | re.MULTILINE)
    formulas = [
        part if i % 2 else re.sub(r"\$([^$\n]+)\$", lambda m: convert(m[1]), part)
        for i, part in enumerate(outside)
    ]
    return "".join(formulas), pictures
