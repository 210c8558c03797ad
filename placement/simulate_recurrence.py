"""The max-plus recurrence: when each service of a token starts and ends, for all instances at once.

Every resource serves one micro-batch at a time, in the order token, layer, micro-batch. A service
starts when its resource is free and what it needs has arrived, and is not interrupted:

- the attention of an instance, then (FFN remote) its outgoing link, then ``latency_s``;
- a pass of the FFN set, when micro-batch j of every instance that it serves has arrived
  ("together"), or one pass for each instance, in their order ("in-turn");
- the instance's incoming link, then ``latency_s``; then the next layer. After the last the token is
  done, and the next follows. What comes between two tokens (head and sampling of the one, embedding
  of the other) is part of the attention of the first layer, so that no micro-batch waits for it
  before its own turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from step3_hetero.placement.simulate_routes import Bools, Floats, Ints, Route
from step3_hetero.placement.simulate_times import Services, Usual

ATTENTION, A2F, FFN, F2A = "attention", "a2f", "ffn", "f2a"


class Watch(Protocol):
    """Sees every service as it is computed."""

    def __call__(
        self, what: str, layer: int, micro_batch: int, who: Ints | None, start: Floats, end: Floats
    ) -> None:
        """Take one service of all instances (``who`` None), of sets, or of passes by instance."""


@dataclass(slots=True)
class Clock:
    """When each resource is free, and each micro-batch ready for its next attention, in seconds."""

    attention: Floats
    a2f: Floats
    f2a: Floats
    """(instances,) each."""
    sets: Floats
    """(sets,)."""
    ready: Floats
    """(micro-batches, instances)."""

    @classmethod
    def at_zero(cls, usual: Usual) -> Clock:
        """Everything is free and ready at 0 s."""
        micro_batches, instances = usual.chosen.shape
        return cls(
            attention=np.zeros(instances),
            a2f=np.zeros(instances),
            f2a=np.zeros(instances),
            sets=np.zeros(usual.ffn.shape[1]),
            ready=np.zeros((micro_batches, instances)),
        )

    def copy(self) -> Clock:
        """Return a clock that goes on by itself."""
        return Clock(*(getattr(self, f.name).copy() for f in fields(self)))

    def put_back(self, earlier: Clock, instances: Bools, sets: Bools) -> None:
        """Set some instances and sets to what they were."""
        for name in ("attention", "a2f", "f2a"):
            getattr(self, name)[instances] = getattr(earlier, name)[instances]
        self.sets[sets] = earlier.sets[sets]
        self.ready[:, instances] = earlier.ready[:, instances]

    def not_before(self, time_s: float, instances: Bools) -> None:
        """Let some instances start nothing before a time."""
        for array in (self.attention, self.a2f, self.f2a):
            array[instances] = np.maximum(array[instances], time_s)
        self.ready[:, instances] = np.maximum(self.ready[:, instances], time_s)


def advance(
    clock: Clock, usual: Usual, routes: Sequence[Route], token: Services, watch: Watch | None
) -> None:
    """Move the clock over one token of every micro-batch of every instance."""
    remote = -1
    for layer, is_remote in enumerate(usual.remote):
        remote += int(is_remote)
        for j, route in enumerate(routes):
            end = _attend(clock, token.attention[layer, j], layer, j, watch)
            if is_remote:
                arrived = _send(clock, usual, token.a2f[remote, j], end, layer, j, watch)
                served = _serve(clock, usual, route, token.ffn[remote, j], arrived, layer, j, watch)
                end = _return(clock, usual, token.f2a[remote, j], served, layer, j, watch)
            clock.ready[j] = end


def _attend(clock: Clock, seconds: Floats, layer: int, j: int, watch: Watch | None) -> Floats:
    start = np.maximum(clock.attention, clock.ready[j])
    clock.attention = start + seconds
    if watch:
        watch(ATTENTION, layer, j, None, start, clock.attention)
    return clock.attention


def _send(
    clock: Clock, usual: Usual, seconds: Floats, ready: Floats, layer: int, j: int,
    watch: Watch | None,
) -> Floats:  # fmt: skip
    start = np.maximum(clock.a2f, ready)
    clock.a2f = start + seconds
    if watch:
        watch(A2F, layer, j, None, start, clock.a2f)
    arrived: Floats = clock.a2f + usual.latency
    return arrived


def _return(
    clock: Clock, usual: Usual, seconds: Floats, ready: Floats, layer: int, j: int,
    watch: Watch | None,
) -> Floats:  # fmt: skip
    start = np.maximum(clock.f2a, ready)
    clock.f2a = start + seconds
    if watch:
        watch(F2A, layer, j, None, start, clock.f2a)
    arrived: Floats = clock.f2a + usual.latency
    return arrived


def _serve(
    clock: Clock, usual: Usual, route: Route, seconds: Floats, arrived: Floats, layer: int, j: int,
    watch: Watch | None,
) -> Floats:  # fmt: skip
    """Return when each instance's tokens leave its set: (instances,)."""
    at_set = np.append(arrived, -np.inf)[route.members]
    free = clock.sets[route.sets]
    if not usual.in_turn:
        start = np.maximum(free, at_set.max(axis=1))
        end = start + seconds[route.sets]
        clock.sets[route.sets] = end
        if watch:
            watch(FFN, layer, j, route.sets, start, end)
        together: Floats = end[route.row]
        return together
    each = np.append(seconds, 0.0)[route.members]
    done = _queue(free, at_set, each)
    clock.sets[route.sets] = done[:, -1]
    ends: Floats = done[route.row, route.column]
    if watch:
        taken = route.members.ravel() < len(seconds)
        who = np.repeat(route.sets, route.members.shape[1])[taken]
        watch(FFN, layer, j, who, (done - each).ravel()[taken], done.ravel()[taken])
    return ends


def _queue(free: Floats, arrived: Floats, seconds: Floats) -> Floats:
    """Return when each of a row's services ends, one after the other in the order given.

    Shapes: free (rows,), arrived and seconds (rows, widest) -> (rows, widest). It is the recurrence
    end[k] = max(end[k-1], arrived[k]) + seconds[k] written as a running sum and maximum.

    >>> _queue(np.array([1.0]), np.array([[0.0, 5.0, 5.0]]), np.array([[2.0, 1.0, 1.0]]))
    array([[3., 6., 7.]])
    """
    total = np.cumsum(seconds, axis=1)
    earliest = np.maximum(arrived, free[:, None]) - (total - seconds)
    ends: Floats = total + np.maximum.accumulate(earliest, axis=1)
    return ends
