"""The walk over the grid finds what a look at every place would, and spends no more than its budget."""

import itertools
import math

import pytest

pytest.importorskip("sklearn")

from benchmarks.tune import behind, place_of, value, walk  # noqa: E402


def test_the_grid():
    assert [value(place) for place in range(-3, 4)] == [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    for place in range(-16, 4):
        assert place_of(value(place)) == place


@pytest.mark.parametrize("target", list(itertools.product((-3, 0, 2), (-2, 0, 4))))
def test_a_walk_ends_at_the_lowest_place(target):
    """Of a valley that is long in the diagonal, as learning rate against damping is."""
    tried = []

    def loss(place):
        assert place not in tried
        tried.append(place)
        x, y = (a - b for a, b in zip(place, target, strict=True))
        return (x - y) ** 2 + 0.1 * (x + y) ** 2

    walk((0, 0), loss, budget=100)
    assert min(tried, key=lambda place: sum(abs(a - b) for a, b in zip(place, target, strict=True))) == target
    assert len(tried) < 35


def test_a_walk_keeps_to_its_budget_and_out_of_what_diverges():
    tried = []

    def loss(place):
        tried.append(place)
        return math.inf if place[0] > 0 else -place[0]  # uphill to the left, diverging to the right

    walk((0,), loss, budget=100)
    assert tried == [(0,), (1,), (-1,)]
    tried.clear()
    walk((0,), lambda place: tried.append(place) or -place[0], budget=5)
    assert tried == [(0,), (1,), (2,), (3,), (4,)]


def test_a_start_that_diverges_is_retreated_from():
    tried = []

    def loss(place):
        tried.append(place)
        return math.inf if place[0] > -3 else 1.0 + abs(place[1])

    walk((0, 0), loss, budget=100)
    assert tried[:6] == [(0, 0), (-1, 0), (-1, 1), (-2, 1), (-2, 2), (-3, 2)]
    assert (-3, 0) in tried
    tried.clear()
    walk((0,), lambda place: tried.append(place) or math.inf, budget=3)
    assert tried == [(0,), (-1,), (-2,)]


def test_what_is_behind():
    best = [{"train_loss": loss} for loss in (100.0, 50.0, 25.0, 12.0, 6.0, 3.0)]
    assert not behind([], best)
    assert not behind(best, [{"train_loss": 100.0}])
    assert behind(best, [{"train_loss": 100.0}, {"train_loss": 90.0}])
    assert not behind(best, [{"train_loss": 100.0}, {"train_loss": 60.0}])
    worse_at_the_end = [*best[:-1], {"train_loss": 90.0}]
    assert not behind(worse_at_the_end, [{"train_loss": 100.0}, {"train_loss": 90.0}])
