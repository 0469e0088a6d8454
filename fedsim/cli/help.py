"""``fedsim --help``: written by hand, with the groups and their options read from the configuration tree."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.types import RunMode

from fedsim.config.tree import config_dir, config_loader

_HEAD = """\
fedsim: federated-learning simulation

  fedsim [GROUP=OPTION] [KEY=VALUE] ...   one run
  fedsim -m KEY=A,B ...                   a sweep: every combination, one comparison at the end
  fedsim tune KEY=A,B --trials N ...      settings chosen on validation data, winners compared
  fedsim report DIR ...                   table, curves and a page of finished runs
  fedsim compare DIR ...                  which method is better, over common seeds, and how sure that is
  fedsim verify RUN                       compute a run again, serially; compare the weights of every round
  fedsim diff RUN RUN                     where two runs part: settings, data, round, client, tensor
  fedsim value RUN --shapley              what each client contributes, by runs without some of them
  fedsim forget RUN --client 3            the run without a client, exactly
  fedsim audit RUN --clients              free riders, harmful clients; without --clients: a bound on epsilon
  fedsim export RUN --to onnx             its model as a file: state_dict, safetensors, onnx, hf
  fedsim ls [DIR ...], fedsim rm DIR ...  what lies on disk, how it ended and its size; remove it
  fedsim deploy local --nodes 3 ...       the same run on Flower, as processes of their own
  fedsim provision --nodes a b ...        keys, certificates, scripts and compose files of a real deployment

Groups (GROUP=OPTION; * is the default)
"""

_TAIL = """
Keys most used (fedsim --cfg job prints all, with their values)
  rounds=50  seed=0  num_clients=20  clients_per_round=5  name=my_sweep
  client.lr=0.1  client.epochs=5  client.batch_size=50      local training
  partition.alpha=0.3                                       label skew; smaller is more skewed
  engine.workers=2                                          0: one per core; never changes a result
  evaluation.every=1  evaluation.target=0.9                 rounds between evaluations; rounds-to-target

Examples
  fedsim                                                    FedAvg on the digits data, no download
  fedsim -m experiment=quickstart strategy=fedavg,fedspeed  two methods side by side
  fedsim -m strategy=fedavg,fedspeed 'seed=range(5)' partition.alpha=0.1,1
  fedsim strategy=fedspeed strategy.rho=0.05 engine=serial
  fedsim -m strategy=ggeur strategy@strategy.base=fedavg,scaffold   a method around others
  fedsim --config-dir my_conf strategy=mine                 a method of your own: my_conf/strategy/mine.yaml
  fedsim report runs/quickstart --target 0.9

Results
  runs/NAME/<method>-s<seed>-<key>/ holds config.yaml, metrics.jsonl (a row a round), checkpoint/ and
  summary.json. The key stands for all settings that can change a result. The same command again skips what is
  finished and goes on with what was interrupted. --json prints how every job ended as JSON.

Exit codes
  0 done   1 a run failed   2 bad configuration or data   130 interrupted (the same command goes on)
  143 terminated by SIGTERM, as from Slurm (the same command goes on)

Hydra's own flags: --cfg job, --info, --config-dir DIR, --hydra-help, and -sc install=bash for completion.
"""


def help_text(argv: Sequence[str] = ()) -> str:
    """The text of ``fedsim --help``; options in a ``--config-dir`` among ``argv`` are listed too."""
    width = 110
    lines = []
    for group, options in groups(config_dir(argv)).items():
        head = f"  {group:<19} "
        lines += textwrap.wrap(
            head + "  ".join(options), width, subsequent_indent=" " * len(head), break_on_hyphens=False
        )
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def groups(extra: Path | None = None) -> dict[str, list[str]]:
    """Options of each group, the default one first and marked by ``*``."""
    found: dict[str, list[str]] = {}
    with config_loader() as loader:
        config = loader.load_configuration("config", [], RunMode.RUN)
        chosen = config.hydra.runtime.choices
        top = [g for g in loader.get_group_options("", ObjectType.GROUP) if g not in ("hydra", "schema")]
        for parent in top:
            inner = [f"{parent}/{name}" for name in loader.get_group_options(parent, ObjectType.GROUP)]
            for group in (parent, *inner):
                names = set(loader.get_group_options(group, ObjectType.CONFIG))
                names |= {p.stem for p in (extra / group).glob("*.yaml")} if extra else set()
                default = chosen.get(group)
                found[group] = [f"{default}*"] * (default in names) + sorted(names - {default})
    return found
