"""A BERT-like classifier of transformers on dict batches; its output holds the logits."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import fedsim

g = torch.Generator().manual_seed(0)
ids = torch.randint(1, 40, (400, 12), generator=g)
y = (ids[:, 0] < 20).long()
x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def example(settings: list[str]) -> fedsim.RunResult:
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=2, **size)
    return fedsim.simulate(
        ["num_clients=4", "partition=iid", "client=adam", "client.lr=0.003", "client.epochs=4", *settings],
        model=lambda: BertForSequenceClassification(config),
        data=({k: v[:320] for k, v in x.items()}, y[:320]),
        test=({k: v[320:] for k, v in x.items()}, y[320:]),
    )
