"""Federated low-rank adapters: six methods on one small problem, against plain loops over the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting import LoRALinear, adapted
from lora_runs import METHODS, NAMES, SIZES, A, B, by_hand, clients, local_steps, run, state
from problems import classification, hashes
from torch import Tensor, nn

import fedsim
from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from fedsim.task.lowrank import Adapter, adapters_of


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("method", METHODS)
def test_three_rounds_are_those_by_hand(method: str, weighting: str) -> None:
    n = torch.tensor(SIZES if weighting == "samples" else [1] * 4, dtype=torch.float64)
    result = run(method, f"strategy.weighting={weighting}", "seed=0")
    expected, kept = by_hand(method, 3, n / n.sum())
    found = state(result)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)
    if method == "fedsa":
        for client, own in enumerate(kept):
            mine = result.model(client).state_dict()
            for name, value in own.items():
                torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-12)


def test_one_round_of_fedex_and_of_flora_gives_the_same_effective_weights() -> None:
    def effective(result: fedsim.RunResult) -> list[Tensor]:
        s = state(result)
        return [s[f"{i}.base.weight"] + 2 * s[f"{i}.lora_B"] @ s[f"{i}.lora_A"] for i in "02"]

    ex, flo, it = (effective(run(m, "rounds=1")) for m in ("fedex", "flora", "fedit"))
    for a, b, c in zip(ex, flo, it, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert (a - c).abs().max() > 1e-4


@pytest.mark.parametrize("many", [1, 4])
def test_with_clients_that_are_alike_all_that_average_both_factors_are_local_lora(many: int) -> None:
    words = ("rounds=1", f"clients_per_round={many}")
    alike = {"clients": clients()[:1] * many}
    done = {m: state(run(m, *words, **alike)) for m in ("fedit", "fedex", "flora")}
    local = local_steps(
        {k: v.double() for k, v in adapted().state_dict().items()}, clients()[0], ("lora_A", "lora_B")
    )
    for name in NAMES:
        torch.testing.assert_close(done["fedit"][name], local[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(done["fedex"][name], local[name], rtol=0, atol=1e-12)
    for i in "02":
        effective = local[f"{i}.base.weight"] + 2 * local[f"{i}.lora_B"] @ local[f"{i}.lora_A"]
        torch.testing.assert_close(done["flora"][f"{i}.base.weight"], effective, rtol=0, atol=1e-12)


def test_ffa_of_full_rank_with_an_orthogonal_a_is_full_fine_tuning_of_the_layer() -> None:
    """Of scale 1, under SGD: W moves by -lr G A'A = -lr G."""

    def layer() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            one = LoRALinear(4, 3, rank=4, scaling=1.0).double()
            one.lora_A.data = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        return nn.Sequential(one)

    def plain() -> nn.Module:
        base = layer()[0].base
        base.weight.requires_grad_(True)
        return nn.Sequential(base)

    low, full = run("ffa", model=layer).model(), run("fedavg", model=plain).model()
    found = low[0].base.weight + low[0].lora_B @ low[0].lora_A
    torch.testing.assert_close(found, full[0].weight, rtol=0, atol=1e-12)
    assert (full[0].weight - plain()[0].weight).abs().max() > 0.01


def test_where_b_is_zero_a_does_not_move() -> None:
    """In RoLoRA's first round by its mask; in FLoRA's rounds of one step of SGD since its gradient is zero: then they
    are FFA's."""
    start, first = adapted().state_dict(), state(run("rolora", "rounds=1"))
    one_step = ("rounds=1", "client.steps=1")
    flora, ffa = (state(run(m, *one_step)) for m in ("flora", "ffa"))
    for i in "02":
        assert torch.equal(first[f"{i}.lora_A"], start[f"{i}.lora_A"].double())
        assert bool(first[f"{i}.lora_B"].any())
        effective = ffa[f"{i}.base.weight"] + 2 * ffa[f"{i}.lora_B"] @ start[f"{i}.lora_A"].double()
        torch.testing.assert_close(flora[f"{i}.base.weight"], effective, rtol=0, atol=1e-12)


# -- what travels -------------------------------------------------------------------------------------------------

