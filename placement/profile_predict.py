"""Tokens per second of ``generate`` in one process, predicted from measured profiles.

One decode step is the sum of its stages, each as measured on its role's device at the step's batch
and context, the copies between devices, and the engine's own work around them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from step3_hetero.errors import PlacementError
from step3_hetero.graph import GraphStage
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.image import ImageConfig
from step3_hetero.placement.profile_file import Profile
from step3_hetero.placement.profile_measure import STAGE_ROWS
from step3_hetero.placement.profile_stages import stage_key
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import BatchResult, Landed, MicroBatch, Ticket
from step3_hetero.runtime.placing import Placement
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.runtime.request import Request, SamplingParams

STEPS = 64
RUNS = 5


def tokens_per_s(
    placement: Placement, profiles: Mapping[str, Profile], batch: int, prompt: int, decoded: int
) -> float:
    """Return the decoded tokens per second of ``batch`` sequences side by side.

    ``profiles`` are by backend, measured with this model's config. The context is taken in the
    middle of the answer, where it is on average.

    Raises:
        PlacementError: a backend was not measured, or not on these stages.
    """
    context = prompt + (decoded + 1) // 2
    return batch / step_seconds(placement, profiles, batch, context)


def step_seconds(
    placement: Placement, profiles: Mapping[str, Profile], batch: int, context: int
) -> float:
    """Return the seconds of one decode step."""
    total = 0.0
    for stage in placement.graph.stages:
        if stage.kind == "vision":
            continue
        profile = _profile(placement, profiles, stage.name)
        total += stage_seconds(profile, stage, batch, context)
    for edge in placement.crossing():
        profile = _profile(placement, profiles, edge.source)
        total += at(profile.crossing, batch, 1) * len(edge.tensors)
    head = _profile(placement, profiles, "head")
    return total + at(head.choose, batch, 1) + at(head.step_s, batch, 1)


def stage_seconds(profile: Profile, stage: GraphStage, rows: int, context: int) -> float:
    """Return the seconds of one stage on ``rows`` tokens of sequences of ``context`` tokens.

    Raises:
        PlacementError: the stage was not measured.
    """
    entries = [e for e in profile.stages if e["key"] == stage_key(stage)]
    if not entries:
        raise PlacementError(
            f"the profile of {profile.backend} does not know stage {stage.name}; measure it "
            "with step3-hetero profile --config and the config to be predicted"
        )
    return at(entries, rows, context)


def _profile(placement: Placement, profiles: Mapping[str, Profile], stage: str) -> Profile:
    backend = placement.roles[placement.role_of[stage]].backend.name
    if backend not in profiles:
        known = ", ".join(profiles) or "none"
        raise PlacementError(f"no profile of backend {backend!r}; given: {known}")
    return profiles[backend]


def at(entries: Sequence[Mapping[str, Any]], rows: int, context: int) -> float:
    """Return the seconds at a batch and a context, linear between the measured ones.

    Beyond the measured ones the nearest two are prolonged, never below the nearest.
    """
    if not entries:
        raise PlacementError("the profile has no measured stages; measure it with --config")
    by_rows: dict[int, list[tuple[int, float]]] = {}
    for entry in entries:
        point = (int(entry.get("context", 1)), float(entry["seconds"]))
        by_rows.setdefault(int(entry["rows"]), []).append(point)
    line = [(n, _between(sorted(points), context)) for n, points in sorted(by_rows.items())]
    return _between(line, rows)


def _between(points: Sequence[tuple[int, float]], x: float) -> float:
    xs, ys = (np.array(side, float) for side in zip(*points, strict=True))
    if len(xs) == 1 or x <= xs[0]:
        return float(ys[0])
    if x <= xs[-1]:
        return float(np.interp(x, xs, ys))
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return float(ys[-1] + max(slope, 0.0) * (x - xs[-1]))


class IdleExecutor(Executor):
    """Answers every micro-batch with token 0 at once: what is left is the engine's own time."""

    def __init__(self, placement: Placement) -> None:
        self.limits = placement.limits
        self.kv_blocks = placement.kv_blocks
        self.clock = StageClock()
        self._rows: list[int] = []

    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Note how many tokens are wanted."""
        self._rows.append(len(batch.rows))
        return Ticket(len(self._rows))

    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return as many zeros."""
        rows = self._rows[-1]
        result = BatchResult(np.zeros(rows, np.int32), [None] * rows)
        return Landed(Ticket(len(self._rows)), result)

    def forget_image(self, key: int, instance: int = 0) -> None:
        """Hold no image."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Hold no cache."""

    def close(self) -> None:
        """Hold nothing."""


def measure_engine(
    model: ModelConfig, placement: Placement, rows: Sequence[int] = STAGE_ROWS
) -> list[dict[str, Any]]:
    """Measure the seconds of one decode step without its stages: schedule, assemble, hand out."""
    prompter = Prompter(model, None, ImageConfig())
    found = []
    for count in rows:
        engine = Engine(
            model, IdleExecutor(placement), prompter, placement,
            max_batch=max(rows), prefill_chunk=max(rows),
        )  # fmt: skip
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
        times = []
        for _ in range(RUNS):
            started = time.perf_counter()
            engine.generate_all([Request([1], params)] * count)
            times.append((time.perf_counter() - started) / STEPS)
        found.append({"rows": count, "seconds": median(times)})
    return found
