"""GGEUR. Placeholder for the pure functions."""

from clients.generated import augment
from clients.geometry import class_geometry, class_statistics, merge_statistics

__all__ = ["augment", "class_geometry", "class_statistics", "merge_statistics"]
