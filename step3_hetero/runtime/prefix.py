"""What a sequence's full blocks hold, as a chain of digests over tokens and images."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from step3_hetero.model.image import ImageViews
from step3_hetero.runtime.blocks import BlockKey
from step3_hetero.runtime.sequence import SequenceState
from step3_hetero.specs import LOGICAL_BLOCK

ROOT = bytes(32)
"""In the place of the digest before the first block."""


def keys_of(sequence: SequenceState, blocks: int) -> Sequence[BlockKey]:
    """Return the keys of a sequence's first ``blocks`` blocks, all of them full.

    A content is the digest of the block before, 128 int32 tokens, and of each image with rows in
    the block its digest and which rows those are: keys and values depend on nothing else.
    """
    for number in range(len(sequence.keys), blocks):
        parent = sequence.keys[-1].digest if number else ROOT
        start = number * LOGICAL_BLOCK
        tokens = np.array(sequence.tokens[start : start + LOGICAL_BLOCK], np.int32)
        content = parent + tokens.tobytes() + _images_in(sequence, start, start + LOGICAL_BLOCK)
        sequence.keys.append(BlockKey(sha256(content).digest(), content))
    return sequence.keys[:blocks]


def _images_in(sequence: SequenceState, start: int, stop: int) -> bytes:
    """Return which image rows fall on tokens start..stop."""
    found = b""
    for number, image in enumerate(sequence.prompt.images):
        first, last = (bisect_left(image.positions, place) for place in (start, stop))
        if first < last:
            if number not in sequence.digests:
                sequence.digests[number] = pixels_digest(image.views)
            found += sequence.digests[number] + np.array([first, last], np.int64).tobytes()
    return found


def pixels_digest(views: ImageViews) -> bytes:
    """Return a digest of an image's prepared pixels and of how they are cut."""
    digest = sha256()
    for stack in (views.crops, views.view):
        digest.update(np.array([stack.ndim, *stack.shape], np.int64).tobytes())
        digest.update(np.ascontiguousarray(stack).tobytes())
    return digest.digest()
