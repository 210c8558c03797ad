"""Continuous batching: which tokens of which sequences run next."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.runtime.blocks import blocks_for
from step3_hetero.runtime.draws import uniform
from step3_hetero.runtime.microbatch import Choice, ImagePart, MicroBatch
from step3_hetero.runtime.sequence import SequenceState
from step3_hetero.specs import LOGICAL_BLOCK

Grow = Callable[[SequenceState], bool]
"""Gives a sequence its next block; False: there is none for it now."""

_age = attrgetter("id")


@dataclass(frozen=True, slots=True)
class Share:
    """The next ``count`` tokens of one sequence."""

    sequence: SequenceState
    count: int

    @property
    def completes(self) -> bool:
        """Say whether the last of these tokens is the newest, so that the next can be chosen."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)

    def rows(self, completes: bool) -> int:
        """Return how many rows of logits are wanted of these tokens."""
        return self.count if self.sequence.all_rows else int(completes)


class Scheduler:
    """What runs on one lane, oldest first, and its next step.

    Every running sequence that decodes gets its token in every step; the prompt budget goes to
    prompts in their order of arrival. Neither waits for the other.
    """

    def __init__(self, max_batch: int, prefill_chunk: int) -> None:
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.running: list[SequenceState] = []

    @property
    def is_full(self) -> bool:
        """Say whether another sequence would be one too many."""
        return len(self.running) >= self.max_batch

    def add(self, sequence: SequenceState) -> None:
        """Take a sequence in, in its place by age."""
        insort(self.running, sequence, key=_age)

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out."""
        self.running.remove(sequence)

    def next_shares(self, grow: Grow) -> list[Share]:
        """Return the tokens of the next step.

        ``grow`` is asked for a block for each sequence that has filled its own; it may take others
        out, younger ones. One that gets none sits out this step.
        """
        decoding = []
        for sequence in [s for s in self.running if s.decoding]:
            if sequence.is_full and not (sequence.blocks and grow(sequence)):
                continue  # without blocks it has just been taken out
            decoding.append(Share(sequence, 1))
        if len(decoding) == len(self.running):
            return decoding
        return decoding + self._prompt_shares()

    def _prompt_shares(self) -> list[Share]:
        shares, budget = [], self.prefill_chunk
        for sequence in self.running:
            if budget and not sequence.decoding:
                count = min(budget, len(sequence.tokens) - sequence.computed)
                shares.append(Share(sequence, count))
                budget -= count
        return shares


def assemble(shares: Sequence[Share], banned: int) -> MicroBatch:
    """Lay the shares one after another in a micro-batch."""
    counts = np.array([s.count for s in shares], np.int32)
    starts = np.zeros(len(shares) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    contexts = np.array([s.sequence.computed for s in shares], np.int32) + counts
    positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(
        contexts - starts[1:], counts
    ).astype(np.int32)
    tables = _block_tables(shares, contexts)
    block = tables[np.repeat(np.arange(len(shares)), counts), positions // LOGICAL_BLOCK]
    slots = block * LOGICAL_BLOCK + positions % LOGICAL_BLOCK
    ids = [t for s in shares for t in _tokens(s)]
    wanted = [s for s in shares if s.completes or s.sequence.all_rows]
    rows = np.concatenate([_rows(s, int(b)) for s, b in zip(shares, starts[:-1], strict=True)])
    return MicroBatch(
        token_ids=np.array(ids, np.int32),
        meta=BatchMeta(positions, slots.astype(np.int32), starts, contexts, tables),
        rows=rows.astype(np.int32),
        choice=_choice(wanted, banned),
        logprobs=[s.sequence.params.logprobs for s in wanted for _ in range(s.rows(s.completes))],
        images=tuple(_image_parts(shares, starts)),
        want_logits=any(s.sequence.all_rows for s in wanted),
    )


def _tokens(share: Share) -> list[int]:
    start = share.sequence.computed
    return share.sequence.tokens[start : start + share.count]


def _block_tables(shares: Sequence[Share], contexts: np.ndarray) -> np.ndarray:
    """Return (seqs, blocks) of the blocks in use, rows padded with 0."""
    width = blocks_for(int(contexts.max()))
    tables = np.zeros((len(shares), width), np.int32)
    for row, share in zip(tables, shares, strict=True):
        used = share.sequence.table[:width]
        row[: len(used)] = used
    return tables


def _rows(share: Share, base: int) -> np.ndarray:
    """Return the batch rows whose logits are wanted: all, the last, or none."""
    return np.arange(base + share.count - share.rows(share.completes), base + share.count)


def _choice(wanted: Sequence[Share], banned: int) -> Choice:
    each = [s.sequence for s in wanted for _ in range(s.rows(s.completes))]
    return Choice(
        temperature=np.array([s.params.temperature for s in each], np.float64),
        top_k=np.array([s.params.top_k for s in each], np.int32),
        top_p=np.array([s.params.top_p for s in each], np.float64),
        uniform=np.array([_draw(s) for s in each], np.float64),
        banned=banned,
    )


def _draw(sequence: SequenceState) -> float:
    if sequence.params.temperature == 0 or sequence.all_rows:
        return 0.0
    return uniform(sequence.params.seed, 0, len(sequence.tokens))


def _image_parts(shares: Sequence[Share], starts: np.ndarray) -> list[ImagePart]:
    parts: list[ImagePart] = []
    for share, base in zip(shares, starts[:-1], strict=True):
        if share.sequence.prompt.images and share.sequence.computed < share.sequence.prompt_tokens:
            first = share.sequence.computed
            parts += share.sequence.image_parts(first, first + share.count, int(base))
    return parts
