"""One-shot methods at sizes that take no time: for the tests of several files."""

SMALL = (
    "strategy.samples=8",
    "strategy.batch_size=4",
    "strategy.noise=3",
    "strategy.width=5",
    "strategy.generator_steps=3",
)
METHODS = {
    "one_shot": (),
    "co_boosting": SMALL,
    "dense": SMALL,
    "feddf": ("strategy.data=noise", "strategy.noise_samples=12", "strategy.steps=7"),
    "fens": ("strategy.proxy=0",),
}
