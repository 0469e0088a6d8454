"""Composing, checking and keying a configuration, in process."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import compose_quickly
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from problems import QUIET

import fedsim
from fedsim.config.check import validate
from fedsim.config.compose import compose, load
from fedsim.config.explain import explain, known_keys
from fedsim.config.schema import RayConfig
from fedsim.errors import ConfigError
from fedsim.run.key import finished, method_name, run_dir, run_key, run_name


def refused(*overrides: str) -> str:
    """The message that these overrides are refused with."""
    with pytest.raises(ConfigError) as caught:
        validate(compose(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def my_conf(tmp_path: Path) -> Path:
    """A loose folder with a third party's strategy."""
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy/mine.yaml").write_text("_target_: my_methods.gossip.Gossip\nfanout: 3\n")
    return tmp_path


def test_defaults_are_valid_and_typed() -> None:
    config = compose()
    validate(config)
    assert (config.rounds, config.num_clients, config.clients_per_round) == (50, 20, 5)
    client = config.client  # plain SGD
    assert (client.momentum, client.weight_decay, client.clip_norm, client.lr_decay) == (0, 0, None, 1)
    assert config.system is None and config.topology is None and config.attack is None
    assert OmegaConf.get_type(config.engine) is RayConfig
    assert "hydra" not in config


def test_experiment_wins_over_defaults_and_overrides_win_over_it() -> None:
    assert (
        compose(["experiment=quickstart"]).rounds,
        compose(["experiment=quickstart", "rounds=3"]).rounds,
    ) == (40, 3)
    config = compose(["experiment=quickstart", "strategy=fedspeed"])
    assert (config.name, config.method, config.partition.alpha) == ("quickstart", "fedspeed", 0.3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy=fedsped", "strategy=fedsped: no such option; nearest is 'fedspeed'"),
        ("experiment=quickstar", "experiment=quickstar: no such option; nearest is 'quickstart'"),
        ("stratgy=fedavg", "unknown key 'stratgy'; nearest is 'strategy'"),
        ("engine.worker=2", "unknown key 'engine.worker'; nearest is 'engine.workers'"),
        ("client.momentun=0.5", "unknown key 'client.momentun'; nearest is 'client.momentum'"),
        ("strategy.server_lrr=1", "unknown key 'strategy.server_lrr'; nearest is 'strategy.server_lr'"),
        ("lr=0.1", "unknown key 'lr'; did you mean 'client.lr'?"),
        ("strategy.zzz=1", "unknown key 'strategy.zzz'; strategy has server_lr, weighting"),
        ("qwertyuiop=1", "unknown key 'qwertyuiop'"),
        ("+foo=1", "unknown key 'foo'"),
        ("clients=5", "unknown key 'clients'; did you mean 'num_clients'?"),
        ("client.learning_rate=1", "unknown key 'client.learning_rate'; did you mean 'client.lr'?"),
        ("optimizer=adam", "unknown key 'optimizer'; did you mean 'client=adam'?"),
        ("rounds:5", "cannot read the setting 'rounds:5': type rounds=5"),
        ("+round=1", "unknown key 'round'; nearest is 'rounds'"),
        ("+client.epoch=1", "unknown key 'client.epoch'; nearest is 'client.epochs'"),
        ("+tracker.wandb.enity=x", "unknown key 'tracker.wandb.enity'; nearest is 'tracker.wandb.entity'"),
        ("+experiment=quickstart", "Multiple values for experiment: write it once, and without '+'"),
        ("rounds=abc", "rounds=abc: must be a whole number"),
        ("rounds=1.5", "rounds=1.5: must be a whole number"),
        ("client.lr=fast", "client.lr=fast: must be a number"),
        ("client.shuffle=maybe", "client.shuffle=maybe: must be true or false"),
        ("rounds", "'rounds' is neither a command (fedsim --help names them) nor a setting: write key=value"),
        ("seed=1,2", "seed=1,2: several values need a sweep; add -m"),
        ("model=null", "model=null: a group needs the name of one of its options"),
        ("~model", "model: has no value; add model=VALUE"),
        ("~strategy._target_", "strategy: has no _target_, the dotted path of its class (my_module.MyClass)"),
        (
            "strategy._target_=strategies.fedavgg.FedAvg",
            "strategy._target_=strategies.fedavgg.FedAvg: there is no module 'strategies.fedavgg'; "
            "nearest is 'strategies.fedavg'",
        ),
        ("strategy._target_=nowhere.X", "strategy._target_=nowhere.X: there is no module 'nowhere'"),
        ("out=${nothere}", "out: Interpolation key 'nothere' not found"),
    ],
)  # fmt: skip
def test_unusable_overrides_name_the_key_and_the_way_out(override: str, message: str) -> None:
    assert refused(override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=-3", "rounds=-3: must be at least 1"),
        ("seed=-1", "seed=-1: must be between 0 and 2**63 - 1"),
        ("clients_per_round=30", "clients_per_round=30: must be between 1 and num_clients (20)"),
        ("clients_per_round=0", "clients_per_round=0: must be between 1 and num_clients (20)"),
        ("client.lr=0", "client.lr=0.0: must be positive"),
        ("client.lr=nan", "client.lr=nan: must be finite"),
        ("client.momentum=1", "client.momentum=1.0: must be in [0, 1)"),
        ("client.batch_size=0", "client.batch_size=0: must be at least 1"),
        ("client.steps=0", "client.steps=0: must be at least 1"),
        ("client.clip_norm=0", "client.clip_norm=0.0: must be positive"),
        ("partition.alpha=0", "partition.alpha=0: must be positive"),
        ("partition.alpha=low", "partition.alpha=low: must be a number"),
        ("evaluation.target=90", "evaluation.target=90.0: must be in [0, 1], as accuracies are"),
        ("engine.threads=0", "engine.threads=0: must be at least 1"),
        ("dtype=float23", "dtype=float23: must be one of float32, float64; nearest is 'float32'"),
        ("resume=always", "resume=always: must be one of auto, never"),
        ("failures.policy=skpi", "failures.policy=skpi: must be one of stop, skip; nearest is 'skip'"),
        ("name=''", "name='': must not be empty"),
    ],
)
def test_impossible_values_are_refused(override: str, message: str) -> None:
    assert refused(override) == message


