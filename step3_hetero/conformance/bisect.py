"""Which layer, stage and op first errs by more than rounding explains, on one request.

Each stage of the suspect role is run step by step as the engine runs it, on what the trusted chain
gave its predecessors, with a cache of its own: an error made in one stage reaches no other. What it
gives is held against the reference in float64. The first stage beyond its bound is taken apart.

The reference's own rounding is taken of many steps at once: its rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from step3_hetero.backend import BatchMeta, Device
from step3_hetero.conformance.bisect_ops import guilty, insides, try_ops
from step3_hetero.conformance.bisect_report import (
    BisectReport,
    Divergence,
    RoutingFlip,
    StageFigure,
)
from step3_hetero.conformance.bisect_run import (
    Chains,
    Growth,
    Loaded,
    Recorded,
    Subject,
    chains,
    load_weights,
    stage_in,
    suspect_stage,
)
from step3_hetero.conformance.bisect_stage import (
    HostStage,
    Outcome,
    StageRun,
    compact,
    expect,
    joined_logits,
)
from step3_hetero.conformance.bisect_verdict import Verdict, look_twice
from step3_hetero.conformance.routing import RouteSpy
from step3_hetero.conformance.trial import Results, reference
from step3_hetero.errors import RequestError
from step3_hetero.runtime.blocks import blocks_for
from step3_hetero.runtime.engine import Engine, Progress
from step3_hetero.runtime.loader import open_cache, stage_weights
from step3_hetero.runtime.request import ImageLike, PromptLike, SamplingParams
from step3_hetero.specs import HostArray

WINDOW_ROWS = 64
"""Tokens whose steps are judged together: enough to know the reference's rounding by."""


@dataclass(eq=False)
class _Examined:
    """A suspect's stage, and the same on the reference in its dtype, twice, and on the peer."""

    loaded: Loaded
    order: int
    suspect: HostStage
    blocked: HostStage
    ordered: HostStage
    peer: HostStage | None
    worst: float = 0.0


@dataclass(frozen=True, eq=False)
class _Found:
    """Where a window's first excess of one stage lies."""

    examined: _Examined
    run: Recorded
    row: int
    verdict: Verdict
    output: str


def bisect(
    subject: Subject,
    role: str,
    prompt: PromptLike,
    *,
    images: Sequence[ImageLike] = (),
    max_tokens: int = 64,
    ignore_eos: bool = False,
    trusted: Device | None = None,
    on_load: Progress | None = None,
    on_progress: Progress | None = None,
) -> BisectReport:
    """Run a request and name the first stage and op of ``role`` that err beyond rounding.

    Tokens are chosen by the reference in float64. ``trusted`` is another device to hold the suspect
    against; the bound is the reference's in any case.

    Raises:
        RequestError: there is no such role, or the request cannot be served.
    """
    check_role(subject, role)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    length = len(subject.prompter.build(prompt, images).token_ids) + max_tokens
    blocks = blocks_for(min(length, subject.model.text.max_positions))
    loaded = load_weights(subject, role, on_load)
    with ExitStack() as stack:
        executor, free, rounding = stack.enter_context(chains(subject, loaded, blocks))
        spy = stack.enter_context(RouteSpy(reference("in-order")))
        examiner = Examiner(subject, loaded, blocks, spy, trusted)
        engine = Engine(subject.model, executor, subject.prompter, subject.placement,
                        max_batch=subject.max_batch,
                        prefill_chunk=subject.prefill_chunk)  # fmt: skip
        number = engine.submit(prompt, params, images=images)
        stack.enter_context(np.errstate(all="ignore"))
        tokens, divergence = _follow(engine, number, executor, examiner, max_tokens, on_progress)
        return BisectReport(
            f"{role} ({subject.placement.roles[role].backend.name})",
            trusted.info.name if trusted else "reference",
            subject.stages[0].spec.dtype,
            length - max_tokens,
            tokens,
            executor.recorder.step,
            divergence,
            tuple(examiner.flips),
            _figures(subject, examiner, free, rounding),
        )


