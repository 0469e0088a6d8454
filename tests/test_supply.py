"""What fedsim ships beside its code: the list of its dependencies, and an image without rights it does not need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
import sbom  # noqa: E402


def test_the_bill_of_materials_names_every_pinned_package_with_a_licence() -> None:
    found = json.loads((ROOT / "docs/sbom.cdx.json").read_text())
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.5")
    assert {c["name"]: c["version"] for c in found["components"]} == sbom.pinned()
    assert found["metadata"]["component"]["name"] == "fedsim-lab"
    names = [c["name"] for c in found["components"]]
    assert names == sorted(names, key=str.lower) and len({c["purl"] for c in found["components"]}) == len(
        names
    )
    for component in found["components"]:
        (entry,) = component["licenses"]
        assert entry.get("expression") or entry["license"]["name"], component["name"]
    unknown = [c["name"] for c in found["components"] if sbom.UNKNOWN in json.dumps(c)]
    assert len(unknown) <= 3, f"nothing is known of {unknown}: run .ci/sbom.py where they are installed"
    by_name = {c["name"]: c["licenses"][0] for c in found["components"]}
    assert by_name["flwr"] == {"expression": "Apache-2.0"} or "Apache" in json.dumps(by_name["flwr"])


def test_the_bill_of_materials_is_what_would_be_written_wherever_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sbom.differences(sbom.document()) == []
    now = sbom.metadata
    monkeypatch.setattr(sbom, "metadata", lambda name: now("pip" if name == "torch" else name))
    assert sbom.differences(sbom.document()) == [], "another version says nothing of the pinned one"
    monkeypatch.setattr(sbom, "licence", lambda name, version: {"expression": "MIT"})
    monkeypatch.setattr(sys, "argv", ["sbom.py", "--check"])
    assert sbom.main() == 1
    assert "pkg:pypi/flwr@" in (said := capsys.readouterr().err) and "its metadata say" in said


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def test_the_image_can_be_built_from_a_checkout_and_has_no_root() -> None:
    steps = instructions()
    assert steps[0] == ("FROM", "python:3.11-slim")
    assert {word for word, _ in steps} <= {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    users = [at for at, (word, _) in enumerate(steps) if word == "USER"]
    assert [steps[at][1] for at in users] == ["10001:10001"] and users[0] > max(
        at for at, (word, _) in enumerate(steps) if word == "RUN"
    )
    sources = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == kept and all((ROOT / source).exists() for source in sources)
    for word, rest in steps:
        if word == "RUN" and "pip install" in rest:
            assert "--constraint constraints.txt" in rest, "what is installed is what was tested"
    assert not re.search(r"(?i)password|token|secret", (ROOT / "Dockerfile").read_text())


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_docker_builds_the_image_and_it_runs() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no docker here: the file was read by the test above")
    for words in (
        ["build", "--tag", "fedsim:test", str(ROOT)],
        ["run", "--rm", "fedsim:test", "fedsim", "--version"],
    ):
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
