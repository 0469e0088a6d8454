"""docs/deployment.md, section 2, followed literally from a fresh clone: the very blocks of the page, with ports and
folders of this machine. Section 3 is ``test_provision.py``'s, section 1 ``test_deploy.py``'s."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from localgrid import wait_until
from real import LIMIT, ROOT, hashes, left_over, marked

import fedsim
from fedsim.flower.processes import Federation, free_port

PAGE = (ROOT / "docs/deployment.md").read_text()
SECTION = PAGE.partition("\n## 2. ")[2].partition("\n## 3. ")[0]


def block(having: str) -> str:
    """The one block of the section that has this."""
    (found,) = [text for text in re.findall(r"```\n(.*?)```", SECTION, re.DOTALL) if having in text]
    return found


def test_the_page_says_each_thing_once() -> None:
    for having in ("flower-superlink", "flower-supernode", "[superlink.lab]", "flwr run . lab"):
        assert block(having)
    assert "partition-id=0" in block("flower-supernode") and "num_clients=3" in block("flwr run")


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_three_machines_by_the_commands_of_the_page(tmp_path: Path) -> None:
    checkout, run = tmp_path / "checkout", tmp_path / "first"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    env = marked(tmp_path) | {"PYTHONPATH": str(ROOT / "tests/flower/impatient")}
    port, places = free_port(), {"0.0.0.0": "127.0.0.1", "/srv/runs/first": str(run)}
    places |= {"SERVER:8000": f"127.0.0.1:{port}", "--port 8000": f"--port {port}", "rounds=10": "rounds=2"}

    def here(text: str, **more: str) -> str:
        for theirs, ours in {**places, **more}.items():
            text = text.replace(theirs, ours)
        return text

    with Federation(tmp_path / "federation", env=env, port=port) as fed:
        home = Path(fed.environment["FLWR_HOME"])
        home.mkdir()
        (home / "config.toml").write_text(here(block("[superlink.lab]")))
        fed._start("link", ["bash", "-c", here(block("flower-superlink"))])
        fed.ready("link", limit=LIMIT)
        for k in range(3):
            mine = {"partition-id=0": f"partition-id={k}", "/var/lib/fedsim": str(tmp_path / f"state-{k}")}
            mine["--node-config"] = f"--port {free_port()} --node-config"
            fed._start(f"node-{k}", ["bash", "-c", here(block("flower-supernode"), **mine)])
        submit, *asking = here(block("flwr run")).splitlines()
        done = subprocess.run(
            ["bash", "-c", submit],
            cwd=checkout,
            env=fed.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(lambda: (run / "summary.json").exists(), LIMIT, "the run")
        number = re.search(r"run (\d+)", done.stdout)
        assert number, done.stdout
        for line in asking:
            words = shlex.split(line.replace("RUN_ID", number[1]), comments=True)
            told = subprocess.run(words, env=fed.environment, capture_output=True, text=True, check=False)
            assert told.returncode == 0, told.stdout + told.stderr
    settings = ["strategy=fedspeed", "num_clients=3", "clients_per_round=3", "rounds=2"]
    alone = fedsim.simulate([*settings, "engine=serial", "tracker=quiet"])
    assert hashes(run) == [r["weights_hash"] for r in alone.rows]
    wait_until(lambda: not left_over(tmp_path), 60, "an end of all processes")
