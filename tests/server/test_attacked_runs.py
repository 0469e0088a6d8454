"""Every attack, around every kind of client and on every engine; the experiments with attackers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from adapting import adapted
from problems import Problem, classification, hashes
from torch import Tensor, nn

from fedsim.config.check import validate
from fedsim.config.compose import compose
from fedsim.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf/attack"
IMAGES = ("cat_map", "lotka_volterra")  # attacks that need images
NAMES = sorted(p.stem for p in CONF.glob("*.yaml"))


# -- any client, any strategy -------------------------------------------------------------------------------------


@cache
def calm_hashes(settings: tuple[str, ...]) -> list[str]:
    return hashes(classification().run(*settings))


NIGHTLY = pytest.mark.nightly
OFTEN = (
    "fedavg",
    "scaffold",
    "moon",
    "gossip",
    "ggeur",
    "fraug",
    "fedloge",
    "heterofl",
    "ifca",
    "fedlabel",
    "fedbuff",
)


@pytest.mark.parametrize(
    "strategy", ["scaffold", *(pytest.param(s, marks=NIGHTLY) for s in ("feddyn", "moon"))]
)
@pytest.mark.parametrize("attack", [n for n in NAMES if n not in (*IMAGES, "none")])
def test_any_attack_fits_around_any_client(attack: str, strategy: str) -> None:
    settings = (f"strategy={strategy}", "rounds=2", "clients_per_round=6")
    options = ("attack.z=1.0",) if attack == "alie" else ("attack.loss=0.5",) if attack == "drop" else ()
    stormy = classification().run(*settings, f"attack={attack}", "attack.fraction=0.34", *options)
    assert not set(calm_hashes(settings)) & set(hashes(stormy))
    assert all(torch.isfinite(v).all() for v in stormy.weights.values())


@pytest.mark.parametrize(
    ("attack", "method"),
    [
        ("random_uniform", ("strategy=scaffold", "aggregator=flag")),
        ("ipm", ("strategy=scaffold", "aggregator=flag")),
        ("ipm", ("strategy=fedspeed", "strategy.dual_mean=active", "aggregator=norm_clip")),
    ],
)
def test_attacked_runs_have_the_same_bits_on_ray(attack: str, method: tuple[str, ...], ray: str) -> None:
    settings = (*method, f"attack={attack}", "attack.fraction=0.34")
    expected = hashes(classification().run(*settings))
    assert hashes(classification().run(*settings, ray, "engine.workers=2")) == expected


# -- the experiments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byzantine", "byzantine_paper"])
def test_the_experiments_compose(name: str) -> None:
    validate(compose([f"experiment={name}"]))


def test_the_grid_composes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from experiments import byzantine

    args = Namespace(out=str(tmp_path), what="digits", seeds=[0])
    values = byzantine.cohort(args, 15, 2)
    for rule, attack in (("Bulyan", "ALIE z=1.5"), ("flag, unit", "none")):
        for kind in ("gradients", "local"):
            settings = (*byzantine.train(kind, rule), *byzantine.RULES[rule], *byzantine.ATTACKS[attack])
            validate(compose([o.format(**values) for o in (*byzantine.COMMON, *settings)]))
    found = {("mean", "none"): [90.0, 80.0], ("mean", "reverse"): [10.0], ("mean", byzantine.SUCCESS): [1.0]}
    byzantine.report(args, {**found, ("flag", "none"): [70.0, 71.0], ("flag", "drop"): [60.0]}, "title")
    said = capsys.readouterr().out
    assert (
        "| mean | 85.0 ± 7.1 | 10.0 | 1.0 | - | 10.0 |\n| flag | 70.5 ± 0.7 | - | - | 60.0 | 60.0 |" in said
    )
    rows = (tmp_path / "digits/table.csv").read_text().splitlines()
    assert (
        rows[1] == f"mean,none,85.0,{50**0.5},80.0,90.0,2" and rows[2] == "mean,reverse,10.0,nan,10.0,10.0,1"
    )
    assert (tmp_path / "digits/heatmap.png").stat().st_size > 5000


# -- every attack, every method -----------------------------------------------------------------------------------

STRATEGIES = sorted(
    p.stem for p in CONF.with_name("strategy").glob("*.yaml") if p.stem != "centralised"
)  # no clients
SLOPES = ("one_byte", "decomfl", "fedkseed")  # of these clients no vectors come that could be changed
ON_DATA = ("label_flip", *IMAGES)
BOXES = (  # of classifiers: one "box" a sample
    "view@views.weak=noise",
    "view@views.strong=noise",
    "strategy.backbone=body.*",
    "strategy.decode._target_=problems.guessed_boxes",
    "strategy.losses.path=problems.guessed_losses",
    "strategy.warmup_rounds=1",
    "strategy.lo=0.12",
    "strategy.hi=0.4",
)
NEEDS = {  # what a method cannot do without
    "fedsgd": ("client.steps=1",),
    "ffa": ('strategy.frozen=["*bias"]',),
    "fedsa": ('strategy.local=["*bias"]',),
    "rolora": ('strategy.turns=[["*weight"], ["*bias"]]',),
    "ranked_lora": ("strategy.ranks=[2, 1]",),
    "fedbuff": ("system=lognormal",),
    "feddf": ("strategy.data=noise", "strategy.steps=4"),
    "fedasync": ("system=lognormal",),
    **dict.fromkeys(("fedlabel", "fixmatch", "uda", "fedmatch"), ("data.labelled={at: client, share: 0.5}",)),
    **dict.fromkeys(("semifl", "server_only"), ("data.labelled={at: server, count: 6}",)),
    **dict.fromkeys(("fedsto", "pseudo_ema"), ("data.labelled={at: server, count: 6}", *BOXES)),
    **dict.fromkeys(("one_byte", "decomfl", "fedkseed", "mezo"), ("strategy.lr=0.05",)),
    **dict.fromkeys(("gossip", "gossip_async", "gossip_fedavg", "dpsgd"), ("topology=ring",)),
}


class Camera(nn.Module):
    """A net for tiny grey images, with features and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh()), nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def stormy(strategy: str, attack: str) -> None:
    draw = torch.Generator().manual_seed(0)
    pictures = [
        (torch.randn(n, 1, 6, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw))
        for n in (5, 3, 4, 6)
    ]
    settings = [f"strategy={strategy}", *NEEDS.get(strategy, ()), f"attack={attack}", "attack.fraction=0.5"]
    model = (
        (lambda: adapted(nn.Flatten(), features=36))
        if strategy in ("fedit", "fedex", "flora", "ranked_lora")
        else Camera
    )
    problem = Problem(model, pictures, ("rounds=2", "clients_per_round=4", "client.steps=1"))
    if strategy == "mezo" or (strategy in SLOPES and attack not in ON_DATA):
        with pytest.raises(ConfigError, match=r"attack: (this one changes vectors|MeZO has all samples)"):
            problem.run(*settings)
        return
    result = problem.run(*settings)
    assert len(result.rows) == 2 and all(torch.isfinite(v).all() for v in result.weights.values())


@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s in OFTEN else NIGHTLY) for s in STRATEGIES]
)
def test_every_method_survives_attackers_that_see_everything(strategy: str) -> None:
    stormy(strategy, "ipm")


@pytest.mark.nightly
@pytest.mark.parametrize("attack", [n for n in NAMES if n not in ("ipm", "none")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_method_survives_every_attack(strategy: str, attack: str) -> None:
    stormy(strategy, attack)


def test_statistics_of_different_shapes_stay_honest() -> None:
    """Classes that a client lacks have no row: there is no mean of what clients send, so nothing to collude about."""
    settings = ("strategy=ggeur", "strategy.target=6", "rounds=1", "clients_per_round=6")
    calm, attacked = (classification().run(*settings, f"attack={a}") for a in ("none", "ipm"))
    assert [r["ranks"] for r in calm.rows] == [r["ranks"] for r in attacked.rows]
    assert hashes(calm) != hashes(attacked)
