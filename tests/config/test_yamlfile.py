"""YAML files are read as OmegaConf reads them, whichever loader does it."""

import pytest
from omegaconf import OmegaConf

from fedsim.config.yamlfile import _by_sections, read_recorded, read_yaml
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


def test_what_runs_have_written_is_read_section_by_section(tmp_path):
    plain = TEXT.strip().replace("3: number", "exclude:\n- 3\n- {a: 1}\n# a remark\nlast: 3") + "\n"
    assert _by_sections(plain) is not None
    for text in (plain, TEXT, plain + "same: ${lr}\n", "---\n" + plain, "a: &x [1]\nb: *x\n", "a: 1\n3: 2\n"):
        (tmp_path / "a.yaml").write_text(text)
        assert read_recorded(tmp_path / "a.yaml") == read_yaml(tmp_path / "a.yaml")
    for text in ("a: 1\na: 2\n", "a: [1\nb: 2\n", "just words\n", ""):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml"):
            read_recorded(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${lr}/${oc.decode:x}", "\\x24{oc.env:HOME}"])
def test_of_what_runs_have_written_nothing_is_computed(tmp_path, text, monkeypatch):
    """A run folder may come from elsewhere; a report of it is handed on."""
    monkeypatch.setenv("HOME", "a secret")
    (tmp_path / "a.yaml").write_text(f'lr: 1\nseed: ${{lr}}\nname: "{text}"\n')
    for read in (read_recorded, lambda path: read_yaml(path, recorded=True)):
        with pytest.raises(ConfigError, match="would be computed on this machine") as refused:
            read(tmp_path / "a.yaml")
        assert "a secret" not in str(refused.value)
    (tmp_path / "a.yaml").write_text("lr: 1\nseed: ${lr}\n")
    assert read_recorded(tmp_path / "a.yaml") == {"lr": 1, "seed": 1}
