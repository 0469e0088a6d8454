"""One-shot methods whose clients train models of different architectures (``client.classes``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callbacks import Interrupt
from one_shot_settings import METHODS, SMALL
from problems import classification, hashes
from safetensors.torch import load_file
from torch.nn import functional as F

import fedsim
from fedsim.config.yamlfile import read_yaml
from fedsim.errors import ConfigError
from fedsim.models import MLP, Linear
from fedsim.rng import numpy_rng, torch_rng

MODEL = ("model=mlp", "model.hidden=[5]")
HALF = "client.classes=[{share: 0.5}, {share: 0.5, model: linear}]"
NONE_OF_OURS = "client.classes=[{share: 0.5, model: {hidden: [4]}}, {share: 0.5, model: linear}]"


def run(name: str, *overrides: str, model: tuple[str, ...] = MODEL, **given: Any) -> fedsim.RunResult:
    options = (f"strategy={name}", *model, *METHODS.get(name, ()), "evaluation.every=1", "dtype=float64")
    return classification(model=None).run(*options, *overrides, **given)


def lines(result: fedsim.RunResult) -> dict[int, dict[str, Any]]:
    found = json.loads((result.dir / "uploads" / "uploads.json").read_text())["clients"]
    return {line["client"]: line for line in found}


def test_each_client_trains_what_it_would_if_all_had_its_model(tmp_path: Path) -> None:
    mixed = lines(run("one_shot", HALF, "rounds=1", f"out={tmp_path}"))
    alike = {
        "MLP": lines(run("one_shot", "rounds=1", f"out={tmp_path}")),
        "Linear": lines(run("one_shot", "rounds=1", f"out={tmp_path}", model=("model=linear",))),
    }
    order = numpy_rng(0, "classes").permutation(6)
    for client, line in mixed.items():
        second = client in order[3:]
        assert (line["class"], line["architecture"]) == ((1, "Linear") if second else (0, "MLP"))
        assert line["sha256"] == alike[line["architecture"]][client]["sha256"]
    assert len(list((tmp_path / "uploads").iterdir())) == 3


def test_who_is_excluded_moves_nobody_to_another_class(tmp_path: Path) -> None:
    whole, less = (lines(run("one_shot", HALF, "rounds=1", *o)) for o in ((), ("exclude=[1]",)))
    assert sorted(less) == [0, 2, 3, 4, 5]
    assert {c: line["class"] for c, line in less.items()} == {c: whole[c]["class"] for c in less}
    assert all(less[c]["sha256"] == whole[c]["sha256"] for c in less)


def test_ensembles_are_those_of_the_models_by_hand() -> None:
    found = run("one_shot", HALF, "rounds=1")
    x, y = classification().test
    logits, weights, means = [], [], []
    for client, line in sorted(lines(found).items()):
        model = (MLP((4,), 3, [5]) if line["class"] == 0 else Linear((4,), 3)).double()
        tensors = load_file(found.dir / "uploads" / f"{client}.safetensors")
        model.load_state_dict(tensors)
        logits.append(model(x.double()).detach())
        if line["class"] == 0:
            weights.append(line["samples"])
            means.append(tensors)
    mean = torch.stack(logits).mean(0)
    row = found.rows[0]
    assert row["uniform/loss"] == pytest.approx(float(F.cross_entropy(mean, y)), rel=1e-12)
    p = torch.stack(logits).softmax(2).mean(0)
    assert row["probabilities/loss"] == pytest.approx(float(F.nll_loss(p.log(), y)), rel=1e-12)
    for name, value in found.weights.items():  # FedAvg of those like the run's own
        expected = sum(n * t[name] for n, t in zip(weights, means, strict=True)) / sum(weights)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert row["fedavg/accuracy"] == row["accuracy"]


@pytest.mark.parametrize("classes", [HALF, NONE_OF_OURS], ids=["one of them ours", "none"])
def test_all_methods_start_from_the_same_models(classes: str, tmp_path: Path) -> None:
    names = [n for n in METHODS if n != "one_shot" or classes == HALF]
    found = [run(n, classes, "rounds=2", f"out={tmp_path}") for n in names]
    assert len({r.summary["uploads_hash"] for r in found}) == 1
    assert len(list((tmp_path / "uploads").iterdir())) == 1  # asked for once, by the first
    for result in found:
        first, later = result.rows
        assert first["models"] == 6 and first["cohort"] == [0, 1, 2, 3, 4, 5]
        assert first["train_loss"] == found[0].rows[0]["train_loss"]
        assert ("fedavg/accuracy" in first) == (classes == HALF)
        if "aggregator_hash" not in first:
            assert first["bytes_up"] == found[0].rows[0]["bytes_up"]
            assert (later["bytes_up"], later["bytes_down"]) == (0, 0)


def test_feddf_has_a_student_of_each_architecture(tmp_path: Path) -> None:
    """Two full-batch steps of Adam from FedAvg of those alike, on the mean of all models' logits, by hand."""
    steps, lr = 2, 0.01
    words = (f"strategy.steps={steps}", f"strategy.lr={lr}", "strategy.batch_size=12", "rounds=1")
    each, one = (
        run("feddf", HALF, *words, f"strategy.students={s}", f"out={tmp_path}") for s in ("each", "one")
    )
    assert hashes(each) == hashes(one) and not any("student/" in k for k in one.rows[0])
    x, y = classification().test
    noise = torch.randn((12, 4), generator=torch_rng(0, "server/feddf/noise"), dtype=torch.float64)
    models, own = [], []
    for client, line in sorted(lines(each).items()):
        model = (Linear((4,), 3) if line["class"] else MLP((4,), 3, [5])).double()
        model.load_state_dict(load_file(each.dir / "uploads" / f"{client}.safetensors"))
        models.append(model)
        own += [(line["samples"], model)] if line["class"] else []
    teacher = torch.stack([m(noise).detach() for m in models]).mean(0)
    student, total = Linear((4,), 3).double(), sum(n for n, _ in own)
    mean = {k: sum(n / total * m.state_dict()[k] for n, m in own) for k in student.state_dict()}
    student.load_state_dict(mean)
    optimiser = torch.optim.Adam(student.parameters(), lr)
    for t in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 + np.cos(np.pi * t / steps)) / 2
        optimiser.zero_grad()
        F.kl_div(student(noise).log_softmax(1), teacher.softmax(1), reduction="batchmean").backward()
        optimiser.step()
    assert each.rows[0]["student/1/loss"] == pytest.approx(
        float(F.cross_entropy(student(x.double()), y).detach()), rel=1e-9
    )


