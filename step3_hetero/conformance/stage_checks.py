"""Checks that only whole stages have: fused against composed, padding, the rest of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from step3_hetero.conformance.case import Inputs, seeded
from step3_hetero.conformance.exam import Exam
from step3_hetero.conformance.stages import StageCase, padded
from step3_hetero.conformance.tolerance import same_bits
from step3_hetero.conformance.trial import Results, cache_content, host_results
from step3_hetero.specs import HostArray


def check_composition(exam: Exam) -> Iterator[str]:
    """The stage composed of the device's own kernels keeps the same bound as the one it builds."""
    trial = exam.trial
    if not isinstance(trial, StageCase):
        return
    placed = trial.place(exam.device, exam.inputs, trial.dtype, fused=False)
    composed = host_results(exam.device, placed.run())
    yield from _beyond(exam, composed, "composed of the device's kernels")
    for name, got in exam.got.items():
        keep = exam.counted(name, len(exam.expected.own[name]))
        if got.dtype.kind in "iub" and not np.array_equal(got[keep], composed[name][keep]):
            yield f"{name}: fused and composed stage differ"


def check_padding(exam: Exam) -> Iterator[str]:
    """Rows behind the batch change neither the rows before them nor the cache."""
    trial = exam.trial
    if not isinstance(trial, StageCase) or exam.inputs.meta is None:
        return
    longer = padded(exam.inputs, seeded(f"{trial.id} padded"))
    placed = trial.place(exam.device, longer, trial.dtype)
    results = host_results(exam.device, placed.run())
    cut = {n: x[: len(exam.expected.own[n])] for n, x in results.items()}
    yield from _beyond(exam, cut, "with padding")
    for name, after in cache_content(placed.cache).items():
        own = exam.cache_after[name]
        touched = (after != own).any(axis=(2, 3)) & ~_slots(exam, own)
        if touched.any():
            yield f"cache {name}: padded rows wrote {int(touched.sum())} rows"


def check_batch_invariance(exam: Exam) -> Iterator[str]:
    """A sequence (an image, a wanted row) alone gives what it gives among others.

    To the bit where the device claims it, with ``batch_invariant`` in the stage's spec; within the
    bound elsewhere.
    """
    trial = exam.trial
    if not isinstance(trial, StageCase) or trial.kind == "embed":
        return
    claimed = exam.device.info.batch_invariant
    whole = _run(exam, exam.inputs, claimed) if claimed else exam.got
    alone = [_run(exam, one, claimed) for one in _alone(exam.inputs, trial.kind)]
    joined = {n: np.concatenate([a[n] for a in alone]) for n in whole} if alone else {}
    if claimed:
        for name, got in joined.items():
            if not same_bits(got, whole[name]):
                yield f"{name}: alone it has other bits than among others"
        yield from _beyond(exam, whole, "batch-invariant")
    elif joined:
        yield from _beyond(exam, joined, "one at a time")


def _run(exam: Exam, inputs: Inputs, batch_invariant: bool) -> Results:
    trial = exam.trial
    assert isinstance(trial, StageCase)
    placed = trial.place(exam.device, inputs, trial.dtype, batch_invariant=batch_invariant)
    return host_results(exam.device, placed.run())


def _alone(inputs: Inputs, kind: str) -> Iterator[Inputs]:
    """Yield each sequence, each image of a vision stage or each wanted row of a head, by itself."""
    if kind in ("vision", "head"):
        split = "pixels" if kind == "vision" else "rows"
        for place in range(len(inputs.arrays[split])):
            one = inputs.arrays[split][place : place + 1]
            yield replace(inputs, arrays={**inputs.arrays, split: one})
        return
    meta = inputs.meta
    assert meta is not None
    for s in range(meta.seqs):
        start, stop = int(meta.query_starts[s]), int(meta.query_starts[s + 1])
        rows = slice(start, stop)
        one_meta = type(meta)(
            meta.positions[rows],
            meta.slots[rows],
            np.array([0, stop - start], np.int32),
            meta.context_lens[s : s + 1],
            meta.block_tables[s : s + 1],
        )
        arrays = {name: x[rows] for name, x in inputs.arrays.items()}
        yield Inputs(arrays, inputs.weights, inputs.history, one_meta)


def _slots(exam: Exam, cache: HostArray) -> HostArray:
    meta = exam.inputs.meta
    assert meta is not None
    named = np.zeros(cache.shape[:2], bool)
    named.reshape(-1)[meta.slots[meta.slots >= 0]] = True
    return named


def _beyond(exam: Exam, results: Results, how: str) -> Iterator[str]:
    for name, judged in exam.judged(results).items():
        bad = judged.row_error > judged.row_bound
        if bad.any():
            yield f"{name} {how}: {int(bad.sum())} of {bad.size} rows beyond their bound"
    e = exam.expected
    for name, own in e.own.items():
        keep = exam.counted(name, len(own))
        if own.dtype.kind in "iub" and not np.array_equal(results[name][keep], own[keep]):
            yield f"{name} {how}: integers differ"