def test_each_engine_has_its_own_keys() -> None:
    assert refused("engine=serial", "engine.timeout=3") == (
        "unknown key 'engine.timeout': serial has no timeout; ray has"
    )
    assert refused("engine=serial", "+engine.timeout=3").startswith("unknown key 'engine.timeout'")
    assert "must be 1 with engine=serial" in refused("engine=serial", "engine.workers=2")
    assert compose(["engine.timeout=3"]).engine.timeout == 3


def test_key_depends_on_results_only() -> None:
    base = ["strategy=fedspeed", "seed=3", "client.lr=0.05"]
    key = run_key(compose(base))
    assert len(key) == 64
    assert run_key(compose(base[::-1])) == key
    same = (
        "name=x out=elsewhere dir=here resume=never tags=[a,b] method=mine tracker=quiet checkpoint.every=1"
    )
    same += " engine.workers=7 engine.address=auto engine.store_mb=9 engine.timeout=5 rounds=51"
    same += " strategy.alpha=1"
    for overrides in (same.split(), ["engine=serial"]):
        assert run_key(compose([*base, *overrides])) == key, overrides
    other = [
        "seed=4",
        "dtype=float64",
        "engine.chunks=2",
        "engine.threads=2",
        "strategy.rho=0.2",
    ]
    keys = {run_key(compose_quickly([*base, override])) for override in other}
    assert len(keys) == len(other) and key not in keys


def test_key_survives_the_run_folder(tmp_path: Path) -> None:
    config = compose(["strategy=fedspeed", f"out={tmp_path}"])
    folder = run_dir(config)
    assert folder == tmp_path / "default" / f"fedspeed-s0-{run_key(config)[:8]}"
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    again = load(folder / "config.yaml")
    validate(again)
    assert run_key(again) == run_key(config) and OmegaConf.get_type(again.engine) is RayConfig

    assert not finished(config)
    (folder / "summary.json").write_text('{"status": "interrupted"}')
    assert not finished(config)
    (folder / "summary.json").write_text('{"status": "done"}')
    assert finished(config)
    config.resume = "never"
    assert not finished(config)
    assert not finished(compose([f"dir={folder}", "seed=1"])), "another run lies in that folder"


