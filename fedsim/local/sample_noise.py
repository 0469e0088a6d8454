"""Record-level privacy inside a client: DP-SGD (Abadi et al.: Deep Learning with Differential Privacy, CCS 2016).

Each sample is in a step's batch by an independent coin of probability ``q = B / n``; the step's gradient is
``(sum_j min(1, C / |g_j|) g_j + N(0, (z C)^2 I)) / B`` with B the expected size. An empty batch still steps by noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedsim.data.local import Batch, LocalData
from fedsim.data.trees import Tree, tree_map
from fedsim.errors import ClientError
from fedsim.exchange import normals as noise
from fedsim.exchange.privacy import Privacy
from fedsim.local.meter import Meter
from fedsim.task.losses import WholeLoss, call
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

SampleGradients = Callable[[Tensor, Any, Any], tuple[Tensor, Tensor]]
Keyed = Callable[..., torch.Generator]  # (purpose, *numbers)


class Records:
    """The noisy gradients of one job. ``events``: releases so far, each of one batch; ``rng`` as of a job."""

    def __init__(self, privacy: Privacy, model: FlatModel, task: Task, rng: Keyed, expected: int):
        if type(task.loss) is WholeLoss or task.forward is not None:
            raise ClientError(
                "privacy=record: the loss calls the model by itself, so samples' gradients cannot be told apart; give "
                "loss(output, y)"
            )
        self._privacy, self._layout, self._rng = privacy, model.layout, rng
        self.expected, self.events = expected, 0
        self._gradients = sample_gradients(model, task.loss)

    def batches(self, data: LocalData, steps: int, purpose: str, meter: Meter) -> Iterator[Batch]:
        """A batch for each of ``steps``: every sample by a coin."""
        rng, n = self._rng(purpose), len(data)
        q = min(1.0, self.expected / n) if n else 0.0
        for _ in range(steps):
            rows = torch.nonzero(torch.rand(n, generator=rng, dtype=torch.float64) < q).flatten()
            yield data.read(rows, rng if data.augment is not None else None)
            meter.samples += len(rows)
            meter.steps += 1

    def grad(self, w: Tensor, batch: Batch, own: bool = False) -> tuple[Tensor, Tensor]:
        """The noisy gradient (d,) at ``w``, and the samples' mean loss (); ``own``: the rule has a loss of its own.

        Raises:
            ClientError: for such a rule: what its loss knows of other samples is not bounded.
        """
        if own:
            raise ClientError(refusal("a loss or forward pass of its own"))
        privacy, layout = self._privacy, self._layout
        bound, n = float(privacy.clip), batch.size
        total, losses = torch.zeros_like(w, dtype=torch.float64), w.new_zeros(())
        for at in range(0, n, privacy.micro):
            x, y = (_cut(half, at, privacy.micro) for half in batch)
            g, values = self._gradients(w.detach(), x, y)
            total += clipped_sum(g, bound)
            losses = losses + values.detach().sum()
        self.events += 1
        normals = noise.secret if privacy.noise == "os" else noise.of(self._rng("release/noise", self.events))
        drawn = normals(layout.size) * (privacy.multiplier * bound)
        g = (total + layout.expand(drawn).to(total.device)) / self.expected
        return g.to(w.dtype), losses / max(n, 1)


def refusal(what: str) -> str:
    """Why a local rule cannot be made private by noise on the gradients of samples."""
    return (
        f"privacy=record: the local rule uses {what}, which looks at samples without noise; type strategy=fedavg, "
        "fedprox or another of the table in docs/privacy.md"
    )


def _cut(half: Tree, at: int, count: int) -> Tree:
    return tree_map(lambda t: t[at : at + count], half)


def sample_gradients(model: FlatModel, loss: Callable[[Any, Any], Tensor]) -> SampleGradients:
    """``(w (d,), x (B, ...), y (B, ...)) -> gradients (B, d), losses (B,)`` of each sample by itself."""
    layout, module = model.layout, model.module
    device, kind, scale = model.w.device.type, model.autocast, model.backward.scale

    def value(w: Tensor, x: Any, y: Any) -> Tensor:
        params = {s.name: w[s.span].view(s.shape) for s in layout.params}

        def one(*args: Any, **named: Any) -> Any:
            return functional_call(module, params, args, named)

        single = [tree_map(lambda t: t.unsqueeze(0), half) for half in (x, y)]
        with torch.autocast(device, kind, enabled=kind is not None):
            found = loss(call(one, single[0], module), single[1])
        return found if scale == 1 else found * scale

    def each(w: Tensor, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        dims = (None, 0, None if y is None else 0)
        g, losses = vmap(grad_and_value(value), in_dims=dims, randomness="different")(w, x, y)
        return (g, losses) if scale == 1 else (g / scale, losses / scale)

    return each


def clipped_sum(g: Tensor, bound: float) -> Tensor:
    """``sum_j min(1, C / |g_j|) g_j`` (d,), float64, of rows ``g`` (B, d)."""
    g = g.double()
    lengths = g.norm(dim=1)
    factor = torch.where(lengths > bound, bound / lengths, torch.ones_like(lengths))
    return factor @ g
