"""Allocation of a budget, against an exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.budget import allocate


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0, 1))
def test_no_choice_of_the_same_cost_is_better(seed: int, items: int, generosity: float) -> None:
    """The chosen point is on the lower convex hull of all (cost, error): no choice of the same cost has less error."""
    rng = np.random.default_rng(seed)
    costs = [sorted(rng.integers(1, 40, 4).tolist()) for _ in range(items)]
    errors = [sorted(rng.uniform(0, 9, 4).tolist(), reverse=True) for _ in range(items)]
    every = list(itertools.product(range(4), repeat=items))
    totals = [(sum(c[i] for c, i in zip(costs, x)), sum(e[i] for e, i in zip(errors, x))) for x in every]  # noqa: B905
    cheapest, dearest = min(cost for cost, _ in totals), max(cost for cost, _ in totals)
    budget = cheapest + generosity * (dearest - cheapest)
    chosen = allocate(costs, errors, budget)
    cost = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    error = sum(e[i] for e, i in zip(errors, chosen, strict=True))
    assert cost <= budget
    best = min(fault for price, fault in totals if price <= budget)
    # The greedy choice along the hulls loses at most one item's step, the one that did not fit.
    assert error <= best + max(e[0] - e[-1] for e in errors) + 1e-9
    if generosity == 1:
        assert error == pytest.approx(best)


def test_the_steepest_falls_are_taken_first() -> None:
    assert allocate([[1, 2, 4], [1, 2, 4]], [[10, 1, 0], [10, 5, 0]], 2) == [0, 0]
    assert allocate([[1, 2, 4], [1, 2, 4]], [[10, 1, 0], [10, 5, 0]], 3) == [1, 0]
    assert allocate([[1, 2, 4], [1, 2, 4]], [[10, 1, 0], [10, 5, 0]], 4) == [1, 1]
    assert allocate([[1, 2, 4], [1, 2, 4]], [[10, 1, 0], [10, 5, 0]], 100) == [2, 2]


def test_a_candidate_above_the_hull_is_passed_over() -> None:
    assert allocate([[1, 2, 3]], [[10, 9.5, 0]], 2) == [0]
    assert allocate([[1, 2, 3]], [[10, 9.5, 0]], 3) == [2]
    assert allocate([[3, 1, 2]], [[7, 7, 8]], 9) == [1]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="the cheapest candidates cost 3, over the budget of 2"):
        allocate([[1, 5], [2, 4]], [[1, 0], [1, 0]], 2)
    with pytest.raises(ValueError, match="without candidates"):
        allocate([[]], [[]], 2)
