"""How a frozen base reaches workers: as a place on this machine, as bytes on others; and narrow types by pipe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.engine.ray import tensors
from fedsim.engine.ray.transport.memory import Address, Block
from fedsim.task.mapped import SUPPORTED, clones, place_of, share

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="needs memfd_create (Linux)")


def base(kind: torch.dtype = torch.float32) -> nn.Linear:
    return share(nn.Linear(300, 300).to(kind).requires_grad_(False))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_on_this_machine_a_place_travels_and_a_worker_writes_to_pages_of_its_own(kind: torch.dtype) -> None:
    layer = base(kind)
    with tensors.referring(None) as kept:
        sent = tensors._from_parameter(layer.weight)
    found, again = tensors._to_parameter(sent), tensors._to_parameter(sent)
    assert isinstance(sent[0], tensors.Reference) and not kept and not found.requires_grad
    assert torch.equal(found, layer.weight) and found.dtype == kind
    assert found.data_ptr() == again.data_ptr() != layer.weight.data_ptr()  # one mapping a worker
    found.data.zero_()
    assert layer.weight.any() and torch.equal(clones([found])[0], layer.weight)
    assert not isinstance(tensors._from_parameter(layer.weight)[0], tensors.Reference)  # nobody asked for it
    assert not isinstance(tensors._from_parameter(layer.bias)[0], tensors.Reference)


def test_on_another_machine_the_bytes_come_from_the_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, stored = base(), list[Any]()

    def put(value: Any) -> int:
        stored.append(value.copy())
        return len(stored) - 1

    def nowhere(self: Address) -> int:
        raise FileNotFoundError("/proc/1/fd/3")

    with tensors.referring(SimpleNamespace(put=put)) as kept:
        sent = [tensors._from_parameter(layer.weight) for _ in range(2)]
    monkeypatch.setattr(Address, "open", nowhere)
    monkeypatch.setattr("ray.get", lambda reference: stored[reference])
    found = [tensors._to_parameter(parts) for parts in sent]
    assert kept == [0] and all(torch.equal(p, layer.weight) for p in found)
    place, home = place_of(found[0]), place_of(layer.weight)
    assert place is not None and home is not None and place.memory is not home.memory
    assert found[0].data_ptr() == found[1].data_ptr()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_narrow_tensors_pass_the_pipe_as_they_are(kind: torch.dtype) -> None:
    value: dict[str, Tensor] = {"small": torch.ones(3).to(kind), "large": torch.arange(9000).to(kind)}
    block = Block()
    found = block.read(block.write(value))
    for name, t in value.items():
        assert found[name].dtype == kind
        assert torch.equal(found[name].view(torch.uint8), t.view(torch.uint8))
