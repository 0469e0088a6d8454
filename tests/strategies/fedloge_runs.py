"""Recorded runs of FedLoGe on little problems, with personal models measured where ``TESTS`` are among the settings."""

from __future__ import annotations

from problems import recorded

OWN = ("strategy.sse.sparsity=0.2", "client.momentum=0.5", "client.clip_norm=null")
TESTS = (
    "evaluation.local_test=true",
    "evaluation.by_class=true",
    "evaluation.clients_every=1",
    "evaluation.every=1",
)


def run(problem, *overrides):
    return recorded("fedloge", problem, *OWN, *overrides)
