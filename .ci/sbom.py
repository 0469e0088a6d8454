"""The list of what fedsim's tested environment is made of, with licences, as CycloneDX 1.5: ``docs/sbom.cdx.json``.

``python .ci/sbom.py`` writes it from constraints.txt and the metadata of what is installed; ``--check`` says what of
the file is not what would be written. A licence is what the metadata of the pinned version say; if nothing, the list
says so. Of a package that is not installed here, or in another version, the list keeps what it says of the pinned one.
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
NOWHERE = {"license": {"name": UNKNOWN}}


def pinned() -> dict[str, str]:
    """Version by name, as constraints.txt pins them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def known() -> dict[str, Any]:
    """What the list says today: a component by its package and version."""
    components = json.loads(FILE.read_text())["components"] if FILE.exists() else []
    return {component["purl"]: component for component in components}


def licence(name: str, version: str) -> dict[str, Any] | None:
    """What a version says of its licence: an expression, else its classifiers, else the first line of its text;
    ``None`` where it is not installed."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return None
    if about["Version"].partition("+")[0] != version:  # torch's CPU build is 2.13.0+cpu
        return None
    if expression := about.get("License-Expression"):
        return {"expression": str(expression)}
    classes = {c.rpartition(" :: ")[2] for c in about.get_all("Classifier", []) if c.startswith("License ::")}
    text = (about.get("License") or "").strip().splitlines()
    said = " AND ".join(sorted(classes - {"OSI Approved"})) or (text[0][:100] if text else UNKNOWN)
    return {"license": {"name": said}}


def document() -> dict[str, Any]:
    """The bill of materials; nothing in it changes from one day to the next."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    components, before = [], known()
    for name, version in sorted(pinned().items(), key=lambda item: item[0].lower()):
        purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}"
        said = licence(name, version)
        components.append(
            {
                "type": "library",
                "name": name,
                "version": version,
                "purl": purl,
                "bom-ref": purl,
                "licenses": [said] if said else before.get(purl, {"licenses": [NOWHERE]})["licenses"],
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


def differences(found: dict[str, Any]) -> list[str]:
    """A line for each component that is missing, too many, or of another licence in the file than in ``found``."""
    before, now = known(), {c["purl"]: c for c in found["components"]}
    lines = [f"{purl}: not in the list" for purl in now.keys() - before.keys()]
    lines += [f"{purl}: not in constraints.txt" for purl in before.keys() - now.keys()]
    for purl in now.keys() & before.keys():
        then, is_now = (json.dumps(held[purl]["licenses"]) for held in (before, now))
        if then != is_now:
            lines.append(f"{purl}: listed with {then}, its metadata say {is_now}")
    return sorted(lines)


def main() -> int:
    """Write the file, or compare it."""
    found = document()
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        if FILE.exists() and FILE.read_text() == text:
            return 0
        name = FILE.relative_to(ROOT)
        print(
            f"{name} is not what python .ci/sbom.py would write",
            *differences(found),
            sep="\n",
            file=sys.stderr,
        )
        return 1
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
