"""What ``fedsim tune`` tries: grids, how they are thinned, and values at an edge."""

from __future__ import annotations

import pytest

from fedsim.cli.spaces import Space, axis_of, edges, spaces, untried
from fedsim.cli.trials import GridSampler, OptunaSampler, overlap, seeds_of
from fedsim.errors import ConfigError

LR, RHO = "client.lr=0.01,0.03,0.1", "strategy.rho=0.05,0.1,0.2"


def space(*words: str, method: str = "fedspeed") -> Space:
    axes = tuple(axis for axis in map(axis_of, words) if axis is not None)
    return Space(method, axes, (f"strategy={method}",))


def test_every_method_gets_the_shared_settings_and_its_own() -> None:
    found, common = spaces(
        ["strategy=fedavg,fedspeed", LR, f"fedspeed:{RHO}", "fedspeed:strategy.beta=0.2", "rounds=3"]
    )
    assert [s.method for s in found] == ["fedavg", "fedspeed"] and common == ["rounds=3"]
    assert [[a.key for a in s.axes] for s in found] == [["client.lr"], ["client.lr", "strategy.rho"]]
    assert [s.size for s in found] == [3, 9]
    point = found[1].points(9)[0]
    expected = ["strategy=fedspeed", "strategy.beta=0.2", "client.lr=0.01", "strategy.rho=0.05"]
    assert found[1].overrides(point) == expected


def test_what_is_typed_for_a_method_takes_the_place_of_what_is_shared() -> None:
    found, _ = spaces(
        ["strategy=fedavg,scaffold,fedprox", LR, "scaffold:client.lr=1,2", "fedprox:client.lr=5"]
    )
    assert [[a.values for a in s.axes] for s in found] == [[("0.01", "0.03", "0.1")], [("1", "2")], []]
    assert found[2].overrides(()) == ["strategy=fedprox", "client.lr=5"]


def test_a_larger_grid_is_thinned_by_a_fixed_key_and_a_larger_budget_holds_a_smaller_one() -> None:
    one = space(LR, RHO, "client.epochs=1,2,5")
    taken = [one.points(n) for n in (4, 9, 27)]
    assert [len(points) for points in taken] == [4, 9, 27]
    assert set(taken[0]) < set(taken[1]) < set(taken[2])
    grid = taken[2]
    assert grid[0] == ("0.01", "0.05", "1") and grid[-1] == ("0.1", "0.2", "5")
    assert taken[0] == sorted(taken[0], key=grid.index) != grid[:4]  # in grid order, from all over the grid
    assert taken[0] == space(LR, RHO, "client.epochs=1,2,5").points(4)
    assert taken[0] != space(LR, RHO, "client.epochs=1,2,5", method="scaffold").points(4)
    assert len(one.points(100)) == 27


@pytest.mark.parametrize("method", ["fedavg", "fedspeed", "scaffold", "term"])
def test_a_thinned_grid_has_every_value_as_soon_as_the_budget_allows(method: str) -> None:
    one = space(LR, RHO, "client.epochs=1,2,5,8,13", method=method)
    for trials in (5, 7, 44):  # five trials are the fewest that can have five values
        points = one.points(trials)
        assert len(set(points)) == trials and untried(one, points) == []
    assert len({p[2] for p in one.points(4)}) == 4
    assert untried(one, one.points(4))[0].endswith("was in none of 4 trials; raise --trials")


def test_values_that_no_trial_had_are_named() -> None:
    one = space(LR, RHO)
    said = "fedspeed: client.lr=0.03,0.1 was in none of 2 trials; raise --trials"
    assert untried(one, [("0.01", "0.05"), ("0.01", "0.2")])[0] == said
    assert untried(one, one.points(9)) == []
    assert untried(space("client.lr=tag(log,interval(0.001,1))"), [("0.5",)]) == []


def test_the_grid_goes_on_where_the_budget_grows() -> None:
    sampler = GridSampler(space(LR, RHO), 4)
    points = [sampler.next() for _ in range(10)]
    assert points[:4] == space(LR, RHO).points(4) and points[9] is None
    assert sorted(map(str, points[:9])) == sorted(map(str, space(LR, RHO).points(9)))


def test_intervals_are_drawn_by_a_fixed_key_within_their_ends() -> None:
    one = space(
        "client.lr=tag(log,interval(0.001,1))", "client.epochs=int(interval(1,3))", "client.momentum=0,0.5"
    )
    assert one.size is None
    points = one.points(200)
    assert points[:5] == one.points(5)
    rates = [float(p[0]) for p in points]
    assert all(0.001 <= r <= 1 for r in rates) and 60 < sum(r < 0.0316 for r in rates) < 140
    assert {p[1] for p in points} == {"1", "2", "3"} and {p[2] for p in points} == {"0", "0.5"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("partition.alpha=0.1,1", "says what is learned, not how"),
        ("data=digits,blobs", "says what is learned, not how"),
        ("rounds=3,5", "says what is learned"),
        ("engine.workers=1,2", "changes no result"),
        ("seed=0,1", "type --seeds 0,1"),
        ("client.lr=interval(1,0.1)", "from a smaller number to a larger"),
    ],
)
def test_what_cannot_be_chosen_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        axis_of(word)


