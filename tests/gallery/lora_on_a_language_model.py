"""Adapters of peft on a frozen GPT-2-like model: only they are trained, sent and saved."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import fedsim

start = torch.randint(0, 16, (300, 1), generator=torch.Generator().manual_seed(0))
tokens = (start + 3 * torch.arange(16)) % 16


def adapted():
    config = GPT2Config(
        vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return get_peft_model(GPT2LMHeadModel(config), lora)


def example(settings: list[str]) -> fedsim.RunResult:
    return fedsim.simulate(
        [
            "task=language_model",
            "num_clients=4",
            "partition=iid",
            "client=adamw",
            "client.lr=0.02",
            *settings,
        ],
        model=adapted,
        data={"input_ids": tokens[:240], "labels": tokens[:240]},
        test={"input_ids": tokens[240:], "labels": tokens[240:]},
    )
