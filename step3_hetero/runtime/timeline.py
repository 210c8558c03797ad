"""What ran when, and where: the spans of one engine's roles, in one process or many."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from step3_hetero.errors import EdgeMismatch

MOST_SPANS = 200_000
"""Kept; the oldest go first. About 40 MB of a trace file."""

SEND, TAKE = "send", "take"
"""Kinds of spans at the two ends of an edge: cast, pack and send; read, unpack and cast back."""


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work of one instance.

    ``who`` is ``a:0``, ``kind`` a stage's kind, `SEND` or `TAKE`; seconds are of the monotonic
    clock of the machine. ``call`` numbers what crosses an edge: the same at both of its ends.
    """

    who: str
    kind: str
    stage: str
    batch: int
    start_s: float
    end_s: float
    sent_bytes: int = 0
    call: int = 0

    def shifted(self, seconds: float) -> Span:
        """Return the span by a clock that shows ``seconds`` more."""
        start, end = self.start_s + seconds, self.end_s + seconds
        return Span(
            self.who, self.kind, self.stage, self.batch, start, end, self.sent_bytes, self.call
        )


class Timeline:
    """The newest spans, at most ``most`` of them. Safe from several threads.

    ``who`` names the instance whose process this is; in one process for all roles it is empty, and
    a span goes by its role. ``batch`` is the number of the micro-batch that is worked on now.
    """

    def __init__(self, who: str = "", most: int = MOST_SPANS) -> None:
        self.who = who
        self.batch = 0
        self.dropped = 0
        self._most = most
        self._spans: deque[Span] = deque()
        self._lock = threading.Lock()

    def add(
        self,
        kind: str,
        stage: str,
        start_s: float,
        end_s: float,
        sent_bytes: int = 0,
        call: int = 0,
        role: str = "",
    ) -> None:
        """File work of this process on the present micro-batch."""
        who = self.who or role
        self.extend([Span(who, kind, stage, self.batch, start_s, end_s, sent_bytes, call)])

    def extend(self, spans: Iterable[Span]) -> None:
        """File spans, of whomever."""
        with self._lock:
            self._spans.extend(spans)
            while len(self._spans) > self._most:
                self._spans.popleft()
                self.dropped += 1

    def spans(self) -> list[Span]:
        """Return what is kept, in the order of filing."""
        with self._lock:
            return list(self._spans)

    def drain(self) -> list[list[Any]]:
        """Return what is kept as a message holds it, and forget it."""
        with self._lock:
            taken, self._spans = self._spans, deque()
        return [list(astuple(span)) for span in taken]


def spans_of(said: Sequence[Sequence[Any]], shift_s: float = 0.0) -> list[Span]:
    """Return the spans that ``drain`` put into a message, by a clock ``shift_s`` ahead.

    Raises:
        EdgeMismatch: they are nothing of the kind.
    """
    try:
        found = [
            Span(
                str(who), str(kind), str(stage), int(batch), float(start), float(end),
                int(sent), int(call),
            )
            for who, kind, stage, batch, start, end, sent, call in said
        ]  # fmt: skip
        if not all(math.isfinite(span.start_s) and math.isfinite(span.end_s) for span in found):
            raise ValueError("a time that is no number")
    except (ValueError, TypeError, OverflowError) as cause:
        raise EdgeMismatch(f"what ran when is not told in spans: {cause}") from cause
    return [span.shifted(shift_s) for span in found] if shift_s else found
