"""Large tensors that stay as they are: in memory once, whoever copies the model, and safe from whoever writes."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from problems import classification, hashes, method
from torch import Tensor, nn

from fedsim.data.local import Batch
from fedsim.errors import ClientError, ConfigError
from fedsim.rng import hash_tensors
from fedsim.task.admission import admitted
from fedsim.task.copies import copied
from fedsim.task.mapped import LARGE, SUPPORTED, clones, place_of, share
from fedsim.task.rehearsal import rehearsed
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="needs memfd_create (Linux)")
WIDTH = 300  # its square is more than LARGE


class Wide(nn.Module):
    """A frozen layer, larger than what is copied, a table of integers, and a trained head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner, self.base = nn.Linear(4, width), nn.Linear(width, width)
            self.head = nn.Linear(width, 3)
        self.inner.requires_grad_(False)
        self.base.requires_grad_(False)
        self.register_buffer("table", torch.arange(LARGE + 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(torch.tanh(self.inner(x)))))


def own_memory() -> int:
    """Bytes of this process's own pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"Private_(?:Clean|Dirty):\s+(\d+)", text)))


def test_what_is_large_and_stays_moves_in_place_with_its_values_strides_and_ties() -> None:
    model, before = Wide(), Wide()
    model.base.weight.data = model.base.weight.data.t().contiguous().t()
    model.again, held = model.base, dict(model.named_parameters())
    assert share(model) is model
    assert place_of(model.base.weight) is not None and place_of(model.table) is not None
    assert place_of(model.head.weight) is None and place_of(model.inner.weight) is None  # trained; small
    assert model.base.weight.stride() == (1, WIDTH) and model.again.weight is held["base.weight"]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.state_dict().items())
    place = place_of(model.base.weight)
    assert place_of(share(model).base.weight) is place  # once


def test_copies_cost_no_memory_and_do_not_see_what_others_write() -> None:
    model = share(Wide(2000))  # 16 MB
    copies = [FlatModel(copied(model)) for _ in range(3)]
    start, total = own_memory(), float(model.base.weight.sum())
    more = [FlatModel(copied(m.module)) for m in copies for _ in range(3)]
    assert all(float(m.module.base.weight.sum()) == total for m in more)
    assert own_memory() - start < 4e6
    more[0].module.base.weight.data.add_(1)
    assert float(model.base.weight.sum()) == float(more[1].module.base.weight.sum()) == total
    assert torch.equal(clones([more[0].module.base.weight])[0], model.base.weight)  # what was there at first
    assert not torch.equal(copy.deepcopy(more[0].module).base.weight, model.base.weight)


def test_what_its_owner_wrote_to_or_trains_by_now_is_moved_anew() -> None:
    model = share(Wide())
    with torch.no_grad():
        model.base.weight[0, 0] = 7
    assert copied(admitted(model, torch.float32)).base.weight[0, 0] == 7
    model.base.requires_grad_(True)
    with torch.no_grad():
        model.base.weight[0, 0] = 8
    again = copied(admitted(model, torch.float32)).base.weight
    assert again[0, 0] == 8 and again.requires_grad and place_of(model.base.weight) is None


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_client_that_writes_to_the_base_is_refused_and_leaves_it_as_it_was(policy: str) -> None:
    from clients.sgd import SGDClient

    class Merging(SGDClient):
        def fit(self, job: object) -> object:
            update = super().fit(job)
            if job.client == 0:
                with torch.no_grad():
                    job.model.module.base.weight.add_(1)
            return update

    strategy, model = method("fedavg"), Wide()
    strategy.client = Merging(weighting="samples")
    before = hash_tensors([model.base.weight])
    problem = classification(model=model)
    run = lambda **given: problem.run("rounds=2", "clients_per_round=6", f"failures.policy={policy}", **given)  # noqa: E731
    if policy == "stop":
        with pytest.raises(ClientError, match=r"the frozen parameter 'base\.weight' was written to"):
            run(strategy=strategy)
    else:
        alone = problem.run("rounds=2", cohorts=[[1, 2, 3, 4, 5]] * 2)
        assert hashes(run(strategy=strategy)) == hashes(alone)
    assert hash_tensors([model.base.weight]) == before


class Adapted(Wide):
    """Merges its product of factors into the base when it is evaluated, as loralib's layers do."""

    def __init__(self, back: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH) / 20), nn.Parameter(torch.randn(WIDTH, 2) / 20)
        self.merged, self.back = False, back

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if mode == self.merged and (self.back or not mode):
            self.base.weight.data += (self.b @ self.a).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        more = 0 if self.merged else h @ self.a.T @ self.b.T
        return self.head(torch.tanh(self.base(h) + more))


def test_layers_that_merge_into_the_base_are_tried_on_pages_of_their_own() -> None:
    torch.manual_seed(0)
    model, x, y = admitted(Adapted(), torch.float32), torch.randn(2, 4), torch.tensor([0, 1])
    before = hash_tensors([model.base.weight])
    assert rehearsed(Task(model), Batch(x, y), torch.float32).merges == ("base.weight",)
    with pytest.raises(ConfigError, match=r"frozen parameter 'base\.weight' was written to"):
        rehearsed(Task(admitted(Adapted(back=False), torch.float32)), Batch(x, y), torch.float32)
    assert hash_tensors([model.base.weight]) == before
    run = classification(model=model).run("rounds=2", "evaluation.every=1")
    assert hash_tensors([model.base.weight]) == before and run.rows[-1]["loss"] < run.rows[0]["loss"]