def test_a_method_that_is_not_there_is_named_and_a_search_over_nothing_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"strategy=fedavg,fedspeed has no 'fedsped'; nearest is 'fedspeed'"
    ):
        spaces(["strategy=fedavg,fedspeed", LR, f"fedsped:{RHO}"])
    with pytest.raises(ConfigError, match="nothing to choose"):
        spaces(["strategy=fedavg,fedspeed", "client.lr=0.1"])
    with pytest.raises(ConfigError, match="stands there twice"):
        spaces(["strategy=fedavg,fedavg", LR])


@pytest.mark.parametrize(
    ("values", "winner", "expected"),
    [
        ("0.01,0.03,0.1", "0.1", (True, "0.03", "0.3")),  # by the ratio of the last two
        ("0.01,0.03,0.1", "0.01", (False, "0.03", "0.003")),
        ("0.01,0.03,0.1", "0.03", None),
        ("0.05,0.1,0.2", "0.2", (True, "0.1", "0.4")),
        ("0.1,0.01,0.03", "0.1", (True, "0.03", "0.3")),  # whatever their order
        ("0,0.5,0.9", "0.9", (True, "0.5", "1.3")),  # by the difference
        ("0,0.5,0.9", "0", (False, "0.5", "-0.5")),
        ("16,32", "32", (True, "16", "64")),
        ("1,2,5", "5", (True, "2", "10")),
        ("1,2,5", "1", (False, "2", "0")),
        ("0.025,0.05", "0.025", (False, "0.05", "0.013")),
        ("1e-3,1e-2", "1e-2", (True, "1e-3", "0.1")),
        ("0.1", "0.1", None),
        ("true,false", "true", None),
        ("samples,uniform", "uniform", None),
    ],
)
def test_the_edge_of_a_grid(values: str, winner: str, expected: tuple[bool, str, str] | None) -> None:
    tried = [(v,) for v in values.split(",")]
    one = Space("m", (axis_of(f"client.lr={values}") or axis_of("client.lr=0,1"),), ())  # type: ignore[arg-type]
    found = edges(one, (winner,), tried)
    assert [(e.largest, e.inside, e.next) for e in found] == ([expected] if expected else [])
    if expected:
        end = "largest" if expected[0] else "smallest"
        assert str(found[0]) == f"m: client.lr={winner} is the {end} tried"


def test_the_edge_of_an_interval_is_a_twentieth_of_it() -> None:
    logarithmic = space("client.lr=tag(log,interval(0.001,1))")
    plain = space("client.momentum=interval(0,0.8)")
    for one, inside, low, high in (
        (logarithmic, "0.7", "0.0014", "0.72"),  # 10 ** (-0.15) = 0.708
        (plain, "0.05", "0.04", "0.77"),
    ):
        assert edges(one, (inside,), []) == []
        assert [e.largest for at in (low, high) for e in edges(one, (at,), [])] == [False, True]
        assert edges(one, (high,), [])[0].next is None


def test_only_values_that_were_tried_are_an_edge() -> None:
    tried = [("0.01", "0.05"), ("0.03", "0.1"), ("0.03", "0.2")]
    found = edges(space(LR, RHO), ("0.03", "0.1"), tried)
    assert [(e.key, e.value, e.inside, e.next) for e in found] == [("client.lr", "0.03", "0.01", "0.09")]


def test_seeds_are_numbers_and_ranges_and_winners_get_others() -> None:
    assert seeds_of("0,1", "--seeds") == (0, 1) and seeds_of("3,10-12", "--seeds") == (3, 10, 11, 12)
    for wrong in ("", "a", "3-1", "1,,2", "-1", "1,1", "0-2,2"):
        with pytest.raises(ConfigError, match="--seeds"):
            seeds_of(wrong, "--seeds")
    overlap((0, 1), (2, 3))
    with pytest.raises(ConfigError, match=r"1 chose the winners already .*--final-seeds 2-6"):
        overlap((0, 1), (1, 2))


def test_optuna_proposes_the_same_points_for_the_same_scores() -> None:
    pytest.importorskip("optuna")
    one = space(LR, "client.momentum=interval(0,0.8)", "client.epochs=int(interval(1,4))")

    def proposed(sign: int) -> list[tuple[str, ...]]:
        sampler, points = OptunaSampler(one, sign), []
        for trial in range(15):
            point = sampler.next()
            assert point is not None
            points.append(point)
            sampler.tell(None if trial == 3 else float(point[1]))
        return points

    up, down = proposed(1), proposed(-1)
    assert up == proposed(1)
    mean = [sum(float(p[1]) for p in points[11:]) / 4 for points in (up, down)]
    assert mean[0] > mean[1]  # it learns where the score is higher, and lower
    assert all(p[0] in ("0.01", "0.03", "0.1") and p[2] in "1234" for p in up)
