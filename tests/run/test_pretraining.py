"""Weights that a run starts from: made once, found again, checked; and what they are trained on."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import pytest
import torch
from problems import QUIET, classification, hashes
from safetensors.torch import load_file

import fedsim
from fedsim.errors import ConfigError
from fedsim.local.pretext import nt_xent
from fedsim.models.dense import MLP
from fedsim.run import pretraining

DIGITS = (
    "data=digits",
    "data.subset=300",
    "engine=serial",
    "num_clients=4",
    "clients_per_round=2",
    "client.epochs=1",
    "model.hidden=[24]",
    *QUIET,
)
BRIEFLY = ("pretrain=central", "pretrain.training.epochs=2")
GENTLE = ("view@views.strong=affine", "views.strong.flip=0", "views.strong.shift=0.15")


def run(tmp_path, *overrides, **given):
    how = () if "pretrain=none" in overrides else BRIEFLY
    return fedsim.simulate([*DIGITS, f"out={tmp_path}", "rounds=1", *how, *overrides], **given)


def folder(tmp_path, result):
    return tmp_path / "pretrained" / result.summary["pretrained"]


@pytest.fixture
def counted(monkeypatch):
    """How often weights were trained."""
    made, make = [], pretraining._make

    def counting(*given):
        made.append(1)
        return make(*given)

    monkeypatch.setattr(pretraining, "_make", counting)
    return made


def test_a_run_starts_from_what_was_made_and_the_next_one_finds_it(tmp_path, counted, caplog):
    first = run(tmp_path)
    assert "a leak" in caplog.text
    there = folder(tmp_path, first)
    assert sorted(p.name for p in there.iterdir()) == [".lock", "made.json", "weights.safetensors"]
    made = json.loads((there / "made.json").read_text())
    assert made["samples"] == 300 and len(made["losses"]) == 2 and made["losses"][1] < made["losses"][0]
    assert "pooled" in made["samples_are"] and made["made_of"]["pretrain"]["training"]["lr"] == 0.05
    second = run(tmp_path, "strategy=fedprox", "seed=3", "client.lr=0.2")
    assert second.summary["pretrained"] == first.summary["pretrained"] and len(counted) == 1
    by_hand = run(tmp_path, "pretrain=none", initial=load_file(there / "weights.safetensors"))
    assert hashes(by_hand) == hashes(first) and "pretrained" not in by_hand.summary


def test_what_the_weights_depend_on_is_their_key(tmp_path, counted):
    names = [
        run(tmp_path, *overrides).summary["pretrained"]
        for overrides in (
            (),
            ("pretrain.training.lr=0.01",),
            ("pretrain.seed=1",),
            ("data.subset=299",),
            ("model.hidden=[23]",),
            ("dtype=float64",),
            ("pretrain=simclr", *GENTLE),
        )
    ]
    assert len(set(names)) == len(counted) == 7
    assert run(tmp_path, "pretrain.seed=null", "seed=1").summary["pretrained"] in names


def test_a_changed_file_is_made_again(tmp_path, counted, caplog):
    first = run(tmp_path)
    weights = folder(tmp_path, first) / "weights.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2], b""):
        weights.write_bytes(bad)
        assert hashes(run(tmp_path)) == hashes(first)
        assert weights.read_bytes() == good and "made again" in caplog.text
        caplog.clear()
    (weights.parent / "made.json").write_text("{")
    assert hashes(run(tmp_path)) == hashes(first) and len(counted) == 5


KILLED = """
import sys, os, signal
from fedsim.run import weightstore
from fedsim.local import pretext
if sys.argv[1] == "training":
    pretext.Supervised.fit = lambda self, job: os.kill(os.getpid(), signal.SIGKILL)
else:
    weightstore.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
