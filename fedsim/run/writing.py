"""Samples of text that the final model writes: how it goes on where test samples are broken off."""

from __future__ import annotations

import json
import logging

import torch
from torch import Tensor

from fedsim.data.federated import FederatedData
from fedsim.rng import torch_rng
from fedsim.server.loop import Loop
from fedsim.task.copies import copied
from fedsim.task.problems import logits_of
from fedsim.task.task import Task
from fedsim.task.vectors import FlatModel

FILE = "texts.json"
TEMPERATURE = 0.7  # divides the logits


def write_texts(loop: Loop, task: Task, data: FederatedData, count: int) -> None:
    """Write ``texts.json``: of ``count`` test samples, evenly spaced, the first half (``given``), the second (``true``)
    and what the global model writes in its place (``written``), drawn token by token by the seed.

    Where samples are no text (a data set that cannot ``spell`` its tokens, no test set), a warning says so.
    """
    test, spell = data.test_data(loop.server.dtype), data.dataset.spell
    if test is None or spell is None:
        logging.getLogger(__name__).warning(
            "evaluation.texts=%d: %s needs a test set of tokens, such as data=shakespeare_tokens", count, FILE
        )
        return
    model, weights = FlatModel(copied(task.model), loop.server.dtype), loop.models()["global"]
    w, out = model.load(weights.w, weights.buffers), []
    rows = torch.linspace(0, len(test) - 1, min(count, len(test))).long()
    with model.measuring(w) as again:
        for row in rows.tolist():
            whole = test.read(torch.tensor([row])).x
            half = whole.shape[1] // 2
            tokens, rng = whole[:, :half], torch_rng(loop.server.seed, "texts", row)
            while tokens.shape[1] < whole.shape[1]:
                again()
                tokens = torch.cat([tokens, _next(task, model, tokens, rng)], dim=1)
            texts = {"given": whole[0, :half], "true": whole[0, half:], "written": tokens[0, half:]}
            out.append({k: spell(v.tolist()) for k, v in texts.items()})
    (loop.folder / FILE).write_text(json.dumps(out, indent=1) + "\n")


def _next(task: Task, model: FlatModel, tokens: Tensor, rng: torch.Generator) -> Tensor:
    """The token (1, 1) that follows ``tokens`` (1, t)."""
    logits = logits_of(task.output(model.module, tokens))[:, -1].float().cpu() / TEMPERATURE
    return torch.multinomial(logits.softmax(-1), 1, generator=rng).to(tokens.device)
