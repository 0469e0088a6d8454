"""Boxes in pictures of shapes, one weather per client: mean average precision, by weather too."""

import fedsim


def example(settings: list[str]) -> fedsim.RunResult:
    some = "data.train={cloudy: 48, overcast: 48, rainy: 48, snowy: 48}"
    data = ["data=weather_shapes", some, "data.test=24", "data.side=32", "data.shapes=[9,16]"]
    small = [
        "model=detector",
        "model.channels=[8,16,16,16,16]",
        "client=adam",
        "client.lr=0.01",
        "client.batch_size=8",
    ]
    clients = ["partition=domains", "num_clients=4", "clients_per_round=2"]
    return fedsim.simulate(["task=detection", *data, *small, *clients, *settings])
