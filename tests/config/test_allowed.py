"""What settings from elsewhere may build: a table of what hostile ones have tried, and what must go through."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from composing import compose_quickly
from omegaconf import OmegaConf

from fedsim.config.allowed import VARIABLE, check_allowed, check_words, granted, listed
from fedsim.errors import ConfigError

ROOT = Path(__file__).parents[2]
RAN = "FEDSIM_TEST_WAS_HERE"
OWN = f"""
import os
os.environ["{RAN}"] = "imported"
from shutil import rmtree
class Net: ...
def loss(output, y): ...
class Outer:
    def method(self): ...
"""

TARGETS = (
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "functools.partial",
    "operator.attrgetter",
    "torch.load",
    "torch.hub.load",
    "numpy.load",
    "pickle.loads",
    "shutil.rmtree",
    "pathlib.Path",
    "importlib.import_module",
    "hydra.utils.instantiate",
    "hydra._internal.utils._locate",
    "omegaconf.OmegaConf.load",
    # by attribute of what is ours
    "fedsim.api.os.system",
    "fedsim.models.torch.load",
    "fedsim.models.encoders.torch.hub.load",
    "fedsim.models.encoders.Path",
    "fedsim.models.encoders.nn.Linear",
    "strategies.fedavg.torch.load",
    "strategies.ggeur.Tensor",
    "strategies.ggeur.GGEUR.round",
    "clients.base.Client.__init__.__globals__",
    "strategies.fedavg.__builtins__",
    "strategies.fedavg._hidden",
    # ours, but no part that a setting may name
    "fedsim.api.run",
    "fedsim.api.simulate",
    "fedsim.cli.main.command",
    "fedsim.cli.storage.rm",
    "fedsim.cli.sweep.RaySweep",
    "fedsim.config.parts.part",
    "fedsim.config.allowed.granted",
    "fedsim.data.cache.cached",
    "fedsim.data.files.read",
    "fedsim.flower.processes.Federation",
    "fedsim.models.encoders.with_head",
    "fedsim.run.weightstore.write",
    "fedsim.task.adapters.save",
    "torchmetrics.wrappers.MetricTracker",
    "torchmetrics.image.fid.FrechetInceptionDistance",
    "torchmetrics.functional.accuracy",
    # no names at all
    "fedsim",
    "strategies",
    "",
    "fedsim..models",
    ".fedsim.models.MLP",
    "fedsim.models.MLP ",
    "fedsim.models.MLP\n",
    "fedsim/models/MLP",
    7,
    ["os", "system"],
    {"_target_": "os.system"},
)
GOOD = (
    "strategies.fedavg.FedAvg",
    "strategies.aggregators.krum",
    "clients.attacks.SignFlip",
    "fedsim.models.MLP",
    "fedsim.models.encoders.FromRun",
    "fedsim.data.sources.digits",
    "fedsim.data.views.Strong",
    "fedsim.task.problems.own",
    "fedsim.topology.timing.LognormalTicks",
    "flwr_datasets.partitioner.DirichletPartitioner",
    "torchmetrics.F1Score",
    "fedsim.encoders.Identity",  # a name of before
)
NODES: dict[str, Any] = {  # in one part of a configuration, whose own target is a good one
    "nested": {"base": {"_target_": "os.system"}},
    "in a list": {"base": [1, {"x": [{"_target_": "os.system"}]}]},
    "positional": {"_args_": [{"_target_": "os.system"}]},
    "not recursive": {"_recursive_": False, "base": {"_target_": "os.system"}},
    "partial": {"base": {"_target_": "os.system", "_partial_": True}},
    "partial of no truth value": {"_partial_": "yes"},
    "arguments that are no list": {"_args_": "rm"},
    "conversion": {"_convert_": "sideways"},
    "key of nobody": {"_call_": "os.system"},
    "found by path": {"loss": {"_target_": "hydra.utils.get_method", "path": "os.system"}},
    "found by attribute": {"loss": {"_target_": "hydra.utils.get_object", "path": "fedsim.api.os.system"}},
    "class found by path": {"loss": {"_target_": "hydra.utils.get_class", "path": "subprocess.Popen"}},
    "finder of finders": {"loss": {"_target_": "hydra.utils.get_method", "path": "hydra.utils.get_object"}},
    "found without a path": {"loss": {"_target_": "hydra.utils.get_method"}},
    "found by position": {"loss": {"_target_": "hydra.utils.get_method", "_args_": ["os.system"]}},
}
TEXTS = (
    "${oc.env:HOME}",
    "a/${oc.env:HOME}/b",
    "${oc.decode:x}",
    "${oc.create:{_target_: os.system}}",
    "${hydra:runtime.cwd}",
    "${seed}${oc.env:HOME}",
    "${a.${oc.env:HOME}}",
    "\\${oc.env:HOME}",
)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_hostile_targets(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model(\._target_)+="):
        check_allowed({"_target_": target}, "model")


@pytest.mark.parametrize("target", GOOD)
def test_parts_of_ours(target: str) -> None:
    check_allowed({"_target_": target, "_partial_": True, "_args_": [1]}, "model")


@pytest.mark.parametrize("name", NODES)
def test_hostile_nodes(name: str) -> None:
    good = {"_target_": "strategies.ggeur.GGEUR"}
    check_allowed(good, "strategy")
    with pytest.raises(ConfigError, match=r"^strategy\."):
        check_allowed(good | NODES[name], "strategy")


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_computed_on_the_way(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "a secret")
    for refused in (
        lambda: check_words(["seed=1", f"model.hidden={text}"]),
        lambda: check_allowed({"hidden": text}, "model"),
        lambda: check_allowed(OmegaConf.create({"seed": 1, "model": {"hidden": [text]}})),
    ):
        with pytest.raises(ConfigError, match="hidden") as caught:
            refused()
        assert "a secret" not in str(caught.value)


def test_references_to_other_settings_and_what_they_say() -> None:
    check_words(["rounds=3", "model.hidden=${seed}", "partition.seed=${..a.b[0]}"])
    check_allowed(OmegaConf.create({"seed": 1, "strategy": {"seed": "${seed}", "base": {"s": "${..seed}"}}}))
    with pytest.raises(ConfigError, match=r"model\._target_=os\.system"):
        check_allowed(OmegaConf.create({"name": "os.system", "model": {"_target_": "${name}"}}))
    halves = {"x": "$", "y": "{oc.env:HOME}", "z": "${x}${y}"}  # another reading of it would compute it
    with pytest.raises(ConfigError, match=r"^z: "):
        check_allowed(OmegaConf.create(halves))


@pytest.mark.parametrize(
    "word",
    ["hydra.searchpath=[file:///tmp]", "+hydra.job.env_set.A=1", "hydra/launcher=joblib", "~hydra.run"],
)
def test_settings_of_hydra_itself(word: str) -> None:
    with pytest.raises(ConfigError, match="Hydra's own settings"):
        check_words([word])


def test_every_option_of_conf_may_be_built() -> None:
    groups = [f for f in (ROOT / "conf").iterdir() if f.is_dir() and f.name not in ("hydra", "experiment")]
    files = [f for group in groups for f in group.rglob("*.yaml")]
    assert len(files) > 100
    for file in files:
        for key, node in OmegaConf.to_container(OmegaConf.load(file), resolve=False).items():
            if key == "_target_" and node != "???":
                check_allowed({key: node}, file.name)
            elif isinstance(node, dict) and "_target_" in node:
                check_allowed({k: v for k, v in node.items() if not isinstance(v, str) or "$" not in v}, key)
    check_allowed(compose_quickly(["strategy=ggeur", "task=detection"]))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module that nothing has imported."""
    (tmp_path / "hospital_code.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hospital_code", raising=False)
    monkeypatch.delenv(RAN, raising=False)
    return "hospital_code"