def check_role(subject: Subject, role: str) -> None:
    """Refuse a role that there is not.

    Raises:
        RequestError: naming those there are.
    """
    if role not in subject.placement.roles:
        known = ", ".join(subject.placement.roles)
        raise RequestError(f"no role {role!r} to suspect; roles: {known}")


def _follow(
    engine: Engine,
    number: int,
    executor: Chains,
    examiner: Examiner,
    most: int,
    on_progress: Progress | None,
) -> tuple[tuple[int, ...], Divergence | None]:
    """Step the engine to the request's end or to the first divergence; return tokens and that."""
    while True:
        finished = engine.step()
        if on_progress is not None:
            on_progress(min(executor.recorder.step, most), most)
        divergence = None
        if finished or executor.recorder.rows >= WINDOW_ROWS:
            divergence = examiner.judge(executor.recorder.take())
        if finished or divergence is not None:
            done = finished[0] if finished else engine.cancel(number)
            return done.token_ids, divergence


class Examiner:
    """Holds windows of the trusted chain's runs against the suspect, stage by stage."""

    def __init__(
        self,
        subject: Subject,
        loaded: Sequence[Loaded],
        blocks: int,
        spy: RouteSpy,
        trusted: Device | None,
    ) -> None:
        self.subject = subject
        self.flips: list[RoutingFlip] = []
        self._spy = spy
        blocked = reference()
        self.stages = [
            _Examined(
                one,
                order,
                suspect_stage(subject, one, blocks),
                stage_in(blocked, one, one.node.spec.dtype, blocks),
                stage_in(spy.device, one, one.node.spec.dtype, blocks),
                None if trusted is None else _on_peer(subject, one, trusted, blocks),
            )
            for order, one in enumerate(loaded)
            if one.own is not None
        ]

    def judge(self, runs: Mapping[str, list[Recorded]]) -> Divergence | None:
        """Judge one window of every suspect stage; return the first divergence, taken apart."""
        found = [
            one
            for examined in self.stages
            for group in _groups(runs.get(examined.loaded.node.name, []))
            if (one := self._judge(examined, group)) is not None
        ]
        if not found:
            return None
        return self._apart(min(found, key=lambda f: (f.run.step, f.examined.order)))

    def _judge(self, examined: _Examined, group: Sequence[Recorded]) -> _Found | None:
        """Run the suspect on each run, the reference on all at once; hold one against the other."""
        spec = examined.loaded.node.spec
        each = [examined.suspect.outcome(r.meta, r.inputs).results for r in group]
        joined = join(group)
        blocked = examined.blocked.outcome(joined.meta, joined.inputs)
        self._spy.logits.clear()
        ordered = examined.ordered.outcome(joined.meta, joined.inputs).results
        expected = expect(
            spec, joined.exact, blocked, Outcome(ordered, joined_logits(self._spy.logits))
        )
        peer = None
        if examined.peer is not None:
            peer = _rows([examined.peer.outcome(r.meta, r.inputs).results for r in group])
        run = _with_history(examined, joined)
        verdict = look_twice(spec, examined.loaded.reference, run, expected, _rows(each), peer)
        examined.worst = max(examined.worst, verdict.worst)
        self._note_flips(examined, joined, verdict)
        if not verdict.excesses:
            return None
        places = [(*_place(each, e.output, e.first), e.output) for e in verdict.excesses]
        number, row, output = min(places)
        return _Found(examined, group[number], row, verdict, output)

    def _note_flips(self, examined: _Examined, joined: Recorded, verdict: Verdict) -> None:
        layer = examined.loaded.node.layer
        for flip in verdict.flips:
            assert joined.meta is not None
            position = int(joined.meta.positions[flip.row])
            self.flips.append(RoutingFlip(layer, position, flip.margin))

    def _apart(self, found: _Found) -> Divergence:
        """Try the ops of the run that diverged, one at a time."""
        one, node = found.examined, found.examined.loaded.node
        _, device, weight_format = self.subject.devices[node.name]
        kernels, own = insides(
            one.suspect.stage,
            device,
            lambda: stage_weights(device, node, self.subject.source, weight_format),
        )
        run = _with_history(one, found.run)
        excess = min(
            (e for e in found.verdict.excesses if e.output == found.output), key=lambda e: e.first
        )
        ops = try_ops(node.spec, one.loaded.reference, run, kernels, own)
        named = guilty(ops)
        return Divergence(
            node.name,
            node.layer,
            found.run.step,
            _position(found.run, found.row),
            found.output,
            named.op if named else None,
            named.label if named else None,
            excess.error,
            excess.bound,
            excess.said,
            tuple(ops),
        )