def test_load_refuses_what_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rounds: 3\nroundz: 4\n")
    for name in ("config.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match="not a run's configuration"):
            load(tmp_path / name)


def test_method_name_comes_from_the_choice_or_the_target(my_conf: Path) -> None:
    config = compose([f"hydra.searchpath=[file://{my_conf}]", "strategy=mine", "seed=2"])
    assert method_name(config) == "mine"
    config.method = None
    assert method_name(config) == "gossip"
    assert run_name(config).startswith("gossip-s2-")
    assert run_dir(compose(["dir=a/b"])) == Path("a/b")


def test_compose_leaves_an_outer_hydra_alone(my_conf: Path) -> None:
    (my_conf / "theirs.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(my_conf), version_base="1.2"):
        outer = GlobalHydra.instance().hydra
        compose(["rounds=3"])
        refused("roundz=3")
        assert GlobalHydra.instance().hydra is outer
        assert hydra_compose("theirs").a == 1
    assert not GlobalHydra.instance().is_initialized()


def test_validate_accepts_python_objects_in_place_of_parts() -> None:
    config = compose()
    with open_dict(config):
        config.strategy = config.model = config.data = config.method = None
    validate(config)
    assert method_name(config) == "custom"


def test_known_keys_follow_the_choices(my_conf: Path) -> None:
    assert "strategy.rho" in known_keys(["strategy=fedspeed", "rounds=1"])
    assert "strategy.rho" not in known_keys()
    assert "strategy.fanout" in known_keys(["--config-dir", str(my_conf), "strategy=mine"])


class Part:
    """A part with a key of its own and one forbidden value."""

    def __init__(self, *, radius: float = 1.0) -> None:
        if radius < 0:
            raise ConfigError(f"strategy.radius={radius}: must not be negative")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "strategy._target_=strategies.fedavg.Fedavg",
            r"no 'Fedavg' in 'strategies\.fedavg'; nearest is 'FedAvg'",
        ),
        ("strategy._target_=strategies.fedavg.Nope", r"no 'Nope' in 'strategies\.fedavg'; it has FedAvg"),
        ("strategy._target_=strategies.fedavg", "is a module; name a class or function of it; it has FedAvg"),
        ("strategy._target_=fedsim.models.dense.MLP", "MLP is no strategy; type strategy=NAME"),
        (
            "model._target_=fedsim.models.dense.MLPP",
            r"no 'MLPP' in 'fedsim\.models\.dense'; nearest is 'MLP'",
        ),
        ("model._target_=strategies.fedavg.FedAvg", "FedAvg is no model; type model=NAME"),
        ("partition._target_=fedsim.data.partition.irid", "nearest is 'iid'"),
        ("partition._target_=fedsim.data.digits.digits", r"is no partition, which is called as \(labels"),
        ("data._target_=math.pi", "is a float, neither a class nor a function"),
    ],
)
def test_targets_that_are_not_there_or_of_another_kind_are_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        fedsim.simulate([setting, *QUIET, "engine=serial", "rounds=1"])
    assert str(caught.value).startswith(setting)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": f"{__name__}.Part", "radius": -1}, "strategy.radius=-1: must not be negative"),
        ({"_target_": f"{__name__}.Part", "server_lrr": 1}, "unknown key 'strategy.server_lrr'; nearest is"),
        ({"_target_": f"{__name__}.Pert"}, f"strategy._target_={__name__}.Pert: cannot be imported"),
        ({"_target_": "no_such_package.X"}, "cannot be imported: No module named 'no_such_package'"),
    ],
)
def test_constructors_speak_for_themselves(node: dict[str, object], message: str) -> None:
    config = OmegaConf.create({"strategy": node})
    assert isinstance(config, DictConfig)
    with pytest.raises(Exception) as caught:
        instantiate(config.strategy)
    text = explain(caught.value)
    assert message in text and "\n" not in text
