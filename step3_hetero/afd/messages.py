"""What the processes of one engine say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.errors import EdgeMismatch
from step3_hetero.runtime.microbatch import (
    BatchResult,
    Choice,
    ImagePart,
    MicroBatch,
    RowLogprobs,
)
from step3_hetero.specs import HostArray

Arrays = dict[str, HostArray]
Said = dict[str, Any]

MOST_NUMBER = 1 << 63
"""Beyond it JSON says numbers that no array and no float holds."""


def total_bytes(arrays: Mapping[str, HostArray]) -> int:
    """Return the bytes of all arrays together."""
    return sum(x.nbytes for x in arrays.values())


def number_of(said: Mapping[str, Any], key: str) -> float:
    """Return a number that a message says; 0 if it says nothing of it.

    Raises:
        EdgeMismatch: it is no finite number, or beyond 64 bits.
    """
    value = said.get(key, 0)
    if type(value) not in (int, float) or not -MOST_NUMBER < value < MOST_NUMBER:
        raise EdgeMismatch(f"{key}: {value!r:.80} refused; allowed: a finite number of 64 bits")
    return float(value)


class Kind(IntEnum):
    """The kinds of frames, with who sends them."""

    HELLO = 1
    """Who connects: the edge contract as it reads it."""
    AGREED = 2
    """Who listens: the contract is the same."""
    REFUSED = 3
    """Who listens, before it closes: why not."""
    LOAD = 4
    """The front: load your weights."""
    READY = 5
    """A role: its stages are loaded."""
    BATCH = 6
    """The front to attention: run a micro-batch. Rank 0 to the others: where its tokens stand."""
    RESULT = 7
    """Attention to the front: what came of it."""
    CALL = 8
    """Attention to another role: run one stage (A2F, or pixels). Rank 0 to the others alike."""
    ANSWER = 9
    """Back: the stage's outputs (F2A, or image rows)."""
    FORGET = 10
    """The front: drop an image."""
    COPY = 11
    """The front, and rank 0 to the others: copy KV blocks."""
    PEERS = 12
    """The front: where the instances of the other roles listen now."""
    BEAT = 13
    """Anybody: I am alive."""
    FAILED = 14
    """A role: what it was asked cannot be done; the sentence is for the user."""
    STOP = 15
    """The front: finish what is under way and end."""
    AGAIN = 17
    """A role that answers calls: a frame came damaged; send again what is not answered yet."""
    LOST = 18
    """Attention to the front: an instance of another role is gone, or gives no sign of life."""
    LEAVING = 19
    """A role, to all it knows: send me nothing more; I answer what is under way and end."""
    ECHO = 20
    """Whoever measures the way, to a role without a front, and back: the same bytes again."""
    MEET = 21
    """Rank 0 to the others: form a group."""


def batch_parcel(batch: MicroBatch) -> tuple[Said, Arrays]:
    """Return a micro-batch as facts and arrays."""
    choice = batch.choice
    arrays: Arrays = {
        "token_ids": batch.token_ids,
        **meta_arrays(batch.meta),
        "rows": batch.rows,
        "temperature": choice.temperature,
        "top_k": choice.top_k,
        "top_p": choice.top_p,
        "uniform": choice.uniform,
    }
    images = []
    for number, part in enumerate(batch.images):
        arrays[f"image {number}"] = part.index
        for view, pixels in enumerate(part.pixels or ()):
            arrays[f"pixels {number} {view}"] = pixels
        views = None if part.pixels is None else len(part.pixels)
        images.append([part.key, part.start, part.stop, views])
    said: Said = {
        "banned": choice.banned,
        "logprobs": list(batch.logprobs),
        "want_logits": batch.want_logits,
        "images": images,
    }
    return said, arrays


def batch_of(said: Mapping[str, Any], arrays: Mapping[str, HostArray]) -> MicroBatch:
    """Return the micro-batch that ``batch_parcel`` described.

    Raises:
        EdgeMismatch: something is missing.
    """
    try:
        images = tuple(
            ImagePart(
                int(key),
                int(start),
                int(stop),
                arrays[f"image {n}"],
                None
                if views is None
                else tuple(arrays[f"pixels {n} {view}"] for view in range(views)),
            )
            for n, (key, start, stop, views) in enumerate(said["images"])
        )
        return MicroBatch(
            arrays["token_ids"],
            meta_of(arrays),
            arrays["rows"],
            Choice(
                arrays["temperature"],
                arrays["top_k"],
                arrays["top_p"],
                arrays["uniform"],
                int(said["banned"]),
            ),
            said["logprobs"],
            images,
            bool(said["want_logits"]),
        )
    except (KeyError, ValueError, TypeError) as cause:
        raise EdgeMismatch(f"a micro-batch lacks {cause}") from cause


META = ("positions", "slots", "query_starts", "context_lens", "block_tables")


def meta_arrays(meta: BatchMeta) -> Arrays:
    """Return where the tokens of a micro-batch stand, as arrays."""
    return {name: getattr(meta, name) for name in META}


def meta_of(arrays: Mapping[str, HostArray]) -> BatchMeta:
    """Return what ``meta_arrays`` described.

    Raises:
        KeyError: something is missing.
    """
    return BatchMeta(*(arrays[name] for name in META))


def result_parcel(result: BatchResult) -> tuple[Said, Arrays]:
    """Return a result as facts and arrays."""
    arrays: Arrays = {"ids": result.ids}
    if result.logits is not None:
        arrays["logits"] = result.logits
    said = {"logprobs": [None if r is None else [r.chosen, r.top] for r in result.logprobs]}
    return said, arrays


def result_of(said: Mapping[str, Any], arrays: Mapping[str, HostArray]) -> BatchResult:
    """Return the result that ``result_parcel`` described."""
    try:
        reported = [
            None
            if entry is None
            else RowLogprobs(float(entry[0]), tuple((int(i), float(v)) for i, v in entry[1]))
            for entry in said["logprobs"]
        ]
        return BatchResult(arrays["ids"], reported, arrays.get("logits"))
    except (KeyError, ValueError, TypeError, IndexError) as cause:
        raise EdgeMismatch(f"a result lacks {cause}") from cause


def rows_only(tokens: int) -> BatchMeta:
    """Return the batch that a stage without a cache is planned for: so many rows, no sequences."""
    zeros = np.zeros(tokens, np.int32)
    none = np.zeros(0, np.int32)
    return BatchMeta(zeros, zeros - 1, np.zeros(1, np.int32), none, none.reshape(0, 0))
