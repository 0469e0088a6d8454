"""What is said of folders that are no runs."""

import pytest
from runfolder import make

import fedsim
from fedsim.errors import ConfigError


def test_folders_that_are_not_there_or_hold_runs_are_called_so(tmp_path):
    with pytest.raises(ConfigError) as missing:
        fedsim.load(tmp_path / "nothing")
    assert str(missing.value) == f"{tmp_path / 'nothing'}: no such folder"
    make(tmp_path, "fedavg", 0, [0.5])
    with pytest.raises(ConfigError, match=r"no config.yaml; fedsim.load reads the runs in it"):
        fedsim.load_run(tmp_path)
