"""A backdoor: what attackers train on, what is measured, and that both fit any kind of samples."""

from __future__ import annotations

import json
import re

import pytest
import torch
from problems import classification, hashes

from clients.attacks import Backdoor
from clients.attacks.backdoor import stamped
from fedsim.config.compose import compose
from fedsim.data.dataset import Dataset, Samples
from fedsim.errors import ConfigError
from fedsim.run import participants


def attack(**changed: object) -> Backdoor:
    options = {"fraction": 0.3, "target": 1, "poison": 0.5, "size": 2, "value": None, "boost": 1.0}
    return Backdoor(**(options | changed))  # type: ignore[arg-type]


def test_the_trigger_is_a_square_of_an_image_or_the_end_of_a_vector() -> None:
    images = torch.zeros(2, 1, 4, 4)
    assert (
        attack(value=9.0).stamp(images)[:, 0].tolist()
        == [[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9]]] * 2
    )
    assert attack(value=7.0, size=1).stamp(torch.zeros(1, 3)).tolist() == [[0, 0, 7]]


def test_the_same_share_of_samples_is_poisoned_however_they_are_read() -> None:
    x, y = torch.zeros(400, 3), torch.full((400,), 2)
    samples = stamped(Samples(x, y), attack(value=5.0), 0.3)
    rows = torch.arange(400)
    xs, ys = samples.take(rows)
    marked = ys == 1
    assert 0.2 < marked.double().mean() < 0.4 and torch.equal(samples.labels, ys)
    assert torch.equal(xs[:, 1:] == 5, marked[:, None].expand(-1, 2)) and not xs[:, 0].any()
    some = torch.tensor([7, 3, 399])
    assert torch.equal(samples.take(some)[1], ys[some])
    assert not x.any() and len(samples) == 400


def test_the_value_is_the_largest_of_the_training_samples() -> None:
    data = Dataset(
        Samples(torch.tensor([[1, 16], [3, 2]], dtype=torch.uint8), torch.tensor([0, 1])), None, ("a", "b")
    )
    assert attack().fitted(data).value == 16 and attack(value=3.0).fitted(data).value == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": 2}, "attack.target=2: the data set has 2 classes, from 0"),
        ({"size": 3}, "attack.size=3: samples of shape (2,) have 2 at most"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(changed: dict[str, object], message: str) -> None:
    data = Dataset(Samples(torch.ones(2, 2), torch.tensor([0, 1])), None, ("a", "b"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        attack(**changed).fitted(data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack.poison=0", "attack.poison=0: a share"),
        ("attack.boost=0", "attack.boost=0: must be positive"),
        ("attack.size=0", "attack.size=0: must be at least 1"),
    ],
)
def test_impossible_options_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        participants.attack(compose(["attack=backdoor", override]))


DIGITS = (
    "data=digits",
    "data.subset=600",
    "partition=iid",
    "model.hidden=[32]",
    "num_clients=6",
    "clients_per_round=6",
    "rounds=12",
    "evaluation.every=6",
    "attack=backdoor",
    "attack.fraction=0.34",
    "engine=serial",
    "tracker=quiet",
)


def test_a_backdoor_works_and_its_success_is_a_column(tmp_path: object) -> None:
    import fedsim

    found = {}
    for name, more in {
        "none": ("attack.fraction=0",),
        "planted": (),
        "clipped": ("aggregator=centered_clipping", "aggregator.tau=0.3"),
    }.items():
        result = fedsim.simulate([*DIGITS, f"out={tmp_path}", *more])
        rows = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
        assert ["attack_success" in row for row in rows] == [row["round"] % 6 == 0 for row in rows]
        assert result.summary["attack_success"] == rows[-1]["attack_success"]
        found[name] = rows[-1]
    assert found["none"]["attack_success"] < 0.3 < 0.6 < found["planted"]["attack_success"]
    assert found["planted"]["accuracy"] > 0.7


def test_boosted_updates_are_that_many_times_as_long() -> None:
    problem = classification(cohorts=[range(6)])
    once, twice = (
        problem.run(
            "rounds=1", "attack=backdoor", "attack.fraction=1", "attack.poison=1", f"attack.boost={b}"
        )
        for b in (1, 2)
    )
    start = problem.run("rounds=1", "client.lr=1e-30").weights
    for name, value in start.items():
        torch.testing.assert_close(
            twice.weights[name] - value, 2 * (once.weights[name] - value), rtol=0, atol=1e-5
        )
    assert hashes(once) != hashes(twice)


def test_centered_clipping_goes_on_from_its_last_result_and_survives_a_restart(tmp_path: object) -> None:
    settings = (
        "strategy=scaffold",
        "aggregator=centered_clipping",
        "aggregator.tau=0.05",
        "checkpoint.every=1",
    )
    whole = classification().run(*settings, "rounds=3")
    alone = classification().run(*settings, "rounds=1")
    folder = f"dir={tmp_path}/run"
    classification().run(*settings, "rounds=1", folder)
    resumed = classification().run(*settings, "rounds=3", folder)
    assert hashes(whole)[0] == hashes(alone)[0] and hashes(resumed) == hashes(whole)


def test_optimised_attacks_are_aimed_at_the_rule_in_use() -> None:
    problem = classification(cohorts=[range(6)])
    clip = ("aggregator=norm_clip",)
    rules = ((), clip, (*clip, "aggregator.before=[{clipping: {c: 0.001}}]"))
    attack = ("rounds=1", "attack=ipm_optimal", "attack.fraction=0.34")
    assert len({tuple(hashes(problem.run(*attack, *rule))) for rule in rules}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("aggregator.before=[nmn]",), r"aggregator.before: 'nmn': choose among"),
        (("aggregator.before=[nnm]",), r"nnm needs an f, which the rule has not"),
        (
            ("aggregator.before=[{nnm: {f: 3}}]",),
            r"nnm needs f \+ 1 = 4 updates, clients_per_round=3 gives 3",
        ),
        (
            ("aggregator=mda", "aggregator.f=1", "aggregator.before=[{bucketing: {s: 2}}]"),
            r"mda needs 2f \+ 1 = 3 updates, clients_per_round=3 gives 2 buckets of 2; type clients_per_round=5 or ag",
        ),
        (("aggregator=monna", "aggregator.f=1", "aggregator.idx=3"), r"monna trusts update 3, from 0"),
        (
            ("strategy=heterofl", "aggregator.before=[clipping]"),
            r"aggregator: parts of models can only be averaged",
        ),
    ],
)
def test_what_updates_are_too_few_for_is_refused_before_anything_starts(
    settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run("clients_per_round=3", *settings)
