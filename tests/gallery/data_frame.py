"""A pandas frame with a column of hospitals: each is a client."""

import numpy as np
import pandas as pd
from torch import nn

import fedsim
from fedsim.data.frames import from_frame

rng = np.random.default_rng(0)
frame = pd.DataFrame(rng.normal(size=(500, 3)), columns=["age", "pressure", "dose"])
frame["outcome"] = np.where(frame["age"] + frame["dose"] > 0, "ill", "well")
frame["hospital"] = rng.choice(["north", "south", "west", "east"], 500)
frame["part"] = np.where(np.arange(500) % 5 == 0, "test", "train")


def example(settings: list[str]) -> fedsim.RunResult:
    data = from_frame(frame, y="outcome", client="hospital", test="part")
    return fedsim.simulate(["client.lr=0.2", *settings], model=lambda: nn.Linear(3, 2), data=data)