def test_modules_of_the_owner_once_the_owner_names_them(
    own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, loss = {"_target_": f"{own_module}.Net"}, {"_target_": f"{own_module}.loss"}
    with pytest.raises(ConfigError, match=f"FEDSIM_ALLOW={own_module}, or allow="):
        check_allowed(net, "model")
    assert RAN not in os.environ, "what is refused is not imported either"
    with granted([own_module]):
        check_allowed(net, "model")
        check_allowed(loss, "model")
        for inner in ("os.system", "rmtree", "Outer.method", "nothing", "os"):
            with pytest.raises(ConfigError, match="not among"):
                check_allowed({"_target_": f"{own_module}.{inner}"}, "model")
    with granted([f"{own_module}.Net"]):
        check_allowed(net, "model")
        with pytest.raises(ConfigError, match="not among"):
            check_allowed(loss, "model")
    monkeypatch.setenv(VARIABLE, f"another, {own_module}.loss")
    check_allowed(loss, "model")


def test_a_list_of_names_holds_names() -> None:
    assert listed(" a.b, c  d.E ", "allow") == ("a.b", "c", "d.E") and listed("", "allow") == ()
    with pytest.raises(ConfigError, match=r"allow: '\*' is neither a module nor a dotted name"):
        listed("a *", "allow")


def test_hydra_has_a_list_of_its_own_behind_this_one() -> None:
    """1.3.4 brought it, 1.3.6 looks at what a name stands for; without it, one slip here would run anything."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "hydra-core>=1.3.6,<1.4" in needs
    assert tuple(map(int, version("hydra-core").split(".")[:3])) >= (1, 3, 6)
    for target in ("os.system", "logging.os.system", "builtins.eval"):
        with pytest.raises(InstantiationException):
            instantiate({"_target_": target, "_args_": ["1"]})
