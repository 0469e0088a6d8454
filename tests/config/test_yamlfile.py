"""YAML files are read as OmegaConf reads them, whichever loader does it."""

import pytest
from omegaconf import OmegaConf

from fedsim.config.yamlfile import read_yaml
from fedsim.errors import ConfigError

TEXT = """
lr: 1e-3
tiny: 1.0e-05
many: 1_000
when: 2024-01-02
time: 12:30:45
odd: [.5, -.inf, on, ~, 0x10, 010, "1e3", '']
nested: {a: {b: [1, {c: null}]}}
text: |
  two
  lines
3: number
"""


def test_numbers_dates_and_texts_are_those_of_omegaconf(tmp_path):
    for text in (TEXT, TEXT + "same: ${lr}\n"):
        (tmp_path / "a.yaml").write_text(text)
        slow = OmegaConf.to_container(OmegaConf.load(tmp_path / "a.yaml"), resolve=True)
        found = read_yaml(tmp_path / "a.yaml")
        assert found == {str(key): value for key, value in slow.items()}
        assert [type(v) for v in found.values()] == [type(v) for v in slow.values()]
    assert found["lr"] == found["same"] == 0.001 and found["when"] == "2024-01-02"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "line 2: no valid YAML .found duplicate key a"),
        ("a: [1\nb: 2\n", "line 2: no valid YAML"),
    ],
)
def test_what_is_wrong_is_said_by_line(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_yaml(tmp_path / "a.yaml")
