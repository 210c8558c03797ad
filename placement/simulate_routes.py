"""Which FFN set serves which attention instance, for each micro-batch, as index arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.pipeline import PredictedPipeline

Ints = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Route:
    """The passes of one micro-batch in one layer: a row for each set that has anything to serve."""

    sets: Ints
    """(rows,) set numbers, ascending."""
    members: Ints
    """(rows, widest) instances in the order served, padded with the number of instances."""
    row: Ints
    """(instances,) the row that serves each instance; 0 where none does."""
    column: Ints
    """(instances,) its place in the row."""


def usual_sets(pipeline: PredictedPipeline) -> Ints:
    """Return the set that serves each micro-batch of each instance: (micro-batches, instances).

    Instance k of those that feed a group of n sets uses set k mod n; where they are fewer than the
    sets, micro-batch j of instance k uses set (k + j * instances) mod n.
    """
    chosen = np.zeros((pipeline.micro_batches, pipeline.attention_instances), np.intp)
    fed = np.repeat(
        [_fed(pipeline, group.feeds) for group in pipeline.attention],
        [group.instances for group in pipeline.attention],
    )
    first = 0
    for number, group in enumerate(pipeline.ffn):
        instances = np.flatnonzero(fed == number)
        k = np.arange(len(instances))
        step = len(instances) if len(instances) < group.instances else 0
        for j in range(pipeline.micro_batches):
            chosen[j, instances] = first + (k + j * step) % group.instances
        first += group.instances
    return chosen


def _fed(pipeline: PredictedPipeline, feeds: str) -> int:
    names = [group.name for group in pipeline.ffn]
    return names.index(feeds) if feeds else 0


def routes(chosen: Ints, active: Bools) -> list[Route]:
    """Return one route for each micro-batch; instances that are not active take part in none."""
    return [_route(sets, active) for sets in chosen]


def _route(chosen: Ints, active: Bools) -> Route:
    instances = np.flatnonzero(active)
    order = instances[np.argsort(chosen[instances], kind="stable")]
    sets, starts, counts = np.unique(chosen[order], return_index=True, return_counts=True)
    row = np.zeros(len(chosen), np.intp)
    column = np.zeros(len(chosen), np.intp)
    row[order] = np.repeat(np.arange(len(sets)), counts)
    column[order] = np.arange(len(order)) - np.repeat(starts, counts)
    members = np.full((len(sets), max(counts, default=1)), len(chosen), np.intp)
    members[row[order], column[order]] = order
    return Route(sets, members, row, column)


def connected(chosen: Ints, start: Bools) -> Bools:
    """Return the instances that wait, through shared sets, for any instance in ``start``."""
    found = start
    while True:
        sets = np.unique(chosen[:, found])
        wider = found | np.isin(chosen, sets).any(axis=0)
        if (wider == found).all():
            return wider
        found = wider


def by_group(counts: Sequence[int]) -> Ints:
    """Return the group of each member: [2, 1] -> [0, 0, 1]."""
    return np.repeat(np.arange(len(counts)), counts)
