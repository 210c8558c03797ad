"""What the engine hands to an executor, and what it gets back. Host arrays throughout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from step3_hetero.backend import BatchMeta, Int32

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ImagePart:
    """The rows of one image that this micro-batch merges into its tokens.

    ``pixels`` (views of one size each, (n, size, size, channels)) come with the image's first part;
    the executor keeps the rows under ``key`` until told to forget them. Feature rows start..stop
    replace batch rows ``index``.
    """

    key: int
    start: int
    stop: int
    index: Int32
    pixels: tuple[Float32, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How to choose a token from each wanted row. Arrays are (rows,)."""

    temperature: npt.NDArray[np.float64]
    top_k: Int32
    top_p: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.float64]
    banned: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Tokens of several sequences that run together.

    ``rows`` are the batch rows whose logits are wanted, ``logprobs`` how many alternatives to
    report for each of them (None: no log-probabilities).
    """

    token_ids: Int32
    meta: BatchMeta
    rows: Int32
    choice: Choice
    logprobs: Sequence[int | None]
    images: tuple[ImagePart, ...] = ()
    want_logits: bool = False


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """The log-probability of the chosen token and of the most probable ones, (id, value)."""

    chosen: float
    top: tuple[tuple[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"logprob": self.chosen, "top": [{"id": i, "logprob": v} for i, v in self.top]}


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """One entry for each wanted row."""

    ids: Int32
    logprobs: Sequence[RowLogprobs | None]
    logits: npt.NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """The name of a submitted micro-batch."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Landed:
    """A micro-batch that has come back. ``result`` None: its instance died, and its KV cache too:
    every sequence there has to be computed again from its tokens."""

    ticket: Ticket
    result: BatchResult | None


def row_logprobs(logits: npt.NDArray[Any], chosen: int, top: int) -> RowLogprobs:
    """Return the log-probabilities of one row's chosen token and of its ``top`` best.

    Shapes: logits (vocab,). Sums are in float64.

    >>> row_logprobs(np.log(np.array([0.25, 0.75])), 0, 1).top[0][0]
    1
    """
    wide = logits.astype(np.float64)
    largest = wide.max()
    values = wide - (largest + np.log(np.exp(wide - largest).sum()))
    order = np.argsort(-values, kind="stable")[:top]
    return RowLogprobs(float(values[chosen]), tuple((int(i), float(values[i])) for i in order))
