"""The oldest versions that pyproject.toml allows, one ``name==version`` a line: what ``make oldest`` installs."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["data"]]:
    name, version = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
