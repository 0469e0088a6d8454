"""The words of a report, as HTML: what was compared, how it was configured, what failed, how to get it again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from fedsim.errors import headline
from fedsim.report.runs import Group, Run, flatten
from fedsim.report.tables import html_table

MAX_REASON = 200  # characters of a failure's reason


def title(groups: Sequence[Group]) -> str:
    """The names the runs were given, else the folder they lie in."""
    names = {str(run.config.get("name") or run.dir.parent.name) for run in _runs(groups)}
    return ", ".join(sorted(names)) or "No runs"


def lead(groups: Sequence[Group]) -> str:
    """One sentence: how many of what, and what tells them apart."""
    methods = sorted({group.method for group in groups})
    keys = list(dict.fromkeys(name for group in groups for name in group.settings))
    runs, seeds = len(_runs(groups)), {len(group.runs) for group in groups}
    parts = [f"{count(len(methods), 'method')} ({', '.join(methods)})"]
    if len(groups) > len(methods):
        names = {key: name for group in groups for key, name in group.names.items()}
        settings = [names.get(key, key) for key in keys]
        parts.append(
            f"{len(groups)} configurations that differ in {', '.join(settings[:6])}{' …' * (len(settings) > 6)}"
        )
    parts.append(
        f"{count(seeds.pop(), 'seed')} each"
        if len(seeds) == 1
        else f"{min(seeds)} to {max(seeds)} seeds each"
    )
    return f"{'; '.join(parts)}: {count(runs, 'run')} in all."


def facts(groups: Sequence[Group]) -> str:
    """A list of what all runs share: data, partition, model, scale, local training."""
    runs = _runs(groups)

    def common(text: Any) -> str:
        found = {text(run.config) for run in runs}
        return found.pop() if len(found) == 1 else "differs"

    def local(config: Mapping[str, Any]) -> str:
        client = config.get("client") or {}
        amount = (
            count(client["steps"], "step")
            if client.get("steps")
            else count(client.get("epochs", "?"), "epoch")
        )
        return f"{amount}, batches of {client.get('batch_size', '?')}, learning rate {client.get('lr', '?')}"

    items = {
        "Data": common(lambda config: part_words(config.get("data"))),
        "Partition": common(lambda config: part_words(config.get("partition"))),
        "Model": common(lambda config: part_words(config.get("model"))),
        "Clients": common(
            lambda c: f"{c.get('num_clients', '?')}, {c.get('clients_per_round', '?')} in a round"
        ),
        "Rounds": common(lambda config: str(config.get("rounds", "?"))),
        "Local training": common(local),
    }
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in items.items()) + "</dl>"


def configuration(groups: Sequence[Group]) -> str:
    """Keys in which the groups differ, as a table; keys that all runs share, folded away."""
    seeds = [[run.settings for run in group.runs] for group in groups]
    flat = [first for first, *_ in seeds]
    everything = [dict(flatten(run.config)) for run in _runs(groups)]
    shared = {
        key: value
        for key, value in everything[0].items()
        if not key.startswith("hydra.") and all(key in one and one[key] == value for one in everything)
    }
    own = [  # not those that follow the seed
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if key not in shared and not _varies(key, seeds)
    ]
    rows = [[(key, ""), *((_value(config, key), "") for config in flat)] for key in own]
    if len(groups) == 1:
        html = paragraph("One configuration; nothing to compare.")
    else:
        html = "<h3>What differs</h3>" + html_table(
            ["setting", *(group.label for group in groups)], rows, [False] * (len(groups) + 1), "keys"
        )
    table = html_table(
        ["setting", "value"], [[(k, ""), (_value(shared, k), "")] for k in shared], [False] * 2, "keys"
    )
    return f"{html}<details><summary>What all runs share ({len(shared)} settings)</summary>{table}</details>"


def failures(groups: Sequence[Group]) -> str:
    """Runs that did not end well, then what clients did not contribute, by group and kind."""
    ended = [
        f"{group.label}, seed {run.seed}: {run.status} after {len(run.rows)} rounds"
        + (f" ({_short(run.summary['error'])})" if run.summary.get("error") else "")
        for group in groups
        for run in group.runs
        if run.status != "done"
    ]
    ended += [line for group in groups for run in group.runs if (line := _thin(group, run))]
    html = f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in ended)}</ul>' if ended else ""
    rows = []
    for group in groups:
        kinds: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
        for row in (row for run in group.runs for row in run.rows):
            for failure in row.get("failures") or ():
                kinds[str(failure.get("task", "fit")), str(failure.get("kind", "unknown"))].append(
                    (row["round"], failure)
                )
        for (task, kind), found in sorted(kinds.items()):
            rows.append([(group.label, ""), (task, ""), (kind, ""), *((text, "") for text in _about(found))])
    if not rows:
        return html + paragraph("Every client that was asked contributed, in every recorded round.")
    header = ["method", "task", "kind", "times", "clients", "rounds", "most frequent reason"]
    return html + html_table(header, rows, [False, False, False, True, True, False, False], "plain")


def _thin(group: Group, run: Run) -> str:
    """The rounds of a run in which too few updates came for the aggregator; empty if there are none."""
    found = [(row["round"], row["thin_round"]) for row in run.rows if row.get("thin_round")]
    if not found:
        return ""
    where = f"{len(found)} of {len(run.rows)} rounds, the first of them {found[0][0]}"
    return f"{group.label}, seed {run.seed}: too few updates in {where} ({_short(found[0][1])})"


def reproduce(groups: Sequence[Group], commands: Sequence[str]) -> str:
    """The commands, then every run with its folder and the hash of its final weights."""
    rows = []
    for group in groups:
        for run in group.runs:
            weights = str(run.rows[-1].get("weights_hash") or "-")[:12] if run.rows else "-"
            cells = (
                str(run.seed),
                run.status,
                str(len(run.rows)),
                partition_hash(run)[:8] or "-",
                weights,
                shown(run.dir),
            )
            rows.append([(group.label, ""), *((cell, "") for cell in cells)])
    header = ["method", "seed", "status", "rounds", "partition", "weights", "folder"]
    typed = f"<pre><code>{escape(chr(10).join(commands))}</code></pre>" if commands else ""
    words = "fedsim verify FOLDER computes a run again from its config.yaml and compares the weights of every round."
    return (
        typed + paragraph(words) + html_table(header, rows, [False, True, False, True, *[False] * 3], "plain")
    )


def paragraph(text: str, name: str = "") -> str:
    """Plain text as a paragraph."""
    return f"<p{f' class={chr(34)}{name}{chr(34)}' if name else ''}>{escape(text)}</p>\n"


def count(number: Any, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def who(pairs: Sequence[tuple[Group, Run]], groups: int) -> str:
    """Which runs share something: ``seed 0 of all 3 methods``, or their names."""
    seeds = sorted({run.seed for _, run in pairs})
    labels = list(dict.fromkeys(group.label for group, _ in pairs))
    which = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    if len(labels) == groups > 1:
        return f"{which} of all {groups} groups"
    return f"{which} of {'; '.join(labels[:4])}{f' and {len(labels) - 4} more' if len(labels) > 4 else ''}"


def shown(folder: Path) -> str:
    """A folder relative to the working directory if it lies there, else as it was given."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def partition_hash(run: Run) -> str:
    """Of the summary, else of the stored partition; empty if there is neither."""
    return str(run.summary.get("partition_hash") or _stored_hash(run.dir / "partition.npz"))


