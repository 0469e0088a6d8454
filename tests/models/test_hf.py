"""Models of transformers: drawn and loaded, adapters, frozen parts in their own type, refusals; offline."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import problems
import pytest
import torch
from composing import compose_quickly

from fedsim.config.parts import part
from fedsim.errors import ConfigError
from fedsim.models import hf
from fedsim.models.split import features_and_output, with_head
from fedsim.rng import hash_tensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

GPT2 = (
    "model.architecture=GPT2LMHeadModel",
    "model.config={n_embd: 16, n_layer: 1, n_head: 2, n_positions: 16}",
)
SMALL = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32"
BERT = ("model.architecture=BertForSequenceClassification", f"model.config={{{SMALL}, vocab_size: 30}}")
VIT = ("model.architecture=ViTForImageClassification", f"model.config={{{SMALL}, patch_size: 4}}")
LORA = "model.lora={r: 2, alpha: 4, target_modules: [c_attn, c_proj]}"


def build(*overrides, shape=(8,), classes=30, seed=0):
    torch.manual_seed(seed)
    node = compose_quickly(["model=hf", *overrides]).model
    return part(node, "model", input_shape=list(shape), num_classes=classes)


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def tokens():
    return torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with weights, as the library saves it."""
    place = tmp_path_factory.mktemp("gpt")
    build(*GPT2).save_pretrained(place)
    return place


def test_a_drawn_model_has_the_datas_sizes_and_follows_from_the_seed():
    model = build(*GPT2)
    assert isinstance(model, transformers.GPT2LMHeadModel) and model.training
    assert model.config.vocab_size == 30 and model.config.resid_pdrop == 0.1 and not model.config.use_cache
    assert model(tokens()).logits.shape == (2, 8, 30) and list(model(tokens())) == ["logits"]
    weights = hash_tensors(model.parameters())
    assert (
        hash_tensors(build(*GPT2).parameters()) == weights != hash_tensors(build(*GPT2, seed=1).parameters())
    )
    assert build(*BERT, classes=5)(tokens()).logits.shape == (2, 5)
    image = build(*VIT, shape=(1, 8, 12), classes=4)
    assert image(torch.randn(2, 1, 8, 12)).logits.shape == (2, 4)
    given = build(GPT2[0], GPT2[1].replace("}", ", vocab_size: 40, resid_pdrop: 0.0}"))
    assert given.config.vocab_size == 40 and given.config.resid_pdrop == 0


def test_a_folder_gives_its_weights_and_no_name_of_this_machine(folder):
    model = build(f"model.path={folder}", classes=0)
    assert hash_tensors(model.parameters()) == hash_tensors(build(*GPT2).parameters())
    assert model.training and model.lm_head.weight is model.transformer.wte.weight
    adapter = build(f"model.path={folder}", LORA)
    assert str(folder.parent) not in str(adapter.peft_config["default"].to_dict())
    assert str(folder.parent) not in str(adapter.config.to_dict())


def test_another_head_on_a_folders_body_is_drawn_and_said(folder, caplog):
    model = build(
        f"model.path={folder}",
        "model.architecture=GPT2ForSequenceClassification",
        "model.config={pad_token_id: 0}",
        classes=3,
    )
    assert model(tokens()).logits.shape == (2, 3)
    assert "not in the folder, so drawn: score.weight" in caplog.text


def test_adapters_start_as_nothing_and_are_all_that_is_trained(folder):
    base, model = build(f"model.path={folder}").eval(), build(f"model.path={folder}", LORA)
    assert model.training and all(".lora_" in name for name in trained(model)) and len(trained(model)) == 6
    config = model.peft_config["default"]
    assert config.fan_in_fan_out and config.lora_alpha == 4 and config.task_type == "CAUSAL_LM"
    assert torch.equal(model.eval()(tokens()).logits, base(tokens()).logits)
    again = build(f"model.path={folder}", LORA)
    assert hash_tensors(again.parameters()) == hash_tensors(model.parameters())
    other = build(f"model.path={folder}", LORA, seed=1)
    assert hash_tensors(other.parameters()) != hash_tensors(model.parameters())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("architecture", "config", "targets"),
    [
        ("GPT2LMHeadModel", "n_embd: 16, n_layer: 1, n_head: 2", {"c_attn"}),
        ("ViTForImageClassification", f"{SMALL}, patch_size: 4", {"q_proj", "v_proj"}),
        ("DistilBertForSequenceClassification", "dim: 16, n_layers: 1, n_heads: 2", {"q_lin", "v_lin"}),
        ("Qwen2ForCausalLM", f"{SMALL}, num_key_value_heads: 2", {"q_proj", "v_proj"}),
    ],
)
def test_of_adapters_rank_scale_and_targets_need_not_be_said(architecture, config, targets):
    shape = (1, 8, 8) if architecture.startswith("ViT") else (8,)
    words = (f"model.architecture={architecture}", f"model.config={{{config}}}")
    for lora, rank in (("{}", 4), ("{r: 2}", 2)):
        found = build(*words, f"model.lora={lora}", shape=shape, classes=4).peft_config["default"]
        assert (found.r, found.lora_alpha, found.lora_dropout) == (rank, 2 * rank, 0)
        assert set(found.target_modules) == targets


