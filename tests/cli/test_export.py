"""``fedsim export``: files that other programs read, with what has to be known beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import classification
from safetensors.torch import load_file

import fedsim
from fedsim.cli.main import command

TINY = (
    "engine=serial",
    "tracker=quiet",
    "rounds=1",
    "client.epochs=1",
    "num_clients=4",
    "clients_per_round=4",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    model = ("model=convnet", "model.channels=[4,8]", "strategy=fedper")
    return fedsim.simulate([*TINY, *model, f"dir={place}"]).dir


def test_state_dict_and_safetensors_hold_the_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = load_file(run / "weights.safetensors")
    assert command(["export", str(run)]) == 0
    assert capsys.readouterr().out == f"written: {run / 'export/model.pt'}\n"
    assert command(["export", str(run), "--to", "safetensors", "--client", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"].endswith("export/model_client3.safetensors") and facts["client"] == 3
    whole, own = torch.load(run / "export/model.pt"), load_file(facts["path"])
    assert whole.keys() == own.keys() == expected.keys()
    assert all(torch.equal(whole[k], v) for k, v in expected.items())
    assert not torch.equal(own["head.weight"], whole["head.weight"])
    about = json.loads(Path(facts["path"] + ".json").read_text())
    assert about["classes"] == [str(i) for i in range(10)] and about["normalize"]["std"] == [0.376]
    assert about["client"] == 3 and about["at"] == {"round": 1}


@pytest.mark.slow
def test_onnx_computes_what_torch_computes_for_any_batch(run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    assert (
        command(["export", str(run), "--to", "onnx", "--client", "1", "--out", str(tmp_path / "a/own.onnx")])
        == 0
    )
    model = onnx.load(tmp_path / "a/own.onnx")
    onnx.checker.check_model(model)
    x = torch.randn(5, 1, 8, 8)
    (found,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    expected = fedsim.load_run(run).model(client=1)(x)
    torch.testing.assert_close(torch.from_numpy(found.copy()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_a_language_model_is_written_without_what_it_keeps_for_the_next_token(tmp_path: Path) -> None:
    onnx, transformers = pytest.importorskip("onnx"), pytest.importorskip("transformers")
    from onnx.reference import ReferenceEvaluator

    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    ids = torch.randint(0, 9, (12, 6))
    result = fedsim.simulate(
        ["engine=serial", "rounds=1", "task=language_model", f"dir={tmp_path / 'run'}"],
        model=lambda: transformers.GPT2LMHeadModel(config),
        clients=[(ids, ids)],
    )
    model = onnx.load(result.export("onnx"))
    (found,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: ids[:3].numpy()})
    expected = result.model()(ids[:3]).logits.detach()
    torch.testing.assert_close(torch.from_numpy(found.copy()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_transformers_model_is_written_as_its_library_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
    )

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertForSequenceClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=x.long()).logits

    ids = [(torch.randint(0, 20, (6, 8)), torch.arange(6) % 3) for _ in range(4)]
    result = classification(model=Classifier, clients=ids, test=None).run(
        "rounds=1", f"dir={tmp_path / 'run'}"
    )
    path = result.export("hf", out=tmp_path / "hf")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, result.weights[f"bert.{name}"])
    assert again.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert json.loads((path / "fedsim.json").read_text())["classes"] == ["0", "1", "2"]


class Adapted(torch.nn.Module):
    """A layer that peft has given adapters."""

    def __init__(self) -> None:
        super().__init__()
        peft = pytest.importorskip("peft")
        base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        self.net = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.slow
def test_of_a_peft_model_the_adapters_are_written(tmp_path: Path) -> None:
    result = classification(model=Adapted).run("rounds=1")
    path = result.export("hf", out=tmp_path / "hf")
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 2
    name = "base_model.model.0.lora_B"
    held = load_file(path / "adapter_model.safetensors")
    assert torch.equal(held[f"{name}.weight"], result.weights[f"net.{name}.default.weight"])
    assert held[f"{name}.weight"].any()


@pytest.mark.slow
def test_of_a_base_that_has_changed_the_merged_model_is_written_or_an_adapter_of_any_rank(
    tmp_path: Path,
) -> None:
    transformers, peft = (pytest.importorskip(name) for name in ("transformers", "peft"))
    size = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(
        **size,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )

    def adapted() -> torch.nn.Module:
        bare, options = transformers.GPT2LMHeadModel(config), {"target_modules": ["c_proj", "c_attn"]}
        return peft.get_peft_model(
            bare, peft.LoraConfig(r=1, fan_in_fan_out=True, task_type="CAUSAL_LM", **options)
        )

    ids = [(x, x) for x in (torch.randint(0, 20, (6, 8)) for _ in range(4))]
    words = ("rounds=2", "strategy=fedex", "task=language_model", "client.lr=2", f"dir={tmp_path / 'run'}")
    result = classification(model=adapted, clients=ids, test=None).run(*words)
    x, model = ids[0][0], result.model()
    with torch.no_grad():
        wanted = model(input_ids=x).logits
        merged = transformers.GPT2LMHeadModel.from_pretrained(result.export("hf", out=tmp_path / "hf")).eval()
        torch.testing.assert_close(merged(input_ids=x).logits, wanted, rtol=1e-5, atol=1e-5)
        errors = []
        for rank in (8, 1):
            path = result.export("hf", out=tmp_path / f"rank{rank}", rank=rank)
            errors.append(json.loads((path / "fedsim.json").read_text())["adapter_error"])
            bare = adapted().unload()
            bare.load_state_dict(
                {
                    k.replace("base_model.model.", "").replace("base_layer.", ""): v
                    for k, v in result.model().state_dict().items()
                    if "lora_" not in k and "base_change" not in k
                }
            )
            again = peft.PeftModel.from_pretrained(bare, path).eval()
            if rank == 8:
                torch.testing.assert_close(again(input_ids=x).logits, wanted, rtol=1e-4, atol=1e-5)
    assert errors[0] < 1e-5 < errors[1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied head", "two adapters", "bias"])
def test_what_is_exported_gives_the_runs_logits(kind: str, tmp_path: Path) -> None:
    """Where the head shares its weight with the embedding, two adapters are active, or one has more than products."""
    transformers, peft = (pytest.importorskip(name) for name in ("transformers", "peft"))
    size = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**size, **still, bos_token_id=0, eos_token_id=0, use_cache=False)

    def bare() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)

    def adapted() -> torch.nn.Module:
        targets = ["lm_head"] if kind == "tied head" else ["c_attn"]
        options = {"r": 2, "task_type": "CAUSAL_LM", "lora_bias": kind == "bias"}
        model = peft.get_peft_model(bare(), peft.LoraConfig(target_modules=targets, **options))
        if kind == "two adapters":
            model.add_adapter("other", peft.LoraConfig(r=1, target_modules=["c_proj"], task_type="CAUSAL_LM"))
            model.base_model.set_adapter(["default", "other"])
        return model

    ids = [(x, x) for x in (torch.randint(0, 20, (6, 8)) for _ in range(4))]
    method = "fedex" if kind == "tied head" else "fedit"
    words = (
        "rounds=1",
        f"strategy={method}",
        "task=language_model",
        "client.lr=0.2",
        f"dir={tmp_path / 'run'}",
    )
    result = classification(model=adapted, clients=ids, test=None).run(*words)
    x = ids[0][0]
    with torch.no_grad():
        wanted = result.model().eval()(input_ids=x).logits
        assert (wanted - bare().eval()(input_ids=x).logits).abs().max() > 1e-3
        if kind != "bias":
            path = result.export("hf", out=tmp_path / "hf")
            merged = transformers.GPT2LMHeadModel.from_pretrained(path).eval()
            torch.testing.assert_close(merged(input_ids=x).logits, wanted, rtol=1e-5, atol=1e-5)
        path = result.export("hf", out=tmp_path / "rank", rank=8)
        again = peft.PeftModel.from_pretrained(bare(), path).eval()
        torch.testing.assert_close(again(input_ids=x).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN"], "model.pt exists; give --force"),
        (["RUN", "--to", "pickle"], "invalid choice: 'pickle'"),
        (["RUN", "--client", "4"], "client=4: this run has clients 0 to 3"),
        (["RUN", "--rank", "2"], "--rank 2: is of adapters; add --to hf"),
        (["RUN", "--best"], "type evaluation.validation=0.1"),
        (["RUN", "--to", "hf"], "ConvNet has no save_pretrained"),
        (["RUN", "--to", "safetensors", "--out", "RUN/config.yaml/x"], "cannot be written"),
        (["RUN/none"], "no such folder"),
        (["RUN/config.yaml"], "a file, not a folder"),
        (["RUN/export"], "no run folder"),
        (["RUN", "strategy=fedavg"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_written_is_said_in_a_line(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "export").mkdir(exist_ok=True)
    (run / "export/model.pt").touch()
    assert command(["export", *(w.replace("RUN", str(run)) for w in words)]) == 2
    told: Any = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1


def test_an_unfinished_run_and_a_model_from_python_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop:
        def round(self, row: Any, clients: Any) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classification().run(f"dir={tmp_path}", callbacks=[Stop()])
    assert command(["export", str(tmp_path)]) == 2
    assert "this run is not finished" in capsys.readouterr().err
    classification().run(f"dir={tmp_path}")
    assert command(["export", str(tmp_path), "--force"]) == 0  # needs no module
    assert command(["export", str(tmp_path), "--to", "onnx"]) == 2
    assert "handed over in Python" in capsys.readouterr().err