UP = {
    "fedit": [A + B] * 3,
    "fedex": [A + B] * 3,
    "flora": [A + B] * 3,
    "ffa": [B] * 3,
    "fedsa": [A] * 3,
    "rolora": [B, A, B],
}


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_factors_that_move(method: str) -> None:
    rows = run(method).rows
    weights = 8 * len(SIZES)
    assert [r["bytes_up"] for r in rows] == [len(SIZES) * 8 * n + weights for n in UP[method]]
    down = [r["bytes_down"] // len(SIZES) // 8 for r in rows]
    dense = 4 * 4 + 4 * 3
    wanted = {
        "fedit": [A + B] * 3,
        "ffa": [B] * 3,
        "fedsa": [A] * 3,
        "rolora": [A, A + B, A + B],  # at first B is zero
        "fedex": [A + B, dense + A + B, dense + A + B],
        "flora": [A + B, dense + 1, dense + 1],  # and under which round adapters are drawn
    }
    assert down == wanted[method]


def test_few_clients_are_sent_factors_and_who_was_away_what_it_missed() -> None:
    cohorts = [[0], [1], [0], [0], [2]]
    rows = run("flora", "rounds=5", "clients_per_round=1", "strategy.ranks=[1]", cohorts=cohorts).rows
    # a round: factors of rank 1; how many clients, rank, weight; a message: round of the draw, whether there is a copy,
    # how many numbers to send
    assert [r["bytes_down"] // 8 - 1 for r in rows] == [30, 15 + 3 + 1 + 30, 28 + 1, 15 + 3 + 2, 28 + 30]
    assert [r["base_change"]["dense"] for r in rows] == [0, 0, 1, 0, 1]


# -- the base that changes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_the_change_of_the_base_is_part_of_the_model(method: str, tmp_path: Any) -> None:
    """Hashed, evaluated, written, found again after a stop; the same whatever chunks."""
    whole = run(method, f"dir={tmp_path / 'whole'}")
    model, x = whole.model(), clients()[1][0].double()
    h = state(whole)
    first = torch.tanh(x @ (h["0.base.weight"] + 2 * h["0.lora_B"] @ h["0.lora_A"]).T + h["0.base.bias"])
    wanted = first @ (h["2.base.weight"] + 2 * h["2.lora_B"] @ h["2.lora_A"]).T + h["2.base.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)
    assert any(k.endswith("base_change") and bool(v.any()) for k, v in whole.weights.items())
    short = run(method, f"dir={tmp_path / 'parts'}", "rounds=2")
    longer = run(method, f"dir={tmp_path / 'parts'}", "rounds=3")
    assert hashes(short) == hashes(whole)[:2]
    assert hashes(longer) == hashes(whole)
    again = fedsim.load_run(tmp_path / "whole", model=adapted).model()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_clipping_bounds_what_a_client_changes_and_leaves_small_changes_alone(method: str) -> None:
    free, loose, tight = (
        run(method, "rounds=1", *o) for o in ((), ("strategy.clip=100",), ("strategy.clip=0.01",))
    )
    assert hashes(free) == hashes(loose)
    assert tight.rows[0]["clipped_clients"] == 4
    start, h = adapted().state_dict(), state(tight)
    moved = [
        h[f"{i}.base.weight"] + 2 * h[f"{i}.lora_B"] @ h[f"{i}.lora_A"] - start[f"{i}.base.weight"].double()
        for i in "02"
    ]
    assert 0.001 < sum(float(m.square().sum()) for m in moved) ** 0.5 < 0.01 + 1e-9


def test_rules_that_judge_factors_and_models_without_adapters_are_refused() -> None:
    for method in ("fedex", "flora"):
        with pytest.raises(ConfigError, match=r"aggregator: any but the mean judges factors.*strategy\.clip"):
            run(method, "aggregator=coordinate_median")
        with pytest.raises(ConfigError, match="no adapter of which both factors"):
            run(method, model=lambda: nn.Linear(4, 3))
        with pytest.raises(ConfigError, match=r"secagg: .* looks at single updates"):
            run(method, "secagg=ring", "secagg.reach=1")
        with pytest.raises(ConfigError, match="server_momentum"):
            run(method, "strategy.server_momentum=0.9")
    with pytest.raises(ConfigError, match=r"no trained parameter fits the pattern '\*lora_A\*'"):
        run("ffa", model=lambda: nn.Linear(4, 3))
    assert run("rolora", "aggregator=coordinate_median", "rounds=1").rows[0]["bytes_up"] == 4 * 8 * (B + 1)


def test_flora_begins_with_what_adapters_have_learnt_before() -> None:
    start = {k: v.double() for k, v in adapted().state_dict().items()}
    start["0.lora_B"] = torch.ones(4, 2, dtype=torch.float64)
    result = run("flora", "client.lr=1e-30", "rounds=1", initial=start)
    base = start["0.base.weight"] + 2 * start["0.lora_B"] @ start["0.lora_A"]
    torch.testing.assert_close(state(result)["0.base.weight"], base, rtol=0, atol=1e-12)
    assert isinstance(adapters_of(adapted(), Layout(adapted()))[0], Adapter)


@pytest.mark.slow
@pytest.mark.parametrize("method", [("fedex",), ("flora", "strategy.ranks=[2, 1]")], ids=lambda m: m[0])
def test_the_base_changes_by_the_same_bits_on_workers(method: tuple[str, ...]) -> None:
    words = (*method[1:], "dtype=float32", "clients_per_round=3")
    assert hashes(run(method[0], *words, "engine=ray", "engine.workers=2")) == hashes(run(method[0], *words))


def test_fedit_without_adapters_is_refused_as_fedavg() -> None:
    with pytest.raises(ConfigError, match=r"strategy=fedit: .*no low-rank adapters.*or strategy=fedavg"):
        classification().run("strategy=fedit", "rounds=1")


class Embedded(nn.Module):
    """A layer with adapters behind an embedding that has some of its own, A zero at first as peft's."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_embedding_A, self.lora_embedding_B = (
            nn.Parameter(torch.zeros(2, 5)),
            nn.Parameter(torch.ones(4, 2)),
        )
        self.scaling, self.layer = 1.0, LoRALinear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x + (self.lora_embedding_B @ self.lora_embedding_A)[:, 0])
        return out


def test_patterns_of_factors_that_pass_an_embedding_over_are_refused() -> None:
    for method in ("ffa", "fedsa", "rolora"):
        with pytest.raises(ConfigError, match=r"'lora_embedding_A' is of an embedding's adapter"):
            run(method, "rounds=1", model=Embedded)
    named = "strategy.frozen=['*lora_A*', 'lora_embedding_B']"
    found = run("ffa", "rounds=1", named, model=Embedded)
    assert bool(found.weights["lora_embedding_A"].any()) and bool(
        (found.weights["lora_embedding_B"] == 1).all()
    )
    assert run("fedit", "rounds=1", model=Embedded).rows[0]["bytes_up"] == 4 * 8 * (10 + 8 + 8 + 6 + 1)
