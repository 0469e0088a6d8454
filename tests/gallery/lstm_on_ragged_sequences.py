"""Sequences of several lengths, padded batch by batch by a collate function."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import fedsim

g = torch.Generator().manual_seed(0)
texts = [torch.randint(0, 9, (int(n),), generator=g) for n in torch.randint(3, 12, (600,), generator=g)]
rows = [(t, int((t == 8).any())) for t in texts]


def pad(items):
    seqs, y = zip(*items, strict=True)
    return (pad_sequence(list(seqs), batch_first=True), torch.tensor([len(s) for s in seqs])), torch.tensor(y)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = (
            nn.Embedding(9, 8),
            nn.LSTM(8, 16, batch_first=True),
            nn.Linear(16, 2),
        )

    def forward(self, tokens, lengths):
        h, _ = self.lstm(self.embed(tokens))
        return self.head(h[torch.arange(len(tokens)), lengths - 1])


def example(settings: list[str]) -> fedsim.RunResult:
    clients = [DataLoader(rows[i : i + 100], collate_fn=pad) for i in range(0, 500, 100)]
    return fedsim.simulate(
        ["client.lr=0.5", "client.epochs=3", *settings],
        model=Tagger,
        clients=clients,
        test=DataLoader(rows[500:], collate_fn=pad),
    )
