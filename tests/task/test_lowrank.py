"""Low-rank adapters: products against the golden arrays, and the views of them in models of several kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import GOLDEN
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from fedsim.task.lowrank import (
    adapters_of,
    changeable,
    cross_term,
    exact_mean,
    product_norm,
    stacked,
    truncated,
)
from fedsim.task.vectors import FlatModel


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "lora_two_clients.npz") as z:
        return {k: torch.from_numpy(np.asarray(v)) for k, v in z.items()}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_two_clients_as_in_the_golden_arrays(weighting: str) -> None:
    z = golden()
    n = z["n"].double() if weighting == "samples" else torch.ones(2, dtype=torch.float64)
    p, scale, said = (
        n / n.sum(),
        float(z["alpha"]) / 2,
        {k.split("/")[1]: v for k, v in z.items() if k.startswith(weighting)},
    )
    a, b = (torch.stack([z[f"{k}_1"], z[f"{k}_2"]]) for k in "AB")
    mean_a, mean_b = torch.tensordot(p, a, 1), torch.tensordot(p, b, 1)
    close(mean_a, said["fedit_A"])
    close(mean_b, said["fedit_B"])
    close(z["W0"] + scale * mean_b @ mean_a, said["fedit_W"])
    close(z["W0"] + scale * exact_mean(a, b, p), said["exact_W"])
    close(cross_term(a, b, p), said["cross"])
    close(cross_term(a, b, p), said["cross_identity"])
    close(z["W0"] + scale * cross_term(a, b, p), said["fedex_base"])
    stack_a, stack_b = stacked(list(a), list(b), p.tolist(), [scale, scale], scale)
    close(stack_a, said["flora_A"])
    close(stack_b, said["flora_B"])
    close(z["W0"] + scale * stack_b @ stack_a, said["flora_base"])
    ffa = torch.stack([z["ffa_B_1"], z["ffa_B_2"]])
    close(z["W0"] + scale * exact_mean(z["A0"].expand(2, -1, -1), ffa, p), said["ffa_W"])


def test_the_error_of_averaged_factors_is_the_covariance_of_the_clients() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    a = torch.randn(4, 2, 5, generator=g, dtype=torch.float64)
    b = torch.randn(4, 6, 2, generator=g, dtype=torch.float64)
    mean_a, mean_b = torch.tensordot(p, a, 1), torch.tensordot(p, b, 1)
    close(exact_mean(a, b, p) - mean_b @ mean_a, cross_term(a, b, p))
    close(cross_term(a, b, p), sum(q * (y - mean_b) @ (x - mean_a) for q, x, y in zip(p, a, b, strict=True)))


def test_stacking_takes_any_ranks_and_scales() -> None:
    g = torch.Generator().manual_seed(0)
    sizes, p, scales = (1, 3, 2), [0.2, 0.5, 0.3], [2.0, 1.0, 0.5]
    a = [torch.randn(r, 5, generator=g, dtype=torch.float64) for r in sizes]
    b = [torch.randn(6, r, generator=g, dtype=torch.float64) for r in sizes]
    stack_a, stack_b = stacked(a, b, p, scales, 4.0)
    assert stack_a.shape == (6, 5)
    close(4.0 * stack_b @ stack_a, sum(q * s * y @ x for q, s, x, y in zip(p, scales, a, b, strict=True)))


def test_the_gauge_moves_the_mean_of_factors_and_not_that_of_products() -> None:
    z, p = golden(), torch.tensor([0.75, 0.25], dtype=torch.float64)
    a, b = (torch.stack([z[f"{k}_1"], z[f"{k}_2"]]) for k in "AB")
    turn = torch.tensor([[2.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    other_a, other_b = torch.stack([turn @ a[0], a[1]]), torch.stack([b[0] @ torch.linalg.inv(turn), b[1]])
    close(exact_mean(other_a, other_b, p), exact_mean(a, b, p))
    means = [torch.tensordot(p, y, 1) @ torch.tensordot(p, x, 1) for x, y in ((a, b), (other_a, other_b))]
    assert (means[0] - means[1]).abs().max() > 0.1


def test_norms_and_truncations_are_those_of_the_whole_product() -> None:
    z = golden()
    a, b = (torch.stack([z[f"{k}_1"], z[f"{k}_2"]]) for k in "AB")
    close(product_norm(a, b, 3.0), 3.0 * torch.linalg.norm(b @ a, dim=(-2, -1)))
    change = exact_mean(a, b, torch.tensor([0.75, 0.25], dtype=torch.float64))  # of rank 4
    x, y, lost = truncated(change, 4)
    assert lost < 1e-12
    close(y @ x, change)
    x, y, lost = truncated(change, 1)
    assert lost == pytest.approx(float((y @ x - change).norm() / change.norm()), abs=1e-12)
    assert 0.01 < lost < 1


class OwnLoRA(nn.Module):
    """Adapters of one's own: parameters, and a plain number for the scale."""

    def __init__(self, size_in: int, size_out: int, rank: int):
        super().__init__()
        self.base = nn.Linear(size_in, size_out).requires_grad_(False)
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.randn(rank, size_in)),
            nn.Parameter(torch.zeros(size_out, rank)),
        )
        self.scaling = 0.5

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        return out