import fedsim
fedsim.simulate(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["training", "writing"])
def test_a_process_killed_half_way_leaves_nothing_that_is_taken_for_weights(tmp_path, counted, where):
    settings = [*DIGITS, f"out={tmp_path}", "rounds=1", *BRIEFLY]
    done = subprocess.run([sys.executable, "-c", KILLED, where, *settings], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [there] = (tmp_path / "pretrained").iterdir()
    assert not (there / "weights.safetensors").exists() and not (there / "made.json").exists()
    assert folder(tmp_path, run(tmp_path)) == there and len(counted) == 1
    assert sorted(p.name for p in there.iterdir()) == [".lock", "made.json", "weights.safetensors"]


@pytest.mark.slow
def test_two_processes_make_them_once(tmp_path):
    settings = [*DIGITS, f"out={tmp_path}", "rounds=1", "pretrain=central", "pretrain.training.epochs=60"]
    code = "import sys, fedsim; print(fedsim.simulate(sys.argv[1:]).rows[-1]['weights_hash'])"
    both = [
        subprocess.Popen([sys.executable, "-c", code, *settings], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0].split()[-1] for process in both]
    assert said[0] == said[1]
    [there] = (tmp_path / "pretrained").iterdir()
    made = json.loads((there / "made.json").read_text())
    assert made["steps"] == 60 * 5


@pytest.mark.slow
def test_serial_and_ray_start_from_the_same(tmp_path):
    serial = run(tmp_path / "a", "pretrain=simclr", *GENTLE, "pretrain.training.batch_size=64")
    ray = run(
        tmp_path / "b",
        "pretrain=simclr",
        *GENTLE,
        "pretrain.training.batch_size=64",
        "engine=ray",
        "engine.workers=1",
    )
    assert serial.summary["pretrained"] == ray.summary["pretrained"] and hashes(serial) == hashes(ray)


def test_nt_xent_by_hand():
    """Two samples in the plane, T = 1/2: (1, 0) with (3, 4)/5, and (0, 1) with (-1, 0)."""
    z = torch.tensor(
        [[1.0, 0], [0, 2], [3, 4], [-1, 0]], dtype=torch.float64
    )  # rows i and 2 + i belong together
    cosines = {(0, 1): 0.0, (0, 2): 0.6, (0, 3): -1.0, (1, 2): 0.8, (1, 3): 0.0, (2, 3): -0.6}
    s = lambda i, j: math.exp(cosines[min(i, j), max(i, j)] / 0.5)  # noqa: E731
    terms = [
        -math.log(s(i, j) / sum(s(i, k) for k in range(4) if k != i))
        for i, j in ((0, 2), (1, 3), (2, 0), (3, 1))
    ]
    assert abs(nt_xent(z, 0.5).item() - sum(terms) / 4) < 1e-14


def probe(features, y, test, test_y):
    """Accuracy of ridge regression of one-hot labels on features."""
    a = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    b = torch.cat([test, torch.ones(len(test), 1)], 1).double()
    hot = torch.nn.functional.one_hot(y, 10).double()
    w = torch.linalg.solve(a.T @ a + 1e-1 * torch.eye(a.shape[1], dtype=a.dtype), a.T @ hot)
    return float(((b @ w).argmax(1) == test_y).double().mean())


def test_simclr_trains_the_body_alone_and_without_labels(tmp_path):
    """The loss falls, and digits are told apart better on its features than on drawn ones: seen .88 and .74."""
    views = ("view@views.strong=noise", "views.strong.sigma=0.2")
    settings = ("pretrain=simclr", *views, "pretrain.training.epochs=30", "pretrain.training.batch_size=100")
    result = run(tmp_path, *settings, "model.hidden=[16]", "data.subset=null")
    there = folder(tmp_path, result)
    state, made = load_file(there / "weights.safetensors"), json.loads((there / "made.json").read_text())
    assert set(state) == {"layers.0.weight", "layers.0.bias"}
    assert made["untrained"] == ["head.bias", "head.weight"]
    assert made["losses"][-1] < 0.9 * made["losses"][0]
    from fedsim.data.sources import digits
    from fedsim.models.dense import MLP

    data = digits()
    x, test = (data.normalize(s.x, torch.float32) for s in (data.train, data.test))
    scores = []
    for pretrained in (True, False):
        torch.manual_seed(0)
        model = MLP((1, 8, 8), 10, [16])
        if pretrained:
            model.load_state_dict(state, strict=False)
        with torch.no_grad():
            scores.append(
                probe(model.features(x[:1000]), data.train.y[:1000], model.features(test), data.test.y)
            )
    assert scores[0] > scores[1] + 0.08


def test_samples_of_their_own_with_other_classes(tmp_path, caplog):
    """Body from ten digits, for a run of three classes: its head is as drawn."""
    own = "+data@pretrain.data=digits"
    x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    clients = [(x[i::4], y[i::4]) for i in range(4)]
    given = {"clients": clients, "model": None}
    drawn = run(tmp_path, "pretrain=none", "client.lr=1e-9", **given)
    result = run(tmp_path, own, "client.lr=1e-9", **given)
    assert "a leak" not in caplog.text
    state = load_file(folder(tmp_path, result) / "weights.safetensors")
    assert state["head.weight"].shape == (10, 24)
    close = lambda a, b: torch.allclose(a, b, atol=1e-6)  # noqa: E731
    assert close(result.weights["layers.0.weight"], state["layers.0.weight"])
    assert close(result.weights["head.weight"], drawn.weights["head.weight"])
    wide = [(torch.rand(5, 1, 9, 9), torch.arange(5) % 3)] * 4
    with pytest.raises(
        ConfigError, match=r"pretrain: 'layers.0.weight' is \(24, 64\) .* and \(24, 81\) for the run's"
    ):
        run(tmp_path, own, clients=wide)


@pytest.mark.parametrize(
    ("overrides", "given", "said"),
    [
        ((), {"initial": {"x": torch.zeros(1)}}, "initial: pretrain says as well"),
        (("pretrain.training.lr=-1",), {}, "pretrain.training.lr=-1: must be positive"),
        (("pretrain.training.lr_decay=0.5",), {}, "leave lr_decay at 1"),
        (("pretrain.training.lr=1e9",), {}, "not finite after"),
        (("pretrain=simclr", "pretrain.temperature=0"), {}, "must be positive"),
        (("pretrain=simclr", "pretrain.temperatur=1"), {}, "unknown key 'pretrain.temperatur'"),
        (("pretrain=simclr", "pretrain.view=stong"), {}, "views.stong: there is no such view"),
        (("pretrain=simclr", "pretrain.projection=a"), {}, "pretrain.projection=a: must be a whole number"),
    ],
)
def test_refused(tmp_path, overrides, given, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, *overrides, **given)
    left = [p for p in tmp_path.rglob("*") if p.suffix in (".safetensors", ".json")]
    assert not left


def test_a_model_without_features_is_refused_simclr(tmp_path):
    problem = classification()
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(
        ConfigError, match=r"SimCLR trains model.features\(x\) -> \(B, d\), which Sequential lacks"
    ):
        problem.run("pretrain=simclr", f"out={tmp_path}", model=model)


def test_pretraining_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="view: Strong shows images"):
        classification().run("pretrain=simclr", f"out={tmp_path}", model=lambda: MLP((4,), 3, hidden=[5]))
    assert not list(tmp_path.iterdir())


def test_simclr_trains_what_lies_under_a_named_head(tmp_path):
    parts = (torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    result = run(tmp_path, "pretrain=simclr", *GENTLE, "model.head='3'", model=torch.nn.Sequential(*parts))
    state = load_file(folder(tmp_path, result) / "weights.safetensors")
    assert set(state) == {"1.weight", "1.bias"} and not torch.equal(state["1.weight"], parts[1].weight)
