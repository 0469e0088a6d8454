"""What all models are: a body and a linear head."""

from __future__ import annotations

from torch import Tensor, nn


class Model(nn.Module):
    """A body and a linear head; subclasses set ``head`` and implement ``features``."""

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Inputs ``(B, *input_shape)`` to features ``(B, d)``, d = ``head.in_features``."""
        raise NotImplementedError(f"{type(self).__name__} must implement features(x) -> (B, d)")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)``."""
        logits: Tensor = self.head(self.features(x))
        return logits
