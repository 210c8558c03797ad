"""Parts of a batch by themselves: a sequence, an image, a row, beside no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.forms import FORMS, OpTrial
from step3_hetero.conformance.stages import StageCase
from step3_hetero.conformance.trial import Results, Trial

COUNTED = {"vision": "pixels", "head": "rows", "embed": "token_ids"}
"""What a kind of stage that knows no sequences has one of for each part of its results."""


@dataclass(frozen=True)
class Piece:
    """Inputs of one part of a batch; ``start`` to ``stop`` of ``total`` are its share of it."""

    inputs: Inputs
    start: int
    stop: int
    total: int

    def rows(self, length: int) -> slice:
        """Return the rows of a result of ``length`` rows that belong to this piece."""
        unit = length // self.total
        return slice(self.start * unit, self.stop * unit)


def pieces(trial: Trial, inputs: Inputs) -> Iterator[Piece]:
    """Yield each part of a stage's batch by itself, or the last row of an op's.

    Nothing for an op whose rows depend on each other, or a batch of one row.
    """
    if isinstance(trial, StageCase):
        yield from _of_stage(trial.kind, inputs)
    elif isinstance(trial, OpTrial):
        yield from _last_row(trial, inputs)


def assembled(got: Results, parts: Sequence[tuple[Piece, Results]]) -> Results:
    """Return ``got`` with the rows of each piece taken from its own run.

    A result that does not fit its place is returned as it is, for its shape to be told.
    """
    whole = {name: x.copy() for name, x in got.items()}
    for name, x in whole.items():
        for piece, results in parts:
            part = results.get(name)
            place = piece.rows(len(x))
            if part is None or part.dtype != x.dtype or part.shape != x[place].shape:
                whole[name] = np.zeros(0) if part is None else part
                break
            x[place] = part
    return whole


def _of_stage(kind: str, inputs: Inputs) -> Iterator[Piece]:
    counted = COUNTED.get(kind)
    if counted is None:
        assert inputs.meta is not None
        for s in range(inputs.meta.seqs):
            yield sequence(inputs, s)
        return
    total = len(inputs.arrays[counted])
    for n in range(total):
        arrays = {**inputs.arrays, counted: inputs.arrays[counted][n : n + 1]}
        if kind == "embed":
            here = inputs.arrays["image_index"] == n
            arrays["image_rows"] = inputs.arrays["image_rows"][here]
            arrays["image_index"] = np.zeros(int(here.sum()), np.int32)
        meta = None if inputs.meta is None else inputs.meta.token(n)
        alone = inputs if kind == "head" else replace(inputs, meta=meta)
        yield Piece(replace(alone, arrays=arrays), n, n + 1, total)


def sequence(inputs: Inputs, number: int) -> Piece:
    """Return one sequence of a batch by itself."""
    meta = inputs.meta
    assert meta is not None
    start, stop = int(meta.query_starts[number]), int(meta.query_starts[number + 1])
    own = slice(number, number + 1)
    alone = BatchMeta(
        meta.positions[start:stop],
        meta.slots[start:stop],
        np.array([0, stop - start], np.int32),
        meta.context_lens[own],
        meta.block_tables[own],
    )
    arrays = {name: x[start:stop] for name, x in inputs.arrays.items()}
    return Piece(replace(inputs, arrays=arrays, meta=alone), start, stop, meta.tokens)


def _last_row(trial: OpTrial, inputs: Inputs) -> Iterator[Piece]:
    cut = FORMS[trial.op].rows
    total = len(inputs.arrays[cut[0]]) if cut else 0
    if total < 2:
        return
    if inputs.meta is not None:
        if inputs.meta.seqs > 1:
            yield sequence(inputs, inputs.meta.seqs - 1)
        return
    last = {name: inputs.arrays[name][-1:] for name in cut}
    yield Piece(replace(inputs, arrays={**inputs.arrays, **last}), total - 1, total, total)
