"""Small run folders for tests."""

import json

from omegaconf import OmegaConf

MB = 1_000_000


def make(
    root,
    method,
    seed,
    accuracies,
    *,
    status="done",
    every=1,
    folder=None,
    evaluation=None,
    extra=None,
    summary=None,
    clients=(),
    **config,
):
    """A run folder, evaluated every ``every`` rounds; 1 MB up, 2 MB down and 0.5 s a round.

    ``extra(round)`` adds to a row, ``summary`` to the summary; ``clients`` are (round, client, metric, value).
    """
    path = root / (folder or f"{method}-s{seed}-{abs(hash(str(config))):x}")
    path.mkdir(parents=True)
    full = {"seed": seed, "dir": str(path), "strategy": {"_target_": f"strategies.{method}.X"}, **config}
    full["partition"] = {"seed": seed, "alpha": 0.1} | full.get("partition", {})
    full["evaluation"] = {"every": every, "target": evaluation}
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(full)))
    lines = []
    for at in range(1, len(accuracies) * every + 1):
        row = {"round": at, "bytes_up": MB, "bytes_down": 2 * MB, "seconds": 0.5}
        if at % every == 0:
            row |= {"accuracy": accuracies[at // every - 1], "loss": 1 / at}
        row |= extra(at) if extra else {}
        lines.append(json.dumps(row) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    if status:
        (path / "summary.json").write_text(json.dumps({"method": method, "status": status} | (summary or {})))
    names = ("round", "client", "metric", "value")
    if clients:
        text = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in clients)
        (path / "clients.jsonl").write_text(text)
    return path
