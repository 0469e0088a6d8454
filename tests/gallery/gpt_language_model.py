"""A GPT-2-like language model of transformers: perplexity by tokens, clients weighed by tokens."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fedsim

start = torch.randint(0, 16, (300, 1), generator=torch.Generator().manual_seed(0))
tokens = (start + 3 * torch.arange(24)) % 16  # every text counts in threes
tokens[::3, 18:] = -100  # a third of them are short: no targets there
x = {"input_ids": tokens.clamp(min=0), "attention_mask": (tokens >= 0).long(), "labels": tokens}


def example(settings: list[str]) -> fedsim.RunResult:
    config = GPT2Config(
        vocab_size=16, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return fedsim.simulate(
        ["task=language_model", "num_clients=4", "partition=iid", "client=adam", "client.lr=0.01", *settings],
        model=lambda: GPT2LMHeadModel(config),
        data={k: v[:240] for k, v in x.items()},
        test={k: v[240:] for k, v in x.items()},
    )