def test_feddf_stops_where_validation_samples_say_so(tmp_path: Path) -> None:
    """The loss of the run's own student rises in the fifth round."""
    words = (HALF, "evaluation.validation=0.3", "strategy.steps=12", "rounds=6", "strategy.lr=3")
    plain = run("feddf", *words, f"out={tmp_path}")
    stopped = run("feddf", *words, f"out={tmp_path}", "strategy.early_stop=1")
    losses = [r["val/loss"] for r in plain.rows]
    assert np.argmin(losses[:5]) == 3 and losses == sorted(losses[:4], reverse=True) + losses[4:]
    assert [r["val/loss"] for r in stopped.rows] == [*losses[:4], losses[3], losses[3]]
    assert hashes(stopped)[3:] == [hashes(plain)[3]] * 3
    with pytest.raises(ConfigError, match="early_stop goes by the loss on validation samples"):
        run("feddf", "strategy.early_stop=2")


def test_the_place_of_models_says_of_which_classes_they_are(tmp_path: Path) -> None:
    def places() -> int:
        return len(list((tmp_path / "uploads").iterdir()))

    run("dense", NONE_OF_OURS, "rounds=1", f"out={tmp_path}")
    run(
        "dense", NONE_OF_OURS, "rounds=1", "model.hidden=[7]", f"out={tmp_path}"
    )  # the student, which no client trains
    assert places() == 1
    run("dense", NONE_OF_OURS.replace("[4]", "[3]"), "rounds=1", f"out={tmp_path}")
    run("dense", HALF, "rounds=1", f"out={tmp_path}")
    assert places() == 3


def test_named_models_of_other_classes_are_refused(tmp_path: Path) -> None:
    first = run("one_shot", HALF, "rounds=1", f"out={tmp_path}/a")
    with pytest.raises(
        ConfigError, match=r"strategy\.uploads: .* is (MLP|Linear) of another class of clients"
    ):
        run("dense", "rounds=1", f"strategy.uploads={first.dir}", f"out={tmp_path}/b")


@pytest.mark.parametrize("name", ["co_boosting", "fens", "feddf"])
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    straight = run(name, HALF, f"out={tmp_path}/a")
    again = (HALF, f"dir={tmp_path}/run", f"out={tmp_path}/b")
    with pytest.raises(KeyboardInterrupt):
        run(name, *again, callbacks=[Interrupt(2)])
    resumed = run(name, *again)
    assert hashes(resumed) == hashes(straight)
    name = "student/1/loss" if name == "feddf" else "ensemble/loss"
    assert [r[name] for r in resumed.rows] == [r[name] for r in straight.rows]


def test_statistics_of_one_class_alone(tmp_path: Path) -> None:
    classes = "client.classes=[{share: 0.5}, {share: 0.5, model: {batch_norm: true}}]"
    for name in ("dense", "fens"):
        found = run(name, classes, "rounds=2", "client.batch_size=3", f"out={tmp_path}/{name}")
        held = [load_file(p) for p in sorted((found.dir / "uploads").glob("*.safetensors"))]
        assert sum("norms.0.running_mean" in t for t in held) == 3
        assert all(np.isfinite(r["ensemble/loss"]) for r in found.rows)


