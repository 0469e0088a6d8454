"""Federated low-rank adapters: six methods on one small problem, against plain loops over the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting import adapted
from problems import QUIET, hashes
from torch import Tensor, nn

import fedsim
from clients.exact import entries, entry, fresh
from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from fedsim.task.lowrank import Adapter, adapters_of

METHODS = ("fedit", "ffa", "fedsa", "rolora", "fedex", "flora")
NAMES = (
    "0.base.weight",
    "0.base.bias",
    "0.lora_A",
    "0.lora_B",
    "2.base.weight",
    "2.base.bias",
    "2.lora_A",
    "2.lora_B",
)
SIZES, LR = (8, 12, 4, 8), 0.2


def clients() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=g) + i, torch.randint(0, 3, (n,), generator=g))
        for i, n in enumerate(SIZES)
    ]


def run(method: str, *overrides: str, **given: Any) -> fedsim.RunResult:
    settings = ("engine=serial", *QUIET, "dtype=float64", "rounds=3", f"strategy={method}", f"client.lr={LR}")
    local = (
        "client.epochs=2",
        "client.batch_size=4",
        "client.shuffle=false",
        "clients_per_round=4",
        "engine.chunks=2",
    )
    parts: dict[str, Any] = {"model": adapted, "clients": clients(), "test": clients()[0]}
    return fedsim.simulate([*settings, *local, *overrides], **{**parts, **given})


# -- the same by hand ---------------------------------------------------------------------------------------------


Matrices = dict[str, Tensor]


def local_steps(model: Matrices, data: tuple[Tensor, Tensor], trained: tuple[str, ...]) -> Matrices:
    """Two passes of plain SGD over batches of 4, of the matrices whose names end as ``trained`` says."""
    own = {k: v.clone().requires_grad_(k.endswith(trained)) for k, v in model.items()}
    x, y = data[0].double(), data[1]
    for _ in range(2):
        for i in range(0, len(y), 4):
            h = x[i : i + 4]
            for layer in "02":
                weight = own[f"{layer}.base.weight"] + 2 * own[f"{layer}.lora_B"] @ own[f"{layer}.lora_A"]
                h = h @ weight.T + own[f"{layer}.base.bias"]
                h = torch.tanh(h) if layer == "0" else h
            names = [k for k, v in own.items() if v.requires_grad]
            grads = torch.autograd.grad(nn.functional.cross_entropy(h, y[i : i + 4]), [own[k] for k in names])
            with torch.no_grad():
                for k, grad in zip(names, grads, strict=True):
                    own[k] -= LR * grad
    return {k: v.detach() for k, v in own.items()}


def by_hand(method: str, rounds: int, p: Tensor) -> tuple[Matrices, list[Matrices]]:
    """Global matrices, the bases with all that was added to them, and the clients' own after ``rounds``."""
    model = {k: v.double() for k, v in adapted().state_dict().items()}
    kept = [{k: v for k, v in model.items() if k.endswith("lora_B")} for _ in SIZES]
    layout = Layout(adapted(), torch.float64)
    for t in range(rounds):
        trained: tuple[str, ...] = ("lora_A", "lora_B")
        if method == "ffa" or (method == "rolora" and t % 2 == 0):
            trained = ("lora_B",)
        elif method == "rolora":
            trained = ("lora_A",)
        starts = [model | own if method == "fedsa" else model for own in kept]
        found = [local_steps(start, data, trained) for start, data in zip(starts, clients(), strict=True)]
        kept = [{k: v for k, v in f.items() if k.endswith("lora_B")} for f in found]
        averaged = trained if method != "fedsa" else ("lora_A",)
        new = {
            k: sum(q * f[k] for q, f in zip(p, found, strict=True)) if k.endswith(averaged) else v
            for k, v in model.items()
        }
        for layer in "02" if method in ("fedex", "flora") else "":
            a, b, w = (f"{layer}.{k}" for k in ("lora_A", "lora_B", "base.weight"))
            exact = model[w] + 2 * sum(q * f[b] @ f[a] for q, f in zip(p, found, strict=True))
            new[w] = exact if method == "flora" else exact - 2 * new[b] @ new[a]
        if method == "flora":
            drawn = torch.zeros(layout.dim, dtype=torch.float64)
            fresh(drawn, adapters_of(adapted(), layout), 0, t + 1)
            new |= layout.named(drawn)
        model = new
    return model, kept


