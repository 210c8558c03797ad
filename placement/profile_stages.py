"""Measuring the stages of a model as an engine runs them: one after another, on all their devices.

A stage alone in a loop is faster than in its place: it finds its weights in a cache, and when two
backends of one placement share a machine's cores their threads wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from step3_hetero.backend import Array
from step3_hetero.graph import GraphStage
from step3_hetero.placement.profile_file import Profile
from step3_hetero.placement.profile_measure import (
    SEED,
    SMALL,
    STAGE_ROWS,
    Bench,
    decode_meta,
    measure_choosing,
    measure_crossing,
)
from step3_hetero.runtime.loader import open_cache, stage_weights
from step3_hetero.specs import (
    LOGICAL_BLOCK,
    AttentionSpec,
    Cut,
    FfnSpec,
    HeadSpec,
    HostTensor,
    Limits,
)

STAGE_CONTEXTS = (32, 128, 512, 2048)

ALIKE = 4
"""Stages of one kind that are built on a device, each with weights of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A device to be measured, and how it holds the matrices of the stages that run on it."""

    bench: Bench
    weight_format: str = "auto"


class RandomSource:
    """Weights of the right shapes: what a stage costs does not depend on their values."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._draw = np.random.default_rng(SEED)

    def tensor(self, name: str, cuts: Sequence[Cut] = ()) -> HostTensor:
        """Return one weight, small so that nothing overflows."""
        values = self._draw.standard_normal(self._shapes[name], np.float32) * np.float32(0.02)
        return HostTensor(name, values).cut(cuts)


def stage_key(stage: GraphStage) -> str:
    """Return what makes two stages cost the same: kind and sizes."""
    return f"{stage.spec!r}"


def measure_stages(
    stages: Sequence[GraphStage],
    seat_of: Mapping[str, Seat],
    longest: int,
    rows: Sequence[int] = STAGE_ROWS,
) -> dict[Seat, list[dict[str, Any]]]:
    """Measure each kind of stage at several batches and, for attention, contexts.

    ``seat_of`` says where each of ``stages``, in the order in which they run, is measured; those
    that are not in it are left out. The stages of a kind, up to `ALIKE` of them on a device, take
    turns with all others.
    """
    alike: dict[tuple[Seat, str], list[GraphStage]] = {}
    for stage in stages:
        if stage.kind != "vision" and stage.name in seat_of:
            alike.setdefault((seat_of[stage.name], stage_key(stage)), []).append(stage)
    kept = {s.name for group in alike.values() for s in group[:ALIKE]}
    turns = [s for s in stages if s.name in kept]
    runners = [_Runner(seat_of[s.name], s, longest, max(rows)) for s in turns]
    contexts = [c for c in STAGE_CONTEXTS if c < longest] + [longest]
    found: dict[Seat, list[dict[str, Any]]] = {seat: [] for seat in seat_of.values()}
    for count in rows:
        for context in contexts:
            times = _in_turn(runners, count, context)
            for (seat, key), (first, *_) in alike.items():
                if context != contexts[0] and first.kind != "attention":
                    continue
                mine = [
                    time for time, s in zip(times, turns, strict=True)
                    if (seat_of[s.name], stage_key(s)) == (seat, key)
                ]  # fmt: skip
                found[seat].append(
                    {
                        "kind": first.kind, "key": key, "rows": count, "context": context,
                        "seconds": sum(mine) / len(mine),
                    }
                )  # fmt: skip
    return found


def _in_turn(runners: Sequence[_Runner], rows: int, context: int) -> list[float]:
    clock = runners[0].bench.clock
    return clock.in_turn([run.action(rows, context) for run in runners])


class _Runner:
    """One stage, built as the engine builds it, with random weights."""

    def __init__(self, seat: Seat, stage: GraphStage, longest: int, rows: int) -> None:
        shapes = {t: p.shapes[k] for p in stage.params for k, t in p.tensors.items()}
        self.bench, self.node = seat.bench, stage
        bench, blocks = seat.bench, -(-longest // LOGICAL_BLOCK)
        weights = stage_weights(bench.device, stage, RandomSource(shapes), seat.weight_format)
        cache = open_cache(bench.device, stage, blocks * rows)
        limits = Limits(tokens=rows, seqs=rows, blocks_per_seq=blocks)
        self.stage = bench.device.build(stage.spec, weights, cache, limits)

    def action(self, rows: int, context: int) -> Callable[[], None]:
        """Return one run on ``rows`` sequences of ``context`` tokens."""
        meta = decode_meta(rows, context)
        fixed = {t.name: self._input(t.name, rows) for t in self.node.takes if t.name != "x"}
        if self.node.kind == "head":
            fixed["rows"] = self.bench.device.from_host(np.arange(rows, dtype=np.int32))
        if self.node.kind == "embed":
            ids = np.arange(rows, dtype=np.int32)
            fixed = {"token_ids": self.bench.device.from_host(ids)}
        hidden = getattr(self.node.spec, "hidden", SMALL)
        needs_x = any(t.name == "x" for t in self.node.takes)
        x = self.bench.array(rows, hidden)

        def run() -> None:
            self.stage.plan(meta)
            self.stage.run({**fixed, **({"x": x} if needs_x else {})})

        return run

    def _input(self, name: str, rows: int) -> Array:
        spec = self.node.spec
        if name == "ids" and isinstance(spec, FfnSpec):
            draw = np.random.default_rng(SEED)
            ids = [draw.permutation(spec.experts)[: spec.top_k] for _ in range(rows)]
            return self.bench.device.from_host(np.array(ids, np.int32))
        if name == "weights" and isinstance(spec, FfnSpec):
            return self.bench.array(rows, spec.top_k)
        return self.bench.array(rows, getattr(spec, "hidden", SMALL))


def with_stages(
    profile: Profile,
    seat: Seat,
    stages: Sequence[GraphStage],
    measured: Sequence[Mapping[str, Any]],
    rows: Sequence[int] = STAGE_ROWS,
) -> Profile:
    """Return a profile of a device that also knows the stages of a model.

    ``measured`` is what `measure_stages` found on the device; copies and the choice of tokens are
    measured here.
    """
    attention = [s.spec for s in stages if isinstance(s.spec, AttentionSpec)]
    heads = [s.spec for s in stages if isinstance(s.spec, HeadSpec)]
    hidden = attention[0].hidden if attention else getattr(stages[0].spec, "hidden", SMALL)
    return replace(
        profile,
        stages=measured,
        choose=measure_choosing(seat.bench, heads[0].vocab, rows) if heads else [],
        crossing=measure_crossing(seat.bench, hidden, rows),
    )
