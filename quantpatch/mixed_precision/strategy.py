"""Which configurations to try next: arithmetic on what they cost, and on the noise that they should have.

The noises of groups are added up, as if these were independent. That gives an order good enough to begin
with; what holds is what evaluations say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

#: The number of the option chosen for each group.
Choice = tuple[int, ...]

_EVERY = 20_000  # configurations, up to which all are looked at; of more the neighbours of the best
_PATIENCE = 16  # failures in a row after which it is enough, unless the budget allows every one
_LEAST_SAVING = 1e-3  # of neighbours, as a share of the cost
_FEW = 64
_TINY = 1e-30
_SHARPNESS = 4


@attrs.frozen
class Option:
    """What a group may become.

    Attributes:
        cost: Of its layers together.
        noise: What it adds to the model's output.
        candidate: Number of the candidate.
    """

    cost: float
    noise: float
    candidate: int


@attrs.frozen
class Space:
    """All configurations.

    Attributes:
        options: Of each group, the least noisy first.
    """

    options: tuple[tuple[Option, ...], ...]

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return math.prod(map(len, self.options))

    def cost(self, choice: Choice) -> float:
        """What a configuration costs."""
        return math.fsum(options[n].cost for options, n in zip(self.options, choice, strict=True))

    def noise(self, choice: Choice) -> float:
        """The noise that it should have."""
        return math.fsum(options[n].noise for options, n in zip(self.options, choice, strict=True))

    def path(self) -> list[Choice]:
        """Configurations from the least noisy to the cheapest: each step saves most for the noise it adds."""
        steps = sorted(
            (step, group, option)
            for group, options in enumerate(self.options)
            for step, option in _hull(options)
        )
        choice = [0] * len(self.options)
        path = [tuple(choice)]
        for _, group, option in steps:
            choice[group] = option
            path.append(tuple(choice))
        return path

    def all(self) -> list[_Trial]:
        """Every configuration there is."""
        every = itertools.product(*(range(len(options)) for options in self.options))
        return [_Trial(choice, self.cost(choice), self.noise(choice)) for choice in every]

    def neighbours(self, choice: Choice) -> Iterator[_Trial]:
        """Configurations that differ in one group, or in two of which one is noisier and one less noisy."""
        cost, noise = self.cost(choice), self.noise(choice)
        changes = [
            (group, n, option.cost - options[choice[group]].cost, option.noise - options[choice[group]].noise)
            for group, options in enumerate(self.options)
            for n, option in enumerate(options)
            if n != choice[group]
        ]
        # Of two that are changed only the best are looked at: most saved for the noise, and the other way.
        cheaper = sorted((c for c in changes if c[2] < 0), key=lambda c: c[3] / -c[2])[:_FEW]
        quieter = sorted((c for c in changes if c[3] < 0 <= c[2]), key=lambda c: -c[2] / c[3])[:_FEW]
        pairs = itertools.product(cheaper, quieter)
        for change in (*((c,) for c in changes), *(pair for pair in pairs if pair[0][0] != pair[1][0])):
            changed = list(choice)
            for group, n, _, _ in change:
                changed[group] = n
            yield _Trial(tuple(changed), cost + sum(c[2] for c in change), noise + sum(c[3] for c in change))


@attrs.frozen
class _Trial:
    choice: Choice
    cost: float
    noise: float


def _hull(options: Sequence[Option]) -> list[tuple[float, int]]:
    """The steps from a group's first option to its cheapest: noise for what is saved, and where to."""
    hull: list[tuple[float, int]] = []
    at = [0]
    for n, option in enumerate(options):
        if option.cost >= options[at[-1]].cost:
            continue
        while True:
            before = options[at[-1]]
            slope = (option.noise - before.noise) / (before.cost - option.cost)
            if not hull or slope > hull[-1][0]:
                break
            hull.pop()
            at.pop()
        hull.append((slope, n))
        at.append(n)
    return hull


