"""Checks that run a case in another way: composed, padded, a second time, one part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from step3_hetero.backend import Array
from step3_hetero.conformance.alone import Piece, assembled, pieces
from step3_hetero.conformance.case import Inputs, seeded
from step3_hetero.conformance.exam import Exam
from step3_hetero.conformance.stages import PlacedStage, StageCase, padded
from step3_hetero.conformance.tolerance import same_bits
from step3_hetero.conformance.trial import Results, cache_content, host_results
from step3_hetero.conformance.verdicts import held

SMALLER = "as a second, smaller batch"


def check_composition(exam: Exam) -> Iterator[str]:
    """The stage composed of the device's own kernels keeps the same bound as the one it builds."""
    trial = exam.trial
    if not isinstance(trial, StageCase):
        return
    placed = trial.place(exam.device, exam.inputs, trial.dtype, fused=False)
    composed = exam.results("composed", placed.run)
    yield from held(exam, composed, "composed of the device's kernels")
    for name, got in exam.got.items():
        keep = exam.counted(name, len(exam.expected.own[name]))
        other = composed.get(name, got)
        are_integers = got.dtype.kind in "iub" and got.shape == other.shape
        if are_integers and not np.array_equal(got[keep], other[keep]):
            yield f"{name}: fused and composed stage differ"


def check_padding(exam: Exam) -> Iterator[str]:
    """Rows behind the batch change neither the rows before them nor the cache."""
    trial = exam.trial
    if not isinstance(trial, StageCase) or exam.inputs.meta is None:
        return
    longer = padded(exam.inputs, seeded(f"{trial.id} padded"))
    placed = trial.place(exam.device, longer, trial.dtype)
    results = exam.results("with padding", placed.run)
    cut = {n: x[: len(exam.expected.own[n])] for n, x in results.items() if n in exam.expected.own}
    yield from held(exam, cut, "with padding")
    for name, after in cache_content(placed.cache).items():
        own = exam.cache_after[name]
        touched = (after != own).any(axis=(2, 3)) & ~exam.inputs.meta.named_slots(len(own))
        if touched.any():
            yield f"cache {name}: padded rows wrote {int(touched.sum())} rows"


def check_reuse(exam: Exam) -> Iterator[str]:
    """A stage that has run another batch gives for the first one what it gave before.

    The other batch is a part of the first, in buffers of the caller, and keeps the bound itself;
    where the first has one part only, it is the first with padding.
    """
    trial = exam.trial
    if not isinstance(trial, StageCase):
        return
    placed = trial.place(exam.device, exam.inputs, trial.dtype)
    exam.ran("before a smaller batch", placed.run)
    parts = list(pieces(trial, exam.inputs))
    if len(parts) > 1:
        piece = parts[len(parts) // 2]
        part = _into_buffers(exam, placed, piece)
        yield from held(exam, assembled(exam.got, [(piece, part)]), SMALLER)
    elif exam.inputs.meta is not None:
        placed.turn(padded(exam.inputs, seeded(f"{trial.id} reused")))
        exam.ran("as a second, padded batch", placed.run)
    placed.turn(exam.inputs)
    for name, again in exam.results("after a smaller batch", placed.run).items():
        if name in exam.got and not same_bits(again, exam.got[name]):
            yield f"{name}: other bits once the stage has run another batch"


def _into_buffers(exam: Exam, placed: PlacedStage, piece: Piece) -> Results:
    """Run a piece on stages that have run before, results into buffers of the right size."""
    placed.turn(piece.inputs)
    own = exam.expected.own
    host = {n: np.zeros_like(x[piece.rows(len(x))]) for n, x in own.items()}
    buffers: Mapping[str, Array] = {n: exam.device.from_host(x) for n, x in host.items()}
    exam.ran(SMALLER, lambda: placed.run(buffers))
    return host_results(exam.device, buffers)


def check_batch_invariance(exam: Exam) -> Iterator[str]:
    """A sequence (an image, a row) alone gives what it gives among others.

    A stage to the bit where the device claims it, with ``batch_invariant`` in the stage's spec;
    within the bound elsewhere.
    """
    trial = exam.trial
    if not isinstance(trial, StageCase):
        parts = [(p, exam.call("a row alone", p.inputs)) for p in pieces(trial, exam.inputs)]
        if parts:
            yield from held(exam, assembled(exam.got, parts), "alone")
        return
    claimed = exam.device.info.batch_invariant
    whole = _run(exam, exam.inputs, "batch-invariant", claimed) if claimed else exam.got
    parts = [
        (p, _run(exam, p.inputs, "one at a time", claimed)) for p in pieces(trial, exam.inputs)
    ]
    joined = assembled(whole, parts)
    if claimed:
        for name, got in joined.items():
            if not same_bits(got, whole[name]):
                yield f"{name}: alone it has other bits than among others"
        yield from held(exam, whole, "batch-invariant")
    else:
        yield from held(exam, joined, "one at a time")


def _run(exam: Exam, inputs: Inputs, how: str, batch_invariant: bool) -> Results:
    trial = exam.trial
    assert isinstance(trial, StageCase)
    placed = trial.place(exam.device, inputs, trial.dtype, batch_invariant=batch_invariant)
    return exam.results(how, placed.run)
