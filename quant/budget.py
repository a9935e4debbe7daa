"""Chooses how many bits each of many weights gets within a budget, so that the sum of errors is small."""

import heapq
from collections.abc import Sequence


def allocate(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Chooses one candidate for each item so that the sum of errors is small and the sum of costs within a budget.

    All items start at their cheapest candidate. Then the step with the largest fall of error per cost that still fits
    is taken, again and again. Steps go along the lower convex hull of each item's (cost, error). As long as every best
    step fits, no other choice of the same cost has a smaller sum of errors (Shoham & Gersho 1988, "Efficient bit
    allocation for an arbitrary set of quantizers"). Once a step does not fit, the choice may miss the optimum.

    Args:
        costs: for each item the cost of each of its candidates, for example in bytes.
        errors: for each item the error of each of its candidates, not negative.
        budget: upper limit of the sum of the chosen costs.

    Returns:
        For each item the index of its chosen candidate.

    Raises:
        ValueError: if even the cheapest candidates exceed the budget, or an item has none.
    """
    hulls = [_lower_hull(cost, error) for cost, error in zip(costs, errors, strict=True)]
    spent = sum(item[hull[0]] for item, hull in zip(costs, hulls, strict=True))
    if spent > budget:
        raise ValueError(
            f"the cheapest candidates cost {spent:g}, over the budget of {budget:g}: raise the budget or allow smaller "
            "candidates"
        )
    position = [0] * len(hulls)
    steps = [step for item in range(len(hulls)) if (step := _next_step(item, 0, hulls, costs, errors))]
    heapq.heapify(steps)
    while steps:
        _, item, extra = heapq.heappop(steps)
        if spent + extra > budget:
            continue  # also ends this item: its further steps need this one
        spent += extra
        position[item] += 1
        step = _next_step(item, position[item], hulls, costs, errors)
        if step:
            heapq.heappush(steps, step)
    return [hull[i] for hull, i in zip(hulls, position, strict=True)]


def _next_step(
    item: int, at: int, hulls: list[list[int]], costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]
) -> tuple[float, int, float] | None:
    """Returns (change of error per cost, item, cost) of an item's next step along its hull; None at its end."""
    if at + 1 == len(hulls[item]):
        return None
    here, there = hulls[item][at : at + 2]
    extra = costs[item][there] - costs[item][here]
    return (errors[item][there] - errors[item][here]) / extra, item, extra


def _lower_hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Returns the candidates on the lower left convex hull of (cost, error), by rising cost and falling error."""
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
