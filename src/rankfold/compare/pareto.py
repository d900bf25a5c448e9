"""Which contenders no other beats in both the metric and the number of parameters."""

from __future__ import annotations

from collections.abc import Sequence


def front(costs: Sequence[float], metrics: Sequence[float], greater_is_better: bool) -> list[bool]:
    """For each point, whether it is on the front: no other costs at most as much and is at least as good, one of them strictly.

    >>> front([1, 2, 3], [0.7, 0.9, 0.8], True)
    [True, True, False]
    """
    sign = 1 if greater_is_better else -1
    points = [(cost, -sign * metric) for cost, metric in zip(costs, metrics, strict=True)]

    def beaten(point: tuple[float, float]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)

    return [not beaten(point) for point in points]
