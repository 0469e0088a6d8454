"""Every method goes through compression and secure sums, or is refused by name before round 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from callbacks import Interrupt
from problems import classification, hashes
from registry import TABLE, Entry

from fedsim.errors import ConfigError

STAGES = {
    "top_k": ("compression=top_k", "compression.rate=0.1"),
    "qsgd": ("compression=qsgd", "compression.down={codec: qsgd, levels: 127}"),
    "down": ("compression=qsgd", "compression.down={codec: top_k, rate: 0.2}"),
    "ring": ("secagg=ring", "secagg.reach=5"),
}
SLOPES = {"one-byte", "decomfl", "fedkseed"}  # refused: no vector is sent
COMPRESSED = {"gossip", "analytic", *SLOPES}  # and peers send each other whole models, or sums
SUMMED = {  # refused: they need more of a client than a sum
    *(
        "gossip",
        "fedproto",
        "ggeur",
        "ggeur-scaffold",
        "fraug",
        "fedspeed-relaxed",
        "flag",
        "flag-reverse",
        "alie",
    ),
    *(
        "qfedavg",
        "term",
        "afl",
        "ifca",
        "fesem",
        "cfl",
        "fedossl",
        "heterofl",
        "fedmatch",
    ),
    *("fedbuff", "fedasync", "centered", *SLOPES),
    *("one-shot", "co-boosting", "dense", "feddf", "fens", "analytic"),
}
REFUSED = {
    "top_k": COMPRESSED | {"rolora"},  # whose parts take turns
    "qsgd": COMPRESSED,
    "down": COMPRESSED | {"fedbuff", "fedasync"},  # whose clients hardly hold the same model
    "ring": SUMMED,
}
DAILY = {
    ("scaffold", "top_k"),
    ("fedloge", "qsgd"),
    ("ditto", "down"),
    ("fednova", "ring"),
    ("ggeur", "ring"),
}
CASES = [
    pytest.param(
        e, stage, id=f"{e.label}-{stage}", marks=[] if (e.label, stage) in DAILY else pytest.mark.nightly
    )
    for e in TABLE
    for stage in STAGES
]


@pytest.mark.parametrize(("entry", "stage"), CASES)
def test_runs_and_resumes_or_is_refused(entry: Entry, stage: str, tmp_path: Path) -> None:
    given, problem = (*entry.arguments, *STAGES[stage], "checkpoint.every=1"), classification()
    if entry.label in REFUSED[stage]:
        with pytest.raises(ConfigError, match=r"^(compression|secagg|aggregator|attack): "):
            problem.run(*given)
        return
    through = problem.run(*given, "rounds=3")
    assert len(set(hashes(through))) > 1 or entry.frozen
    if not entry.asynchronous:
        with pytest.raises(KeyboardInterrupt):
            problem.run(*given, "rounds=3", f"dir={tmp_path}", callbacks=[Interrupt(2)])
        assert hashes(problem.run(*given, "rounds=3", f"dir={tmp_path}")) == hashes(through)
