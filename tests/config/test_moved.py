"""Old names answer with the new one: imports work with a warning, classes named in YAML are told."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from composing import compose_quickly
from hydra.utils import get_object

from fedsim.config.check import validate
from fedsim.config.moved import MODULES, NAMES, before, now, renamed
from fedsim.errors import ConfigError

OLD_TARGETS = (Path(__file__).parents[1] / "golden" / "old_runs" / "targets.txt").read_text().split()


VECTORS = (
    "fedsim.vectors is now fedsim.task.vectors; hash_tensors is now fedsim.rng.hash_tensors; "
    "finite is now fedsim.task.slots.finite"
)
OLD_IMPORTS = {
    "import fedsim.vectors": VECTORS,
    "from fedsim.vectors import FlatModel": VECTORS,
    "from fedsim import layout": "fedsim.layout is now fedsim.task.layout",
    "from fedsim.config import RunConfig": "fedsim.config.RunConfig is now fedsim.config.schema.RunConfig",
    "from fedsim.config import register": "fedsim.config.register is now fedsim.config.tree.register",
    "from fedsim.task import Task": "fedsim.task.Task is now fedsim.task.task.Task",
    "import fedsim.engine.mail": "fedsim.engine.mail is now fedsim.engine.ray.transport",
    "import fedsim.session.assembly": "fedsim.session is now fedsim.run",
    "from fedsim.replay import Reality": "fedsim.replay.Reality is now fedsim.flower.replay.DeploymentRecord",
    "from fedsim.classes import Classes": (
        "fedsim.classes is now fedsim.local.kinds; Classes is now fedsim.local.kinds.Kinds"
    ),
    "from clients.attacks import NonFinite": "clients.attacks.NonFinite is now clients.attacks.NonFiniteUpdate",
}
ATTEMPT = """
import json, sys
said = []
for line in json.loads(sys.argv[1]):
    try:
        exec(line)
        said.append("")
    except FutureWarning as warning:
        said.append(str(warning))
print(json.dumps(said))
"""


def test_an_old_import_works_and_says_the_new_path():
    def said(action: str) -> list[str]:
        command = [
            sys.executable,
            "-W",
            f"{action}::FutureWarning",
            "-c",
            ATTEMPT,
            json.dumps([*OLD_IMPORTS]),
        ]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert dict(zip(OLD_IMPORTS, said("error"), strict=True)) == OLD_IMPORTS
    assert said("ignore") == [""] * len(OLD_IMPORTS)


def test_what_an_old_import_gives_is_what_lies_at_the_new_place():
    with pytest.warns(FutureWarning, match="is now"):
        from fedsim import settings, vectors
        from fedsim.config import RunConfig
        from fedsim.engine.ray import RayEngine
    from fedsim.config import compose, schema
    from fedsim.engine.ray import engine
    from fedsim.rng import hash_tensors
    from fedsim.run import key
    from fedsim.task.vectors import FlatModel

    assert (settings.compose, settings.run_key) == (compose.compose, key.run_key)
    assert (vectors.FlatModel, vectors.hash_tensors) == (FlatModel, hash_tensors)
    assert RunConfig is schema.RunConfig and RayEngine is engine.RayEngine
    import fedsim.engine.ray as room

    assert room.RayEngine is engine.RayEngine  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="nothing"):
        room.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="nothing"):
        settings.nothing  # noqa: B018


def test_what_never_was_there_is_missed_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'fedsim\.nothing'"):
        importlib.import_module("fedsim.nothing")
    with pytest.raises(ImportError, match=r"cannot import name 'Nothing' from 'fedsim\.config'"):
        exec("from fedsim.config import Nothing")
    assert importlib.util.find_spec("fedsim.nothing") is None


def test_new_names_are_there():
    pytest.importorskip("flwr")
    for module in MODULES.values():
        importlib.import_module(module)
    for name in NAMES.values():
        assert get_object(name) is not None
    assert [old for old in MODULES if Path(*old.split(".")).with_suffix(".py").exists()] == []


def test_every_class_that_the_configuration_once_named_is_still_found():
    ours = [name for name in OLD_TARGETS if name.split(".")[0] in ("fedsim", "clients", "strategies")]
    assert len(ours) > 100
    for name in ours:
        today = now(name) or name
        assert get_object(today) is not None
        assert before(today) == name


def test_the_map_of_old_names_costs_nothing_until_one_is_met():
    code = "import sys, fedsim; from fedsim import rng; print('fedsim.config.moved' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ["encoder=identity", "encoder._target_=fedsim.encoders.Identity"],
            "encoder._target_=fedsim.encoders.Identity: this is now fedsim.models.encoders.Identity; "
            "type encoder._target_=fedsim.models.encoders.Identity",
        ),
        (
            ["system=lognormal", "system.dropout._target_=fedsim.system.settings.Dropout"],
            "system.dropout._target_=fedsim.system.settings.Dropout: this is now fedsim.system.system.Dropout; "
            "type system.dropout._target_=fedsim.system.system.Dropout",
        ),
    ],
)
def test_an_old_class_in_a_configuration_answers_with_the_new_name(overrides, answer):
    with pytest.raises(ConfigError) as raised:
        validate(compose_quickly(overrides))
    assert str(raised.value) == answer


def test_classes_are_renamed_at_any_depth():
    old = {
        "a": [{"_target_": "fedsim.encoders.Clip", "b": 1}],
        "_target_": "mine.Own",
        "c": "fedsim.encoders.Clip",
    }
    new = {**old, "a": [{"_target_": "fedsim.models.encoders.Clip", "b": 1}]}
    assert renamed(old, now) == new and renamed(new, before) == old
