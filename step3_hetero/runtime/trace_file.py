"""Spans as a Chrome/Perfetto trace: one process a role, one row an instance.

Open the file at https://ui.perfetto.dev. Micro-batches that are under way side by side have
letters, and each letter a colour; an arrow leads from where something is sent to where it is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from step3_hetero.runtime.timeline import SEND, TAKE, Span

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = ("thread_state_running", "thread_state_iowait", "rail_response", "rail_animation")
"""Names of the trace viewer in Chrome; Perfetto chooses by a slice's name."""


def chrome_trace(spans: Sequence[Span], dropped: int = 0) -> dict[str, Any]:
    """Return the trace-event format: complete events and flows in microseconds, named rows."""
    kept = "all spans" if not dropped else f"the newest {len(spans)} spans; {dropped} older dropped"
    origin = min((s.start_s for s in spans), default=0.0)
    letters = lane_letters(spans)
    rows = {who: n for n, who in enumerate(sorted({s.who for s in spans}), 1)}
    roles = {role: n for n, role in enumerate(sorted({_role(who) for who in rows}), 1)}
    events = [*_names(rows, roles)]
    for span in spans:
        place = {"pid": roles[_role(span.who)], "tid": rows[span.who]}
        events.append(_slice(span, letters[span.batch], origin) | place)
        if span.call and span.kind in (SEND, TAKE):
            events.append(_arrow_end(span, origin) | place)
    return {"displayTimeUnit": "ms", "otherData": {"shows": kept}, "traceEvents": events}


def lane_letters(spans: Iterable[Span]) -> dict[int, str]:
    """Return a letter for each micro-batch: no two that are under way at a time share one."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for span in spans:
        first[span.batch] = min(first.get(span.batch, span.start_s), span.start_s)
        last[span.batch] = max(last.get(span.batch, span.end_s), span.end_s)
    free_at = [float("-inf")] * len(LETTERS)
    letters = {}
    for batch in sorted(first, key=lambda b: first[b]):
        lane = next((n for n, t in enumerate(free_at) if t <= first[batch]), len(LETTERS) - 1)
        free_at[lane] = last[batch]
        letters[batch] = LETTERS[lane]
    return letters


@dataclass(frozen=True, slots=True)
class Bubbles:
    """How one instance spent a window: working on spans, or not. Seconds."""

    who: str
    window_s: float
    busy_s: float

    @property
    def idle_s(self) -> float:
        """Return the seconds between spans."""
        return self.window_s - self.busy_s


def bubbles(spans: Sequence[Span]) -> list[Bubbles]:
    """Return for each instance what its spans leave free between the first and the last of all."""
    if not spans:
        return []
    start, end = min(s.start_s for s in spans), max(s.end_s for s in spans)
    return [
        Bubbles(who, end - start, covered_s((s.start_s, s.end_s) for s in spans if s.who == who))
        for who in sorted({s.who for s in spans})
    ]


def covered_s(pieces: Iterable[tuple[float, float]]) -> float:
    """Return the seconds that pieces of time cover; what two cover counts once.

    >>> covered_s([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    total, until = 0.0, float("-inf")
    for start, end in sorted(pieces):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _role(who: str) -> str:
    return who.rpartition(":")[0] or who


def _names(rows: dict[str, int], roles: dict[str, int]) -> Iterator[dict[str, Any]]:
    for role, pid in roles.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"role {role}"}}
    for who, tid in rows.items():
        pid = roles[_role(who)]
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": who}}


def _slice(span: Span, letter: str, origin: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{letter} {span.kind}",
        "cat": span.kind,
        "cname": COLOURS[LETTERS.index(letter) % len(COLOURS)],
        "ts": (span.start_s - origin) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "args": {"stage": span.stage, "micro-batch": span.batch, "bytes": span.sent_bytes},
    }


def _arrow_end(span: Span, origin: float) -> dict[str, Any]:
    """Return one end of an arrow, bound to the slice around it."""
    leaves = span.kind == SEND
    at = span.start_s if leaves else span.end_s
    arrow = {"ph": "s"} if leaves else {"ph": "f", "bp": "e"}
    return arrow | {"name": "edge", "cat": "edge", "id": span.call, "ts": (at - origin) * 1e6}
