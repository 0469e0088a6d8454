"""What is measured after a round, and when: on test, validation and clients' own samples, and on clients held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedsim.config.schema import EvaluationConfig
from fedsim.exchange.payload import Message, Payload
from fedsim.local.newcomer import HELD_OUT
from fedsim.server.clientmetrics import fairness, over_clients
from fedsim.server.exchanges import Server
from fedsim.server.handed import Handed, as_numbers
from fedsim.server.roundlog import Row
from fedsim.server.traits import OffersModels, State, StrategyLike
from fedsim.task.vectors import Weights


def measured(
    server: Server,
    strategy: StrategyLike,
    state: State,
    plan: EvaluationConfig,
    last: bool,
    weights: Callable[[], Weights],
) -> Row:
    """Metrics for the round's row.

    Every model on the test set (plain names) and the validation set (``val/``), every ``plan.every`` rounds; over
    clients on their own test samples (``clients/``) and their own validation samples (``clients_val/``), every
    ``plan.clients_every``; of the clients held out (see ``held_out``) when clients are measured, or if they never are,
    when the test set is; with the test set also how often a backdoor works (see ``successes``). Everything is measured
    after the ``last`` round, clients' tests only if they ever are.
    ``weights()`` gives the global model.
    """
    out: Row = {}
    number, own = server.round.index + 1, plan.holdout or plan.local_test or plan.clients_on == "domain"
    common = last or (plan.every and number % plan.every == 0)
    clients = plan.clients_every and (last or number % plan.clients_every == 0)
    if common:
        out |= _numbers(strategy, server, state)
        if server.validator is not None:
            out |= _numbers(strategy, server.on("val"), state, "val/")
        if server.triggered is not None:
            out |= successes(_numbers(strategy, server.on("attack"), state))
    if clients and own:
        out |= _over_clients(strategy, server, state, "clients/", plan.fairness)
    if plan.client_validation and (clients or last):
        out |= _over_clients(strategy, server.on("val"), state, "clients_val/", plan.fairness)
    if server.newcomers is not None and (clients if plan.clients_every else common):
        if clients and own:
            out |= _numbers(strategy, server.on("train"), state, "clients_train/", clients=True)
        message = (
            strategy.newcomer_message(server, state)
            if isinstance(strategy, OffersModels)
            else Message(Payload(weights()._asdict()))
        )
        out |= held_out(server, message, plan.held_out_steps)
        out |= gaps(out)
    return out


def held_out(server: Server, message: Message, steps: int) -> Row:
    """``held_out/``: metrics over the clients that never take part, each on its own samples, of the model that
    ``message`` brings them, or of the one they choose by half of them.

    After ``steps`` local steps on half of them, on the other half.
    """
    assert server.newcomers is not None
    who = np.flatnonzero(server.newcomers).tolist()
    shared = message.shared
    message = replace(message, shared=Payload(shared.arrays, {**shared.values, "steps": steps}))
    found = server.exchange(message, {}, task=HELD_OUT, clients=who)
    return {f"held_out/{k}": v for k, v in over_clients(found.ok, server.newcomers).items()}


def successes(found: Mapping[str, Any]) -> Row:
    """``attack_success`` of the model, or of each: the share of test samples of other classes that it takes for the
    attackers' target once they bear the trigger."""
    names = {k: k.rpartition("accuracy")[0] for k in found if k == "accuracy" or k.endswith("/accuracy")}
    return {f"{name}attack_success": found[k] for k, name in names.items()}


def gaps(row: Mapping[str, Any]) -> Row:
    """How much is lost on unseen samples, and how much more on unseen clients (Yuan, Morningstar, Ning, Singh 2022).

    ``out_of_sample_gap``: clients' training samples minus their own test samples; ``participation_gap``: the latter
    minus those of the clients held out. Of accuracy, where that is measured, else of the first metric; of all others
    than accuracy under their names too.
    """
    names = [k.removeprefix("held_out/") for k in row if k.startswith("held_out/")]
    both = [
        k for k in names if f"clients/{k}" in row and not k.endswith(("_weighted", "_std", "_worst_tenth"))
    ]
    out: Row = {}
    plain = "accuracy" if "accuracy" in both else both[0] if both else ""
    for name in both:
        test = row[f"clients/{name}"]
        for suffix in [*[""] * (name == plain), *[f"/{name}"] * (name != "accuracy")]:
            if f"clients_train/{name}" in row:
                out[f"out_of_sample_gap{suffix}"] = row[f"clients_train/{name}"] - test
            out[f"participation_gap{suffix}"] = test - row[f"held_out/{name}"]
    return out


def _over_clients(strategy: StrategyLike, server: Server, state: State, prefix: str, fair: bool) -> Row:
    """What ``evaluate_clients`` finds, and with ``fair`` how unequal clients are, each under ``prefix``."""
    before = len(server.outcomes)
    out = _numbers(strategy, server, state, prefix, clients=True)
    measured = [o for o in server.outcomes[before:] if o.kind == "ok" and o.task.endswith("evaluate")]
    return out | ({f"{prefix}{k}": v for k, v in fairness(measured).items()} if fair else {})


def _numbers(
    strategy: StrategyLike, server: Server, state: State, prefix: str = "", *, clients: bool = False
) -> Row:
    """What ``evaluate`` finds, or ``evaluate_clients``, each under ``prefix``."""
    given, find = Handed(strategy, state=state), strategy.evaluate_clients if clients else strategy.evaluate
    method = "evaluate_clients" if clients else "evaluate"
    found = as_numbers(strategy, method, find(server, state))
    given.check(method)
    return {f"{prefix}{name}": value for name, value in found.items()}
