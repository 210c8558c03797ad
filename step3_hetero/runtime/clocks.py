"""Where the seconds go: sums and quantiles by role and kind of work, small enough to send."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from step3_hetero.errors import EdgeMismatch

PER_OCTAVE = 8
"""Steps in which a duration is filed, for each doubling: a quantile is within 4.5 %."""

LEAST_S = 1e-9

MOST = 1 << 63
"""What a clock that somebody else tells may count: seconds, calls, bytes."""

MOST_STEP = 63 * PER_OCTAVE
"""Nor can it file a duration beyond."""

WAIT = "wait"
"""Kind of the seconds in which an instance had nothing to compute."""


@dataclass(slots=True)
class Durations:
    """Many calls of one kind: their seconds and bytes, and how many took about how long."""

    seconds: float = 0.0
    calls: int = 0
    sent_bytes: int = 0
    filed: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float, sent_bytes: int = 0) -> None:
        """Count one call."""
        self.seconds += seconds
        self.calls += 1
        self.sent_bytes += sent_bytes
        step = math.floor(math.log2(max(seconds, LEAST_S)) * PER_OCTAVE)
        self.filed[step] = self.filed.get(step, 0) + 1

    def join(self, other: Durations) -> None:
        """Add what another one has counted."""
        self.seconds += other.seconds
        self.calls += other.calls
        self.sent_bytes += other.sent_bytes
        for step, count in other.filed.items():
            self.filed[step] = self.filed.get(step, 0) + count

    def since(self, before: Durations) -> Durations:
        """Return the calls counted after a copy ``before`` of this one was taken."""
        filed = {step: n - before.filed.get(step, 0) for step, n in list(self.filed.items())}
        return Durations(
            self.seconds - before.seconds,
            self.calls - before.calls,
            self.sent_bytes - before.sent_bytes,
            {step: n for step, n in filed.items() if n > 0},
        )

    def quantile_s(self, part: float) -> float:
        """Return the seconds that ``part`` of the calls did not exceed, within 4.5 %; 0 of none.

        >>> durations = Durations()
        >>> for seconds in (0.001, 0.002, 0.1):
        ...     durations.add(seconds)
        >>> 0.0019 < durations.quantile_s(0.5) < 0.0021
        True
        """
        left = math.ceil(part * self.calls)
        for step in sorted(self.filed):
            left -= self.filed[step]
            if left <= 0:
                return float(2 ** ((step + 0.5) / PER_OCTAVE))
        return 0.0


class StageClock:
    """Durations by (role, kind of work): a stage's kind, an edge, or `WAIT`."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Durations] = {}

    def add(self, role: str, kind: str, seconds: float, sent_bytes: int = 0) -> None:
        """Count one call."""
        self.entries.setdefault((role, kind), Durations()).add(seconds, sent_bytes)

    def only(self, role: str, kinds: Collection[str], name: str) -> StageClock:
        """Return the entries of a role and of these kinds of work under another name."""
        found = StageClock()
        for (owner, kind), durations in list(self.entries.items()):
            if owner == role and kind in kinds:
                found.entries[name, kind] = durations
        return found

    def join(self, other: StageClock) -> None:
        """Add what another clock has counted."""
        for key, durations in list(other.entries.items()):
            self.entries.setdefault(key, Durations()).join(durations)

    def to_json(self) -> list[dict[str, Any]]:
        """Return what ``--json`` prints: one entry for each role and kind of work."""
        return [
            {
                "role": role,
                "stage": kind,
                "seconds": d.seconds,
                "calls": d.calls,
                "median_s": d.quantile_s(0.5),
                "p99_s": d.quantile_s(0.99),
                "bytes": d.sent_bytes,
            }
            for (role, kind), d in list(self.entries.items())
        ]

    def to_wire(self) -> list[list[Any]]:
        """Return what goes into a message, whole: the next one replaces it."""
        return [
            [role, kind, d.seconds, d.calls, d.sent_bytes, sorted(d.filed.items())]
            for (role, kind), d in self.entries.items()
        ]

    @classmethod
    def of_wire(cls, said: Sequence[Sequence[Any]]) -> StageClock:
        """Return the clock that ``to_wire`` described.

        Raises:
            EdgeMismatch: it is nothing of the kind.
        """
        clock = cls()
        try:
            for role, kind, seconds, calls, sent, filed in said:
                durations = Durations(float(seconds), int(calls), int(sent))
                durations.filed = {int(step): int(count) for step, count in filed}
                _check(durations)
                clock.entries[str(role), str(kind)] = durations
        except (ValueError, TypeError, OverflowError) as cause:
            raise EdgeMismatch(f"a clock is not told by role and kind: {cause}") from cause
        return clock


def _check(told: Durations) -> None:
    """Refuse what no calls take.

    Raises:
        ValueError: with the number.
    """
    for number in (told.seconds, told.calls, told.sent_bytes, *told.filed.values()):
        if not 0 <= number < MOST:
            raise ValueError(f"{number!r} refused; allowed: from 0 to 64 bits")
    for step in told.filed:
        if not -MOST_STEP <= step <= MOST_STEP:
            raise ValueError(f"step {step} refused; allowed: to {MOST_STEP} either way")


def sum_of(clocks: Mapping[str, StageClock]) -> StageClock:
    """Return the sum of the clocks of several instances."""
    total = StageClock()
    for clock in list(clocks.values()):
        total.join(clock)
    return total
