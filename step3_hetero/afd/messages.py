"""What the processes of one engine say to each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
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


MOST_EPOCH = (1 << 32) - 1
"""A frame's epoch has 32 bits."""


def next_number(number: int) -> int:
    """Return the epoch of what follows message ``number`` of a front: from 1, and again from 1."""
    return number % MOST_EPOCH + 1


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


def whole_of(said: Mapping[str, Any], key: str, most: int = MOST_NUMBER - 1) -> int:
    """Return a whole number that a message has to say.

    Raises:
        EdgeMismatch: it says none from 0 to ``most``.
    """
    value = said.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise EdgeMismatch(f"{key}: {value!r:.80} refused; allowed: a whole number to {most}")
    return value


def pairs_of(said: Mapping[str, Any], blocks: int) -> list[tuple[int, int]]:
    """Return the (source, target) of `Kind.COPY`, numbers of KV blocks under ``blocks``.

    Raises:
        EdgeMismatch: it says none.
    """
    pairs = said.get("pairs")
    listed: list[Any] = pairs if isinstance(pairs, list) else [pairs]
    for pair in listed:
        numbers = pair if isinstance(pair, list) else [pair]
        if len(numbers) != 2 or not all(type(n) is int and 0 <= n < blocks for n in numbers):
            raise EdgeMismatch(f"pairs: {pair!r:.80} refused; allowed: two blocks of {blocks}")
    return [(source, target) for source, target in listed]


def peers_of(said: Mapping[str, Any], roles: Collection[str]) -> dict[str, dict[int, str]]:
    """Return where the instances of other roles listen, as `Kind.PEERS` says, by number.

    Raises:
        EdgeMismatch: it is of another role, or no address.
    """
    found: dict[str, dict[int, str]] = {}
    peers = said.get("peers")
    if not isinstance(peers, dict):
        raise EdgeMismatch(f"peers: {peers!r:.80} refused; allowed: addresses by role and number")
    for role, addresses in peers.items():
        if role not in roles or not isinstance(addresses, dict):
            raise EdgeMismatch(
                f"peers: {role!r:.80}: {addresses!r:.80} refused; roles: {', '.join(roles)}"
            )
        for number, address in addresses.items():
            if not (number.isascii() and number.isdecimal() and len(number) < 10):
                raise EdgeMismatch(f"peers: {role}:{number:.80} refused; allowed: a whole number")
            if not isinstance(address, str):
                raise EdgeMismatch(f"peers: {role}:{number}: {address!r:.80} is no address")
            found.setdefault(role, {})[int(number)] = address
    return found


@contextmanager
def said_by(name: str) -> Iterator[None]:
    """Name the peer in the error of what it says in this context.

    Raises:
        EdgeMismatch: with the name in front.
    """
    try:
        yield
    except EdgeMismatch as mismatch:
        raise EdgeMismatch(f"{name}: {mismatch}") from mismatch


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
    """A frame came damaged. A role that answers calls: send again what is not answered yet.
    Attention to the front: what followed the message that it names."""
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
    except (KeyError, ValueError, TypeError, OverflowError) as cause:
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


def result_of(
    said: Mapping[str, Any], arrays: Mapping[str, HostArray], rows: int, *, with_logits: bool
) -> BatchResult:
    """Return the result that ``result_parcel`` described, of a micro-batch that wants ``rows``.

    Shapes: ids (rows,) int32, logits (rows, vocab).

    Raises:
        EdgeMismatch: something is missing, or of another size.
    """
    try:
        reported = [
            None
            if entry is None
            else RowLogprobs(float(entry[0]), tuple((int(i), float(v)) for i, v in entry[1]))
            for entry in said["logprobs"]
        ]
        ids, logits = arrays["ids"], arrays["logits"] if with_logits else None
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as cause:
        raise EdgeMismatch(f"a result lacks {cause}") from cause
    fits = ids.shape == (rows,) == (len(reported),) and ids.dtype == np.int32
    if not fits or (rows and ids.min() < 0):
        raise EdgeMismatch(
            f"a result's ids {ids.dtype} {ids.shape} with {len(reported)} log-probabilities "
            f"refused; allowed: {rows} of each, ids int32 from 0"
        )
    if logits is not None and (logits.ndim != 2 or len(logits) != rows):
        raise EdgeMismatch(f"a result's logits {logits.shape} refused; allowed: ({rows}, vocab)")
    return BatchResult(ids, reported, logits)


def rows_only(tokens: int) -> BatchMeta:
    """Return the batch that a stage without a cache is planned for: so many rows, no sequences."""
    zeros = np.zeros(tokens, np.int32)
    none = np.zeros(0, np.int32)
    return BatchMeta(zeros, zeros - 1, np.zeros(1, np.int32), none, none.reshape(0, 0))
