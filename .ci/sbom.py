"""The list of what fedsim's tested environment is made of, with licences, as CycloneDX 1.5: ``docs/sbom.cdx.json``.

``python .ci/sbom.py`` writes it from constraints.txt and the metadata of what is installed; ``--check`` says whether
the file is what would be written. A licence is what the package's metadata says; if nothing, the list says so.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/sbom.cdx.json"
UNKNOWN = "not stated by the package"


def pinned() -> dict[str, str]:
    """Version by name, as constraints.txt pins them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def licence(name: str) -> dict[str, Any]:
    """What a package says of its licence: an expression, else its classifiers, else the first line of its text."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return {"license": {"name": UNKNOWN}}
    if expression := about.get("License-Expression"):
        return {"expression": str(expression)}
    classes = {c.rpartition(" :: ")[2] for c in about.get_all("Classifier", []) if c.startswith("License ::")}
    text = (about.get("License") or "").strip().splitlines()
    said = " AND ".join(sorted(classes - {"OSI Approved"})) or (text[0][:100] if text else UNKNOWN)
    return {"license": {"name": said}}


def document() -> dict[str, Any]:
    """The bill of materials; nothing in it changes from one day to the next."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    components = []
    for name, version in sorted(pinned().items(), key=lambda item: item[0].lower()):
        canonical = re.sub(r"[-_.]+", "-", name).lower()
        components.append(
            {
                "type": "library",
                "name": name,
                "version": version,
                "purl": f"pkg:pypi/{canonical}@{version}",
                "bom-ref": f"pkg:pypi/{canonical}@{version}",
                "licenses": [licence(name)],
            }
        )
    itself = {
        "type": "application",
        "name": project["name"],
        "version": project["version"],
        "licenses": [{"expression": project["license"]}],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": itself},
        "components": components,
    }


def main() -> int:
    """Write the file, or compare it."""
    text = json.dumps(document(), indent=1, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        return int(not FILE.exists() or FILE.read_text() != text)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
