"""Text as blocks of tokens: roles, tokenizers, styles, and what the final model writes."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from problems import QUIET

import fedsim
from fedsim.data import sources
from fedsim.data.huggingface import load
from fedsim.data.language import END, tokenizer
from fedsim.errors import DataError
from fedsim.report.runs import group_runs, load_runs
from fedsim.report.texts import text_table

SPEECHES = [
    ("P", "A", "Aha, we see!"),
    ("P", "B", "no"),
    ("Q", "A", "the the the the then"),
    ("P", "A", "Oh; no."),
]
OPTIONS: dict[str, Any] = {
    "tokenizer": "byte",
    "vocabulary": 260,
    "public": None,
    "plays": None,
    "largest": None,
    "style": "plain",
    "block": 4,
    "min_chars": 3,
    "test_fraction": 0.25,
    "by_role": False,
}


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    columns = dict(zip(("play", "speaker", "text"), map(list, zip(*SPEECHES, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "speeches.parquet")
    return tmp_path


def test_blocks_by_hand(plays: Path) -> None:
    data = sources.shakespeare_tokens(plays, **OPTIONS | {"style": "transcript", "by_role": True})
    text = "aha we see oh no"  # 16 characters, of which 12 are to train on
    assert [bytes(r).decode() for r in data.train.x[:3].tolist()] == [text[0:4], text[4:8], text[8:12]]
    assert data.train.x is data.train.y or data.train.x.equal(data.train.y)
    assert data.group_names == {"domain": ("P: A", "Q: A")} and data.ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.groups["test"]["domain"].tolist() == [0, 1] and data.num_classes == 256
    assert data.spell(data.test.x[0].tolist()) == text[12:16]
    one = sources.shakespeare_tokens(plays, **OPTIONS | {"largest": 1})
    assert one.group_names == {"role": ("P: A",)} and len(one.train) == 3


def test_pairs_are_learnt_from_public_plays_which_are_no_clients(plays: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (fedsim[hf])")
    data = sources.shakespeare_tokens(plays, **OPTIONS | {"tokenizer": "bpe", "public": ["Q"], "block": 2})
    assert data.group_names["role"] == ("P: A",)
    assert data.num_classes == 260 and data.classes[0] == END and "the" in data.classes
    made, again = (tokenizer("bpe", 260, ["the the the then"]) for _ in range(2))
    text = "the naïve thé"
    assert made.spell(made.encode(text).tolist()) == text and made.names == again.names
    assert len(made.encode(text)) < len(tokenizer("byte", 0).encode(text))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizer": "bpe"}, r"name plays that are no clients' by data\.public"),
        (
            {"tokenizer": "bpe", "public": ["P"], "plays": ["P"]},
            "'P' is among data.plays, whose roles are clients",
        ),
        ({"plays": ["R"]}, r"data\.plays: there is no play 'R'"),
        ({"tokenizer": "byt"}, "expected byte, bpe, or the path of a tokenizer.json; nearest is 'byte'"),
        ({"block": 99}, r"lower data\.block"),
        ({"block": 1}, r"data\.block=1"),
        ({"tokenizer": "bpe", "public": ["Q"], "vocabulary": 5}, "need at least 257"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, plays: Path) -> None:
    if "byt" in str(options.get("tokenizer")) or options.get("tokenizer") == "bpe":
        pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=said):
        sources.shakespeare_tokens(plays, **OPTIONS | options)


def test_a_small_decoder_learns_from_roles_and_writes(plays: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = (
        "data=shakespeare_tokens",
        f"data.path={plays}",
        "data.block=4",
        "data.min_chars=3",
        "model=gpt",
    )
    shape = ("model.layers=1", "model.width=8", "model.heads=2", "task=language_model", "partition=natural")
    run = (
        "num_clients=2",
        "clients_per_round=2",
        "rounds=2",
        "client.lr=0.1",
        "evaluation.texts=2",
        "engine=serial",
    )
    own = ("data.by_role=true", "evaluation.clients_on=domain", "evaluation.clients_every=1")
    result = fedsim.simulate([*QUIET, *settings, *shape, *run, *own])
    texts = json.loads((result.dir / "texts.json").read_text())
    assert (
        len(texts) == 2 and all(len(t["given"]) == 2 for t in texts) and {"true", "written"} < set(texts[0])
    )
    row = result.rows[-1]
    assert row["clients/perplexity_pooled"] == pytest.approx(
        row["perplexity"], rel=1e-6
    )  # one model, all tokens
    table = text_table(group_runs(load_runs([result.dir])))
    assert "Samples of text" in table and escape(texts[0]["given"]) in table
    fedsim.simulate([*QUIET, "engine=serial", "rounds=1", "evaluation.texts=1", "data=blobs", "model=linear"])
    assert "texts.json needs a test set of tokens" in caplog.text


def test_columns_of_text_become_tokens_for_a_classifier(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (fedsim[hub])")
    rows = {
        "sentence": ["good", "bad luck", "fine", "so bad"] * 3,
        "label": [1, 0, 1, 0] * 3,
        "who": list("aabbccaabbcc"),
    }
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    own: dict[str, Any] = {
        "path": str(tmp_path),
        "cache": str(tmp_path / "cache"),
        "test_split": None,
        "client": "who",
    }
    data = load(**own, tokenizer="byte", length=6)
    x, y = data.train.take(torch.arange(2))
    assert bytes(x["input_ids"][0].tolist()) == b"good\0\0" and bytes(x["input_ids"][1].tolist()) == b"bad lu"
    assert x["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6] and y.tolist() == [1, 0]
    with pytest.raises(DataError, match="'label' is no text"):
        load(**own, tokenizer="byte", x="label")


def test_tables_lie_as_the_hub_and_glue_have_them(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (fedsim[hub])")
    glue, hub = tmp_path / "glue", tmp_path / "hub"
    for place in (glue, hub / "data"):
        place.mkdir(parents=True)
    (glue / "train.tsv").write_text('sentence\tlabel\na "good one\t1\nbad\t0\n')
    (glue / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    (glue / "test.tsv").write_text("index\tsentence\n0\twithout a label\n")
    (hub / "dataset_infos.json").write_text("{}")
    for split in ("train", "validation"):
        rows = pa.table({"sentence": ["good", "bad"], "label": [1, 0]})
        pq.write_table(rows, hub / f"data/{split}-00000-of-00001.parquet")
    own: dict[str, Any] = {"cache": str(tmp_path / "cache"), "tokenizer": "byte", "length": 12}
    for name in ("dev", "validation"):
        data = load(path=str(glue), test_split=name, **own)
        assert len(data.train) == 2 and len(data.test or ()) == 1
    assert bytes(data.train.take(torch.tensor([0]))[0]["input_ids"][0].tolist()) == b'a "good one\0'
    assert len(load(path=str(hub), test_split="validation", **own).test or ()) == 2
    with pytest.raises(DataError, match=r"data.test_split=validatoin: .* nearest is 'validation'"):
        load(path=str(hub), test_split="validatoin", **own)
