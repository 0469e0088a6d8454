"""Graphs of several sizes as one block-diagonal graph per batch, put together by a collate function."""

import torch
from torch import nn
from torch.utils.data import DataLoader

import fedsim

g = torch.Generator().manual_seed(0)
sizes = torch.randint(3, 8, (300,), generator=g).tolist()
graphs = [((torch.rand(n, n, generator=g) < 0.4).float(), i % 2) for i, n in enumerate(sizes)]
graphs = [(torch.cat([torch.ones(len(a), 1), a.sum(1, keepdim=True)], 1), a * (1 - y), y) for a, y in graphs]


def merge(items):
    nodes, edges, y = zip(*items, strict=True)
    owner = torch.repeat_interleave(torch.tensor([len(n) for n in nodes]))
    return {"nodes": torch.cat(nodes), "edges": torch.block_diag(*edges), "owner": owner}, torch.tensor(y)


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(2, 16), nn.Linear(16, 2)

    def forward(self, nodes, edges, owner):
        h = torch.relu(self.first(nodes + edges @ nodes))
        return self.head(h.new_zeros(int(owner.max()) + 1, 16).index_add(0, owner, h))


def example(settings: list[str]) -> fedsim.RunResult:
    parts = [DataLoader(graphs[i : i + 60], collate_fn=merge) for i in range(0, 300, 60)]
    return fedsim.simulate(["client.lr=0.02", *settings], model=GraphNet, clients=parts[:4], test=parts[4])
