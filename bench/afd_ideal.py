"""What a decode run apart took, by its clocks and its trace, and what it could have taken at best.

The ideal is the max-plus recurrence of `step3_hetero.placement.simulate` over the seconds that the
stages and both ends of the edges took in the run itself. On one machine a core carries the bytes,
so that sending and taking belong to the work of the instance that does them; what is left of a
round trip is the transit, measured where only one micro-batch is under way and nothing queues.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from step3_hetero.placement.pipeline import (
    LOCAL,
    REMOTE,
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)
from step3_hetero.placement.profile_apart import apart_tokens_per_s
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.timeline import SEND, TAKE, Span, Timeline

LEADING, SERVING = "a", "f"
"""The roles of the bench's config."""

TO, FROM = f"{SEND} to {SERVING}", f"{TAKE} from {SERVING}"
TRIP = "ffn round trip"
BETWEEN = ("embed", "head", "sample")

Sums = dict[tuple[str, str], tuple[float, int]]


def sums_of(executor: Executor) -> Sums:
    """Return (seconds, calls) of each kind of work so far."""
    entries = executor.clock.to_json()
    return {(e["role"], e["stage"]): (e["seconds"], e["calls"]) for e in entries}


@dataclass
class Stretch:
    """A stretch of decoding between two moments."""

    start_s: float
    start: Sums
    end_s: float = 0.0
    done: Sums = field(default_factory=dict)
    tokens: int = 0
    spans: Sequence[Span] = ()

    @classmethod
    def begin(cls, executor: Executor) -> Self:
        """Begin now."""
        return cls(time.monotonic(), sums_of(executor))

    def end(self, executor: Executor, tokens: int, timeline: Timeline) -> Self:
        """End now, ``tokens`` tokens later; the spans of the leading instance are kept."""
        self.end_s, self.tokens = time.monotonic(), tokens
        none = (0.0, 0)
        for key, (seconds, calls) in sums_of(executor).items():
            first_s, first = self.start.get(key, none)
            self.done[key] = (seconds - first_s, calls - first)
        self.spans = [s for s in timeline.spans() if s.who.startswith(LEADING)]
        return self

    @property
    def wall_s(self) -> float:
        """Return how long it took."""
        return self.end_s - self.start_s

    @property
    def tokens_per_s(self) -> float:
        """Return the decoded tokens per second of the whole batch."""
        return self.tokens / self.wall_s

    def seconds(self, role: str, *kinds: str) -> float:
        """Return the seconds of some kinds of work of a role."""
        return sum(self.done.get((role, kind), (0.0, 0))[0] for kind in kinds)

    def each(self, role: str, kind: str) -> float:
        """Return the mean seconds of one call."""
        seconds, calls = self.done.get((role, kind), (0.0, 0))
        return seconds / max(calls, 1)

    @property
    def attention_s(self) -> float:
        """Return the seconds that the leading instance worked."""
        return self.seconds(LEADING, "attention", "ffn", *BETWEEN, TO, FROM)

    @property
    def ffn_s(self) -> float:
        """Return the seconds that the FFN instance worked."""
        return self.seconds(SERVING, "ffn", TAKE, SEND)

    @property
    def transit_s(self) -> float:
        """Return the seconds of a call's round trip in which nobody worked on it, in the mean.

        Of one micro-batch under way; of several, waiting in line is part of it.
        """
        worked = self.each(LEADING, TO) + self.each(LEADING, FROM)
        worked += sum(self.each(SERVING, kind) for kind in ("ffn", TAKE, SEND))
        return max(0.0, self.each(SERVING, TRIP) - worked)

    @property
    def lost_s(self) -> float:
        """Return the wall's seconds in which the leading instance did not work."""
        return self.wall_s - self.attention_s

    @property
    def bubbles_s(self) -> float:
        """Return the gaps between the leading instance's spans in the trace."""
        inside = [
            (max(s.start_s, self.start_s), min(s.end_s, self.end_s))
            for s in sorted(self.spans, key=lambda s: s.start_s)
            if s.end_s > self.start_s and s.start_s < self.end_s
        ]
        covered, reached = 0.0, self.start_s
        for start, end in inside:
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return self.wall_s - covered


def pipeline_of(run: Stretch, microbatches: int, share: int, transit_s: float) -> PredictedPipeline:
    """Return the pipeline whose services take what they took in a run."""
    carried = run.each(LEADING, TO) + run.each(LEADING, FROM)
    near, far = (
        run.each(LEADING, "attention"),
        sum(run.each(SERVING, k) for k in ("ffn", TAKE, SEND)),
    )
    calls = {kind: run.done.get((LEADING, kind), (0.0, 0))[1] for kind in ("attention", "ffn")}
    local = round(calls["ffn"] * _layers(run) / max(calls["attention"], 1))
    runs = [LayerRun(local, "local", LOCAL)] if local else []
    runs.append(LayerRun(_layers(run) - local, "remote", REMOTE))
    seconds = {"local": near + run.each(LEADING, "ffn"), "remote": near + carried}
    group = AttentionGroup(
        LEADING, LEADING, 1, 1, share, seconds, feeds=SERVING, latency_s=transit_s / 2
    )
    served = FfnGroup(SERVING, SERVING, 1, 1, {"remote": far})
    between_s = sum(run.each(LEADING, kind) for kind in BETWEEN)
    return PredictedPipeline(microbatches, 0, tuple(runs), (group,), (served,), between_s)


def _layers(run: Stretch) -> int:
    """Return how many layers a step has: attention runs once in each, the embedding once."""
    attention, embed = (run.done[LEADING, kind][1] for kind in ("attention", "embed"))
    return round(attention / embed)


def ideal_tokens_per_s(run: Stretch, microbatches: int, share: int, transit_s: float) -> float:
    """Return the speed at which nothing but the recurrence's own waiting is lost."""
    return apart_tokens_per_s(pipeline_of(run, microbatches, share, transit_s))


def equal_context(points: Sequence[tuple[int, Stretch]]) -> float:
    """Return where the work of attention, linear in context, meets that of the FFN, which is not.

    Shapes: (context, run) of two contexts.
    """
    contexts = [context for context, _ in points]
    steps = [run.done[LEADING, "embed"][1] for _, run in points]
    near = [run.attention_s / n for (_, run), n in zip(points, steps, strict=True)]
    far = float(np.mean([run.ffn_s / n for (_, run), n in zip(points, steps, strict=True)]))
    slope = (near[1] - near[0]) / (contexts[1] - contexts[0])
    return contexts[0] + (far - near[0]) / slope if slope > 0 else float(contexts[0])