def test_devices_compute_as_much_as_their_model_takes(tmp_path: Path) -> None:
    """4 -> 5 -> 3 against 4 -> 3: products of 5 * 4 + 3 * 5 and 3 * 4 entries; backwards the first layer's once."""
    slow = f"{HALF.replace('linear', '{option: linear}')}"
    found = run("one_shot", slow, "client.classes_by=speed", "system=lognormal", "rounds=1")
    assert found.rows[0]["sim_seconds"] > 0
    table = found.per_client.pivot_table(index="client", columns="metric", values="value")
    share = {c: line["class"] for c, line in lines(found).items()}
    for client, row in table.iterrows():
        whole, linear = 2 * 20 + 3 * 15, 2 * 12
        assert row["gradients"] == pytest.approx(row["samples"] * (linear / whole if share[client] else 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["co_boosting", "fens"])
def test_any_number_of_workers_gives_the_same_bits(name: str, ray: str, tmp_path: Path) -> None:
    options = (HALF, "rounds=2", "engine.chunks=3")
    serial = run(name, *options, f"out={tmp_path}/a")
    spread = run(name, *options, f"out={tmp_path}/b", ray, "engine.workers=2")
    assert hashes(spread) == hashes(serial)
    assert spread.summary["uploads_hash"] == serial.summary["uploads_hash"]
    for key in ("ensemble/loss", "uniform/loss", "fedavg/loss", "train_loss", "bytes_up"):
        assert [r.get(key) for r in spread.rows] == [r.get(key) for r in serial.rows]


OTHER = "client.classes=[{share: 1}, {share: 1, model: linear}]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=fedavg", OTHER), r"client\.classes: FedAvg puts vectors of one model together"),
        (("strategy=analytic", OTHER), r"client\.classes: Analytic puts vectors of one model together"),
        (("strategy=heterofl", OTHER), r"client\.classes: HeteroFL puts vectors of one model together"),
        (
            ("strategy=one_shot", NONE_OF_OURS),
            r"OneShot averages models of the run's architecture, which no class",
        ),
        (
            ("strategy=dense", NONE_OF_OURS, "strategy.start=fedavg"),
            "CoBoosting averages models of the run's",
        ),
        (("strategy=dense", OTHER, "compression=qsgd"), r"compression: it is for one model of all clients"),
        (
            ("strategy=dense", OTHER, "attack=label_flip", "attack.fraction=0.5"),
            "attack: it is for one model",
        ),
        (
            ("strategy=dense", OTHER.replace("linear", "linaer")),
            r"classes\[1\]\.model=linaer: .*nearest is 'linear'",
        ),
        (
            ("strategy=dense", OTHER.replace("linear", "{hiden: [2]}")),
            r"unknown key 'client\.classes\[1\]\.model\.hid",
        ),
        (
            ("strategy=dense", OTHER.replace("linear", "3")),
            r"client\.classes\[1\]\.model=3: must be an option",
        ),
        (
            ("strategy=dense", OTHER.replace("linear", "{hidden: [a]}")),
            r"client\.classes\[1\]: model\.hidden=\['a'\]",
        ),
        (
            ("strategy=dense", OTHER.replace("linear", "linear, width: 0.5")),
            "a width is a share of the run's model",
        ),
        (("strategy=dense", OTHER.replace("linear", "lenet")), r"client\.classes\[1\]: "),
        (
            ("strategy=dense", OTHER.replace("linear", "{_target_: problems.network, num_classes: 5}")),
            "Network gives 5 logits, MLP 3, and there are 3 classes",
        ),
    ],
    ids=lambda v: str(v[1:])[:60] if isinstance(v, tuple) else "",
)
def test_what_cannot_be_is_refused_by_name(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification(model=None).run(*MODEL, *words, *METHODS.get(words[0].partition("=")[2], ()))


def test_settings_are_needed_where_the_runs_model_was_handed_over() -> None:
    problem = classification()
    with pytest.raises(ConfigError, match=r"client\.classes\[1\]\.model: the run's model was handed over"):
        problem.run("strategy=dense", *SMALL, OTHER.replace("linear", "{hidden: [2]}"))
    found = problem.run(
        "strategy=dense", *SMALL, OTHER.replace("linear", "{option: mlp, hidden: [2]}"), "rounds=1"
    )
    assert sorted(line["architecture"] for line in lines(found).values()) == ["MLP"] * 3 + ["Network"] * 3


def test_a_model_of_ones_own_by_its_name(tmp_path: Path) -> None:
    own = OTHER.replace("linear", "{_target_: problems.network, kind: bn}")
    found = run("dense", own, "rounds=1", f"out={tmp_path}")
    recorded = read_yaml(found.dir / "config.yaml")
    assert list(recorded["code"]) == ["client.classes.1.model"]  # an edit of it is another run
    assert sorted(line["architecture"] for line in lines(found).values()) == ["MLP"] * 3 + ["network"] * 3


def test_a_model_that_is_the_runs_own_is_no_other(tmp_path: Path) -> None:
    plain = run("one_shot", "client.classes=[{share: 1}, {share: 1}]", "rounds=1", f"out={tmp_path}/a")
    named = run(
        "one_shot",
        "client.classes=[{share: 1}, {share: 1, model: {hidden: [5]}}]",
        "rounds=1",
        f"out={tmp_path}/a",
    )
    assert named.dir.name.split("-")[:3] == plain.dir.name.split("-")[:3]  # the same key
