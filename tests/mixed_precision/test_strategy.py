"""Which configurations a search tries: against trying all."""

from __future__ import annotations

import itertools
import random

import pytest

from quantpatch.mixed_precision.strategy import Option, Search, Space, pareto


def options(*pairs):
    """Of a group: costs and noises, the least noisy first."""
    return tuple(Option(cost, noise, n) for n, (cost, noise) in enumerate(pairs))


def test_the_path_goes_from_the_least_noisy_to_the_cheapest_by_the_noise_that_saving_costs():
    space = Space((options((8, 0.0), (4, 1.0), (2, 9.0)), options((80, 0.0), (40, 20.0))))
    assert space.path() == [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert [space.cost(choice) for choice in space.path()] == [88, 84, 44, 42]
    assert [space.noise(choice) for choice in space.path()] == [0, 1, 21, 29]


def test_the_path_leaves_out_what_a_mixture_of_others_beats():
    space = Space((options((8, 0.0), (7, 5.0), (4, 6.0)),))
    assert space.path() == [(0,), (2,)]


def test_a_path_of_groups_with_one_option_is_that_one():
    assert Space((options((8, 0.5)), options((3, 0.1)))).path() == [(0, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_with_enough_evaluations_it_finds_what_trying_all_finds(seed):
    """Whatever the metric is: here it has nothing to do with the noise that was expected."""
    rng = random.Random(seed)
    space = Space(
        tuple(
            tuple(sorted((Option(rng.random(), rng.random(), n) for n in range(3)), key=lambda o: o.noise))
            for _ in range(4)
        )
    )
    every = list(itertools.product(range(3), repeat=4))
    good = {choice for choice in every if rng.random() < 0.3}
    search = Search(space, good.__contains__)
    search.allow(len(every))
    search.run()
    assert search.best == min(good, key=space.cost)


@pytest.mark.parametrize("seed", range(12))
def test_where_noise_adds_up_it_comes_within_a_percent_of_trying_all_in_few_evaluations(seed):
    rng = random.Random(seed)
    space = Space(
        tuple(
            options(
                *((cost * rng.uniform(10, 20), scale * noise) for cost, noise in [(8, 0), (4, 1), (2, 9)])
            )
            for scale in (rng.uniform(0.1, 1) for _ in range(5))
        )
    )
    limit = 8.0
    search = Search(space, lambda choice: space.noise(choice) <= limit)
    search.run()
    good = [c for c in itertools.product(range(3), repeat=5) if space.noise(c) <= limit]
    assert space.cost(search.best) <= 1.01 * min(map(space.cost, good))
    assert len(search.tried) <= 40  # of 243


def test_a_large_space_is_searched_among_neighbours_and_comes_near_the_best():
    rng = random.Random(0)
    groups = []
    for _ in range(60):
        size, scale = rng.uniform(1, 10), rng.uniform(0.1, 1)
        groups.append(options((8 * size, 0.001 * scale), (4 * size, 0.1 * scale), (2 * size, scale)))
    space = Space(tuple(groups))
    search = Search(space, lambda choice: space.noise(choice) <= 6.0)
    search.run()
    # No configuration is cheaper than the bound that the path gives, between two of its steps.
    path = space.path()
    bound = max(space.cost(choice) for choice in path if space.noise(choice) > 6.0)
    assert search.best is not None
    assert bound <= space.cost(search.best) * 1.01
    assert space.cost(search.best) <= min(space.cost(c) for c in path if space.noise(c) <= 6.0)
    assert len(search.tried) < 60


def test_where_nothing_holds_nothing_is_found():
    search = Search(Space((options((8, 0.0), (4, 1.0)), options((8, 0.0), (4, 2.0)))), lambda choice: False)
    search.run()
    assert search.best is None
    assert (0, 0) in search.tried


def test_the_frontier_has_what_none_beats():
    points = {(0,): (1.0, 0.5), (1,): (2.0, 0.4), (2,): (3.0, 0.9), (3,): (3.0, 0.8), (4,): (3.0, 0.9)}
    assert pareto(points) == [(0,), (2,)]
