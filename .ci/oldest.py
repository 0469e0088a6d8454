"""The oldest versions that pyproject.toml allows, one ``name==version`` a line: what ``make oldest`` installs."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("data", "detection", "privacy", "compression", "sweep")  # those that `make oldest` installs

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
optional = project["optional-dependencies"]
for requirement in [*project["dependencies"], *(r for extra in EXTRAS for r in optional[extra])]:
    name, version = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