@cache
def _stored_hash(path: Path) -> str:
    if not path.is_file():
        return ""
    from fedsim.data.shards import Shards
    from fedsim.errors import DataError

    try:
        return Shards.load(path).hash()
    except DataError:
        return ""


def _runs(groups: Sequence[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


def _varies(key: str, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether a key differs between seeds of one group, whose settings are together, as ``partition.seed`` may."""
    return any(one.get(key) != group[0].get(key) for group in seeds for one in group)


def _about(found: Sequence[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """Of failures of one kind: how many, of how many clients, in which rounds, mostly why."""
    rounds = [at for at, _ in found]
    clients = {failure.get("client") for _, failure in found}
    reason = Counter(str(failure.get("reason", "")) for _, failure in found).most_common(1)[0][0]
    first, last = min(rounds), max(rounds)
    return [
        str(len(found)),
        str(len(clients)),
        f"{first}" if first == last else f"{first} to {last}",
        _short(reason),
    ]


def _short(text: Any) -> str:
    """The line that says what happened, cut to ``MAX_REASON`` characters."""
    line = headline(str(text))
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


def part_words(config: Any) -> str:
    """``dirichlet (alpha=0.3)`` of a configuration group."""
    if not isinstance(config, Mapping):
        return "-" if config is None else str(config)
    name = str(config.get("_target_", "")).rpartition(".")[2] or "-"
    options = [
        f"{k}={_plain(v)}"
        for k, v in config.items()
        if not k.startswith("_") and v is not None and v is not False and not _all_labelled(k, v)
    ]
    return f"{name} ({', '.join(options)})" if options else name


def _all_labelled(key: str, value: Any) -> bool:
    """Whether an option is ``data.labelled`` of data that all have labels."""
    return key == "labelled" and isinstance(value, Mapping) and value.get("at") is None


def _value(config: Mapping[str, Any], key: str) -> str:
    return _plain(config[key]) if key in config else "–"


def _plain(value: Any) -> str:
    """As in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(_plain, value)) + "]" if isinstance(value, list) else str(value)
