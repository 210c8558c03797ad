"""Which member of a role is slow: beside its peers, or alone, beside its own beginning."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from step3_hetero.runtime.clocks import Durations, StageClock, sum_of

SLOW = 1.5
"""A member is told of once its calls take so many times the seconds of its peers'."""

WINDOW_CALLS = 100
"""Over so many calls in a row: fewer are a pause of the machine, not a slow member."""

BEGINNING_S = 120.0
"""Calls of a member's first minutes are what it is later held against when it has no peer."""

LOOK_S = 1.0
"""How often clocks are added up to see who is slow: tellers may be many, and tell often."""

ROUND_TRIP = "round trip"
"""Ends the kind of what a caller waited for, the way there and back and the queue included."""

Key = tuple[str, str]
"""A member, as ``f:0``, and a kind of work."""


def role_of(member: str) -> str:
    """Return the role of a member.

    >>> role_of("f:0")
    'f'
    """
    return member.rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long one member's calls of one kind take, in seconds.

    ``ratio`` is its median to the median of its peers' medians (``against`` "peers"), or, of one
    without peers, the median since its first minutes to that in them ("beginning"); None while
    there is nothing to hold it against.
    """

    member: str
    stage: str
    calls: int
    mean_s: float
    p50_s: float
    p95_s: float
    ratio: float | None
    against: str | None

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"role": role_of(self.member), **asdict(self)}


@dataclass(slots=True)
class Window:
    """Where a member's present run of calls began, what its last whole one took, how it began."""

    since: Durations
    born_s: float
    p50_s: float = 0.0
    beginning: Durations | None = None


@dataclass(eq=False)
class Paces:
    """Takes in clocks by (member, kind), whole each time, and says who is slow.

    ``beginning_s``, ``window_calls`` and ``look_s`` as `BEGINNING_S`, `WINDOW_CALLS`, `LOOK_S`.
    """

    beginning_s: float = BEGINNING_S
    window_calls: int = WINDOW_CALLS
    look_s: float = LOOK_S
    _looked_s: float | None = None
    _clocks: dict[str, StageClock] = field(default_factory=dict)
    _windows: dict[Key, Window] = field(default_factory=dict)
    _told: set[Key] = field(default_factory=set)

    def take(self, teller: str, clock: StageClock) -> list[tuple[str, str]]:
        """Take in what ``teller`` counted since its start; return (member, line) of who is slow.

        A member is told of once for each kind of work.
        """
        self._clocks[teller] = clock
        now = time.monotonic()
        if self._looked_s is not None and now - self._looked_s < self.look_s:
            return []
        self._looked_s = now
        entries = sum_of(self._clocks).entries
        closed = [key for key, durations in entries.items() if self._closes(key, durations)]
        touched = {k: None for key in closed for k in (key, *_peers(key, self._windows))}
        return [(key[0], line) for key in touched if (line := self._complaint(key)) is not None]

    def rows(self) -> list[Pace]:
        """Return the pace of every member and kind, role by role. From any thread."""
        entries = sum_of(dict(self._clocks)).entries
        return [self._pace(key, entries) for key in sorted(entries, key=_order)]

    def _closes(self, key: Key, durations: Durations) -> bool:
        """Note how a member began and how its calls go; say whether a run of calls is whole."""
        now, window = time.monotonic(), self._windows.get(key)
        if window is None or durations.calls < window.since.calls:  # its teller began anew
            window = self._windows[key] = Window(Durations(), now)
        if window.beginning is None and now - window.born_s > self.beginning_s:
            window.beginning = durations.since(Durations())
        if durations.calls - window.since.calls < self.window_calls:
            return False
        window.p50_s = durations.since(window.since).quantile_s(0.5)
        window.since = durations.since(Durations())
        return True

    def _complaint(self, key: Key) -> str | None:
        kind = key[1]
        peers = [self._windows[peer].p50_s for peer in _peers(key, self._windows)]
        usual = median(found) if (found := [s for s in peers if s]) else 0.0
        mine = self._windows[key].p50_s
        if key in self._told or not usual or mine <= SLOW * usual:
            return None
        self._told.add(key)
        return (
            f"slow: {kind} takes {mine * 1e3:.3f} ms in the median of {self.window_calls} calls, "
            f"{mine / usual:.1f} times that of its peers ({usual * 1e3:.3f} ms)"
        )

    def _pace(self, key: Key, entries: Mapping[Key, Durations]) -> Pace:
        durations = entries[key]
        p50_s = durations.quantile_s(0.5)
        peers = [entries[peer].quantile_s(0.5) for peer in _peers(key, entries)]
        ratio, against = None, None
        if peers:
            ratio, against = p50_s / max(median(peers), 1e-9), "peers"
        elif (window := self._windows.get(key)) and (beginning := window.beginning) is not None:
            later = durations.since(beginning)
            if later.calls:
                usual = max(beginning.quantile_s(0.5), 1e-9)
                ratio, against = later.quantile_s(0.5) / usual, "beginning"
        mean_s = durations.seconds / max(durations.calls, 1)
        p95_s = durations.quantile_s(0.95)
        return Pace(*key, durations.calls, mean_s, p50_s, p95_s, ratio, against)


def _peers(key: Key, among: Iterable[Key]) -> Iterator[Key]:
    """Yield the other members of the role that do this kind of work."""
    for other in among:
        if other != key and other[1] == key[1] and role_of(other[0]) == role_of(key[0]):
            yield other


def _order(key: Key) -> tuple[str, str, int, str]:
    """Put members that are compared one below the other, by number."""
    role, _, number = key[0].rpartition(":")
    return role, key[1], len(number), number


def table_of(rows: Sequence[Pace]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of members, times in milliseconds."""
    header = ("member", "what", "calls", "mean ms", "median ms", "p95 ms", "ratio", "against")
    found = [
        (
            r.member, r.stage, str(r.calls),
            *(f"{seconds * 1e3:.3f}" for seconds in (r.mean_s, r.p50_s, r.p95_s)),
            "" if r.ratio is None else f"{r.ratio:.2f}{' slow' if r.ratio > SLOW else ''}",
            r.against or "",
        )
        for r in rows
    ]  # fmt: skip
    return header, found