def _on_peer(subject: Subject, one: Loaded, device: Device, blocks: int) -> HostStage:
    weight_format = subject.devices[one.node.name][2]
    weights = stage_weights(device, one.node, subject.source, weight_format)
    cache = open_cache(device, one.node, blocks)
    built = device.build(one.node.spec, weights, cache, subject.placement.limits)
    return HostStage(device, built, cache)


def _groups(runs: Sequence[Recorded]) -> Iterator[Sequence[Recorded]]:
    """Yield the runs that are judged together: images alone, steps of the sequence at once."""
    if runs and runs[0].meta is None:
        yield from ([run] for run in runs)
    elif runs:
        yield runs


def join(group: Sequence[Recorded]) -> Recorded:
    """Return consecutive runs over one sequence as one run, row after row."""
    if len(group) == 1:
        return group[0]
    metas = [r.meta for r in group if r.meta is not None]
    starts = np.cumsum([0, *(m.tokens for m in metas)])
    inputs = {}
    for name in dict.fromkeys(n for r in group for n in r.inputs):
        parts = [
            _shifted(name, r.inputs[name], int(start))
            for r, start in zip(group, starts, strict=False)
            if name in r.inputs
        ]
        inputs[name] = np.concatenate(parts)
    last = metas[-1]
    meta = BatchMeta(
        np.concatenate([m.positions for m in metas]),
        np.concatenate([m.slots for m in metas]),
        np.array([0, starts[-1]], np.int32),
        last.context_lens,
        last.block_tables,
    )
    exact = Outcome(
        _rows([r.exact.results for r in group]),
        joined_logits([r.exact.logits for r in group if r.exact.logits is not None]),
    )
    return Recorded(group[0].step, meta, inputs, exact)


def _shifted(name: str, x: HostArray, start: int) -> HostArray:
    """Return an input of a later run; row numbers count from the joined run's first row."""
    if name not in ("rows", "image_index"):
        return x
    return np.where(x >= 0, x + start, x).astype(x.dtype)


def _rows(each: Sequence[Results]) -> Results:
    return {n: np.concatenate([r[n] for r in each]) for n in each[0]}


def _with_history(examined: _Examined, run: Recorded) -> StageRun:
    """Return a run with the blocks that the reference in the stage's dtype has cached by now.

    Later rows of the window are in them, too: no row sees keys behind its own.
    """
    cache = examined.blocked.cache
    if cache is None or run.meta is None:
        return StageRun(run.meta, run.inputs)
    blocks, meta = compact(run.meta)
    return StageRun(meta, run.inputs, cache.read(blocks))


def _place(each: Sequence[Results], output: str, row: int) -> tuple[int, int]:
    """Return which run a joined row is of, and which row of it."""
    for number, results in enumerate(each):
        rows = len(results.get(output, ()))
        if row < rows:
            return number, row
        row -= rows
    return len(each) - 1, 0


def _position(run: Recorded, row: int) -> int | None:
    """Return the position in the sequence of one row of an output."""
    if run.meta is None:
        return None
    rows = run.inputs.get("rows")
    return int(run.meta.positions[row if rows is None else rows[row]])


def _figures(
    subject: Subject, examiner: Examiner, free: Growth, rounding: Growth
) -> tuple[StageFigure, ...]:
    worst = {e.loaded.node.name: e.worst for e in examiner.stages}
    return tuple(
        StageFigure(
            s.name, s.layer, worst.get(s.name), free.relative(s.name), rounding.relative(s.name)
        )
        for s in subject.stages
    )
