"""Models of the peft library: trained as a plain loop trains them, and written as its own loader reads them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import QUIET, hashes
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.errors import ConfigError
from fedsim.task.adapters import save
from fedsim.task.frozen import base_of, reference
from fedsim.task.mapped import place_of

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
pytest.importorskip("peft", reason="peft is not installed (fedsim[hf])")
pytest.importorskip("transformers", reason="transformers is not installed (fedsim[hf])")
import peft
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTH = 2100, 8  # x 32: the embedding is large enough to be shared
HISTORIES = Path(__file__).resolve().parents[3] / "shared/data/gpt_histories"
Adapt = Callable[[nn.Module], nn.Module]


def base(**options: Any) -> nn.Module:
    """A GPT-2 of two layers, drawn under a fixed seed, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False}
        return GPT2LMHeadModel(GPT2Config(**(sizes | off | ends | options)))


def lora(model: nn.Module, **options: Any) -> nn.Module:
    targets = ["c_attn", "c_proj"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": True} | options
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def dora(model: nn.Module) -> nn.Module:
    return lora(model, use_dora=True, lora_dropout=0.1)


def prompts(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lora(model)


KINDS: dict[str, Adapt] = {"lora": lora, "dora": dora, "prompts": prompts, "checkpointed": checkpointed}


def adapted(kind: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return KINDS[kind](base(**options))


def next_token(output: Any, y: Tensor) -> Tensor:
    """Mean cross entropy of each next token; virtual tokens stand before the first."""
    logits = output.logits[:, -y.shape[1] : -1]
    return F.cross_entropy(logits.flatten(0, 1).float(), y[:, 1:].flatten())


def texts(clients: int = 3, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Counting up from anywhere, in steps of each client's own."""
    g = torch.Generator().manual_seed(0)
    starts = [torch.randint(0, 50, (rows, 1), generator=g) for _ in range(clients)]
    return [(x, x) for x in (s + (c + 1) * torch.arange(LENGTH) for c, s in enumerate(starts))]


def run(model: nn.Module, *overrides: str, **given: Any) -> fedsim.RunResult:
    settings = ("engine=serial", *QUIET, "rounds=2", "clients_per_round=2", "client.batch_size=4")
    local = ("client.epochs=2", "client.lr=0.5", "engine.chunks=2", "evaluation.every=1")
    return fedsim.simulate(
        [*settings, *local, *overrides],
        model=model,
        loss=next_token,
        clients=texts(),
        test=texts(1)[0],
        **given,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_and_loads_into_peft_with_equal_logits(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    done = run(model, "client.lr=2" if kind == "prompts" else "client.lr=0.5")
    assert done.rows[-1]["loss"] < done.rows[0]["loss"] < 7.7
    assert place_of(model.get_base_model().transformer.wte.weight) is not None
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert done.weights.keys() == trained
    save(model, done.weights, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    here = adapted(kind)
    here.load_state_dict(done.weights, strict=False)
    x = texts(1)[0][0]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=x).logits, here.eval()(input_ids=x).logits)
        assert not torch.equal(loaded(input_ids=x).logits, adapted(kind).eval()(input_ids=x).logits)
    assert reference(tmp_path / "adapter/adapter_model.safetensors") == base_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "prompts"])
def test_workers_compute_the_same_bits_as_one_process(kind: str, ray: str) -> None:
    model = adapted(kind)
    bits = hashes(run(model))
    assert hashes(run(model, ray, "engine.workers=1")) == bits
    assert hashes(run(model, ray, "engine.workers=2")) == bits


@pytest.mark.slow
def test_a_base_in_bfloat16_gives_the_same_bits_on_workers(ray: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = lora(base().to(torch.bfloat16))
    done = run(model)
    assert {t.dtype for t in done.weights.values()} == {torch.float32} and done.rows[1]["loss"] < 7.7
    assert hashes(run(model, ray, "engine.workers=2")) == hashes(done)
    assert model.get_base_model().transformer.wte.weight.dtype == torch.bfloat16


def test_one_step_is_the_step_of_a_plain_loop() -> None:
    local = ("client.epochs=1", "client.batch_size=8", "client.weight_decay=0", "client.clip_norm=null")
    done = run(adapted("lora"), "rounds=1", *local, cohorts=[[1]])
    model, x = adapted("lora"), texts()[1][0]
    params = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.backward(next_token(model(input_ids=x), x))
    with torch.no_grad():
        for p in params:
            p.sub_(0.5 * p.grad)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(done.weights[name], p, rtol=0, atol=1e-6), name


def test_a_saved_adapter_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    if not HISTORIES.is_dir():
        pytest.skip(f"the small pretrained GPT is not at {HISTORIES}")
    model = lora(GPT2LMHeadModel.from_pretrained(HISTORIES))
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save(model, weights, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert (
        json.loads(text)["base_model_name_or_path"] == "gpt_histories" and str(HISTORIES.parent) not in text
    )
    assert str(HISTORIES.parent).encode() not in (tmp_path / "adapter_model.safetensors").read_bytes()
    base = reference(tmp_path / "adapter_model.safetensors")
    assert base is not None and base.name == "gpt_histories"


def test_what_an_adapter_file_would_not_hold_is_refused(tmp_path: Path) -> None:
    model = adapted("lora")
    model.get_base_model().transformer.ln_f.requires_grad_(True)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match=r"ln_f\.weight' and 1 more changed in the run too"):
        save(model, weights, tmp_path)
    with pytest.raises(ConfigError, match=r"weights: '.*lora_A.* is missing"):
        save(adapted("lora"), {}, tmp_path)
    with pytest.raises(ConfigError, match=r"Linear holds no peft\.PeftModel"):
        save(nn.Linear(1, 1), {}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_parts_from_its_embedding_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    for parted in (["lm_head"], ["wte"], ["wte", "lm_head"]):
        with pytest.raises(ConfigError, match=r"ensure_weight_tying=True"):
            run(lora(base(), modules_to_save=parted))
    run(lora(base(tie_word_embeddings=False), modules_to_save=["lm_head"]), "rounds=1")
    model = lora(base(), modules_to_save=["lm_head"], ensure_weight_tying=True)
    done = run(model, "rounds=1")
    save(model, done.weights, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    here, x = lora(base(), modules_to_save=["lm_head"], ensure_weight_tying=True), texts(1)[0][0]
    here.load_state_dict(done.weights, strict=False)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=x).logits, here.eval()(input_ids=x).logits)
