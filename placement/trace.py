"""The services of a simulated run as slices, and as a Chrome/Perfetto trace.

Open the file at https://ui.perfetto.dev: one process a role and group, one thread an instance (a
set, a link), a slice for each micro-batch in each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.simulate_recurrence import A2F, ATTENTION, F2A, FFN
from step3_hetero.placement.simulate_routes import Bools, Floats, Ints, by_group, usual_sets

MOST_EVENTS = 100_000
"""About 15 MB of JSON, which Perfetto opens in a second or two."""
MOST_INSTANCES = 16
"""Attention instances shown, the first of each group alike."""
TITLES = {ATTENTION: "attention", A2F: "A2F", FFN: "FFN", F2A: "F2A"}
ORDER = ("attention", "A2F", "FFN", "F2A")
FULL_S = 1e-12
"""A slice shorter than a picosecond is nothing."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One service: what, whose, of which token, layer and micro-batch; seconds."""

    what: str
    unit: int
    """Number of the attention instance, or of the set for "ffn"."""
    token: int
    layer: int
    micro_batch: int
    start_s: float
    end_s: float


class SliceRecorder:
    """Keeps the slices of the first instances of each group, and of their sets, from the start on.

    It keeps whole tokens, as many as fit into ``most_events``, at least one.
    """

    def __init__(
        self,
        pipeline: PredictedPipeline,
        tokens: int,
        *,
        most_events: int = MOST_EVENTS,
        most_instances: int = MOST_INSTANCES,
    ) -> None:
        self.pipeline, self.run_tokens = pipeline, tokens
        self.chosen = usual_sets(pipeline)
        remote = sum(run.count for run in pipeline.layers if run.ffn == "remote")
        self.each = pipeline.micro_batches * (pipeline.layer_count + 3 * remote)
        fit = max(1, min(most_instances, most_events // self.each))
        self.instances = _first_of_each(pipeline, fit)
        self.sets = np.unique(self.chosen[:, self.instances])
        self.tokens = min(tokens, max(1, most_events // (self.each * len(self.instances))))
        self._kept: list[tuple[int, str, int, int, Ints, Floats, Floats]] = []
        self._number, self._active = 0, np.ones(pipeline.attention_instances, bool)

    @property
    def said(self) -> str:
        """Return one sentence: what of the run is kept."""
        whole = len(self.instances) == self.pipeline.attention_instances
        if whole and self.tokens == self.run_tokens:
            return f"all {self.run_tokens} tokens of all attention instances"
        numbers = ", ".join(map(str, self.instances))
        return (
            f"the first {self.tokens} of {self.run_tokens} tokens of attention instances {numbers} "
            f"of {self.pipeline.attention_instances}, and their FFN sets"
        )

    def token(self, number: int, active: Bools) -> None:
        """Start a token."""
        self._number, self._active = number, active

    def undo(self, stalled: Bools) -> None:
        """Forget this token of some instances, and of the sets that wait with them."""
        sets = np.unique(self.chosen[:, stalled])
        instances = np.flatnonzero(stalled)
        kept = []
        for entry in self._kept:
            number, what, layer, j, units, start, end = entry
            if number == self._number:
                stay = ~np.isin(units, sets if what == FFN else instances)
                entry = (number, what, layer, j, units[stay], start[stay], end[stay])
            kept.append(entry)
        self._kept = kept

    def __call__(
        self, what: str, layer: int, micro_batch: int, who: Ints | None, start: Floats, end: Floats
    ) -> None:
        """Take one service of all instances, of sets, or of passes by instance."""
        if self._number >= self.tokens:
            return
        if who is None:
            units = self.instances[self._active[self.instances]]
            at = units
        else:
            at = np.flatnonzero(np.isin(who, self.sets))
            units = who[at]
        self._kept.append(
            (self._number, what, layer, micro_batch, units, start[at].copy(), end[at].copy())
        )

    def slices(self) -> Iterator[Slice]:
        """Yield what was kept, services that take no time left out."""
        for number, what, layer, j, units, starts, ends in self._kept:
            for unit, start, end in zip(units, starts, ends, strict=True):
                if end - start > FULL_S:
                    yield Slice(what, int(unit), number, layer, j, float(start), float(end))


def _first_of_each(pipeline: PredictedPipeline, most: int) -> Ints:
    """Return the first instances of each group, alike many, at most ``most`` but one a group."""
    group = by_group([g.instances for g in pipeline.attention])
    starts = np.searchsorted(group, np.arange(len(pipeline.attention)))
    place = np.arange(len(group)) - starts[group]
    share = max(1, most // len(pipeline.attention))
    found: Ints = np.flatnonzero(place < share)
    return found


def lane(pipeline: PredictedPipeline, what: str, unit: int) -> tuple[str, str]:
    """Return role with group, and the name of one instance in it: "FFN ascend-910b", "set 0"."""
    groups: Any = pipeline.ffn if what == FFN else pipeline.attention
    group = by_group([g.instances for g in groups])[unit]
    number = unit - sum(g.instances for g in groups[:group])
    kind = "set" if what == FFN else "link" if what in (A2F, F2A) else "instance"
    return f"{TITLES[what]} {groups[group].name}", f"{kind} {number}"


def chrome_trace(recorder: SliceRecorder) -> dict[str, Any]:
    """Return the trace-event format: complete events in microseconds, and names of the lanes."""
    pipeline = recorder.pipeline
    threads: dict[tuple[str, int], tuple[int, int]] = {}
    processes: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for s in recorder.slices():
        key = (TITLES[s.what], s.unit)
        if key not in threads:
            process, thread = lane(pipeline, s.what, s.unit)
            pid = processes.setdefault(process, len(processes) + 1)
            threads[key] = (pid, s.unit)
            events += _names(pid, process, s.unit, thread)
        events.append(_event(s, *threads[key]))
    return {
        "displayTimeUnit": "ms",
        "otherData": {"shows": recorder.said},
        "traceEvents": events,
    }


def _names(pid: int, process: str, tid: int, thread: str) -> list[dict[str, Any]]:
    order = ORDER.index(process.split(" ")[0])
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": order}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}},
    ]


def _event(s: Slice, pid: int, tid: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"micro-batch {s.micro_batch}",
        "cat": TITLES[s.what],
        "pid": pid,
        "tid": tid,
        "ts": s.start_s * 1e6,
        "dur": (s.end_s - s.start_s) * 1e6,
        "args": {"token": s.token, "layer": s.layer},
    }
