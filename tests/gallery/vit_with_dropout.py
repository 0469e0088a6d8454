"""A vision transformer with dropout on the digits, from configuration alone."""

import fedsim


def example(settings: list[str]) -> fedsim.RunResult:
    model = ["model=vit", "model.patch=2", "model.layers=1", "model.width=32", "model.dropout=0.1"]
    return fedsim.simulate([*model, "data=digits", "client=adam", "client.lr=0.003", *settings])