def expected_evaluations(space: Space) -> int:
    """About how many evaluations a search takes that is not limited."""
    return math.ceil(math.log2(len(space.path()))) + _PATIENCE + 4


class Search:
    """The search itself.

    Args:
        space: All configurations.
        holds: Evaluates one, and says whether its metric is good enough. It may raise, which ends the search.

    Attributes:
        best: The cheapest that holds, or None.
        tried: Whether each that was evaluated holds.
    """

    def __init__(self, space: Space, holds: Callable[[Choice], bool]) -> None:
        self.best: Choice | None = None
        self.tried: dict[Choice, bool] = {}
        self._space = space
        self._holds = holds
        self._allowed: int | None = None
        self._all = space.all() if space.size <= _EVERY else None

    def allow(self, evaluations: int | None) -> None:
        """Says how many there may be: if that is enough for all that are cheaper, all are tried."""
        self._allowed = evaluations

    def try_(self, choice: Choice) -> bool:
        """Whether a configuration holds."""
        if choice not in self.tried:
            self.tried[choice] = self._holds(choice)
            space, best = self._space, self.best
            if self.tried[choice] and (best is None or space.cost(choice) < space.cost(best)):
                self.best = choice
        return self.tried[choice]

    def run(self) -> None:
        """Halves the path from the least noisy to the cheapest, then improves on what that gives."""
        path = self._space.path()
        low, high = 0, len(path) - 1
        if self.try_(path[low]) and not self.try_(path[high]):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.try_(path[middle]) else (low, middle)
        failures = 0
        while (trial := self._next(failures)) is not None:
            failures = 0 if self.try_(trial) else failures + 1

    def _next(self, failures: int) -> Choice | None:
        """The configuration that should save most, by the odds that it holds; None if it is enough."""
        best = self.best
        bound = math.inf if best is None else self._space.cost(best)
        if self._all is not None:
            trials: Iterable[_Trial] = self._all
        else:
            trials = () if best is None else self._space.neighbours(best)
        least = 0.0 if best is None or self._all is not None else _LEAST_SAVING * bound
        trials = [t for t in trials if t.cost < bound - least and t.choice not in self.tried]
        left = None if self._allowed is None else self._allowed - len(self.tried)
        every = self._all is not None and left is not None and len(trials) <= left
        if not trials or (failures >= _PATIENCE and not every):
            return None
        odds = self._odds()

        def gain(trial: _Trial) -> float:
            share = odds(trial.noise)
            if best is None:  # what is least noisy is likeliest to hold
                return share / (1 + trial.noise)
            return share * (bound - trial.cost)

        trial = max(trials, key=lambda t: (gain(t), t.choice))
        return trial.choice

    def _odds(self) -> Callable[[float], float]:
        """How likely a configuration of some noise is to hold, by those that did and that did not."""
        noises = {choice: self._space.noise(choice) for choice in self.tried}
        held = max((noises[c] for c, holds in self.tried.items() if holds), default=0.0)
        failed = min((noises[c] for c, holds in self.tried.items() if not holds), default=math.inf)
        failed = max(failed, held)

        def share(noise: float) -> float:
            if noise <= held or math.isinf(failed):
                return 1.0
            if noise < failed:
                return 1.0 - 0.5 * (noise - held) / (failed - held)
            # A sum of noises is not quite what they are together.
            return 0.5 * ((failed + _TINY) / (noise + _TINY)) ** _SHARPNESS

        return share


def pareto(points: Mapping[Choice, tuple[float, Any]]) -> list[Choice]:
    """The configurations that none beats in both cost and metric, the cheapest first.

    Args:
        points: Cost and metric of each.
    """
    found: list[Choice] = []
    for choice in sorted(points, key=lambda c: points[c][0]):
        cost, metric = points[choice]
        if found and not metric > points[found[-1]][1]:
            continue
        if found and points[found[-1]][0] == cost:
            found.pop()
        found.append(choice)
    return found
