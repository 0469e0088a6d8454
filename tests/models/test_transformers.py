"""The plain transformers: GPT-2's numbers from the library's weights, causality, sizes of images, refusals."""

from __future__ import annotations

import pytest
import torch

from fedsim import models
from fedsim.errors import ConfigError
from fedsim.task.layout import Layout

GPT = {"layers": 3, "heads": 4, "width": 96, "context": 64, "vocabulary": None, "dropout": 0.0, "tied": True}
VIT = {"patch": 4, "layers": 2, "heads": 2, "width": 16, "dropout": 0.0}
NAMES = {  # ours: the library's
    "tokens.weight": "transformer.wte.weight",
    "places.weight": "transformer.wpe.weight",
    "norm": "transformer.ln_f",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def gpt(**options):
    torch.manual_seed(0)
    return models.GPT((64,), 512, **GPT | options)


def from_library(library):
    """The library's GPT-2 in ours: its matrices are (in, out)."""
    mine, theirs = gpt(), library.state_dict()
    out = {}
    for name in mine.state_dict():
        if name.startswith("blocks."):
            _, i, layer, kind = name.split(".")
            value = theirs[f"transformer.h.{i}.{NAMES[layer]}.{kind}"]
            out[name] = value.T if kind == "weight" and value.dim() == 2 else value
        elif name == "head.weight":
            out[name] = theirs["lm_head.weight"]
        else:
            layer, kind = name.rsplit(".", 1)
            out[name] = theirs[NAMES.get(name, f"{NAMES.get(layer)}.{kind}")]
    mine.load_state_dict(out)
    return mine


def test_gpt_computes_what_the_library_does_with_its_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=512, n_positions=64, n_embd=96, n_layer=3, n_head=4)
    library = transformers.GPT2LMHeadModel(config).eval()
    x = torch.randint(512, (3, 20))
    mine = from_library(library).eval()
    torch.testing.assert_close(mine(x), library(x).logits, atol=2e-5, rtol=1e-4)
    assert sum(p.numel() for p in mine.parameters()) == 391_008
    assert mine.head.weight is mine.tokens.weight and not Layout(mine).head


def test_gpt_does_not_look_ahead_and_knows_its_own_head():
    model = gpt(tied=False)
    x = torch.randint(512, (2, 10))
    changed = torch.cat([x[:, :6], (x[:, 6:] + 1) % 512], dim=1)
    assert torch.equal(model(x)[:, :6], model(changed)[:, :6])
    assert not torch.equal(model(x)[:, 6:], model(changed)[:, 6:])
    assert model.features(x).shape == (2, 10, 96) and Layout(model).head == {"head.weight"}


def test_gpt_under_vmap_is_the_loop():
    model = gpt(layers=1)
    many = {k: torch.stack([v, 1.1 * v]) for k, v in model.named_parameters()}
    x = torch.randint(512, (2, 3, 8))
    found = torch.vmap(lambda p, x: torch.func.functional_call(model, p, (x,)))(many, x)
    for i in range(2):
        alone = torch.func.functional_call(model, {k: v[i] for k, v in many.items()}, (x[i],))
        torch.testing.assert_close(found[i], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8)])
def test_vit_takes_images_of_any_size_that_patches_fill(shape):
    model = models.ViT(shape, 5, **VIT)
    assert model(torch.randn(2, *shape)).shape == (2, 5)
    assert model.features(torch.randn(2, shape[0], 12, 20)).shape == (2, 16)
    with pytest.raises(ConfigError, match="does not divide images of 12x10"):
        model(torch.randn(2, shape[0], 12, 10))


def test_dropout_falls_in_training_only_and_not_at_all_without_it():
    x = torch.randn(2, 1, 8, 8)
    model = models.ViT((1, 8, 8), 5, **VIT | {"dropout": 0.5})
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert not any(isinstance(m, torch.nn.Dropout) for m in models.ViT((1, 8, 8), 5, **VIT).modules())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: models.GPT((1, 8, 8), 10, **GPT), "reads sequences"),
        (lambda: models.GPT((64,), 0, **GPT), "model.vocabulary=512"),
        (lambda: gpt(heads=5), "model.heads=5 does not divide model.width=96"),
        (lambda: gpt(dropout=1.0), "model.dropout=1.0"),
        (lambda: gpt(context=8)(torch.zeros(1, 9, dtype=torch.long)), "type model.context=9"),
        (lambda: models.ViT((1, 9, 8), 5, **VIT), "model.patch=4 does not divide images of 9x8"),
        (lambda: models.ViT((64,), 5, **VIT), "needs images"),
    ],
)
def test_impossible_ones_are_refused(build, words):
    with pytest.raises(ConfigError, match=words):
        build()