def peft_model(**options: Any) -> nn.Module:
    """A square GPT-2, whose layers keep (in, out), with adapters."""
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["c_proj"], "fan_in_fan_out": True} | options
    return peft.get_peft_model(GPT2LMHeadModel(config), peft.LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_a_change_of_the_base_does_what_the_same_weight_would(kind: str) -> None:
    torch.manual_seed(0)
    model = (
        nn.Sequential(OwnLoRA(4, 4, 2), nn.Tanh(), OwnLoRA(4, 3, 2)) if kind == "own" else peft_model()
    ).eval()
    x = torch.randn(5, 4) if kind == "own" else torch.arange(10).view(2, 5)

    def output(m: nn.Module) -> Tensor:
        with torch.no_grad():
            out = m.eval()(x)
            return getattr(out, "logits", out).clone()

    before = output(model)
    changed = FlatModel(changeable(model), torch.float32)
    assert torch.equal(output(changed.module), before)
    adapters = adapters_of(changed.module, changed.layout)
    assert [ad.rank for ad in adapters] == [2, 2]
    assert {ad.scale for ad in adapters} == {0.5 if kind == "own" else 2.0}
    for ad in adapters:
        for part in (*ad.factors(changed.w), ad.change_of(changed.buffers)):
            part.copy_(torch.randn(part.shape))
    wanted = output(changed.module)
    with torch.no_grad():
        for ad in adapters:
            a, b = ad.factors(changed.w)
            ad.change_of(changed.buffers).add_(ad.scale * b @ a)
            b.zero_()
    torch.testing.assert_close(output(changed.module), wanted, rtol=1e-5, atol=1e-5)
    for ad in adapters:
        base = changed.module.get_submodule(ad.name)
        base = base.base if kind == "own" else base.base_layer
        with torch.no_grad():
            base.weight.add_(base.base_change)
            ad.change_of(changed.buffers).zero_()
    torch.testing.assert_close(output(changed.module), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_more_than_a_product_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no adapter of which both factors are trained"):
        changeable(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"use_dora"):
        changeable(peft_model(use_dora=True))
    model = OwnLoRA(2, 2, 1)
    model.base = nn.Bilinear(2, 2, 2)
    with pytest.raises(ConfigError, match="is a Bilinear, and a change is added to weights"):
        changeable(model)
    with pytest.raises(ConfigError, match="is a Embedding, and a change is added to weights"):
        changeable(peft_model(target_modules=["wte", "c_proj"]))
    with pytest.raises(ConfigError, match="BatchNorm"):
        changeable(nn.Sequential(OwnLoRA(2, 2, 1), nn.BatchNorm1d(2)))
    assert adapters_of(nn.Linear(2, 2), Layout(nn.Linear(2, 2))) == ()


def test_adapters_of_embeddings_and_convolutions_are_adapters() -> None:
    model = peft_model(target_modules=["wte", "c_attn"])
    found = adapters_of(model, Layout(model))
    assert [(ad.name.rsplit(".", 1)[1], ad.a.shape, ad.b.shape) for ad in found] == [
        ("wte", (2, 11), (8, 2)),
        ("c_attn", (2, 8), (24, 2)),
    ]
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(nn.Sequential(nn.Conv2d(1, 3, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    assert [ad.a.shape for ad in adapters_of(net, Layout(net))] == [(2, 1, 3, 3)]
