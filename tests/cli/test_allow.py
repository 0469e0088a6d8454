"""Commands that rebuild a run from its folder build nothing that is not on the list, whoever wrote the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import fedsim
from fedsim.cli.main import command

OTHERS = """\
from strategies.fedavg import FedAvg
open("built", "a").close()
class Mine(FedAvg): ...
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allow") / "run"
    words = (
        "engine=serial",
        "tracker=quiet",
        "model=linear",
        "num_clients=2",
        "clients_per_round=2",
        "rounds=1",
    )
    return fedsim.simulate([*words, f"dir={folder}"]).dir


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "RUN"],
        ["diff", "RUN", "RUN"],
        ["value", "RUN"],
        ["forget", "RUN", "--client", "1"],
        ["audit", "RUN"],
        ["audit", "RUN", "--clients"],
        ["export", "RUN", "--to", "onnx"],
        ["report", "RUN", "--system", "lognormal"],
    ],
    ids=" ".join,
)
def test_code_from_elsewhere_is_not_run(
    words: list[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in run.iterdir():
        (theirs / path.name).symlink_to(path)
    config = OmegaConf.load(run / "config.yaml")
    config.strategy._target_ = "elsewhere.Mine"
    (theirs / "config.yaml").unlink()
    OmegaConf.save(config, theirs / "config.yaml")
    (tmp_path / "elsewhere.py").write_text(OTHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    typed = [word.replace("RUN", str(theirs)) for word in words]
    assert command(typed) == 2
    assert "strategy._target_=elsewhere.Mine: not among what" in capsys.readouterr().err
    assert not Path("built").exists()
    if words[0] == "diff":
        assert command([*typed, "--metrics-only"]) == 0  # builds nothing
        assert command([*typed, "--allow", "elsewhere"]) == 0