def state(result: fedsim.RunResult) -> Matrices:
    """The run's matrices, with what was added to the bases in them."""
    out = dict(result.model().state_dict())
    for name in [k for k in out if k.endswith("base_change")]:
        weight = name.replace("base_change", "weight")
        out[weight] = out[weight] + out.pop(name)
    return out


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


def test_with_one_client_all_that_average_both_factors_are_local_lora() -> None:
    one = {"clients": clients()[:1]}
    done = {m: state(run(m, "rounds=1", "clients_per_round=1", **one)) for m in ("fedit", "fedex", "flora")}
    for name in NAMES:
        torch.testing.assert_close(done["fedex"][name], done["fedit"][name], rtol=0, atol=1e-12)
    for i in "02":
        learnt = 2 * done["fedit"][f"{i}.lora_B"] @ done["fedit"][f"{i}.lora_A"]
        base = adapted().state_dict()[f"{i}.base.weight"].double()
        torch.testing.assert_close(done["flora"][f"{i}.base.weight"], base + learnt, rtol=0, atol=1e-12)


# -- what travels -------------------------------------------------------------------------------------------------

A, B = 4 * 2 + 4 * 2, 4 * 2 + 3 * 2  # numbers of both layers' factors
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


def test_a_round_as_it_travels_is_what_was_put_in() -> None:
    model = adapted()
    layout = Layout(model, torch.float64)
    adapters, g = adapters_of(model, layout), torch.Generator().manual_seed(0)
    rounds = []
    for ranks in ([2, 1], [1]):
        rows = layout.expand(torch.randn(len(ranks), layout.size, generator=g, dtype=torch.float64))
        for row, rank in zip(rows, ranks, strict=True):
            for ad in adapters:
                a, b = ad.factors(row)
                a[rank:], b[:, rank:] = 0, 0
        rounds.append((rows, torch.rand(len(ranks), generator=g, dtype=torch.float64), ranks))
    flat = torch.cat([entry(adapters, *r) for r in rounds])
    assert len(flat) == (1 + 4 + 15 + 30) + (1 + 2 + 15)
    for (rows, q, _), (found, share) in zip(rounds, entries(adapters, flat, layout.dim), strict=True):
        assert torch.equal(found, rows) and torch.equal(share, q)


