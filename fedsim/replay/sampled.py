"""From which coalitions values are estimated, where not all of them are computed."""

from __future__ import annotations

from fedsim.errors import ConfigError
from fedsim.replay import kernelshap, valuation
from fedsim.replay.valuation import Coalition, Order
from fedsim.rng import numpy_rng


def sampled(
    kind: str, n: int, runs: int | None, kernel: bool, seed: int
) -> tuple[tuple[Order, ...], dict[Coalition, float]]:
    """The orders, or the weighted coalitions, that values of n players are estimated from; neither: all coalitions."""
    if kernel and (kind != "shapley" or runs is None):
        raise ConfigError(
            "--method kernel: estimates Shapley values from some coalitions; type --shapley --runs B with it"
        )
    if kind == "loo" and runs is not None:
        raise ConfigError(
            f"--runs {runs}: leaving one out takes a run a client; type --shapley or --banzhaf with it"
        )
    if kind == "loo" or (runs is None and n <= valuation.EXACT):
        return (), {}
    if runs is None:
        raise ConfigError(
            f"{n} players have {2**n - 1} coalitions; type --runs B for at most B of them, or "
            f"--players FILE with at most {valuation.EXACT} groups"
        )
    if runs < (least := min(2 * n, 2**n - 1) if kernel else n):
        why = "least squares take" if kernel else "one order in which they join takes"
        raise ConfigError(f"--runs {runs}: of {n} players {why} {least} coalitions at least")
    if kernel:
        return (), kernelshap.weighted_coalitions(n, runs, numpy_rng(seed, "value/kernel"))
    return tuple(valuation.orders_within(n, runs, numpy_rng(seed, "value/orders"))), {}
