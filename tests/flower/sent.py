"""What clients send under each method: the rows of the table in docs/threat_model.md. As a program: prints them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/contracts")]
from adapting import adapted  # noqa: E402
from problems import classification, network  # noqa: E402
from registry import AT_SERVER, BOXES, ONE_SHOT, TABLE  # noqa: E402

from fedsim.engine.base import SerialEngine  # noqa: E402

BEGIN, END = "<!-- sent:", "<!-- end of sent -->"
SETTINGS: dict[str, tuple[str, ...]] = {  # what an option needs beyond its entry in the contracts
    "centralised": (),
    "dpsgd": ("topology=ring",),
    "gossip_fedavg": ("topology=complete",),
    "gossip_async": ("topology=ring",),
    "local_only": (),
    "fed_ao": (),
    "fedossl_as_code": ("strategy.server_steps=10", "strategy.centroids=4"),
    "server_only": AT_SERVER,
    "pseudo_ema": (*AT_SERVER, *BOXES),
    "fedbn": (),
    "fedit": (),
    "ffa": ('strategy.frozen=["*.bias"]',),
    "fedsa": ('strategy.local=["*.bias"]',),
    "fedex": (),
    "flora": (),
    "ranked_lora": ("strategy.ranks=[1]",),
    "fraug_digits": ("strategy.rounds=6",),
    "fraug_officehome": ("strategy.rounds=6",),
}
VARIANTS = (
    "fedproto strategy.share=model",
    "fedsa strategy.new_client=mean",
    "flora strategy.ranks=[1]",
    "heterofl strategy.output_rows=classes",
    "logit_adjust strategy.prior=all",
    "analytic strategy.balance=class",
    "co_boosting strategy.labels=present",
)
DEFAULTS = (
    "fedproto",
    "heterofl",
    "logit_adjust",
)  # whose entries in the contracts may be of another variant
ADAPTED = ("fedex", "fedit", "flora", "ranked_lora")  # whose models have adapters
NOTHING = dict.fromkeys(("centralised", "mezo"), "not deployed: all data in one place")
IMPLIED = {"sums"}  # arrays that a simulation folds, and that do not travel
Sent = dict[str, tuple[set[str], set[str]]]  # question to arrays and values


def options() -> list[str]:
    """Every option of conf/strategy, and settings by which a method sends other things."""
    return sorted([*(path.stem for path in (ROOT / "conf/strategy").glob("*.yaml")), *VARIANTS])


def recorded(option: str) -> Sent:
    """Names of what clients send in three rounds of a tiny problem, by question; weights, which all send, left out."""
    name, *more = option.split()
    entry = next((e for e in TABLE if e.strategy == name), None)
    words = (f"strategy={name}", *SETTINGS[name]) if entry is None else entry.arguments
    if name in DEFAULTS:
        words = (f"strategy={name}", *(w for w in words if w.startswith("client.")), *more)
    if name in (*ADAPTED, "fedsa") or entry in ONE_SHOT:
        words = (*words, *more)
    words = tuple(w for w in words if not w.startswith("model="))
    found: Sent = {}
    mapped = SerialEngine.map

    def watched(self: Any, method: str, shared: Any, items: Any, costs: Any = None) -> Iterator[Any]:
        for result in mapped(self, method, shared, items, costs):
            if method == "run" and shared.task != "train/evaluate":  # of models handed over: no node is asked
                arrays, values = found.setdefault(shared.task, (set(), set()))
                arrays |= set(shared.fold) - IMPLIED
                values |= {k for o in result.outcomes for k in o.values} - {"weight"}
            yield result

    with patch.object(SerialEngine, "map", watched):
        model = adapted() if name in ADAPTED else network()
        classification(model=model).run(
            *words, "rounds=3", "evaluation.every=1", "evaluation.clients_every=0"
        )
    return found


def row(option: str) -> str:
    """Its row."""
    if option in NOTHING:
        return f"| `{option}` | {NOTHING[option]} |"
    cells = []
    for task, (arrays, values) in sorted(
        recorded(option).items(), key=lambda item: (item[0] != "fit", item[0])
    ):
        named = ", ".join(f"`{a}`" for a in sorted(arrays)) or "numbers only"
        more = f" ({', '.join(f'`{v}`' for v in sorted(values))})" if values else ""
        cells.append(f"{task}: {named}{more}")
    return f"| `{option}` | {'; '.join(cells) or 'clients are asked nothing'} |"


def table() -> str:
    """The whole table."""
    return "\n".join(["| method | question: arrays (values) |", "|---|---|", *map(row, options())])


if __name__ == "__main__":
    print(table())