def test_newcomers_of_fedsa_begin_with_the_mean_of_the_others() -> None:
    """Client 3 takes part in the last round only; its B begins as the mean of those of the second."""
    cohorts = [[0, 1, 2], [0, 2], [3]]
    words = ("strategy.new_client=mean", "clients_per_round=3")
    result = run("fedsa", *words, cohorts=cohorts)
    model = {k: v.double() for k, v in adapted().state_dict().items()}
    kept = [{k: v for k, v in model.items() if k.endswith("lora_B")}] * 4
    mean = kept[0]
    for cohort in cohorts:
        n = torch.tensor([SIZES[c] for c in cohort], dtype=torch.float64)
        starts = [model | (mean if c == 3 else kept[c]) for c in cohort]
        found = [
            local_steps(s, clients()[c], ("lora_A", "lora_B")) for s, c in zip(starts, cohort, strict=True)
        ]
        for c, f in zip(cohort, found, strict=True):
            kept[c] = {k: v for k, v in f.items() if k.endswith("lora_B")}
        means = {
            k: sum(w * f[k] for w, f in zip(n / n.sum(), found, strict=True)) for k in model if "lora" in k
        }
        mean = {k: v for k, v in means.items() if k.endswith("lora_B")}
        model |= {k: v for k, v in means.items() if k.endswith("lora_A")}
    for client in (1, 3):
        own = result.model(client).state_dict()
        for name, value in (model | kept[client]).items():
            torch.testing.assert_close(own[name], value, rtol=0, atol=1e-12, msg=name)
    assert [r["bytes_up"] // 8 for r in result.rows] == [3 * (A + B + 1), 2 * (A + B + 1), A + B + 1]
    assert [r["bytes_down"] // 8 for r in result.rows] == [3 * A, 2 * A, A + B]
    with pytest.raises(ConfigError, match=r"new_client.*nothing stays with clients"):
        run("ffa", "+strategy.new_client=mean")


def test_ranks_of_the_clients_own_are_what_they_train_and_send() -> None:
    result = run("flora", "strategy.ranks=[2, 1]", "rounds=1")
    assert result.rows[0]["bytes_up"] == 8 * (2 * (A + B) + (A + B)) + 8 * 4
    model, total = {k: v.double() for k, v in adapted().state_dict().items()}, sum(SIZES)
    learnt = {i: torch.zeros_like(model[f"{i}.base.weight"]) for i in "02"}
    for client, data in enumerate(clients()):
        rank = (2, 1)[client % 2]
        start = dict(model) | {
            f"{i}.lora_A": torch.cat([model[f"{i}.lora_A"][:rank], torch.zeros(2 - rank, 4)]) for i in "02"
        }
        found = local_steps(start, data, ("lora_A", "lora_B"))
        for i in "02":
            learnt[i] += SIZES[client] / total * 2 * found[f"{i}.lora_B"] @ found[f"{i}.lora_A"]
    for i in "02":
        expected = model[f"{i}.base.weight"] + learnt[i]
        torch.testing.assert_close(state(result)[f"{i}.base.weight"], expected, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match=r"strategy\.ranks=\[3\].*at most 2; type model\.lora\.r=3"):
        run("flora", "strategy.ranks=[3]")


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


@pytest.mark.parametrize("combine", ["pad", "svd"])
def test_ranks_are_padded_or_cut_off_the_exact_sum(combine: str) -> None:
    result = run("ranked_lora", "strategy.ranks=[2, 1]", f"strategy.combine={combine}", "rounds=1")
    assert result.rows[0]["bytes_up"] == 8 * (2 * (A + B) + (A + B)) + 8 * 4
    assert result.rows[0]["bytes_down"] == 8 * (2 * (A + B) + (A + B))
    model, total = {k: v.double() for k, v in adapted().state_dict().items()}, sum(SIZES)
    sums = {k: torch.zeros_like(v) for k, v in model.items()} | {i: torch.zeros(()) for i in "02"}
    for client, data in enumerate(clients()):
        start, share = dict(model), SIZES[client] / total
        for i in "02":
            start[f"{i}.lora_A"] = model[f"{i}.lora_A"].clone()
            start[f"{i}.lora_A"][(2, 1)[client % 2] :] = 0
        found = local_steps(start, data, ("lora_A", "lora_B"))
        for i in "02":
            a, b = found[f"{i}.lora_A"], found[f"{i}.lora_B"]
            sums[i] = sums[i] + share * b @ a
            sums[f"{i}.lora_A"] += share * a
            sums[f"{i}.lora_B"] += share * b
    end = result.model().state_dict()
    for i in "02":
        a, b = end[f"{i}.lora_A"], end[f"{i}.lora_B"]
        if combine == "pad":
            torch.testing.assert_close(a, sums[f"{i}.lora_A"], rtol=0, atol=1e-12)
            torch.testing.assert_close(b, sums[f"{i}.lora_B"], rtol=0, atol=1e-12)
            continue
        values = torch.linalg.svdvals(sums[i])
        for rank in (1, 2):  # what is left is as short as can be, of the first rank alone too
            rest = torch.linalg.matrix_norm(sums[i] - b[:, :rank] @ a[:rank])
            assert float(rest) == pytest.approx(
                float(values[rank:].square().sum().sqrt()), rel=1e-9, abs=1e-12
            )
    with pytest.raises(ConfigError, match=r"strategy\.ranks=None.*give whole numbers from 1"):
        run("ranked_lora")
