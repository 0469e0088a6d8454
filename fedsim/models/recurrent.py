"""Recurrent models of text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.models.base import Model


class CharLSTM(Model):
    """Next-character LSTM of McMahan et al. 2017 and LEAF: embedding, stacked LSTM, linear head on the last
    state.

    Args:
        input_shape: (window,), characters per sample; any length works.
        num_classes: size of the vocabulary.
        embedding: width of the character embedding (8 in LEAF).
        hidden: units per LSTM layer (256).
        layers: stacked LSTM layers (2).
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, embedding: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"model=char_lstm reads windows of characters (window,), data gives {tuple(input_shape)}; "
                "type data=shakespeare or another model"
            )
        self.embedding = nn.Embedding(num_classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Codes ``(B, window)`` to the last output of the top layer ``(B, hidden)``."""
        outputs: Tensor = self.lstm(self.embedding(x.long()))[0]
        return outputs[:, -1]
