"""Gossip learning."""

from strategies.averaging import variance_corrected_average

__all__ = ["variance_corrected_average"]
