"""A frozen base: it keeps its type, has a name and a hash, and is left out of what a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import classes, classification, hashes
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsim.errors import CheckpointError, ConfigError
from fedsim.run.resolve import code_of
from fedsim.task.fixed import converted
from fedsim.task.frozen import base_of, full_state, published, reference
from fedsim.task.layout import Layout
from fedsim.task.vectors import FlatModel


class Quantised(nn.Module):
    """Weights in 8 bits with a scale for each output."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1) / 127
        self.register_buffer("q", (layer.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("s", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.q.to(x.dtype) * self.s[:, None]).T


class Narrow(nn.Module):
    """A body in another type, and a trained head in float32."""

    def __init__(self, kind: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.kind = kind
        self.body = Quantised(layer) if kind == torch.int8 else layer.to(kind).requires_grad_(False)
        self.register_buffer("shift", torch.zeros(8, dtype=torch.float16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x if self.kind == torch.int8 else x.to(self.kind))
        return self.head(torch.tanh(h.to(self.head.weight.dtype)) + self.shift)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int8])
def test_the_base_keeps_its_type_and_is_neither_sent_nor_averaged(kind: torch.dtype) -> None:
    model = FlatModel(Narrow(kind), torch.float64)
    body = model.module.body
    assert (body.q if kind == torch.int8 else body.weight).dtype == kind
    assert model.module.head.weight.dtype == torch.float64 and model.module.shift.dtype == torch.float16
    assert [s.name for s in model.layout.params] == ["head.weight", "head.bias"] and not len(
        model.layout.buffers
    )
    everything = tuple(map(torch.cat, zip(*classes(), strict=True)))
    problem = classification(model=Narrow(kind), test=everything)
    run = problem.run("evaluation.every=1", "clients_per_round=6", "client.lr=0.05")
    assert run.rows[-1]["loss"] < run.rows[0]["loss"]


def test_a_model_of_one_type_is_converted_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).half()
    model[0].requires_grad_(False)
    assert {t.dtype for t in converted(model, torch.float32, "cpu").state_dict().values()} == {
        torch.float32,
        torch.int64,
    }
    assert [s.name for s in Layout(model).buffers] == ["1.running_mean", "1.running_var"]


class Based(nn.Module):
    """A base of which most is frozen, under a configuration with a name."""

    def __init__(self, seed: int = 0, name: str = "/somebody/models/tiny-base") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 5), nn.Tanh()
            )
            self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.body.requires_grad_(False)
        self.config = type("Config", (), {"name_or_path": name})()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_weights_of_a_run_hold_what_changed_and_name_the_base() -> None:
    model = Based()
    run = classification(model=model).run()
    file = load_file(run.dir / "weights.safetensors")
    trained = {
        "1.weight",
        "1.bias",
        "0.weight",
        "0.bias",
        "0.running_mean",
        "0.running_var",
        "0.num_batches_tracked",
    }
    assert file.keys() == run.weights.keys() == {f"head.{n}" for n in trained}
    base = reference(run.dir / "weights.safetensors")
    assert base == base_of(model) and base is not None and base.name == "tiny-base"
    whole = full_state(model, file, base)
    fresh = Based()
    fresh.load_state_dict(whole)
    assert torch.equal(whole["head.1.weight"], file["head.1.weight"])
    with pytest.raises(ConfigError, match=r"base 'tiny-base' \(sha256 .{12}\), but the model's is 'other'"):
        full_state(Based(1, "other"), file, base)
    with pytest.raises(ConfigError, match=r"weights: 'head\.1\.bias' is missing"):
        full_state(model, {k: v for k, v in file.items() if k != "head.1.bias"})
    with pytest.raises(ConfigError, match=r"the model has no 'head\.2\.bias'; nearest is 'head\.1\.bias'"):
        full_state(model, {**file, "head.2.bias": file["head.1.bias"]})
    on = classification(model=model).run("rounds=1", initial=run.weights)
    assert hashes(on) == hashes(classification(model=model).run("rounds=1", initial=whole))


def test_a_base_that_came_with_the_initial_weights_is_held_by_the_result() -> None:
    run = classification(model=Based()).run("rounds=1", initial=Based(1).state_dict())
    assert run.weights.keys() == Based().state_dict().keys()
    assert torch.equal(run.weights["body.0.weight"], Based(1).body[0].weight)
    assert reference(run.dir / "weights.safetensors") is None


def test_a_model_that_is_trained_for_the_most_part_is_written_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    run = classification(model=model).run("rounds=1")
    assert run.weights.keys() == model.state_dict().keys()
    assert reference(run.dir / "weights.safetensors") is None and base_of(model) is not None


def test_the_hash_tells_names_types_shapes_and_numbers_apart() -> None:
    def sha(change: Any = lambda m: None, **options: Any) -> str:
        model = Based(**options)
        change(model)
        base = base_of(model)
        assert base is not None
        return base.sha256

    assert sha() == sha(name="other") == sha(lambda m: m.head[1].weight.data.add_(1))
    others = {
        sha(seed=1),
        sha(lambda m: m.body[0].weight.data.mul_(2)),
        sha(lambda m: m.body[1].running_mean.add_(1)),
        sha(lambda m: setattr(m.body[0].weight, "data", m.body[0].weight.data.view(4, 16))),
        sha(lambda m: m.body.to(torch.bfloat16)),
    }
    assert len(others) == 5 and sha() not in others
    assert base_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/a/b/gpt/", "gpt"),
        ("owner/gpt", "owner/gpt"),
        ("gpt2", "gpt2"),
        ("../gpt", "gpt"),
        ("a/b/gpt", "gpt"),
    ],
)
def test_a_base_is_named_without_a_folder_of_this_machine(name: str, said: str) -> None:
    assert published(name) == said


def test_another_base_is_another_run(tmp_path: Path) -> None:
    problem, where = classification(model=Based()), f"dir={tmp_path / 'run'}"
    problem.run(where, "rounds=1", "checkpoint.every=1")
    with pytest.raises(CheckpointError, match="other things, or other code, were handed over"):
        problem.run(where, "rounds=2", model=Based(1))


def test_no_checkpoint_is_continued_on_another_base(tmp_path: Path) -> None:
    """A factory that reads a file: its code does not say what the file holds."""
    file = tmp_path / "base.pt"

    def built() -> nn.Module:
        model = Based()
        model.body.load_state_dict(torch.load(file))
        return model

    problem, where = classification(model=built), f"dir={tmp_path / 'run'}"
    torch.save(Based().body.state_dict(), file)
    problem.run(where, "rounds=1", "checkpoint.every=1")
    torch.save(Based(1).body.state_dict(), file)
    with pytest.raises(
        CheckpointError, match=r"made with the frozen base 'tiny-base' .*, but this run's model has"
    ):
        problem.run(where, "rounds=2")
    torch.save(Based().body.state_dict(), file)
    assert len(problem.run(where, "rounds=2").rows) == 2


def test_the_content_of_a_file_of_weights_is_part_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    values = {"model": {"_target_": "fedsim.models.ResNet18", "weights": str(file), "path": "nowhere"}}
    keys = []
    for content in (None, b"1", b"2"):
        if content is not None:
            file.write_bytes(content)
        keys.append(code_of(values))
    assert keys[0] == {} and keys[1].keys() == keys[2].keys() == {"model.weights"} and keys[1] != keys[2]
    folder = {"model": {"path": str(tmp_path)}}
    before = code_of(folder)
    file.rename(tmp_path / "other.pt")
    assert before.keys() == {"model.path"} and code_of(folder) != before
