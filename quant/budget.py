"""Sharing out a budget: how many bits each of many weights gets, so that the errors add up to the least."""

import heapq
from collections.abc import Sequence


def allocate(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Chooses one candidate for each item so that the sum of errors is small and the sum of costs within a budget.

    All items start at their cheapest candidate; then, again and again, the step with the largest fall of error per
    cost is taken that still fits. Steps go along the lower convex hull of each item's (cost, error). As long as every
    best step fits, no other choice of that cost has a smaller sum of errors (Shoham & Gersho 1988, "Efficient bit
    allocation for an arbitrary set of quantizers"); of the last few steps, that do not all fit, it may miss the best.

    Args:
        costs: for each item the cost of each of its candidates, for example bytes.
        errors: likewise, not negative.
        budget: most that the chosen costs may add up to.

    Returns:
        For each item the index of its candidate.

    Raises:
        ValueError: if even the cheapest candidates exceed the budget, or an item has none.
    """
    hulls = [_lower_hull(cost, error) for cost, error in zip(costs, errors, strict=True)]
    spent = sum(item[hull[0]] for item, hull in zip(costs, hulls, strict=True))
    if spent > budget:
        raise ValueError(f"the least is {spent:g}, over the budget of {budget:g}: raise it or allow smaller candidates")
    position = [0] * len(hulls)
    steps = [step for item in range(len(hulls)) if (step := _next_step(item, 0, hulls, costs, errors))]
    heapq.heapify(steps)
    while steps:
        _, item, extra = heapq.heappop(steps)
        if spent + extra > budget:
            continue  # and no further step of this item: those need this one
        spent += extra
        position[item] += 1
        step = _next_step(item, position[item], hulls, costs, errors)
        if step:
            heapq.heappush(steps, step)
    return [hull[i] for hull, i in zip(hulls, position, strict=True)]


def _next_step(
    item: int, at: int, hulls: list[list[int]], costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]
) -> tuple[float, int, float] | None:
    """(minus the fall of error per cost, item, cost) of going on along an item's hull; None at its end."""
    if at + 1 == len(hulls[item]):
        return None
    here, there = hulls[item][at : at + 2]
    extra = costs[item][there] - costs[item][here]
    return (errors[item][there] - errors[item][here]) / extra, item, extra


def _lower_hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Candidates on the lower left convex hull of (cost, error), from the cheapest on; each has less error."""
    if not costs:
        raise ValueError("an item without candidates: expected at least one")
    hull: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], errors[i])):
        if hull and errors[i] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(costs, errors, hull[-2], hull[-1]) >= _slope(costs, errors, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(costs: Sequence[float], errors: Sequence[float], i: int, j: int) -> float:
    return (errors[j] - errors[i]) / (costs[j] - costs[i])
