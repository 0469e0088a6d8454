"""Adapters of ranks of the clients' own, rounds as they travel, and clients that come late."""

from __future__ import annotations

import pytest
import torch
from adapting import adapted
from lora_runs import SIZES, A, B, clients, local_steps, run, state
from torch import nn

from clients.exact import entries, entry
from fedsim.errors import ConfigError
from fedsim.task.layout import Layout
from fedsim.task.lowrank import adapters_of


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


def test_what_fedsa_trains_beside_adapters_stays_with_its_client() -> None:
    """The three numbers of a bias: local, or averaged."""

    def model() -> nn.Module:
        out = adapted()
        out.get_parameter("2.base.bias").requires_grad_(True)
        return out

    local, average = (
        run("fedsa", f"strategy.head={h}", "rounds=1", model=model) for h in ("local", "average")
    )
    start = {k: v.double() for k, v in model().state_dict().items()}
    own = [local_steps(start, data, ("lora_A", "lora_B", "2.base.bias"))["2.base.bias"] for data in clients()]
    mean = sum(n / sum(SIZES) * bias for n, bias in zip(SIZES, own, strict=True))
    for client, bias in enumerate(own):
        found = [r.model(client).state_dict()["2.base.bias"] for r in (local, average)]
        torch.testing.assert_close(found, [bias, mean], rtol=0, atol=1e-12)
    assert average.rows[0]["bytes_up"] - local.rows[0]["bytes_up"] == 4 * 8 * 3
    with pytest.raises(ConfigError, match=r"head.*nothing else stays with clients"):
        run("ffa", "+strategy.head=local")


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