def test_new_classifiers_are_trained_beside_the_adapters():
    for model, name in (
        (
            build(*VIT, "model.lora={r: 2, target_modules: [q_proj]}", shape=(1, 8, 8), classes=4),
            "classifier",
        ),
        (build(*BERT, "model.lora={r: 2}", classes=4), "classifier"),
    ):
        rest = [n for n in trained(model) if ".lora_" not in n]
        assert rest == [
            f"base_model.model.{name}.modules_to_save.default.{kind}" for kind in ("weight", "bias")
        ]
    plain = build(*BERT, "model.lora={r: 2, target_modules: [query]}")
    assert not plain.peft_config["default"].fan_in_fan_out  # its layers are nn.Linear


@pytest.mark.parametrize(
    ("more", "floats"),
    [
        (("model.lora={r: 2}",), ".lora_"),
        (("model.freeze=['bert.*']",), "classifier"),
        (("model.freeze=['bert.encoder.*']",), ""),
    ],
)
def test_frozen_parts_keep_their_own_type(more, floats):
    model = build(*BERT, *more, "model.dtype=bfloat16", classes=4)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    assert all(floats in name or "modules_to_save" in name for name in trained(model))
    exact = build(*BERT, *more, classes=4)
    mine, theirs = (m.eval()(tokens()).logits.float() for m in (model, exact))
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
    model(tokens()).logits.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    pickle.loads(pickle.dumps(model))(tokens())


def test_a_tied_layer_is_saved_once_if_asked_so(folder):
    model = build(
        f"model.path={folder}", "model.lora={r: 2, modules_to_save: [wte], ensure_weight_tying: true}"
    )
    tied = [n for n in trained(model) if ".lora_" not in n]
    assert tied == ["base_model.model.transformer.wte.modules_to_save.default.weight"]


def test_features_of_a_classifier_are_what_goes_into_it():
    model = with_head(build(*BERT, classes=4).eval(), "classifier")
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    z, output = features_and_output(model, batch)
    assert z.shape == (2, 16) and torch.equal(model.classifier(z), output.logits)
    torch.testing.assert_close(features_and_output(model, tokens())[0], z)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "type model.architecture=GPT2LMHeadModel"),
        (("model.architecture=GPT2LMHead",), "nearest is 'model.architecture=GPT2LMHeadModel'"),
        (("model.architecture=AutoModel",), "has no such model"),
        (
            (GPT2[0], "model.config={n_emb: 8}"),
            "model.config.n_emb: GPT2Config has no such field; nearest is 'n_embd'",
        ),
        ((GPT2[0], "model.config={n_embd: 7, n_layer: 1}"), "GPT2LMHeadModel cannot be built: .*divisible"),
        (("model.path=/nowhere",), "found no such folder; nothing is fetched"),
        ((*GPT2, "model.lora={rank: 4}"), "model.lora.rank: peft's LoRA has no such option"),
        ((*GPT2, "model.lora={r: 4, target_modules: [query]}"), "Target modules {'query'} not found"),
        ((*GPT2, "model.lora={modules_to_save: [lm_head]}"), "add ensure_weight_tying: true"),
        ((*GPT2, "model.freeze=[wte.*]"), "no parameter fits 'wte"),
        ((*GPT2, "model.dtype=bfloat16"), "add model.lora="),
        ((*GPT2, "model.dtype=int8"), "must be one of float32, bfloat16, float16"),
        ((GPT2[0], "model.config={attn_implementation: some/kernel}"), "must be a name of the library"),
        ((GPT2[0], "model.config={attn_implementation: 7}"), "must be a name of the library"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_line(overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        build(*overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.architecture=BertModel",), "are of type gpt2"),
        (("model.config={n_embd: 8}",), r"c_attn.bias' has shape \(48,\) there, \(24,\) by the settings"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, overrides, words):
    with pytest.raises(ConfigError, match=words):
        build(f"model.path={folder}", *overrides)


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_a_missing_library_is_said_in_a_line(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs {missing}: pip install 'fedsim-lab\[hf\]'"):
        build(*GPT2, "model.lora={r: 2}")


def test_the_core_is_imported_without_the_libraries_and_they_offline():
    code = (
        "import sys, os, fedsim.api, fedsim.models, fedsim.task.task\n"
        "assert not {'transformers', 'peft', 'torchvision'} & set(sys.modules)\n"
        "from fedsim.models.hf import library\n"
        "library('transformers')\n"
        "import huggingface_hub.constants as c\n"
        "assert c.HF_HUB_OFFLINE and os.environ['TOKENIZERS_PARALLELISM'] == 'false'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hf.DTYPES["bfloat16"] is torch.bfloat16


def token_classes(sizes=(9, 12, 7)):
    """Clients whose class is whether the first token is one of the upper half."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randint(30, (n, 8), generator=g) for n in sizes]
    return [(x, (x[:, 0] >= 15).long()) for x in xs]


def loss_of_logits(output, y):
    return torch.nn.functional.cross_entropy(output.logits, y)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedper", "moon"])
def test_methods_with_heads_train_it_serially_and_on_ray_to_the_same_bits(method):
    problem = problems.Problem(
        model=None,
        clients=token_classes(),
        loss=loss_of_logits,
        settings=(
            "model=hf",
            *BERT,
            "model.head=classifier",
            f"strategy={method}",
            "rounds=2",
            "clients_per_round=2",
        ),
    )
    serial = problem.run("client.lr=0.1")
    assert problems.hashes(serial) == problems.hashes(
        problem.run("client.lr=0.1", "engine=ray", "engine.workers=2")
    )
    assert "classifier.weight" in serial.weights and len(set(problems.hashes(serial))) == 2
